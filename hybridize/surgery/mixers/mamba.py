"""Creates Mamba-1 mixers from attention, in M1's grouped form (2504.10449, section 3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hybridize.errors import InputError, setting
from hybridize.modeling import inverse_softplus
from hybridize.surgery.calibrate import STEP
from hybridize.surgery.mapping import Rows, Target
from hybridize.surgery.mixers.selective import SelectiveKind
from hybridize.surgery.teacher import Teacher


class MambaKind(SelectiveKind):
    """Mamba-1. Rows of keys and values are copied; the mixer itself repeats them per query head."""

    kind = "mamba"
    expanded = False

    def completed(self, teacher: Teacher, shape: dict[str, Any]) -> dict[str, Any]:
        """See MixerKind.completed. Defaults: state size 16, or the head size if smaller; dt rank
        ceil(D / 16) as in the Mamba paper (2312.00752); expansion by head."""
        rank = -(-teacher.hidden // 16)
        shape = {"d_state": min(16, teacher.head_dim), "dt_rank": rank, "expand": "head", **shape}
        if shape["d_state"] < 1 or teacher.head_dim % shape["d_state"]:
            raise InputError(f"{setting('d_state')} {shape['d_state']} must divide the head dimension {teacher.head_dim}")
        if shape["expand"] not in self.mixer.choices["expand"]:
            raise InputError(f"{setting('expand')} must be head or chunk, not {shape['expand']}")
        if shape["dt_rank"] < 1:
            raise InputError(f"{setting('dt_rank')} {shape['dt_rank']} must be positive")
        return shape

    def steps(self, teacher: Teacher, mixer: dict[str, Any]) -> int:
        """See SelectiveKind.steps."""
        return int(mixer["dt_rank"])

    def own_targets(self, teacher: Teacher, mixer: dict[str, Any], base: str) -> list[Target]:
        """See SelectiveKind.own_targets."""
        inner = mixer["d_inner"]
        shapes = {
            "A_log": (inner, mixer["d_state"]), "D": (inner,), "dt_bias": (inner,), "dt_proj.weight": (inner, mixer["dt_rank"]),
        }  # fmt: skip
        return [Target(f"{base}.{name}", shape, (Rows("all", inner),)) for name, shape in shapes.items()]

    def set_decay(self, mixer: Any, forget: Tensor) -> None:
        """See SelectiveKind.set_decay. The step size is STEP at most; heads that must forget faster
        get a larger A."""
        channels = mixer.inner // len(forget)
        mixer.dt_proj.weight.zero_()
        mixer.dt_bias.copy_(inverse_softplus(forget.clamp(max=STEP)).repeat_interleave(channels))
        mixer.A_log.zero_()
        mixer.A_log += (forget / forget.clamp(max=STEP)).log().repeat_interleave(channels).unsqueeze(1)

    def probe(self, mixer: Any) -> nn.Module:
        """See SelectiveKind.probe."""
        out: nn.Module = mixer.out_proj
        return out

    def scaled(self, mixer: Any) -> Tensor:
        """See SelectiveKind.scaled. These are out_proj's columns, since no other weight scales
        channels."""
        weight: Tensor = mixer.out_proj.weight
        return weight

    def changes_output(self, parts: frozenset[str]) -> bool:
        """See MixerKind.changes_output."""
        return bool({"scale", "out"} & parts)

    def can_verify(self, mixer: dict[str, Any]) -> bool:
        """See MixerKind.can_verify. False if heads are expanded by chunk, which pairs other parts
        of heads than the attention does."""
        return bool(mixer["expand"] == "head")

    def projected(self, mixer: Any, inputs: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """See SelectiveKind.projected."""
        _, x, B, C, _ = mixer.project(inputs)
        return (x, B, C), (x, B, C)

    def kept_bytes(self, mixer: dict[str, Any], inner: int, kv: int, plain: bool) -> float:
        """See MixerKind.kept_bytes."""
        if plain:
            return 4 * (14 * inner + 2 * kv + mixer["dt_rank"])
        # in order: in_proj's output; expanded x and the convolution's input and output; dt before
        # and after its projection; x, dt, B, C as the kernel gets them; y, z, the gate and their
        # product
        return 2 * (2 * inner + 2 * kv + mixer["dt_rank"] + (3 + 2 + 4 + 5) * inner)
