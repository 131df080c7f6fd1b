"""Maps mixture-of-experts weights between disk, with separate tensors for each expert, and memory,
where transformers 5 stacks all experts of a layer in one tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Container

import torch
from torch import Tensor, nn

from hybridize.checkpoint.reader import CheckpointReader

_RENAMED = (".block_sparse_moe.", ".mlp.")  # Mixtral's blocks
_EXPERT = re.compile(r"(.*\.(?:block_sparse_moe|mlp)\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
# An expert's matrix -> the parameter that stacks it for all experts, and its place within one
# expert.
_PLACES = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
_PLACES |= {"gate_proj": _PLACES["w1"], "up_proj": _PLACES["w3"], "down_proj": _PLACES["w2"]}


def locate(name: str) -> tuple[str, tuple[int, int] | None]:
    """The parameter that a tensor on disk belongs to, and for a single expert's tensor (expert,
    place within that expert), else None."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return name.replace(*_RENAMED), None
    parameter, place = _PLACES[found[3]]
    return f"{found[1].replace(*_RENAMED)}.{parameter}", (int(found[2]), place)


def has_experts(model: nn.Module) -> bool:
    """Whether any layer is a mixture of experts, for which the host must read the tokens per
    expert."""
    return any(".experts." in name for name, _ in model.named_parameters())


def holds(reader: CheckpointReader, parameter: str) -> bool:
    """Whether the checkpoint has the parameter, under its own name or as separate tensors."""
    return parameter in reader or parameter in _stacked(reader)


def stored_shape(reader: CheckpointReader, parameter: str) -> tuple[int, ...] | None:
    """The shape that `read_parameter` gives; None if the checkpoint lacks the parameter, (-1,) if
    its parts do not fit together."""
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
    """A parameter as the model has it: as stored, or the experts' matrices stacked to
    [experts, ...]."""
    if parameter in reader:
        return reader.tensor(parameter)
    parts = _stacked(reader).get(parameter)
    if parts is None:
        return reader.tensor(parameter)  # raises the reader's error
    if None in parts:
        return reader.tensor(parts[None])
    experts, each = _extent(parts)
    return torch.stack([torch.cat([reader.tensor(parts[e, p]) for p in range(each)]) for e in range(experts)])


def as_on_disk(name: str, known: Container[str], value: Callable[[str], Tensor]) -> Tensor | None:
    """The model's value for the tensor `name` on disk, None if the model has no such parameter.
    known: names of the model's parameters; value: returns the parameter of a name."""
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
    """The number of experts, and of matrices per expert."""
    places = [place for place in parts if place is not None]
    return 1 + max(expert for expert, _ in places), 1 + max(part for _, part in places)


def _stacked(reader: CheckpointReader) -> dict[str, dict[tuple[int, int] | None, str]]:
    """The parameters that have other names on disk, each with these names by place; cached on the
    reader."""
    cached: dict[str, dict[tuple[int, int] | None, str]] | None = vars(reader).get("_experts")
    if cached is None:
        cached = vars(reader)["_experts"] = {}
        for name in reader.names:
            parameter, place = locate(name)
            if parameter != name:
                cached.setdefault(parameter, {})[place] = name
    return cached
