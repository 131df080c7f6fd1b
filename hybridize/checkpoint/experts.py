"""Mixtures of experts lie on the disk expert by expert, and in memory, since transformers 5, as one
tensor for all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Container

import torch
from torch import Tensor, nn

from hybridize.checkpoint.reader import CheckpointReader

_RENAMED = (".block_sparse_moe.", ".mlp.")  # Mixtral's blocks
_EXPERT = re.compile(r"(.*\.(?:block_sparse_moe|mlp)\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
# an expert's matrix -> the tensor of all experts that holds it, and its place among what that
# stacks of each
_PLACES = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
_PLACES |= {"gate_proj": _PLACES["w1"], "up_proj": _PLACES["w3"], "down_proj": _PLACES["w2"]}


def locate(name: str) -> tuple[str, tuple[int, int] | None]:
    """The parameter that a tensor on the disk belongs to, and, where it is one expert's, (expert,
    place within that expert)."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return name.replace(*_RENAMED), None
    parameter, place = _PLACES[found[3]]
    return f"{found[1].replace(*_RENAMED)}.{parameter}", (int(found[2]), place)


def has_experts(model: nn.Module) -> bool:
    """Whether any layer is a mixture of experts, whose tokens are counted on the host."""
    return any(".experts." in name for name, _ in model.named_parameters())


def holds(reader: CheckpointReader, parameter: str) -> bool:
    return parameter in reader or parameter in _stacked(reader)


def stored_shape(reader: CheckpointReader, parameter: str) -> tuple[int, ...] | None:
    """The shape that `read_parameter` gives, or None where there is nothing of it; (-1,) where its
    parts do not fit."""
    if parameter in reader:
        return reader.shape(parameter)
    parts = _stacked(reader).get(parameter)
    if parts is None:
        return None
    if None in parts:
        return reader.shape(parts[None])
    shapes = {reader.shape(name) for name in parts.values()}
    experts, each = _extent(parts)
    if len(shapes) != 1 or len(parts) != experts * each or len(shape := shapes.pop()) != 2:
        return (-1,)
    return experts, each * shape[0], shape[1]


def read_parameter(reader: CheckpointReader, parameter: str) -> Tensor:
    """A parameter as the model has it: as it lies there, or stacked [experts, ...] of its experts'
    matrices."""
    if parameter in reader:
        return reader.tensor(parameter)
    parts = _stacked(reader).get(parameter)
    if parts is None:
        return reader.tensor(parameter)  # whose absence is the reader's to explain
    if None in parts:
        return reader.tensor(parts[None])
    experts, each = _extent(parts)
    return torch.stack([torch.cat([reader.tensor(parts[e, p]) for p in range(each)]) for e in range(experts)])


def as_on_disk(name: str, known: Container[str], value: Callable[[str], Tensor]) -> Tensor | None:
    """What a tensor on the disk has become in a model with the parameters `known`, whose value
    `value` gives; None where the model keeps no such thing."""
    if name in known:
        return value(name)
    parameter, place = locate(name)
    if parameter not in known:
        return None
    found = value(parameter)
    if place is None:
        return found
    of_expert = found[place[0]]
    return of_expert.chunk(2)[place[1]] if parameter.endswith("gate_up_proj") else of_expert


def _extent(parts: dict[tuple[int, int] | None, str]) -> tuple[int, int]:
    """How many experts, and how many matrices of each."""
    places = [place for place in parts if place is not None]
    return 1 + max(expert for expert, _ in places), 1 + max(part for _, part in places)


def _stacked(reader: CheckpointReader) -> dict[str, dict[tuple[int, int] | None, str]]:
    """Parameters that the disk has under other names, and those names by place; kept with the
    reader."""
    kept: dict[str, dict[tuple[int, int] | None, str]] | None = vars(reader).get("_experts")
    if kept is None:
        kept = vars(reader)["_experts"] = {}
        for name in reader.names:
            parameter, place = locate(name)
            if parameter != name:
                kept.setdefault(parameter, {})[place] = name
    return kept
