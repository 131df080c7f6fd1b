"""What every scorer shares: which layers there are to score, and how it tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hybridize.modeling import MIXER_LAYER

Progress = Callable[[int, int], None]  # told how many of how many steps or texts are done


def attention_layers(model: Any) -> list[int]:
    """Indices of the layers that are still attention, for a teacher and a hybrid alike."""
    layers = model.base_model.layers
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers)
    return [index for index in range(len(layers)) if kinds[index] != MIXER_LAYER]
