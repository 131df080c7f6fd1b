"""What every scorer shares: one function from a model to a score per attention layer, and the way to try a layer out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.modeling import MIXER_LAYER

Progress = Callable[[int, float], None]  # told (layer, score) as each is found


def attention_layers(model: Any) -> list[int]:
    """Indices of the layers that are still attention, for a teacher and a hybrid alike."""
    layers = model.base_model.layers
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers)
    return [index for index in range(len(layers)) if kinds[index] != MIXER_LAYER]


class _Nothing(nn.Module):
    """Stands in for a self-attention that adds nothing to the residual stream (or, `passes`, for a layer that changes nothing).

    It still tells the cache how many tokens went by: transformers reads positions and mask sizes off the first attention layer.
    """

    def __init__(self, layer: int, passes: bool) -> None:
        super().__init__()
        self.layer, self.passes = layer, passes

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> Any:
        if past_key_values is not None:
            empty = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(empty, empty, self.layer)
        return hidden_states if self.passes else (torch.zeros_like(hidden_states), None)


@contextlib.contextmanager
def ablated(model: Any, layer: int, what: str) -> Iterator[None]:
    """Within the block, layer `layer` is an identity (`block`) or loses its attention only (`mixer`)."""
    layers = model.base_model.layers
    whole = layers[layer]
    if what == "block":
        layers[layer] = _Nothing(layer, passes=True)
        try:
            yield
        finally:
            layers[layer] = whole
        return
    attention = whole.self_attn
    whole.self_attn = _Nothing(layer, passes=False)
    try:
        yield
    finally:
        whole.self_attn = attention
