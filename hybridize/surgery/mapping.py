"""Surgery as data: each tensor of a new mixer is a list of row blocks, copied from a teacher tensor or drawn by a rule.

The mapping is Mamba-in-Llama's (2408.15237, section 3): v -> x, k -> B, q -> C, o -> out_proj. RoPE and the softmax have no
counterpart in a mixer and end here; the attention scale is head_dim^-1/2 in every supported family and needs no folding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridize.errors import InputError
from hybridize.modeling import FLOAT32, MIXER_KEYS, initial
from hybridize.surgery.teacher import Teacher

DEFAULT_MIXER = "mamba2"


@dataclass(frozen=True)
class Rows:
    """`count` rows: those of tensor `source` (whole; or, where `head` is given, each `head` of them as often in a row as
    gives `count`), or drawn by the mixer's rule when there is no source."""

    label: str
    count: int
    source: str | None = None
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
        """One line for people: where each block of rows comes from. `fitted`: calibration will look at it."""
        begin, blocks = 0, []
        for part in self.parts:
            rows = f"{begin}:{begin + part.count}"
            spread = f", each {part.head} rows repeated to {part.count}" if part.head else f"[0:{part.count}]"
            origin = f"{part.source}{spread}" if part.source else f"init({self.seed_name(part)})"
            blocks.append(f"{part.label}[{rows}] = {origin}")
            begin += part.count
        return "; ".join(blocks) + (" (then calibrated)" if fitted else "")

    def seed_name(self, part: Rows) -> str:
        return f"{self.name}:{part.label}"


def mixer_shape(teacher: Teacher, kind: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The config's `mixer` entry. `asked` overrides the defaults: kernel 4; for `mamba` state 16, dt rank ceil(D / 16) as in
    the Mamba paper, expansion by head. InputError where it does not fit."""
    if kind not in MIXER_KEYS:
        raise InputError(f"--mixer {kind} is unknown; use {' or '.join(MIXER_KEYS)}")
    for key in asked:
        if key not in MIXER_KEYS[kind]:
            raise InputError(f"--{key.replace('_', '-')} has no use with --mixer {kind}")
    shape: dict[str, Any] = {"kind": kind, "d_inner": teacher.inner, "d_conv": 4} | dict(asked)
    if not 2 <= shape["d_conv"] <= 4:
        raise InputError(f"--d-conv {shape['d_conv']} is outside 2..4, which the kernels support")
    if kind == "mamba2":
        if shape.setdefault("d_state", teacher.head_dim) != teacher.head_dim:
            raise InputError(f"--d-state {shape['d_state']}: a mamba2 mixer's state size is the head size, {teacher.head_dim}")
        return shape
    rank = -(-teacher.hidden // 16)
    shape = {"d_state": min(16, teacher.head_dim), "dt_rank": rank, "expand": "head", **shape}
    if shape["d_state"] < 1 or teacher.head_dim % shape["d_state"]:
        raise InputError(f"--d-state {shape['d_state']} must divide the head dimension {teacher.head_dim}")
    if shape["expand"] not in ("head", "chunk"):
        raise InputError(f"--expand is head or chunk, not {shape['expand']}")
    if shape["dt_rank"] < 1:
        raise InputError(f"--dt-rank {shape['dt_rank']} must be positive")
    return shape


def plan_layer(teacher: Teacher, mixer: dict[str, Any], layer: int) -> list[Target]:
    """Every tensor of layer `layer`'s mixer, in the order they are written."""
    attention, base = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mixer"
    q, k, v, o = (f"{attention}.{name}_proj.weight" for name in "qkvo")
    inner, kv, taps = mixer["d_inner"], teacher.kv, mixer["d_conv"]
    out = Target(f"{base}.out_proj.weight", (teacher.hidden, inner), (Rows("o", teacher.hidden, o),))
    whole = (Rows("all", inner),)
    if mixer["kind"] == "mamba2":
        heads, head = teacher.heads, teacher.head_dim
        inputs = (
            Rows("z", inner), Rows("x", inner, v, head), Rows("B", inner, k, head), Rows("C", inner, q), Rows("dt", heads),
        )  # fmt: skip
        each, channels = (Rows("all", heads),), (Rows("all", 3 * inner),)
        return [
            Target(f"{base}.A_log", (heads,), each),
            Target(f"{base}.D", (heads,), each),
            Target(f"{base}.conv1d.bias", (3 * inner,), channels, fan_in=taps),
            Target(f"{base}.conv1d.weight", (3 * inner, 1, taps), channels),
            Target(f"{base}.dt_bias", (heads,), each),
            Target(f"{base}.in_proj.weight", (sum(part.count for part in inputs), teacher.hidden), inputs),
            Target(f"{base}.norm.weight", (inner,), whole),
            out,
        ]
    rank, states = mixer["dt_rank"], mixer["d_state"]
    inputs = (Rows("z", inner), Rows("x", kv, v), Rows("B", kv, k), Rows("C", inner, q), Rows("dt", rank))
    return [
        Target(f"{base}.A_log", (inner, states), whole),
        Target(f"{base}.D", (inner,), whole),
        Target(f"{base}.conv1d.bias", (inner,), whole, fan_in=taps),
        Target(f"{base}.conv1d.weight", (inner, 1, taps), whole),
        Target(f"{base}.dt_bias", (inner,), whole),
        Target(f"{base}.dt_proj.weight", (inner, rank), whole),
        Target(f"{base}.in_proj.weight", (sum(part.count for part in inputs), teacher.hidden), inputs),
        out,
    ]


def build(target: Target, source: Callable[[str], Tensor], seed: int) -> Tensor:
    """The tensor that `target` describes, in its sources' type, or float32 without any; each draw is seeded by its own name."""
    blocks = []
    for part in target.parts:
        if part.source is not None:
            rows = source(part.source)
            if part.head is not None:
                units = rows.unflatten(0, (-1, part.head))
                rows = units.repeat_interleave(part.count // len(rows), 0).flatten(0, 1)
            blocks.append(rows)
            continue
        name = hashlib.sha256(f"{seed}/{target.seed_name(part)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(name[:7], "big"))
        blocks.append(initial(target.parameter, (part.count, *target.shape[1:]), target.fan_in, generator))
    dtype = next((b.dtype for b, part in zip(blocks, target.parts, strict=True) if part.source), torch.float32)
    built = blocks[0] if len(blocks) == 1 else torch.cat([block.to(dtype) for block in blocks])
    assert tuple(built.shape) == target.shape, (target.name, built.shape)
    return built


def stored(target: Target, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in the type that a checkpoint of `dtype` keeps it in: float32 where the mixer insists."""
    return value.to(torch.float32 if target.parameter in FLOAT32 else dtype)
