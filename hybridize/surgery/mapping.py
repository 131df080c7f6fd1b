"""The mapping of weights as data: each tensor of a new mixer is a list of row blocks, copied from a
teacher tensor or drawn by a rule.

The mapping is that of Mamba-in-Llama (2408.15237, section 3): v -> x, k -> B, q -> C, o ->
out_proj, with their biases; the norms of keys and queries become those of B and C. An attention
scale other than head_dim^-1/2 is folded into C. RoPE, windows, the softmax and its soft cap have no
counterpart in a mixer and are dropped.
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
    """Rows of a teacher's tensor: all, or `rows` rows starting at `begin`; multiplied by `scale`.
    offset: the constant that a norm adds to its weight, included in the scaling."""

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
        """Returns a description for people of the rows that make up `count` rows. head: see Rows."""
        rows = f"[{self.begin}:{self.begin + self.rows}]" if self.rows is not None else "" if head else f"[0:{count}]"
        spread = f", each {head} rows repeated to {count}" if head else ""
        return f"{self.name}{rows}{spread}" + ("" if self.scale == 1 else f", times {self.scale:g}")


@dataclass(frozen=True)
class Rows:
    """A block of `count` rows: those of `source`, or drawn by the mixer's rule if there is none.
    head: if set, each group of `head` source rows is repeated until there are `count`."""

    label: str
    count: int
    source: Source | None = None
    head: int | None = None


@dataclass(frozen=True)
class Target:
    """One tensor of the mixer: its full name, its shape, and the blocks of rows that are stacked to
    form it. fan_in: for the drawing rule, see modeling.initial."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Rows, ...]
    fan_in: int | None = None

    @property
    def parameter(self) -> str:
        return self.name.split(".mixer.")[1]

    def describe(self, fitted: bool = False) -> str:
        """Returns a one-line description for people of where each block of rows comes from. fitted:
        whether calibration may change it."""
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
    """Returns where the teacher has the rows of `part` (q, k, v or o), or None if it has no such
    tensor (a bias)."""
    base = f"model.layers.{layer}.self_attn."
    if f"{part}_proj.{what}" in teacher.tensors:
        return Source(f"{base}{part}_proj.{what}", scale=scale)
    if f"qkv_proj.{what}" not in teacher.tensors or part == "o":
        return None
    begin = {"q": 0, "k": teacher.inner, "v": teacher.inner + teacher.kv}[part]
    return Source(f"{base}qkv_proj.{what}", begin, teacher.inner if part == "q" else teacher.kv, scale)


def build(target: Target, source: Callable[[str], Tensor], seed: int, draw: Callable[..., Tensor] = initial) -> Tensor:
    """Returns the tensor that `target` describes, in the dtype of its sources, or float32 without
    any. Each drawn block is seeded by its own name.

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
    """Returns `value` in the dtype in which a checkpoint of `dtype` stores it: float32 for the
    parameters that a mixer keeps in float32."""
    return value.to(torch.float32 if target.parameter in FLOAT32 else dtype)
