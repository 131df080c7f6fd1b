"""hybridize score-loo"""

from __future__ import annotations

from hybridize.scoring.settings import LooSettings

from .shared import options as opt
from .shared.flags import expanded
from .shared.output import guarded
from .shared.scoring import Place, Text, request_of, run_scorer


@guarded
@expanded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    *,
    settings: LooSettings,
    text: Text,
    mask: opt.Mask = "assistant",
    place: Place,
    machine: opt.Machine,
    seed: opt.Seed = 0,
    speech: opt.Speech,
) -> None:
    """Reads a checkpoint; writes CHECKPOINT/scores/loo.json: the cost of removing each attention
    layer alone.

    Higher means convert later. With --metric accuracy or margin the cost is the drop on lm-eval
    tasks, with kl the increase of the KL divergence from the teacher on data.
    """
    from hybridize.scoring.loo import LooScorer

    request = request_of(checkpoint, text, place, machine, mask=mask, seed=seed)
    run_scorer(speech.output(), LooScorer(), request, settings)
