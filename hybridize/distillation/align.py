"""The cheap first stage: every mixer learns its own attention layer's output, all of them side by
side.

One forward pass of the teacher gives every layer's input and output; each mixer is then run and
differentiated alone, with no layer after it (MOHAWK, 2408.10189, section 4.2; RADLADS, 2505.03005,
stage 1).
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

TINY = 1e-6  # a share of the hidden size: below this mean square an attention output counts as nothing to be relative to


class Aligner(Accumulator):
    """Adds the gradient of the mean, over kept tokens and over mixers, of the relative square error
    |mixer(u) - attention(u)|^2 / |attention(u)|^2, u what the teacher's attention layer hears."""

    teacher: nn.Module

    def __init__(self, student: Student, teacher: nn.Module, micro: int, ranks: DistributedContext | None = None) -> None:
        super().__init__(student, teacher, micro, ranks)
        config: Any = student.model.config
        self.layers: list[int] = [i for i, kind in enumerate(config.layer_types) if kind == MIXER_LAYER]

    def one(self, part: Batch, count: int) -> Tensor:
        """As in Accumulator."""
        scale = self.ranks.size / (count * len(self.layers))
        heard: dict[int, tuple[Tensor, Tensor]] = {}
        handles = [self._listen(layer, heard) for layer in self.layers]
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
        told = model.layer_inputs(heard[self.layers[0]][0], None, positions, packed=part.positions is not None)[MIXER_LAYER]
        kept, total = part.loss_mask.flatten(), torch.zeros((), device=part.ids.device)
        for layer in self.layers:
            given, wanted = heard.pop(layer)
            with autocast(given.device, self.student.dtype):
                made = model.layers[layer].mixer(given, **told)[0]
            made, wanted = (chosen(t.float().flatten(0, 1), kept) for t in (made, wanted))
            size = wanted.square().sum(-1) + TINY * wanted.shape[-1]
            value = scale * ((made - wanted).square().sum(-1) / size).sum()
            value.backward()
            total = total + value.detach()
        return total

    def _listen(self, layer: int, heard: dict[int, tuple[Tensor, Tensor]]) -> Any:
        def hook(_: nn.Module, positional: Any, named: dict[str, Any], output: Any) -> None:
            given = named["hidden_states"] if "hidden_states" in named else positional[0]
            heard[layer] = given, output[0] if isinstance(output, tuple) else output

        teacher: Any = self.teacher.base_model
        return teacher.layers[layer].self_attn.register_forward_hook(hook, with_kwargs=True)
