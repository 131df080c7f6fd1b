"""What of transformers is used beside its documented classes. For the versions that it was tried on
see TRIED."""

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
    """Lets `config._attn_implementation = name` mean `function`. No mask is made for a name that
    masks do not know."""
    ALL_ATTENTION_FUNCTIONS.register(name, function)
