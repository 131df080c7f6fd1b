"""hybridize score-restore"""

from __future__ import annotations

from hybridize.scoring.settings import RestoreSettings

from .shared import options as opt
from .shared.flags import expanded
from .shared.output import guarded
from .shared.scoring import Converting, Place, Text, request_of, run_scorer


@guarded
@expanded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    *,
    settings: RestoreSettings,
    text: Text,
    eval_data: opt.EvalData = None,
    mixers: Converting,
    place: Place,
    machine: opt.Machine,
    speech: opt.Speech,
) -> None:
    """Reads a checkpoint and traces; writes CHECKPOINT/scores/restore.json: what giving each
    attention layer back recovers.

    All remaining attention layers become Mamba layers and are aligned for a few steps; then one of
    them at a time is attention again, and the KL from the teacher that this takes away is its
    score. Higher means convert later.
    """
    from hybridize.scoring.restore import RestoreScorer

    request = request_of(
        checkpoint, text, place, machine, mask=settings.mask, seed=settings.seed, mixers=mixers, eval_data=eval_data
    )
    run_scorer(speech.output(), RestoreScorer(), request, settings)
