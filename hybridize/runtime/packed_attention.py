"""Causal attention over whole rows without a mask, restricted to the documents packed into each
row.

For packed rows transformers builds a mask of T x T, which rules out fast kernels, and inspects the
positions on the host. Here the boundaries are an argument, `cu_seq_lens_q`, as transformers names
it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from hybridize.compat.transformers import register_attention, sdpa_attention_forward

NAME = "hybridize_packed"
WIDEST_HEAD = 256  # the limit of torch's flash attention
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)  # torch 2.11 always groups heads


def can_attend(model: Any, length: int) -> bool:
    """Returns whether `attend` gives the same result as the model's own attention on rows of
    `length`."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    extra = getattr(config, "attention_dropout", 0) or getattr(config, "attn_logit_softcapping", None) is not None
    plain = config._attn_implementation in ("sdpa", NAME) and not extra
    return plain and (window is None or window >= length)


def use_packed_attention(model: Any) -> None:
    """Makes all attention layers of a model call `attend`; forward then needs the boundaries of
    packed rows (cu_seq_lens_q)."""
    register_attention(NAME, attend)
    model.config._attn_implementation = NAME


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention function as transformers calls it: query [B, H, T, d], key and value [B, H', T, d]
    -> ([B, T, H, d], None).

    kwargs may contain cu_seq_lens_q int32 [N + 1], the position where each document begins among
    all B * T positions (see Batch.boundaries). attention_mask is ignored.
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
    # rotary tables are float32 under autocast, and so are the rotated queries and keys
    q, k, v = (t.to(value.dtype).transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    out: Any = varlen_attn(
        q, k, v, bounds, bounds, length, length, scale=kwargs.get("scaling"), window_size=(-1, 0), **_GROUPED
    )
    return out.unflatten(0, (batch, length)), None
