"""Surgery as data: each tensor of a new mixer is a list of row blocks, copied from a teacher tensor
or drawn by a rule.

The mapping is Mamba-in-Llama's (2408.15237, section 3): v -> x, k -> B, q -> C, o -> out_proj,
their biases with them, and the normalisation of keys and queries as that of B and C. An attention
scale other than head_dim^-1/2 is folded into C. RoPE, windows, the softmax and its soft cap have no
counterpart in a mixer and end here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridize.modeling import FLOAT32, initial
from hybridize.surgery.teacher import Teacher


@dataclass(frozen=True)
class Source:
    """Rows of a teacher's tensor, all of them or `rows` from `begin` on; times `scale`, as a norm's
    weight beside `offset`."""

    name: str
    begin: int = 0
    rows: int | None = None
    scale: float = 1.0
    offset: float = 0.0

    def read(self, tensor: Callable[[str], Tensor]) -> Tensor:
        found = tensor(self.name)
        if self.rows is not None:
            found = found[self.begin : self.begin + self.rows]
        if self.scale == 1:
            return found
        return ((found.float() + self.offset) * self.scale - self.offset).to(found.dtype)

    def describe(self, count: int, head: int | None) -> str:
        """For people: which rows make `count` of them."""
        rows = f"[{self.begin}:{self.begin + self.rows}]" if self.rows is not None else "" if head else f"[0:{count}]"
        spread = f", each {head} rows repeated to {count}" if head else ""
        return f"{self.name}{rows}{spread}" + ("" if self.scale == 1 else f", times {self.scale:g}")


@dataclass(frozen=True)
class Rows:
    """`count` rows: those of `source` (whole; or, where `head` is given, each `head` of them as
    often in a row as gives `count`), or drawn by the mixer's rule when there is no source."""

    label: str
    count: int
    source: Source | None = None
    head: int | None = None


@dataclass(frozen=True)
class Target:
    """One tensor of the mixer: its full name, shape, and the blocks of rows it is stacked from."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Rows, ...]
    fan_in: int | None = None

    @property
    def parameter(self) -> str:
        return self.name.split(".mixer.")[1]

    def describe(self, fitted: bool = False) -> str:
        """One line for people: where each block of rows comes from. `fitted`: calibration will look
        at it."""
        begin, blocks = 0, []
        for part in self.parts:
            rows = f"{begin}:{begin + part.count}"
            origin = part.source.describe(part.count, part.head) if part.source else f"init({self.seed_name(part)})"
            blocks.append(f"{part.label}[{rows}] = {origin}")
            begin += part.count
        return "; ".join(blocks) + (" (then calibrated)" if fitted else "")

    def seed_name(self, part: Rows) -> str:
        return f"{self.name}:{part.label}"


def source_of(teacher: Teacher, layer: int, part: str, what: str = "weight", scale: float = 1.0) -> Source | None:
    """Where the rows of `part`, one of q k v o, are in the teacher; None where it has no such
    tensor (a bias)."""
    base = f"model.layers.{layer}.self_attn."
    if f"{part}_proj.{what}" in teacher.tensors:
        return Source(f"{base}{part}_proj.{what}", scale=scale)
    if f"qkv_proj.{what}" not in teacher.tensors or part == "o":
        return None
    begin = {"q": 0, "k": teacher.inner, "v": teacher.inner + teacher.kv}[part]
    return Source(f"{base}qkv_proj.{what}", begin, teacher.inner if part == "q" else teacher.kv, scale)


def build(target: Target, source: Callable[[str], Tensor], seed: int, draw: Callable[..., Tensor] = initial) -> Tensor:
    """The tensor that `target` describes, in its sources' type, or float32 without any; each draw
    is seeded by its own name.

    draw: the rule for rows without a source, see modeling.initial.
    """
    blocks = []
    for part in target.parts:
        if part.source is not None:
            rows = part.source.read(source)
            if part.head is not None:
                units = rows.unflatten(0, (-1, part.head))
                rows = units.repeat_interleave(part.count // len(rows), 0).flatten(0, 1)
            blocks.append(rows)
            continue
        name = hashlib.sha256(f"{seed}/{target.seed_name(part)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(name[:7], "big"))
        blocks.append(draw(target.parameter, (part.count, *target.shape[1:]), target.fan_in, generator))
    dtype = next((b.dtype for b, part in zip(blocks, target.parts, strict=True) if part.source), torch.float32)
    built = blocks[0] if len(blocks) == 1 else torch.cat([block.to(dtype) for block in blocks])
    assert tuple(built.shape) == target.shape, (target.name, built.shape)
    return built


def stored(target: Target, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in the type that a checkpoint of `dtype` keeps it in: float32 where the mixer
    insists."""
    return value.to(torch.float32 if target.parameter in FLOAT32 else dtype)
