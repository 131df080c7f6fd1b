"""What the two Mamba kinds share: in_proj's rows [z, x, B, C, dt], the convolution, calibration and
the linear form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridize.modeling import inverse_softplus
from hybridize.surgery.calibrate import channel_ratio, decays, features, fit_output, open_gate, pass_through, set_skip
from hybridize.surgery.mapping import Rows, Target
from hybridize.surgery.mixers.base import MixerKind, attention_rows, norm_targets, output_targets
from hybridize.surgery.observe import LayerObservation
from hybridize.surgery.teacher import Teacher


class SelectiveKind(MixerKind):
    """A Mamba mixer. expanded: in_proj holds keys and values repeated per query head.

    Parts: z, the gate open on every token; conv, the identity times a small tap; decay, step sizes
    and decays by each head's attention distance, and the skip D by regression; scale, channels with
    the RMS of the attention heads; out, out_proj by ridge regression of the attention's output.
    """

    parts = ("z", "conv", "decay", "scale", "out")
    default_parts = ("z", "conv", "decay", "scale")  # with `out` the start is better and the end is worse: docs/results.md
    expanded: ClassVar[bool]

    def steps(self, teacher: Teacher, mixer: dict[str, Any]) -> int:
        """How many rows of in_proj are dt's."""
        raise NotImplementedError

    def own_targets(self, teacher: Teacher, mixer: dict[str, Any], base: str) -> list[Target]:
        """A_log, D, dt bias and whatever else this kind has, all drawn by its rule."""
        raise NotImplementedError

    def targets(self, teacher: Teacher, mixer: dict[str, Any], layer: int) -> list[Target]:
        """As in MixerKind."""
        base, inner, taps = f"model.layers.{layer}.mixer", mixer["d_inner"], mixer["d_conv"]
        channels = 3 * inner if self.expanded else inner

        def inputs(what: str) -> tuple[Rows, ...]:
            made = attention_rows(teacher, layer, what, self.expanded)
            return Rows("z", inner), made["x"], made["B"], made["C"], Rows("dt", self.steps(teacher, mixer))

        rows = sum(part.count for part in inputs("weight"))
        made = [
            Target(f"{base}.conv1d.bias", (channels,), (Rows("all", channels),), fan_in=taps),
            Target(f"{base}.conv1d.weight", (channels, 1, taps), (Rows("all", channels),)),
            Target(f"{base}.in_proj.weight", (rows, teacher.hidden), inputs("weight")),
            *output_targets(teacher, mixer, layer),
            *norm_targets(teacher, layer, self.expanded),
            *self.own_targets(teacher, mixer, base),
        ]
        if mixer.get("in_bias"):
            made.append(Target(f"{base}.in_proj.bias", (rows,), inputs("bias")))
        return sorted(made, key=lambda target: target.name)

    def set_part(self, part: str, mixer: Any, seen: LayerObservation, plain: Mapping[str, Tensor]) -> None:
        """As in MixerKind."""
        if part == "z":
            open_gate(mixer.in_proj.weight[: mixer.inner], seen.inputs)
        elif part == "conv":
            pass_through(mixer.conv1d)
        elif part == "decay":
            self.set_decay(mixer, decays(seen.distance))
            set_skip(mixer, self.probe(mixer), seen)
        elif part == "scale":
            self.scaled(mixer).mul_(channel_ratio(mixer, seen))
        else:
            fit_output(mixer.out_proj, features(mixer, seen.inputs), seen, plain["out_proj.weight"])

    def set_decay(self, mixer: Any, forget: Tensor) -> None:
        """Step sizes and decays so that head h forgets `forget` [H] nats of its state at each
        token."""
        raise NotImplementedError

    def probe(self, mixer: Any) -> nn.Module:
        """The module that gets the scan's output."""
        raise NotImplementedError

    def scaled(self, mixer: Any) -> Tensor:
        """The weight by whose last dimension [I] the channels before out_proj are scaled."""
        raise NotImplementedError

    def projected(self, mixer: Any, inputs: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """x, B and C, and the same as the mixer's `scan` takes them."""
        raise NotImplementedError

    def vectors(self, mixer: Any, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in MixerKind."""
        (x, B, C), parts = self.projected(mixer, inputs)
        mixer.A_log.fill_(-torch.inf)
        mixer.D.zero_()
        mixer.dt_bias.fill_(float(inverse_softplus(torch.tensor(1.0))))
        steps = inputs.new_zeros(*inputs.shape[:2], len(mixer.dt_bias))
        return x, B, C, mixer.scan(*parts, steps, backend="torch")[0]  # kernels are good for three digits
