"""hybridize score-mmr"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybridize.scoring.settings import MmrSettings

from .shared import options as opt
from .shared.flags import expanded
from .shared.output import Output, guarded
from .shared.scoring import Converting, Place, Text, request_of, run_scorer

if TYPE_CHECKING:
    from hybridize.scoring.setup import Request


@guarded
@expanded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    *,
    settings: MmrSettings,
    text: Text,
    mixers: Converting,
    max_memory: Annotated[
        float | None, typer.Option("--max-memory", help="Memory limit in GiB [default: 80% of the free memory].")
    ] = None,
    place: Place,
    machine: opt.Machine,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an unfinished run beside the scores, if there is one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the memory that the run needs; do nothing.")] = False,
    speech: opt.Speech,
) -> None:
    """Reads a checkpoint and traces; writes CHECKPOINT/scores/mmr.json: how badly each attention
    layer converts.

    Each remaining attention layer is replaced alone by a Mamba layer and trained for a few steps on
    the same batches; its score is the remaining loss (MIL-Mamba-Replacement). Higher means convert
    later. All candidates train side by side; under torchrun they are divided among the processes.
    """
    out = speech.output()
    if not dry_run:
        _check_unfinished(checkpoint, place, settings, resume)
    from hybridize.distillation.losses import Loss
    from hybridize.errors import InputError, setting
    from hybridize.scoring.mmr import MmrScorer

    if max_memory is not None and not 0 < max_memory < math.inf:
        raise InputError(f"{setting('max_memory')} {max_memory} must be a positive number of GiB")
    Loss.parse(settings.loss)
    request = request_of(
        checkpoint, text, place, machine, mask=settings.mask, seed=settings.seed, mixers=mixers, replace=resume
    )
    if dry_run:
        _show_memory(out, request, settings, max_memory)
    else:
        run_scorer(out, MmrScorer(resume, place.overwrite, max_memory), request, settings)


def _check_unfinished(checkpoint: str, place: Place, settings: MmrSettings, resume: bool) -> None:
    """InputError if an unfinished run blocks the output; runs before heavy imports."""
    from hybridize.checkpoint.scores import scores_path
    from hybridize.checkpoint.unfinished import check_unfinished, run_path

    target = place.output or scores_path(Path(checkpoint), checkpoint, "mmr")
    if not target.exists():
        check_unfinished(run_path(target), {"settings": asdict(settings)}, resume, place.overwrite)


def _show_memory(out: Output, request: Request, settings: MmrSettings, max_memory: float | None) -> None:
    """Shows the memory that all candidates need when they train side by side."""
    from hybridize.distillation.plan import GIB
    from hybridize.errors import with_settings
    from hybridize.runtime.device import planned_on
    from hybridize.runtime.distributed import world_size
    from hybridize.scoring.mmr_memory import memory_plan
    from hybridize.scoring.setup import Setup

    from .shared.output import flag_of

    setup = Setup(request, "mmr", out, training=True)
    where, compute = planned_on(request.device, request.dtype)
    planned = memory_plan(setup.source, setup.origin, setup.shape, settings, where, compute, world_size(), max_memory)

    def human() -> None:
        for name, size in {**planned.parts, "together": planned.total}.items():
            print(f"{name:42} {size / GIB:9.2f} GiB")
        print(with_settings(str(planned), flag_of))

    gib = {name: round(size / GIB, 3) for name, size in planned.parts.items()}
    limit = None if math.isinf(planned.limit) else round(planned.limit / GIB, 3)
    out.result({"gib": gib, "total_gib": round(planned.total / GIB, 3), "max_gib": limit}, human)
