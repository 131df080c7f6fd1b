"""What a checkpoint's attention layers do on real text, found by running it layer by layer: memory
is one layer's weights and the hidden states, whatever the model's size. Calibration reads from it.
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
    """One attention layer on [W, T] tokens. inputs [W, T, D]: what its mixer will read; heads [W,
    T, I]: the attention heads' outputs before o_proj; drift [W, T, D]: what the mixer's output
    would have to be less by, to undo what those below did; distance [H]: how many tokens back each
    head looks on average, the first token, where idle heads look, left out; attention: the layer's
    own module."""

    attention: Any
    inputs: Tensor
    heads: Tensor
    drift: Tensor
    distance: Tensor


class Observer:
    """Walks up a checkpoint with `ids` [W, T], in float32: `see` a layer, then `convert` it or
    leave it.

    Two residual streams go side by side, the model's own and that of the model with the mixers
    given so far, so that each mixer is fitted on the inputs that it will get.
    """

    def __init__(self, source: CheckpointReader, donor: CheckpointReader, ids: Tensor, device: torch.device) -> None:
        self.source, self.donor, self.device = source, donor, device
        config = hybrid_config(source.config)
        config._attn_implementation = "eager"  # the only one that shows its weights
        model = without_storage(lambda: HybridModel(config))
        model.rotary_emb.to(device)
        used, places = ids.unique(return_inverse=True)
        model.embed_tokens.weight = nn.Parameter(source.tensor("model.embed_tokens.weight")[used].float(), False)
        model.embed_tokens.padding_idx = None
        self.hidden = [model.embed(row.unsqueeze(0)).to(device) for row in places]
        self.student = self.hidden
        self.positions = torch.arange(ids.shape[1], device=device).unsqueeze(0)
        self.told = model.layer_inputs(self.hidden[0], None, self.positions)
        self.told[MIXER_LAYER] = next(iter(self.told.values())) | {"attention_mask": None}
        self.kinds, self.layers, self.index = config.layer_types, model.layers, 0
        self.open: tuple[nn.Module, list[Tensor]] | None = None

    @torch.no_grad()
    def see(self, index: int) -> LayerObservation:
        """Goes up to layer `index`, which has the donor's attention. Layers are seen from below
        upwards."""
        if self.open is not None:
            self.convert(None)
        while self.index < index:
            layer, kind = self._take(self.source), self.kinds[self.index]
            self._go_on(layer, self._run(layer, kind, self.hidden), kind)
        layer, kind = self._take(self.donor), self.kinds[index]
        with _Listener(layer.self_attn) as attention:  # type: ignore[arg-type]
            after = self._run(layer, kind, self.hidden)
        before: Any = getattr(layer, "input_layernorm", nn.Identity())  # some families normalise behind the attention only
        inputs = [before(window) for window in self.student]
        # what the attention's output is multiplied by; where it is normalised, no output can take
        # the drift back
        share = 0.0 if hasattr(layer, "post_feedforward_layernorm") else 1 / getattr(layer, "residual_multiplier", 1.0)
        drift = [(ours - theirs) * share for ours, theirs in zip(self.student, self.hidden, strict=True)]
        self.open = layer, after
        return LayerObservation(
            layer.self_attn, torch.cat(inputs), torch.cat(attention.heads), torch.cat(drift), attention.distance()
        )

    def rotary(self, index: int) -> tuple[Tensor, Tensor]:
        """The tables [1, T, R] that layer `index` turns its queries and keys by."""
        return self.told[self.kinds[index]]["position_embeddings"]  # type: ignore[no-any-return]

    @torch.no_grad()
    def convert(self, mixer: nn.Module | None) -> None:
        """From here on the second stream has `mixer` in the layer seen last (None: its attention)."""
        assert self.open is not None
        (layer, after), self.open = self.open, None
        kind = self.kinds[self.index]
        if mixer is not None:
            layer.self_attn, kind = mixer, MIXER_LAYER
        self._go_on(layer, after, kind, apart=mixer is not None)

    def _go_on(self, layer: nn.Module, after: list[Tensor], kind: str, apart: bool = False) -> None:
        apart = apart or self.student is not self.hidden
        self.student = self._run(layer, kind, self.student) if apart else after
        self.hidden, self.index = after, self.index + 1

    def _run(self, layer: nn.Module, kind: str, hidden: list[Tensor]) -> list[Tensor]:
        return [layer(window, position_ids=self.positions, **self.told[kind]) for window in hidden]

    def _take(self, attention: CheckpointReader) -> nn.Module:
        """The next layer with its weights, those of self_attn from `attention`; the model keeps no
        hold on them."""
        layer, prefix = self.layers[self.index], f"model.layers.{self.index}."
        self.layers[self.index] = nn.Identity()
        state = {
            name: read_parameter(attention if name.startswith("self_attn.") else self.source, prefix + name)
            for name in layer.state_dict()
        }
        wide = {name: value.to(self.device, torch.float32) for name, value in state.items()}
        layer.load_state_dict(wide, strict=True, assign=True)
        return layer.eval()


class _Listener:
    """Collects head outputs and attention distances of a self-attention while it runs."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention
        self.heads: list[Tensor] = []
        self.sums: list[Tensor] = []

    def __enter__(self) -> _Listener:
        self.handles = [
            self.attention.o_proj.register_forward_pre_hook(lambda _, given: self.heads.append(given[0])),  # type: ignore[union-attr, operator]
            self.attention.register_forward_hook(self._weigh),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _weigh(self, _: nn.Module, __: Any, out: tuple[Tensor, Tensor]) -> None:
        weights = out[1][0, :, :, 1:]  # [H, T, T - 1]
        steps = torch.arange(weights.shape[1], device=weights.device)
        lag = (steps.unsqueeze(1) - steps[1:]).clamp(min=0).to(weights.dtype)
        self.sums.append(torch.stack([(weights * lag).sum((1, 2)), weights.sum((1, 2))]))

    def distance(self) -> Tensor:
        far, all_ = torch.stack(self.sums).sum(0)
        return far / all_.clamp(min=1e-6)
