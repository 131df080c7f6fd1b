"""Every flag that more than one command has, once: same name, same meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Checkpoint = Annotated[str, typer.Argument(metavar="[CHECKPOINT]", help="A checkpoint directory or hub id.", show_default=True)]
Output = Annotated[Optional[Path], typer.Option("--output", "-o", help="Where to write; see above for what when omitted.")]
Teacher = Annotated[Optional[str], typer.Option("--teacher", help="The teacher [default: the one the checkpoint comes from].")]
Data = Annotated[
    Optional[str],
    typer.Option("--data", help="jsonl, parquet, txt or hub id [default: $HYBRIDIZE_DATA, ./traces.jsonl, the teacher's own]."),
]
EvalData = Annotated[Optional[str], typer.Option("--eval-data", help="Held-out data [default: the last rows of --data].")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Compute type: auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
Tasks = Annotated[str, typer.Option("--tasks", help="lm-eval tasks, separated by commas.")]
NumFewshot = Annotated[Optional[int], typer.Option("--num-fewshot", help="Worked examples in each prompt.")]
Limit = Annotated[Optional[int], typer.Option("--limit", help="Documents per task, or rows of data.")]
IncludePath = Annotated[Optional[str], typer.Option("--include-path", help="A folder with lm-eval tasks of your own.")]
ApplyChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", help="Wrap prompts in the chat template.")]
GenKwargs = Annotated[Optional[str], typer.Option("--gen-kwargs", help="Generation settings as lm-eval reads them: a=b,c=d.")]
EvalBatchSize = Annotated[int, typer.Option("--batch-size", help="Requests per forward.")]
ChatTemplate = Annotated[Optional[Path], typer.Option("--chat-template", help="A Jinja file in place of the tokenizer's template.")]
Mask = Annotated[str, typer.Option("--mask", help="assistant: learn its tokens; none: every token of one joined stream.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a checkpoint brings along.")]
Revision = Annotated[Optional[str], typer.Option("--revision", help="Branch, tag or commit of a hub id.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, in one step, when done.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")]
DState = Annotated[Optional[int], typer.Option("--d-state", help="State size of a mixer; divides the head size [default: 16].")]
DConv = Annotated[Optional[int], typer.Option("--d-conv", help="Taps of a mixer's convolution [default: 4].")]
DtRank = Annotated[Optional[int], typer.Option("--dt-rank", help="Rank of a mixer's step size [default: hidden size / 16].")]
Expand = Annotated[Optional[str], typer.Option("--expand", help="Key/value heads by head, or by chunk as in M1 [default: head].")]
