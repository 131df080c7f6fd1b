"""The common part of the two Mamba kinds: in_proj's rows [z, x, B, C, dt], the convolution,
calibration and the linear form."""

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

    Parts of calibration: z, a gate that is open on every token; conv, the identity times a small
    tap; decay, step sizes and decays from each head's attention distance, and the skip D by
    regression; scale, channels scaled to the RMS of the attention heads; out, out_proj by ridge
    regression of the attention's output.
    """

    parts = ("z", "conv", "decay", "scale", "out")
    # `out` improves the start but worsens the result after training: docs/results.md
    default_parts = ("z", "conv", "decay", "scale")
    expanded: ClassVar[bool]

    def steps(self, teacher: Teacher, mixer: dict[str, Any]) -> int:
        """Returns the number of in_proj's rows for dt."""
        raise NotImplementedError

    def own_targets(self, teacher: Teacher, mixer: dict[str, Any], base: str) -> list[Target]:
        """Returns the targets of A_log, D, dt bias and the kind's further parameters, all drawn by
        its rule. base: the prefix of their names."""
        raise NotImplementedError

    def targets(self, teacher: Teacher, mixer: dict[str, Any], layer: int) -> list[Target]:
        """See MixerKind.targets."""
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
        """See MixerKind.set_part."""
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
        """Sets step sizes and decays so that head h decays by `forget[h]` nats per token. forget
        [H]."""
        raise NotImplementedError

    def probe(self, mixer: Any) -> nn.Module:
        """Returns the module whose input is the scan's output."""
        raise NotImplementedError

    def scaled(self, mixer: Any) -> Tensor:
        """Returns a weight whose last dimension [I] scales the channels before out_proj."""
        raise NotImplementedError

    def projected(self, mixer: Any, inputs: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """Returns x, B and C, and the same in the form that the mixer's `scan` takes."""
        raise NotImplementedError

    def vectors(self, mixer: Any, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See MixerKind.vectors."""
        (x, B, C), parts = self.projected(mixer, inputs)
        mixer.A_log.fill_(-torch.inf)
        mixer.D.zero_()
        mixer.dt_bias.fill_(float(inverse_softplus(torch.tensor(1.0))))
        steps = inputs.new_zeros(*inputs.shape[:2], len(mixer.dt_bias))
        return x, B, C, mixer.scan(*parts, steps, backend="torch")[0]  # the kernels are accurate to three digits only
