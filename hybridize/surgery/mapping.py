"""Surgery as data: each tensor of a new mixer is a list of row blocks, copied from a teacher tensor or drawn by a rule.

The mapping is Mamba-in-Llama's (2408.15237, section 3): v -> x, k -> B, q -> C, o -> out_proj. RoPE and the softmax have no
counterpart in a mixer and end here; the attention scale is head_dim^-1/2 in every supported family and needs no folding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridize.errors import InputError
from hybridize.modeling import FLOAT32, initial
from hybridize.surgery.teacher import Teacher


@dataclass(frozen=True)
class Rows:
    """`count` rows: those of tensor `source` (whole), or drawn by the mixer's rule when it is None."""

    label: str
    count: int
    source: str | None = None


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

    def describe(self) -> str:
        """One line for people: where each block of rows comes from."""
        begin, blocks = 0, []
        for part in self.parts:
            rows = f"{begin}:{begin + part.count}"
            origin = f"{part.source}[0:{part.count}]" if part.source else f"init({self.seed_name(part)})"
            blocks.append(f"{part.label}[{rows}] = {origin}")
            begin += part.count
        return "; ".join(blocks)

    def seed_name(self, part: Rows) -> str:
        return f"{self.name}:{part.label}"


def mixer_shape(teacher: Teacher, *, d_state: int, d_conv: int, dt_rank: int | None, expand: str) -> dict[str, Any]:
    """The config's `mixer` entry. dt_rank None is the Mamba paper's ceil(D / 16). InputError where it does not fit."""
    if d_state < 1 or teacher.head_dim % d_state:
        raise InputError(f"--d-state {d_state} must divide the head dimension {teacher.head_dim}")
    if expand not in ("head", "chunk"):
        raise InputError(f"--expand is head or chunk, not {expand}")
    if not 2 <= d_conv <= 4:
        raise InputError(f"--d-conv {d_conv} is outside 2..4, which the kernels support")
    rank = -(-teacher.hidden // 16) if dt_rank is None else dt_rank
    if rank < 1:
        raise InputError(f"--dt-rank {rank} must be positive")
    return {
        "kind": "mamba", "d_inner": teacher.inner, "d_state": d_state, "d_conv": d_conv, "dt_rank": rank, "expand": expand,
    }  # fmt: skip


def plan_layer(teacher: Teacher, mixer: dict[str, Any], layer: int) -> list[Target]:
    """Every tensor of layer `layer`'s mixer, in the order they are written."""
    attention, base = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mixer"
    inner, kv, rank, states = mixer["d_inner"], teacher.kv, mixer["dt_rank"], mixer["d_state"]
    inputs = (
        Rows("z", inner), Rows("x", kv, f"{attention}.v_proj.weight"), Rows("B", kv, f"{attention}.k_proj.weight"),
        Rows("C", inner, f"{attention}.q_proj.weight"), Rows("dt", rank),
    )  # fmt: skip
    whole = (Rows("all", inner),)
    return [
        Target(f"{base}.A_log", (inner, states), whole),
        Target(f"{base}.D", (inner,), whole),
        Target(f"{base}.conv1d.bias", (inner,), whole, fan_in=mixer["d_conv"]),
        Target(f"{base}.conv1d.weight", (inner, 1, mixer["d_conv"]), whole),
        Target(f"{base}.dt_bias", (inner,), whole),
        Target(f"{base}.dt_proj.weight", (inner, rank), whole),
        Target(f"{base}.in_proj.weight", (sum(part.count for part in inputs), teacher.hidden), inputs),
        Target(f"{base}.out_proj.weight", (teacher.hidden, inner), (Rows("o", teacher.hidden, f"{attention}.o_proj.weight"),)),
    ]


def build(target: Target, source: Callable[[str], Tensor], dtype: torch.dtype, seed: int) -> Tensor:
    """The tensor that `target` describes, in `dtype` (float32 where the mixer keeps it); each draw seeded by its own name."""
    kind = torch.float32 if target.parameter in FLOAT32 else dtype
    blocks = []
    for part in target.parts:
        if part.source is not None:
            blocks.append(source(part.source).to(kind))
            continue
        name = hashlib.sha256(f"{seed}/{target.seed_name(part)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(name[:7], "big"))
        blocks.append(initial(target.parameter, (part.count, *target.shape[1:]), target.fan_in, generator).to(kind))
    built = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    assert tuple(built.shape) == target.shape, (target.name, built.shape)
    return built
