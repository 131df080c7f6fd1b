"""Surgery as data: each tensor of a new mixer is a list of row blocks, copied from a teacher tensor or drawn by a rule.

The mapping is Mamba-in-Llama's (2408.15237, section 3): v -> x, k -> B, q -> C, o -> out_proj, their biases with them, and the
normalisation of keys and queries as that of B and C. An attention scale other than head_dim^-1/2 is folded into C. RoPE,
windows, the softmax and its soft cap have no counterpart in a mixer and end here.
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
class Source:
    """Rows of a teacher's tensor, all of them or `rows` from `begin` on; times `scale`, as a norm's weight beside `offset`."""

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
    """`count` rows: those of `source` (whole; or, where `head` is given, each `head` of them as often in a row as gives
    `count`), or drawn by the mixer's rule when there is no source."""

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
        """One line for people: where each block of rows comes from. `fitted`: calibration will look at it."""
        begin, blocks = 0, []
        for part in self.parts:
            rows = f"{begin}:{begin + part.count}"
            origin = part.source.describe(part.count, part.head) if part.source else f"init({self.seed_name(part)})"
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
    shape |= teacher.carried
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


def source_of(teacher: Teacher, layer: int, part: str, what: str = "weight", scale: float = 1.0) -> Source | None:
    """Where the rows of `part`, one of q k v o, are in the teacher; None where it has no such tensor (a bias)."""
    base = f"model.layers.{layer}.self_attn."
    if f"{part}_proj.{what}" in teacher.tensors:
        return Source(f"{base}{part}_proj.{what}", scale=scale)
    if f"qkv_proj.{what}" not in teacher.tensors or part == "o":
        return None
    begin = {"q": 0, "k": teacher.inner, "v": teacher.inner + teacher.kv}[part]
    return Source(f"{base}qkv_proj.{what}", begin, teacher.inner if part == "q" else teacher.kv, scale)


def plan_layer(teacher: Teacher, mixer: dict[str, Any], layer: int) -> list[Target]:
    """Every tensor of layer `layer`'s mixer, in the order they are written."""
    base, scaled = f"model.layers.{layer}.mixer", teacher.norm_bc is None
    inner, kv, taps, head = mixer["d_inner"], teacher.kv, mixer["d_conv"], teacher.head_dim
    expanded = mixer["kind"] == "mamba2"  # keys and values stand once for every query head

    def inputs(what: str) -> tuple[Rows, ...]:
        """The rows of in_proj, those of the weight or of the bias."""
        of = {part: source_of(teacher, layer, part, what, teacher.scale if part == "q" and scaled else 1.0) for part in "qkv"}
        keys = (inner, head) if expanded else (kv, None)
        x, B = (Rows(label, keys[0], of[part], keys[1] if of[part] else None) for label, part in (("x", "v"), ("B", "k")))
        dt = Rows("dt", teacher.heads if expanded else mixer["dt_rank"])
        return Rows("z", inner), x, B, Rows("C", inner, of["q"]), dt

    rows = sum(part.count for part in inputs("weight"))
    whole, channels = (Rows("all", inner),), 3 * inner if expanded else inner
    targets = [
        Target(f"{base}.conv1d.bias", (channels,), (Rows("all", channels),), fan_in=taps),
        Target(f"{base}.conv1d.weight", (channels, 1, taps), (Rows("all", channels),)),
        Target(f"{base}.in_proj.weight", (rows, teacher.hidden), inputs("weight")),
        Target(
            f"{base}.out_proj.weight", (teacher.hidden, inner), (Rows("o", teacher.hidden, source_of(teacher, layer, "o")),)
        ),
    ]
    if mixer.get("in_bias"):
        targets.append(Target(f"{base}.in_proj.bias", (rows,), inputs("bias")))
    if mixer.get("out_bias"):
        o = Rows("o", teacher.hidden, source_of(teacher, layer, "o", "bias"))
        targets.append(Target(f"{base}.out_proj.bias", (teacher.hidden,), (o,)))
    if teacher.norm_bc is not None:
        attention, offset = f"model.layers.{layer}.self_attn.", teacher.norm_bc["offset"]
        repeated = teacher.norm_bc["over"] == "all" and expanded
        k = Rows("k", inner if repeated else teacher.tensors["k_norm.weight"][0], Source(f"{attention}k_norm.weight"), head)
        q = Rows(
            "q", teacher.tensors["q_norm.weight"][0], Source(f"{attention}q_norm.weight", scale=teacher.scale, offset=offset)
        )
        targets += [Target(f"{base}.{name}_norm.weight", (part.count,), (part,)) for name, part in (("B", k), ("C", q))]
    if expanded:
        each = (Rows("all", teacher.heads),)
        targets += [Target(f"{base}.{name}", (teacher.heads,), each) for name in FLOAT32]
        targets.append(Target(f"{base}.norm.weight", (inner,), whole))
    else:
        targets.append(Target(f"{base}.A_log", (inner, mixer["d_state"]), whole))
        targets += [Target(f"{base}.{name}", (inner,), whole) for name in ("D", "dt_bias")]
        targets.append(Target(f"{base}.dt_proj.weight", (inner, mixer["dt_rank"]), whole))
    return sorted(targets, key=lambda target: target.name)


def build(target: Target, source: Callable[[str], Tensor], seed: int) -> Tensor:
    """The tensor that `target` describes, in its sources' type, or float32 without any; each draw is seeded by its own name."""
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
        blocks.append(initial(target.parameter, (part.count, *target.shape[1:]), target.fan_in, generator))
    dtype = next((b.dtype for b, part in zip(blocks, target.parts, strict=True) if part.source), torch.float32)
    built = blocks[0] if len(blocks) == 1 else torch.cat([block.to(dtype) for block in blocks])
    assert tuple(built.shape) == target.shape, (target.name, built.shape)
    return built


def stored(target: Target, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in the type that a checkpoint of `dtype` keeps it in: float32 where the mixer insists."""
    return value.to(torch.float32 if target.parameter in FLOAT32 else dtype)
