"""Forward passes up to the output matrix, for teachers and hybrids of every family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridize.data.packing import Batch
from hybridize.modeling import soft_capped
from hybridize.runtime import packed_attention as attention

CHUNK_TOKENS = 1024


def output_weight(model: Any) -> Tensor:
    """Returns the output matrix [V, D] of a causal LM."""
    return model.get_output_embeddings().weight


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Returns an autocast context for `dtype`, disabled for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def hidden_states(model: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Returns the final hidden states [B, T, D], after the last norm and scaled for the output
    matrix (see before_output), computed in `dtype`."""
    kwargs = {}
    if batch.positions is not None and model.config._attn_implementation == attention.NAME:
        kwargs["cu_seq_lens_q"] = batch.boundaries(batch.documents)
    with autocast(batch.ids.device, dtype):
        out = model.base_model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **kwargs)
    return before_output(model, out.last_hidden_state)


def before_output(model: Any, hidden: Tensor) -> Tensor:
    """Returns final hidden states scaled so that their product with the output matrix gives the
    logits: some families divide the logits (Granite)."""
    scaling = getattr(model.config, "logits_scaling", 1.0)
    return hidden if scaling == 1 else hidden / scaling


def soft_cap(model: Any) -> float | None:
    """Returns the soft cap of the family's logits, cap * tanh(logits / cap) (Gemma 2), or None."""
    return getattr(model.config, "final_logit_softcapping", None)


@torch.no_grad()
def token_logits(model: Any, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the logits [n, V] in float32 of n rows [n, D] of `hidden_states`."""
    return soft_capped((hidden.to(dtype) @ output_weight(model).to(dtype).t()).float(), soft_cap(model))
