"""The cheap first stage: each mixer is fitted to the output of the attention layer it replaces.

One forward pass of the teacher gives the input and output of every layer. Each mixer is then run
and differentiated on its own, without the layers after it (MOHAWK, 2408.10189, section 4.2;
RADLADS, 2505.03005, stage 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hybridize.data.packing import Batch
from hybridize.distillation.step import Accumulator, Student, chosen
from hybridize.modeling import MIXER_LAYER
from hybridize.runtime.distributed import DistributedContext
from hybridize.runtime.forward import autocast, hidden_states

TINY = 1e-6  # mean square added to the denominator, so that the error relative to a tiny attention output stays finite


class Aligner(Accumulator):
    """Adds the gradient of the relative squared error |mixer(u) - attention(u)|^2 /
    |attention(u)|^2, averaged over the tokens of the loss mask and over mixers; u is the input of
    the teacher's attention layer."""

    teacher: nn.Module

    def __init__(self, student: Student, teacher: nn.Module, micro: int, ranks: DistributedContext | None = None) -> None:
        super().__init__(student, teacher, micro, ranks)
        config: Any = student.model.config
        self.layers: list[int] = [i for i, kind in enumerate(config.layer_types) if kind == MIXER_LAYER]

    def one(self, part: Batch, count: int) -> Tensor:
        """See Accumulator.one."""
        scale = self.ranks.size / (count * len(self.layers))
        captured: dict[int, tuple[Tensor, Tensor]] = {}
        handles = [self._capture(layer, captured) for layer in self.layers]
        try:
            with torch.no_grad():
                hidden_states(self.teacher, part, self.student.dtype)
        finally:
            for handle in handles:
                handle.remove()
        model: Any = self.student.model.base_model
        positions = part.positions
        if positions is None:
            positions = torch.arange(part.ids.shape[1], device=part.ids.device).unsqueeze(0)
        kwargs = model.layer_inputs(captured[self.layers[0]][0], None, positions, packed=part.positions is not None)[
            MIXER_LAYER
        ]
        kept, total = part.loss_mask.flatten(), torch.zeros((), device=part.ids.device)
        for layer in self.layers:
            given, target = captured.pop(layer)
            with autocast(given.device, self.student.dtype):
                predicted = model.layers[layer].mixer(given, **kwargs)[0]
            predicted, target = (chosen(t.float().flatten(0, 1), kept) for t in (predicted, target))
            size = target.square().sum(-1) + TINY * target.shape[-1]
            value = scale * ((predicted - target).square().sum(-1) / size).sum()
            value.backward()
            total = total + value.detach()
        return total

    def _capture(self, layer: int, captured: dict[int, tuple[Tensor, Tensor]]) -> Any:
        def hook(_: nn.Module, positional: Any, named: dict[str, Any], output: Any) -> None:
            given = named["hidden_states"] if "hidden_states" in named else positional[0]
            captured[layer] = given, output[0] if isinstance(output, tuple) else output

        teacher: Any = self.teacher.base_model
        return teacher.layers[layer].self_attn.register_forward_hook(hook, with_kwargs=True)
