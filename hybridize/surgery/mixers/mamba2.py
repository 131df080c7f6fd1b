"""Mamba-2 mixers (2405.21060) out of attention: every query head is a head and a group of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hybridize.errors import InputError, setting
from hybridize.modeling import FLOAT32, inverse_softplus
from hybridize.modeling.ssd import CHUNK
from hybridize.surgery.calibrate import STEP
from hybridize.surgery.mapping import Rows, Target
from hybridize.surgery.mixers.selective import SelectiveKind
from hybridize.surgery.teacher import Teacher


class Mamba2Kind(SelectiveKind):
    """Rows of keys and values are repeated per query head, since stock runtimes know no grouped
    values."""

    kind = "mamba2"
    expanded = True

    def completed(self, teacher: Teacher, shape: dict[str, Any]) -> dict[str, Any]:
        """As in MixerKind: the state size is the head size."""
        if shape.setdefault("d_state", teacher.head_dim) != teacher.head_dim:
            raise InputError(
                f"{setting('d_state')} {shape['d_state']}: a mamba2 mixer's state size is the head size, {teacher.head_dim}"
            )
        return shape

    def steps(self, teacher: Teacher, mixer: dict[str, Any]) -> int:
        """As in SelectiveKind."""
        return teacher.heads

    def own_targets(self, teacher: Teacher, mixer: dict[str, Any], base: str) -> list[Target]:
        """As in SelectiveKind."""
        shapes = {**dict.fromkeys(FLOAT32, teacher.heads), "norm.weight": mixer["d_inner"]}
        return [Target(f"{base}.{name}", (size,), (Rows("all", size),)) for name, size in shapes.items()]

    def set_decay(self, mixer: Any, forget: Tensor) -> None:
        """As in SelectiveKind: steps of STEP, whatever the token."""
        mixer.in_proj.weight[-mixer.heads :] = 0
        mixer.dt_bias.fill_(float(inverse_softplus(torch.tensor(STEP))))
        mixer.A_log.copy_((forget / STEP).log())

    def probe(self, mixer: Any) -> nn.Module:
        """As in SelectiveKind."""
        norm: nn.Module = mixer.norm
        return norm

    def scaled(self, mixer: Any) -> Tensor:
        """As in SelectiveKind."""
        weight: Tensor = mixer.norm.weight
        return weight

    def projected(self, mixer: Any, inputs: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """As in SelectiveKind."""
        _, xBC, _ = mixer.project(inputs)
        x, B, C = xBC.chunk(3, -1)
        return (x, B, C), (xBC,)

    def kept_bytes(self, mixer: dict[str, Any], inner: int, kv: int, plain: bool) -> float:
        """As in MixerKind."""
        heads = inner // mixer["d_state"]
        if plain:  # beside convolution and norm: products of pairs of steps in a chunk, three times, and a state a chunk
            return 4 * (33 * inner + inner * mixer["d_state"] // CHUNK + 3 * heads * CHUNK)
        # in_proj's output; the convolution's input and output; x, B, C side by side; y, z and the
        # normed product; step sizes
        return 2 * (4 + 3 + 3 + 3 + 4) * inner + 12 * heads
