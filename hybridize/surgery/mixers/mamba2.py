"""Creates Mamba-2 mixers (2405.21060) from attention: every query head becomes a head with its own
group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hybridize.modeling import FLOAT32, inverse_softplus
from hybridize.modeling.ssd import CHUNK
from hybridize.surgery.calibrate import STEP
from hybridize.surgery.mapping import Rows, Target
from hybridize.surgery.mixers.selective import SelectiveKind
from hybridize.surgery.teacher import Teacher


class Mamba2Kind(SelectiveKind):
    """Mamba-2. Rows of keys and values are repeated per query head, since stock runtimes do not
    support grouped values."""

    kind = "mamba2"
    expanded = True

    def steps(self, teacher: Teacher, mixer: dict[str, Any]) -> int:
        """See SelectiveKind.steps."""
        return teacher.heads

    def own_targets(self, teacher: Teacher, mixer: dict[str, Any], base: str) -> list[Target]:
        """See SelectiveKind.own_targets."""
        shapes = {**dict.fromkeys(FLOAT32, teacher.heads), "norm.weight": mixer["d_inner"]}
        return [Target(f"{base}.{name}", (size,), (Rows("all", size),)) for name, size in shapes.items()]

    def set_decay(self, mixer: Any, forget: Tensor) -> None:
        """See SelectiveKind.set_decay. The step size is STEP for every token."""
        mixer.in_proj.weight[-mixer.heads :] = 0
        mixer.dt_bias.fill_(float(inverse_softplus(torch.tensor(STEP))))
        mixer.A_log.copy_((forget / STEP).log())

    def probe(self, mixer: Any) -> nn.Module:
        """See SelectiveKind.probe."""
        norm: nn.Module = mixer.norm
        return norm

    def scaled(self, mixer: Any) -> Tensor:
        """See SelectiveKind.scaled."""
        weight: Tensor = mixer.norm.weight
        return weight

    def projected(self, mixer: Any, inputs: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """See SelectiveKind.projected."""
        _, xBC, _ = mixer.project(inputs)
        x, B, C = xBC.chunk(3, -1)
        return (x, B, C), (xBC,)

    def kept_bytes(self, mixer: dict[str, Any], inner: int, kv: int, plain: bool) -> float:
        """See MixerKind.kept_bytes."""
        heads = inner // mixer["d_state"]
        if plain:  # convolution and norm; one state per chunk; three products of step pairs
            return 4 * (33 * inner + inner * mixer["d_state"] // CHUNK + 3 * heads * CHUNK)
        # in order: in_proj's output; the convolution's input and output; x, B, C concatenated; y, z
        # and the normed product; step sizes
        return 2 * (4 + 3 + 3 + 3 + 4) * inner + 12 * heads
