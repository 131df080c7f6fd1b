"""What the scoring commands share: where scores go, and the table with a bar per layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .models import open_checkpoint
from .output import Output

if TYPE_CHECKING:
    from hybridize.checkpoint.reader import CheckpointReader
    from hybridize.checkpoint.scores import LayerScore

BAR = 30


def check_score_output(
    name: str, revision: str | None, output: Path | None, kind: str, overwrite: bool
) -> tuple[CheckpointReader, Path]:
    """The checkpoint, and the file its scores go to; InputError when that is there already or nothing is left to score."""
    from hybridize.checkpoint.scores import scores_path
    from hybridize.checkpoint.writer import check_writable
    from hybridize.errors import InputError
    from hybridize.surgery.teacher import read_teacher

    source = open_checkpoint(name, revision)
    if not read_teacher(source).attention_layers:
        raise InputError(f"{name} has no attention layer left to score")
    path = output or scores_path(source.path, name, kind)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; give another -o or --overwrite")
    if path.is_dir():
        raise InputError(f"{path} is a directory; scores go to a file")
    check_writable(path)
    return source, path


def report_scores(
    out: Output,
    source: CheckpointReader,
    path: Path,
    kind: str,
    label: str,
    mixer: str | None,
    init: str | None,
    found: list[LayerScore],
    made: dict[str, Any],
) -> None:
    """Writes the score file and shows the ranking, least important first."""
    from dataclasses import asdict

    from hybridize.checkpoint.scores import Scores

    scores = Scores(kind, source.hash, mixer, init, made["metric"], made["settings"], made["seconds"], found)
    scores.write(path)

    def human() -> None:
        by_layer = {s.layer: s for s in found}
        low, high = min(s.score for s in found), max(s.score for s in found)
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

    out.result({"scores": str(path), "ranking": scores.ranking(), "layers": [asdict(s) for s in found]}, human)
