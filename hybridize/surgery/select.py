"""Which layers to convert: from a number and a ranking, or from a list of indices."""

from __future__ import annotations

from collections.abc import Sequence

from hybridize.checkpoint.scores import LayerScore, Scores
from hybridize.errors import InputError, setting
from hybridize.surgery.teacher import Teacher


def check_indices(teacher: Teacher, indices: list[int]) -> list[int]:
    for index in indices:
        if index >= len(teacher.layer_types):
            raise InputError(f"there is no layer {index}: the model has layers 0 to {len(teacher.layer_types) - 1}")
        if index in teacher.mixer_layers:
            raise InputError(f"layer {index} is a Mamba layer already")
    return sorted(indices)


def needed(teacher: Teacher, layers: int) -> int:
    """How many layers are still to be converted so that the result has `layers` Mamba layers."""
    total, done = len(teacher.layer_types), len(teacher.mixer_layers)
    if layers > total:
        raise InputError(f"{setting('layers')} {layers}: the model has only {total} layers")
    if layers < done:
        raise InputError(f"{setting('layers')} {layers}: {done} layers are Mamba already, and replace never turns one back")
    return layers - done


def lowest(teacher: Teacher, scores: Scores, count: int, inherited: bool = False) -> list[int]:
    """The `count` attention layers with the lowest scores; ties go to the lower index.

    inherited: the scores are an ancestor's, and may also cover layers that have become Mamba layers
    since. InputError where they do not cover the attention layers.
    """
    scored, wanted = {s.layer for s in scores.layers}, set(teacher.attention_layers)
    if scored != wanted and not (inherited and scored - wanted <= set(teacher.mixer_layers) and wanted <= scored):
        raise InputError("the scores do not cover exactly the attention layers of this checkpoint; score it again")
    return sorted([layer for layer in scores.ranking() if layer in wanted][:count])


def astride(scores: Sequence[LayerScore], count: int) -> list[int]:
    """Layers that may well be on either side of a cut after the `count` lowest."""
    return sorted(s.layer for s in scores if s.ranks is not None and s.ranks[0] <= count < s.ranks[1])
