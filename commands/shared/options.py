"""Every flag that more than one command has, once: same name, same meaning. Those that go together
are one class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import Output as Speaking

if TYPE_CHECKING:
    from hybridize.surgery.replace import MixerSettings

Checkpoint = Annotated[str, typer.Argument(metavar="[CHECKPOINT]", help="A checkpoint directory or hub id.", show_default=True)]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where to write; see above for what when omitted.")]
Teacher = Annotated[str | None, typer.Option("--teacher", help="The teacher [default: the one the checkpoint comes from].")]
Data = Annotated[
    str | None,
    typer.Option("--data", help="jsonl, parquet, txt or hub id [default: $HYBRIDIZE_DATA, ./traces.jsonl, the teacher's own]."),
]
EvalData = Annotated[str | None, typer.Option("--eval-data", help="Held-out data [default: the last rows of --data].")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Compute type: auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Random seed.")]
IncludePath = Annotated[str | None, typer.Option("--include-path", help="A folder with lm-eval tasks of your own.")]
NumFewshot = Annotated[int | None, typer.Option("--num-fewshot", help="Worked examples in each prompt.")]
ApplyChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", help="Wrap prompts in the chat template.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Documents per task, or rows of data.")]
ChatTemplate = Annotated[
    Path | None, typer.Option("--chat-template", help="A Jinja file in place of the tokenizer's template.")
]
Mask = Annotated[
    str, typer.Option("--mask", help="assistant: compute the loss on assistant tokens; none: on every token of one stream.")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a checkpoint brings along.")]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of CHECKPOINT, where that is a hub id.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, in one step, when done.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")]
NoCalibrate = Annotated[bool, typer.Option("--no-calibrate", help="Start new mixers from attention weights alone.")]
CalibrationTokens = Annotated[int, typer.Option("--calibration-tokens", help="How much text to calibrate on.")]


@dataclass(frozen=True)
class Speech:
    """How a command speaks."""

    as_json: Json = False
    quiet: Quiet = False

    def output(self) -> Speaking:
        return Speaking(self.as_json, self.quiet)


@dataclass(frozen=True)
class Machine:
    """Where a model runs, and whether code that it brings along may."""

    device: Device = "auto"
    dtype: Dtype = "auto"
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True)
class NewMixers:
    """Kind and shape of new mixers. None: see surgery.replace.MixerSettings."""

    mixer: Annotated[str | None, typer.Option("--mixer", help="Kind of new mixers: mamba2 or mamba [default: mamba2].")] = None
    d_state: Annotated[
        int | None,
        typer.Option("--d-state", help="State size; divides the head size [default: 16; in mamba2 it is the head size]."),
    ] = None
    d_conv: Annotated[int | None, typer.Option("--d-conv", help="Taps of a mixer's convolution [default: 4].")] = None
    dt_rank: Annotated[
        int | None, typer.Option("--dt-rank", help="Rank of a mixer's step size [default: hidden size / 16].")
    ] = None
    expand: Annotated[
        str | None, typer.Option("--expand", help="Key/value heads by head, or by chunk as in M1 [default: head].")
    ] = None

    def settings(self) -> MixerSettings:
        from hybridize.surgery.replace import MixerSettings

        return MixerSettings(self.mixer, self.d_state, self.d_conv, self.dt_rank, self.expand)
