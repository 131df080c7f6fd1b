"""Imports from transformers beyond its documented classes. TRIED has the tested versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "DynamicLayer", "LinearAttentionLayer", "no_init_weights", "register_attention", "sdpa_attention_forward",
]  # fmt: skip


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Registers `function` for `config._attn_implementation = name`. transformers makes no mask for
    a name that is not registered for masks, too."""
    ALL_ATTENTION_FUNCTIONS.register(name, function)
