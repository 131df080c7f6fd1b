"""Attention over whole rows without a mask: causal, and within the documents that are packed beside
one another in a row.

transformers makes a mask of T x T for packed rows, with which no fast kernel works, and looks at
positions on the host to find out. Here the boundaries come as an argument, `cu_seq_lens_q`, which
is transformers' own name for them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from hybridize.compat.transformers import register_attention, sdpa_attention_forward

NAME = "hybridize_packed"
WIDEST_HEAD = 256  # of the flash attention that torch brings
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)  # torch 2.11 always does


def can_attend(model: Any, length: int) -> bool:
    """Whether `attend` computes what the model's own attention computes on rows of `length`."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    odd = getattr(config, "attention_dropout", 0) or getattr(config, "attn_logit_softcapping", None) is not None
    plain = config._attn_implementation in ("sdpa", NAME) and not odd
    return plain and (window is None or window >= length)


def use_packed_attention(model: Any) -> None:
    """Lets all attention layers of a model call `attend`; forward must then be told the boundaries
    of packed rows."""
    register_attention(NAME, attend)
    model.config._attn_implementation = NAME


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [B, H, T, d], key and value [B, H', T, d] -> ([B, T, H, d], None), as transformers
    calls attention functions.

    cu_seq_lens_q int32 [N + 1] among kwargs: where each document begins among all B * T positions,
    see Batch.boundaries.
    """
    bounds = kwargs.pop("cu_seq_lens_q", None)
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, None, **{**kwargs, "is_causal": True})
    batch, _, length, width = query.shape
    flash = value.is_cuda and value.dtype in (torch.bfloat16, torch.float16) and width <= WIDEST_HEAD and width % 8 == 0
    if not flash:
        index = torch.searchsorted(bounds, torch.arange(batch * length, device=bounds.device), right=True).view(batch, 1, -1)
        mask = (index.unsqueeze(-1) == index.unsqueeze(-2)).tril()
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    # rotary tables are float32 under autocast, and so are the queries and keys that they turned
    q, k, v = (t.to(value.dtype).transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    out: Any = varlen_attn(
        q, k, v, bounds, bounds, length, length, scale=kwargs.get("scaling"), window_size=(-1, 0), **_GROUPED
    )
    return out.unflatten(0, (batch, length)), None
