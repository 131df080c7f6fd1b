"""Flags that several commands have, defined once so that a name always has the same meaning. Flags
that belong together form a class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import Output as Speaking

if TYPE_CHECKING:
    from hybridize.surgery.replace import MixerSettings

Checkpoint = Annotated[str, typer.Argument(metavar="[CHECKPOINT]", help="A checkpoint directory or hub id.", show_default=True)]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where to write [default: see above].")]
Teacher = Annotated[
    str | None, typer.Option("--teacher", help="The teacher [default: the one that the checkpoint was made from].")
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="jsonl, parquet, txt or hub id [default: $HYBRIDIZE_DATA, ./traces.jsonl, the teacher's own]."),
]
EvalData = Annotated[str | None, typer.Option("--eval-data", help="Held-out data [default: the last rows of --data].")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Compute type: auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Random seed.")]
IncludePath = Annotated[str | None, typer.Option("--include-path", help="A folder with your own lm-eval tasks.")]
NumFewshot = Annotated[int | None, typer.Option("--num-fewshot", help="Few-shot examples in each prompt.")]
ApplyChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", help="Wrap prompts in the chat template.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Documents per task, or rows of data.")]
ChatTemplate = Annotated[
    Path | None, typer.Option("--chat-template", help="A Jinja file that replaces the tokenizer's chat template.")
]
Mask = Annotated[
    str, typer.Option("--mask", help="assistant: loss on assistant tokens; none: loss on every token of a concatenated stream.")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of CHECKPOINT, if it is a hub id.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output, atomically, when done.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")]
NoCalibrate = Annotated[bool, typer.Option("--no-calibrate", help="Initialize new mixers from attention weights alone.")]
CalibrationTokens = Annotated[int, typer.Option("--calibration-tokens", help="Number of tokens to calibrate on.")]


@dataclass(frozen=True)
class Speech:
    """Form of a command's output."""

    as_json: Json = False
    quiet: Quiet = False

    def output(self) -> Speaking:
        """The output with these settings."""
        return Speaking(self.as_json, self.quiet)


@dataclass(frozen=True)
class Machine:
    """Device and compute type of a model, and whether its own code may run."""

    device: Device = "auto"
    dtype: Dtype = "auto"
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True)
class NewMixers:
    """Kind and shape of new mixers. None: the default, see surgery.replace.MixerSettings."""

    mixer: Annotated[
        str | None, typer.Option("--mixer", help="Kind of new mixers: mamba2, mamba, or an extension's [default: mamba2].")
    ] = None
    d_state: Annotated[
        int | None,
        typer.Option("--d-state", help="State size; divides the head size [default: 16; in mamba2 it is the head size]."),
    ] = None
    d_conv: Annotated[int | None, typer.Option("--d-conv", help="Kernel size of a mixer's convolution [default: 4].")] = None
    dt_rank: Annotated[
        int | None, typer.Option("--dt-rank", help="Rank of a mixer's step size [default: hidden size / 16].")
    ] = None
    expand: Annotated[
        str | None, typer.Option("--expand", help="Repeat KV heads by head, or by chunk as in M1 [default: head].")
    ] = None

    def settings(self) -> MixerSettings:
        """The flags as settings of the library."""
        from hybridize.surgery.replace import MixerSettings

        return MixerSettings(self.mixer, self.d_state, self.d_conv, self.dt_rank, self.expand)
