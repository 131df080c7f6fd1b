"""The decoding cache: keys and values, convolution windows and states, preallocated at fixed
addresses.

Nothing is resized or moved, so that a captured CUDA graph can read and write it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridize.compat.transformers import LinearAttentionLayer
from hybridize.modeling import MIXER_LAYER, HybridConfig, HybridForCausalLM


class _KeyValues:
    """Keys and values [B, K, S, d] of one attention layer. For a window of S tokens it is a ring
    buffer: attention does not depend on the order of keys, since their positions are already
    rotated in."""

    def __init__(self, rows: int, heads: int, slots: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self.keys, self.values = (torch.zeros(rows, heads, slots, width, device=device, dtype=dtype) for _ in range(2))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]


def _mixer_layer(mixer: Any, rows: int, device: torch.device, dtype: torch.dtype) -> LinearAttentionLayer:
    """Returns transformers' cache layer for a mixer's window and state, marked as continuing a
    prefix and as updatable in place."""
    layer = LinearAttentionLayer()
    window = torch.zeros(rows, mixer.conv1d.weight.shape[0], mixer.conv1d.kernel_size[0], device=device, dtype=dtype)
    layer.lazy_initialization(conv_states=window)
    layer.lazy_initialization(recurrent_states=torch.zeros(rows, *mixer.state_shape, device=device))
    layer.has_previous_state[0] = True
    layer.inplace = True  # type: ignore[attr-defined]
    return layer


class DecodeCache:
    """The cache of `rows` sequences with up to `length` tokens each. lengths [rows]: the tokens
    read so far, which is also the position of the next step's tokens."""

    def __init__(self, model: HybridForCausalLM, rows: int, length: int, dtype: torch.dtype) -> None:
        config, device = model.config, model.device
        self.layers: list[Any] = []
        for kind, layer in zip(config.layer_types, model.model.layers, strict=True):
            if kind == MIXER_LAYER:
                self.layers.append(_mixer_layer(layer.self_attn, rows, device, dtype))
            else:
                heads, slots, width = _attention_shape(config, kind, length)
                self.layers.append(_KeyValues(rows, heads, slots, width, device, dtype))
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._rows = torch.arange(rows, device=device)
        self._at: dict[int, Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns 0, since every sequence has its own length; the model gets positions explicitly."""
        return 0

    def begin_step(self) -> None:
        """Computes the slots for the step's keys and values. Must be called before each step."""
        sizes = {layer.keys.shape[2] for layer in self.layers if isinstance(layer, _KeyValues)}
        self._at = {size: self.lengths % size for size in sizes}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Stores keys and values [B, K, 1, d] of this step; returns those of all slots, [B, K, S,
        d]."""
        layer = self.layers[layer_idx]
        at = self._at[layer.keys.shape[2]]
        layer.keys[self._rows, :, at] = keys[:, :, 0].to(layer.keys.dtype)
        layer.values[self._rows, :, at] = values[:, :, 0].to(layer.values.dtype)
        return layer.keys, layer.values

    def take(self, rows: Sequence[int], read: Any, length: int) -> None:
        """Copies a prefilled transformers cache `read`, of prompts of `length` tokens, into these
        rows."""
        index = torch.tensor(rows, device=self.lengths.device)
        for mine, theirs in zip(self.layers, read.layers, strict=True):
            if isinstance(mine, _KeyValues):
                size = mine.keys.shape[2]
                count = min(theirs.keys.shape[2], size)
                at = torch.arange(length - count, length, device=index.device) % size
                for own, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    own[index.unsqueeze(1), :, at] = other[:, :, -count:].transpose(1, 2).to(own.dtype)
            else:
                mine.conv_states[0][index] = theirs.conv_states[0].to(mine.conv_states[0].dtype)
                mine.recurrent_states[0][index] = theirs.recurrent_states[0]
        self.lengths[index] = length

    def bytes(self) -> dict[str, int]:
        """Returns the size in bytes of keys and values (`kv`) and of windows and states (`state`)."""
        sizes = {"kv": 0, "state": 0}
        for layer in self.layers:
            attention = isinstance(layer, _KeyValues)
            tensors = layer.tensors if attention else [layer.conv_states[0], layer.recurrent_states[0]]
            sizes["kv" if attention else "state"] += sum(t.numel() * t.element_size() for t in tensors)
        return sizes


def _attention_shape(config: HybridConfig, kind: str, length: int) -> tuple[int, int, int]:
    """Returns the KV heads, slots and head size of an attention layer's cache for `length` tokens."""
    window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, min(length, window or length), width


def attention_bytes(config: HybridConfig, kind: str, length: int, dtype: torch.dtype) -> int:
    """Returns the bytes of keys and values of one attention layer, for one sequence of `length`
    tokens."""
    return 2 * math.prod(_attention_shape(config, kind, length)) * dtype.itemsize


def sequence_bytes(model: HybridForCausalLM, length: int, dtype: torch.dtype) -> tuple[int, int]:
    """Returns the cache size in bytes of one sequence of `length` tokens: (keys and values, windows
    and states)."""
    kv = state = 0
    for kind, layer in zip(model.config.layer_types, model.model.layers, strict=True):
        if kind == MIXER_LAYER:
            state += layer.self_attn.state_bytes(dtype)
        else:
            kv += attention_bytes(model.config, kind, length, dtype)
    return kv, state
