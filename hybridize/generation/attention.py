"""Attention of one new token per sequence over a preallocated KV cache, with a separate length for
each sequence.

`kernel` is a Triton kernel on a CUDA device, `torch` is plain PyTorch. Both read each key and value
once for all query heads that share it.

Shapes: B sequences, H query heads, K KV heads, S cache slots, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hybridize.compat.transformers import register_attention
from hybridize.modeling import missing_on_cuda

NAME = "hybridize_decode"


def triton_missing() -> str | None:
    """Returns why the kernel cannot run here, or None if it can."""
    return missing_on_cuda("triton")


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    scale: float,
    cap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Returns softmax(scale q k^T) v over the first min(counts, S) slots of each sequence, [B, H,
    d] in values' dtype.

    query [B, H, d]; keys, values [B, K, S, d]; counts [B] int, at least 1; cap: Gemma 2's soft cap
    on the scores.
    """
    if backend is None:
        backend = "kernel" if query.is_cuda and triton_missing() is None else "torch"
    if backend == "kernel":
        from .decode_kernel import attend

        return attend(query, keys, values, counts, scale, cap)
    groups = query.unflatten(1, (keys.shape[1], -1)).float()
    scores = groups @ keys.float().transpose(-1, -2) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    beyond = torch.arange(keys.shape[2], device=keys.device) >= counts.unsqueeze(-1)
    weights = scores.masked_fill(beyond[:, None, None], -torch.inf).softmax(-1)
    return (weights @ values.float()).flatten(1, 2).to(values.dtype)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, counts: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention function as transformers calls it: query [B, H, 1, d] -> ([B, 1, H, d], None).
    Windows are handled by the cache."""
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return decode_attention(query[:, :, 0], key, value, counts, scale, kwargs.get("softcap")).unsqueeze(1), None


register_attention(NAME, _attend)
