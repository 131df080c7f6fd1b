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
    """Reads a checkpoint and traces; writes CHECKPOINT/scores/restore.json: what restoring each
    attention layer recovers.

    All remaining attention layers are replaced by Mamba layers and aligned for a few steps. Then
    one at a time is restored to attention; its score is the decrease of the KL divergence from the
    teacher. Higher means convert later.
    """
    from hybridize.scoring.restore import RestoreScorer

    request = request_of(
        checkpoint, text, place, machine, mask=settings.mask, seed=settings.seed, mixers=mixers, eval_data=eval_data
    )
    run_scorer(speech.output(), RestoreScorer(), request, settings)
