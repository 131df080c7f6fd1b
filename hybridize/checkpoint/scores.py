"""Score files: the importance of each attention layer, bound by content hash to the checkpoint that
was scored."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybridize.checkpoint.atomic import write_json_atomic
from hybridize.checkpoint.json_files import read_json
from hybridize.checkpoint.manifest import ancestors, hidden
from hybridize.errors import InputError, setting

PREFERRED = ("mmr", "restore", "loo")  # the order in which `replace` looks for them; other kinds follow by name
FORMAT = 1


@dataclass(frozen=True)
class LayerScore:
    """The score of one layer. score: higher means convert later. stderr: its standard error, None
    if unknown. ranks: the 90% interval of the layer's rank, from 1, over resamples of the
    measurements, None if unknown."""

    layer: int
    score: float
    stderr: float | None = None
    ranks: tuple[int, int] | None = None


@dataclass(frozen=True)
class Scores:
    """One ranking. checkpoint: content hash of the checkpoint that was scored; seconds: duration of
    the scoring."""

    kind: str
    checkpoint: str
    mixer: str | None
    init: str | None
    metric: str
    settings: dict[str, Any]
    seconds: float
    layers: list[LayerScore]

    def write(self, path: Path) -> None:
        write_json_atomic(path, {"format": FORMAT, **asdict(self), "settings": hidden(self.settings)})

    def ranking(self) -> list[int]:
        """Layers, least important first; equal scores by lower index."""
        return [s.layer for s in sorted(self.layers, key=lambda s: (s.score, s.layer))]


def read_scores(path: Path) -> Scores:
    """The scores in a file. InputError naming the file if it is not a score file, or a layer's
    score is missing, duplicate or not finite."""
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise InputError(f"{path} is not a score file of format {FORMAT}")
    fields: dict[str, Any] = {key: found.get(key) for key in Scores.__dataclass_fields__}
    try:
        layers = [
            LayerScore(int(s["layer"]), float(s["score"]), _number(s.get("stderr")), _pair(s.get("ranks")))
            for s in fields.pop("layers")
        ]
        scores = Scores(**fields, layers=layers)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is not a score file: {error}") from error
    for score in layers:
        if not math.isfinite(score.score):
            raise InputError(f"{path}: the score of layer {score.layer} is {score.score}")
    if len({s.layer for s in layers}) != len(layers):
        raise InputError(f"{path} scores a layer twice")
    if not isinstance(scores.checkpoint, str) or not isinstance(scores.kind, str):
        raise InputError(f"{path} does not name its kind of score and the checkpoint that was scored")
    return scores


def _number(found: Any) -> float | None:
    return None if found is None else float(found)


def _pair(found: Any) -> tuple[int, int] | None:
    if found is None:
        return None
    first, last = map(int, found)
    return first, last


def beside(checkpoint: Path, name: str, folder: str) -> Path:
    """CHECKPOINT/FOLDER, or ./FOLDER/NAME if the checkpoint is a hub id or read-only."""
    if Path(name).is_dir() and os.access(checkpoint, os.W_OK):
        return checkpoint / folder
    return Path(folder) / name.strip("/").replace("/", "--")


def scores_path(checkpoint: Path, name: str, kind: str) -> Path:
    return beside(checkpoint, name, "scores") / f"{kind}.json"


def score_files(checkpoint: Path, name: str) -> list[Path]:
    """The score files of a checkpoint, in the order of `replace`'s preference."""
    found = [path for path in beside(checkpoint, name, "scores").glob("*.json") if path.is_file()]
    places = {kind: place for place, kind in enumerate(PREFERRED)}
    return sorted(found, key=lambda path: (places.get(path.stem, len(places)), path.stem))


def find_scores(checkpoint: Path, name: str) -> Path | None:
    """The score file that `replace` would use."""
    return next(iter(score_files(checkpoint, name)), None)


def explain_no_scores(path: Path, name: str) -> str:
    """The error message for a checkpoint without scores; it names scores of an ancestor, if any."""
    what = f"{name} has no scores; run score-loo, score-mmr or score-restore first, or name layers with {setting('indices')}"
    for place in ancestors(path).values():
        found = find_scores(Path(place), place)
        if found is not None:
            return f"{what}; {setting('scores')} {found} uses the scores of {place}, from which it was made"
    return what
