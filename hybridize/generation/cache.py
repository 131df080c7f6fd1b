"""What sequences leave behind while they are decoded, at fixed addresses: keys and values, windows
and states.

Nothing here is ever grown or moved, so a captured step can read and write it for ever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridize.compat.transformers import LinearAttentionLayer
from hybridize.modeling import MIXER_LAYER, HybridConfig, HybridForCausalLM


class _Places:
    """Keys and values [B, K, S, d] of one attention layer. A window of S tokens is a ring: what
    order keys stand in is nothing to attention, since their positions are turned into them."""

    def __init__(self, rows: int, heads: int, places: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self.keys, self.values = (torch.zeros(rows, heads, places, width, device=device, dtype=dtype) for _ in range(2))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]


def _mixer_layer(mixer: Any, rows: int, device: torch.device, dtype: torch.dtype) -> LinearAttentionLayer:
    """transformers' layer of a mixer's window and state, as if a prefix had been read: mixers step
    on from it in place."""
    layer = LinearAttentionLayer()
    window = torch.zeros(rows, mixer.conv1d.weight.shape[0], mixer.conv1d.kernel_size[0], device=device, dtype=dtype)
    layer.lazy_initialization(conv_states=window)
    layer.lazy_initialization(recurrent_states=torch.zeros(rows, *mixer.state_shape, device=device))
    layer.has_previous_state[0] = True
    layer.inplace = True  # type: ignore[attr-defined]
    return layer


class DecodeCache:
    """Of `rows` sequences with up to `length` tokens each. `lengths` [rows]: how many each has; a
    step's tokens go there."""

    def __init__(self, model: HybridForCausalLM, rows: int, length: int, dtype: torch.dtype) -> None:
        config, device = model.config, model.device
        self.layers: list[Any] = []
        for kind, layer in zip(config.layer_types, model.model.layers, strict=True):
            if kind == MIXER_LAYER:
                self.layers.append(_mixer_layer(layer.self_attn, rows, device, dtype))
            else:
                heads, places, width = _attention_shape(config, kind, length)
                self.layers.append(_Places(rows, heads, places, width, device, dtype))
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._rows = torch.arange(rows, device=device)
        self._at: dict[int, Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nobody's, since every sequence has its own: positions are given to the model."""
        return 0

    def begin_step(self) -> None:
        """To be called before each step: where in a layer of so many places the step's keys and
        values go."""
        sizes = {layer.keys.shape[2] for layer in self.layers if isinstance(layer, _Places)}
        self._at = {size: self.lengths % size for size in sizes}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """keys, values [B, K, 1, d], put in their places; returns all of them, [B, K, S, d]."""
        layer = self.layers[layer_idx]
        at = self._at[layer.keys.shape[2]]
        layer.keys[self._rows, :, at] = keys[:, :, 0].to(layer.keys.dtype)
        layer.values[self._rows, :, at] = values[:, :, 0].to(layer.values.dtype)
        return layer.keys, layer.values

    def take(self, rows: Sequence[int], read: Any, length: int) -> None:
        """Takes over what prefill left in transformers' cache `read`, row by row, of prompts of
        `length` tokens."""
        index = torch.tensor(rows, device=self.lengths.device)
        for mine, theirs in zip(self.layers, read.layers, strict=True):
            if isinstance(mine, _Places):
                size = mine.keys.shape[2]
                kept = min(theirs.keys.shape[2], size)
                at = torch.arange(length - kept, length, device=index.device) % size
                for own, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    own[index.unsqueeze(1), :, at] = other[:, :, -kept:].transpose(1, 2).to(own.dtype)
            else:
                mine.conv_states[0][index] = theirs.conv_states[0].to(mine.conv_states[0].dtype)
                mine.recurrent_states[0][index] = theirs.recurrent_states[0]
        self.lengths[index] = length

    def bytes(self) -> dict[str, int]:
        """What is held, in bytes: keys and values (`kv`), windows and states (`state`)."""
        held = {"kv": 0, "state": 0}
        for layer in self.layers:
            places = isinstance(layer, _Places)
            tensors = layer.tensors if places else [layer.conv_states[0], layer.recurrent_states[0]]
            held["kv" if places else "state"] += sum(t.numel() * t.element_size() for t in tensors)
        return held


def _attention_shape(config: HybridConfig, kind: str, length: int) -> tuple[int, int, int]:
    """Key/value heads, places and head size of an attention layer that is to hold `length` tokens."""
    window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, min(length, window or length), width


def attention_bytes(config: HybridConfig, kind: str, length: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one attention layer holds of one sequence of `length` tokens."""
    return 2 * math.prod(_attention_shape(config, kind, length)) * dtype.itemsize


def sequence_bytes(model: HybridForCausalLM, length: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that one sequence of `length` tokens holds: (keys and values, windows and states)."""
    kv = state = 0
    for kind, layer in zip(model.config.layer_types, model.model.layers, strict=True):
        if kind == MIXER_LAYER:
            state += layer.self_attn.state_bytes(dtype)
        else:
            kv += attention_bytes(model.config, kind, length, dtype)
    return kv, state
