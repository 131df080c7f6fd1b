"""Records what a checkpoint's attention layers do on real text, for calibration.

The checkpoint runs layer by layer, so memory is one layer's weights and the hidden states, whatever
the model's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.checkpoint.experts import read_parameter
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.modeling import MIXER_LAYER, HybridModel, hybrid_config
from hybridize.runtime.loading import without_storage


@dataclass(frozen=True)
class LayerObservation:
    """One attention layer on [W, T] tokens.

    attention: the layer's own module. inputs [W, T, D]: the inputs that its mixer will get. heads
    [W, T, I]: the outputs of the attention heads, before o_proj. drift [W, T, D]: what must be
    subtracted from the mixer's output to undo the deviation of the mixers below. distance [H]: the
    mean distance in tokens that each head attends back; the first token, which idle heads attend
    to, is excluded.
    """

    attention: Any
    inputs: Tensor
    heads: Tensor
    drift: Tensor
    distance: Tensor


class Observer:
    """Runs a checkpoint on `ids` [W, T] in float32, from the first layer up: `see` a layer, then
    `convert` it or leave it.

    It carries two residual streams, that of the original model and that of the model with the
    mixers given so far, so that each mixer is fitted on the inputs that it will get. donor: the
    checkpoint that provides the attention of the layers that are seen.
    """

    def __init__(self, source: CheckpointReader, donor: CheckpointReader, ids: Tensor, device: torch.device) -> None:
        self.source, self.donor, self.device = source, donor, device
        config = hybrid_config(source.config)
        config._attn_implementation = "eager"  # the only implementation that returns attention weights
        model = without_storage(lambda: HybridModel(config))
        model.rotary_emb.to(device)
        used, places = ids.unique(return_inverse=True)
        model.embed_tokens.weight = nn.Parameter(source.tensor("model.embed_tokens.weight")[used].float(), False)
        model.embed_tokens.padding_idx = None
        self.hidden = [model.embed(row.unsqueeze(0)).to(device) for row in places]
        self.student = self.hidden
        self.positions = torch.arange(ids.shape[1], device=device).unsqueeze(0)
        self.layer_inputs = model.layer_inputs(self.hidden[0], None, self.positions)
        self.layer_inputs[MIXER_LAYER] = next(iter(self.layer_inputs.values())) | {"attention_mask": None}
        self.kinds, self.layers, self.index = config.layer_types, model.layers, 0
        self.pending: tuple[nn.Module, list[Tensor]] | None = None

    @torch.no_grad()
    def see(self, index: int) -> LayerObservation:
        """Runs up to layer `index`, with the donor's attention in it, and returns what that layer
        does. Layers must be seen in ascending order."""
        if self.pending is not None:
            self.convert(None)
        while self.index < index:
            layer, kind = self._load_next(self.source), self.kinds[self.index]
            self._advance(layer, self._run(layer, kind, self.hidden), kind)
        layer, kind = self._load_next(self.donor), self.kinds[index]
        with _AttentionRecorder(layer.self_attn) as attention:  # type: ignore[arg-type]
            after = self._run(layer, kind, self.hidden)
        before: Any = getattr(layer, "input_layernorm", nn.Identity())  # some families only normalise the attention's output
        inputs = [before(window) for window in self.student]
        # The inverse of the factor on the attention's output. Where that output is normalised, no
        # mixer output can undo the drift.
        share = 0.0 if hasattr(layer, "post_feedforward_layernorm") else 1 / getattr(layer, "residual_multiplier", 1.0)
        drift = [(ours - theirs) * share for ours, theirs in zip(self.student, self.hidden, strict=True)]
        self.pending = layer, after
        return LayerObservation(
            layer.self_attn, torch.cat(inputs), torch.cat(attention.heads), torch.cat(drift), attention.distance()
        )

    def rotary(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns the rotary tables (cos, sin) [1, T, R] of layer `index`."""
        return self.layer_inputs[self.kinds[index]]["position_embeddings"]  # type: ignore[no-any-return]

    @torch.no_grad()
    def convert(self, mixer: nn.Module | None) -> None:
        """Puts `mixer` into the second stream at the layer seen last; None leaves its attention
        there."""
        assert self.pending is not None
        (layer, after), self.pending = self.pending, None
        kind = self.kinds[self.index]
        if mixer is not None:
            layer.self_attn, kind = mixer, MIXER_LAYER
        self._advance(layer, after, kind, apart=mixer is not None)

    def _advance(self, layer: nn.Module, after: list[Tensor], kind: str, apart: bool = False) -> None:
        apart = apart or self.student is not self.hidden
        self.student = self._run(layer, kind, self.student) if apart else after
        self.hidden, self.index = after, self.index + 1

    def _run(self, layer: nn.Module, kind: str, hidden: list[Tensor]) -> list[Tensor]:
        return [layer(window, position_ids=self.positions, **self.layer_inputs[kind]) for window in hidden]

    def _load_next(self, attention: CheckpointReader) -> nn.Module:
        """Returns the next layer with its weights, those of self_attn from `attention`, and drops
        it from the model, so that its memory can be freed."""
        layer, prefix = self.layers[self.index], f"model.layers.{self.index}."
        self.layers[self.index] = nn.Identity()
        state = {
            name: read_parameter(attention if name.startswith("self_attn.") else self.source, prefix + name)
            for name in layer.state_dict()
        }
        wide = {name: value.to(self.device, torch.float32) for name, value in state.items()}
        layer.load_state_dict(wide, strict=True, assign=True)
        return layer.eval()


class _AttentionRecorder:
    """Context manager that records head outputs and attention distances of a self-attention module."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention
        self.heads: list[Tensor] = []
        self.sums: list[Tensor] = []

    def __enter__(self) -> _AttentionRecorder:
        self.handles = [
            self.attention.o_proj.register_forward_pre_hook(lambda _, given: self.heads.append(given[0])),  # type: ignore[union-attr, operator]
            self.attention.register_forward_hook(self._record_distances),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _record_distances(self, _: nn.Module, __: Any, out: tuple[Tensor, Tensor]) -> None:
        weights = out[1][0, :, :, 1:]  # [H, T, T - 1]
        steps = torch.arange(weights.shape[1], device=weights.device)
        lag = (steps.unsqueeze(1) - steps[1:]).clamp(min=0).to(weights.dtype)
        self.sums.append(torch.stack([(weights * lag).sum((1, 2)), weights.sum((1, 2))]))

    def distance(self) -> Tensor:
        weighted, total = torch.stack(self.sums).sum(0)
        return weighted / total.clamp(min=1e-6)
