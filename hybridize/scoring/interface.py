"""What every scorer shares: one function from a model to a score per attention layer, and the way to try a layer out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from hybridize.modeling import MIXER_LAYER

Progress = Callable[[int, float], None]  # told (layer, score) as each is found


def attention_layers(model: Any) -> list[int]:
    """Indices of the layers that are still attention, for a teacher and a hybrid alike."""
    layers = model.base_model.layers
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers)
    return [index for index in range(len(layers)) if kinds[index] != MIXER_LAYER]


class _Nothing(nn.Module):
    """Stands in for a self-attention that adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(hidden_states.shape), None


class _Identity(nn.Module):
    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


@contextlib.contextmanager
def ablated(model: Any, layer: int, what: str) -> Iterator[None]:
    """Within the block, layer `layer` is an identity (`block`) or loses its attention only (`mixer`)."""
    layers = model.base_model.layers
    whole = layers[layer]
    if what == "block":
        layers[layer] = _Identity()
        try:
            yield
        finally:
            layers[layer] = whole
        return
    attention = whole.self_attn
    whole.self_attn = _Nothing()
    try:
        yield
    finally:
        whole.self_attn = attention
