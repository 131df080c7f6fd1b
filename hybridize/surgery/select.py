"""Which layers to convert: from a number and a ranking, or from a list of indices."""

from __future__ import annotations

from collections.abc import Sequence

from hybridize.checkpoint.scores import LayerScore, Scores
from hybridize.errors import InputError
from hybridize.surgery.teacher import Teacher


def parse_indices(text: str, flag: str = "--indices") -> list[int]:
    """`3,5-8` -> [3, 5, 6, 7, 8]; InputError that names `flag` on anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"{flag} {text!r} is not a list like 3,5-8")
        low, high = int(first), int(last or first)
        if high < low:
            raise InputError(f"{flag}: the range {part.strip()} runs backwards")
        found.extend(range(low, high + 1))
    if len(set(found)) != len(found):
        raise InputError(f"{flag} {text!r} names a layer twice")
    return sorted(found)


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
        raise InputError(f"--layers {layers}: the model has only {total} layers")
    if layers < done:
        raise InputError(f"--layers {layers}: {done} layers are Mamba already, and replace never turns one back")
    return layers - done


def lowest(teacher: Teacher, scores: Scores, count: int) -> list[int]:
    """The `count` attention layers with the lowest scores; ties go to the lower index."""
    if sorted(s.layer for s in scores.layers) != teacher.attention_layers:
        raise InputError("the scores do not cover exactly the attention layers of this checkpoint; score it again")
    return sorted(scores.ranking()[:count])


def astride(scores: Sequence[LayerScore], count: int) -> list[int]:
    """Layers that may well be on either side of a cut after the `count` lowest."""
    return sorted(s.layer for s in scores if s.ranks is not None and s.ranks[0] <= count < s.ranks[1])
