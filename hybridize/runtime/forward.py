"""Forward passes up to the output matrix, the same for teachers and hybrids of every family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridize.data.packing import Batch
from hybridize.modeling import soft_capped
from hybridize.runtime import packed_attention as attention

CHUNK_TOKENS = 1024


def output_weight(model: Any) -> Tensor:
    """The output matrix [V, D] of a causal LM."""
    return model.get_output_embeddings().weight


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Products in `dtype`; off for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def hidden_states(model: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Final hidden states [B, T, D], after the last norm, as the output matrix wants them; computed
    in `dtype`."""
    told = {}
    if batch.positions is not None and model.config._attn_implementation == attention.NAME:
        told["cu_seq_lens_q"] = batch.boundaries(batch.documents)
    with autocast(batch.ids.device, dtype):
        out = model.base_model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **told)
    return before_output(model, out.last_hidden_state)


def before_output(model: Any, hidden: Tensor) -> Tensor:
    """Final hidden states as the output matrix alone makes logits of them: some families divide the
    logits (Granite)."""
    scaling = getattr(model.config, "logits_scaling", 1.0)
    return hidden if scaling == 1 else hidden / scaling


def soft_cap(model: Any) -> float | None:
    """What the family bends its logits with, cap * tanh(logits / cap) (Gemma 2), or None."""
    return getattr(model.config, "final_logit_softcapping", None)


@torch.no_grad()
def token_logits(model: Any, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, V] float32 of `hidden_states` [n, D]."""
    return soft_capped((hidden.to(dtype) @ output_weight(model).to(dtype).t()).float(), soft_cap(model))
