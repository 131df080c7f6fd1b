"""Selects the layers to convert, from a number and a ranking or from a list of indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridize.checkpoint.manifest import ancestors
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.checkpoint.scores import LayerScore, Scores, explain_no_scores, find_scores, read_scores
from hybridize.errors import InputError, setting
from hybridize.notes import SILENT, Notes
from hybridize.parsing import check_either, parse_indices
from hybridize.surgery.teacher import Teacher


@dataclass(frozen=True)
class Selection:
    """The user's selection of layers. Either `layers`, the total number of mixer layers, chosen by
    the ranking in `scores`; or `indices`, such as 3,5-8."""

    layers: int | None = None
    indices: str | None = None
    scores: Path | None = None

    def __post_init__(self) -> None:
        check_either("say which layers", f"{setting('layers')} N", self.layers, f"{setting('indices')} LIST", self.indices)
        if self.indices is not None and self.scores is not None:
            raise InputError(f"{setting('scores')} has no use with {setting('indices')}")


def choose_layers(
    source: CheckpointReader, name: str, teacher: Teacher, selection: Selection, notes: Notes = SILENT
) -> tuple[list[int], Scores | None]:
    """Returns the layers to convert, and the ranking that chose them, if one did. name: the
    checkpoint as the user named it. Raises InputError if there is no usable ranking or the
    selection does not fit."""
    if selection.indices is not None:
        return check_indices(teacher, parse_indices(selection.indices)), None
    assert selection.layers is not None
    count = needed(teacher, selection.layers)
    if not count:
        return [], None
    path = selection.scores or find_scores(source.path, name)
    if path is None:
        raise InputError(explain_no_scores(source.path, name))
    ranking, inherited = read_scores(path), False
    if ranking.checkpoint != source.hash:
        line = ancestors(source.path)
        if ranking.checkpoint not in line:
            raise InputError(f"{path} was measured on another checkpoint than {name}; score {name} first")
        inherited = True
        notes.warn(
            f"{path} was measured on {line[ranking.checkpoint]}, which {name} was made from: its scores do not show what has "
            "been converted and trained since"
        )
    notes.note(f"layers by {path} ({ranking.kind}, {ranking.metric})")
    try:
        chosen = lowest(teacher, ranking, count, inherited)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    # the cut as a place in the full ranking, which may include layers converted earlier
    cut = max(place for place, layer in enumerate(ranking.ranking(), 1) if layer in chosen)
    tied = [layer for layer in ambiguous_at_cut(ranking.layers, cut) if layer not in teacher.mixer_layers]
    if tied:
        names = ", ".join(map(str, tied))
        notes.warn(f"the choice of {count} layers is ambiguous: {names} could be on either side of the cut (90% of resamples)")
    return chosen, ranking


def check_indices(teacher: Teacher, indices: list[int]) -> list[int]:
    """Returns the indices sorted. Raises InputError for a layer that does not exist or is already a
    mixer."""
    for index in indices:
        if index >= len(teacher.layer_types):
            raise InputError(f"there is no layer {index}: the model has layers 0 to {len(teacher.layer_types) - 1}")
        if index in teacher.mixer_layers:
            raise InputError(f"layer {index} is already a Mamba layer")
    return sorted(indices)


def needed(teacher: Teacher, layers: int) -> int:
    """Returns how many layers must still be converted for the result to have `layers` mixer layers.
    Raises InputError if that is impossible."""
    total, done = len(teacher.layer_types), len(teacher.mixer_layers)
    if layers > total:
        raise InputError(f"{setting('layers')} {layers}: the model has only {total} layers")
    if layers < done:
        raise InputError(
            f"{setting('layers')} {layers}: {done} layers are already Mamba layers, and replace never converts one back"
        )
    return layers - done


def lowest(teacher: Teacher, scores: Scores, count: int, inherited: bool = False) -> list[int]:
    """Returns the `count` attention layers with the lowest scores; ties go to the lower index.

    inherited: the scores were measured on an ancestor and may include layers that have been
    converted since. Raises InputError if the scores do not cover the attention layers.
    """
    scored, wanted = {s.layer for s in scores.layers}, set(teacher.attention_layers)
    if scored != wanted and not (inherited and scored - wanted <= set(teacher.mixer_layers) and wanted <= scored):
        raise InputError("the scores do not cover exactly the attention layers of this checkpoint; score it again")
    return sorted([layer for layer in scores.ranking() if layer in wanted][:count])


def ambiguous_at_cut(scores: Sequence[LayerScore], count: int) -> list[int]:
    """Returns the layers whose rank interval contains the cut after the `count` lowest, so that
    they could be on either side of it."""
    return sorted(s.layer for s in scores if s.ranks is not None and s.ranks[0] <= count < s.ranks[1])
