"""Shared by the scoring commands: their flags, running a scorer, and the table of the ranking."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridize.options import CALIBRATION_TOKENS

from . import options as opt
from .flags import expanded
from .output import Output, guarded

if TYPE_CHECKING:
    from hybridize.checkpoint.scores import Scores
    from hybridize.scoring.scorer import Scorer
    from hybridize.scoring.setup import Request

BAR = 30


@dataclass(frozen=True)
class Text:
    """Data and teacher for scoring."""

    data: opt.Data = None
    teacher: opt.Teacher = None
    chat_template: opt.ChatTemplate = None
    limit: opt.Limit = None


@dataclass(frozen=True)
class Converting(opt.NewMixers):
    """Shape and initialization of the candidates' new mixers."""

    no_calibrate: opt.NoCalibrate = False
    calibration_tokens: opt.CalibrationTokens = CALIBRATION_TOKENS


@dataclass(frozen=True)
class Place:
    """Revision that is scored, and where the scores are written."""

    output: opt.Output = None
    revision: opt.Revision = None
    overwrite: opt.Overwrite = False


def request_of(
    checkpoint: str, text: Text, place: Place, machine: opt.Machine, *, mask: str, seed: int,
    mixers: Converting | None = None, eval_data: str | None = None, replace: bool = False,
) -> Request:  # fmt: skip
    """The request to a scorer, from the flags. replace: existing scores may be replaced, even
    without --overwrite."""
    from hybridize.scoring.setup import Request

    made = mixers or Converting()
    return Request(
        checkpoint, text.teacher, text.data, eval_data, mask, text.chat_template, text.limit, made.settings(),
        not made.no_calibrate, made.calibration_tokens, seed, place.output, machine.device, machine.dtype,
        machine.trust_remote_code, place.revision, place.overwrite or replace,
    )  # fmt: skip


def run_scorer(out: Output, scorer: Scorer, request: Request, settings: Any) -> None:
    """Scores, writes the score file and shows the ranking."""
    from hybridize.scoring.setup import Setup

    setup, began = Setup(request, scorer.kind, out, scorer.trains), time.time()
    with scorer.ranked(setup, settings) as found:
        if not setup.ranks.main:
            return
        if found is None:
            out.note(f"{setup.path} already is the result of this run")
            out.result({"output": str(setup.path), "already": True})
            return
        scores = setup.write(found, time.time() - began)
        out.result(
            {"scores": str(setup.path), "ranking": scores.ranking(), "layers": [asdict(s) for s in scores.layers]},
            lambda: _show(out, setup.path, found.label, scores),
        )


def _show(out: Output, path: Path, label: str, scores: Scores) -> None:
    """Shows the ranking, with the least important layer first."""
    by_layer = {score.layer: score for score in scores.layers}
    low, high = (pick(score.score for score in scores.layers) for pick in (min, max))
    rows = []
    for rank, layer in enumerate(scores.ranking(), start=1):
        score = by_layer[layer]
        share = (score.score - low) / (high - low) if high > low else 0.0
        spread = "" if score.stderr is None else f"{score.stderr:.5f}"
        could = "" if score.ranks is None else f"{score.ranks[0]}-{score.ranks[1]}"
        bar = ("#" * max(1, round(BAR * share))).ljust(BAR)
        rows.append([str(layer), str(rank), could, f"{score.score:.5f}", spread, bar])
    columns = ["layer", "rank", "could be", "score", "stderr", ""]
    out.table(f"{path}: {label} (lower: convert first; could be: in 90% of resamples)", columns, rows)


def command_of(scorer: Scorer) -> Callable[..., None]:
    """The command of a scorer that an extension has registered: its settings as flags, and the
    flags that all scorers have."""

    def command(
        checkpoint: opt.Checkpoint = "./teacher",
        *,
        settings: Any,
        text: Text,
        mixers: Converting,
        place: Place,
        machine: opt.Machine,
        speech: opt.Speech,
    ) -> None:
        mask, seed = getattr(settings, "mask", "assistant"), getattr(settings, "seed", 0)
        request = request_of(checkpoint, text, place, machine, mask=mask, seed=seed, mixers=mixers)
        run_scorer(speech.output(), scorer, request, settings)

    command.__annotations__["settings"] = scorer.settings
    command.__doc__ = f"""Reads a checkpoint; writes CHECKPOINT/scores/{scorer.kind}.json. {scorer.summary}

    Higher means convert later.
    """
    return guarded(expanded(command))
