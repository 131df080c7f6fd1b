"""How far a student is from its teacher on held-out text: both KLs, top-1 agreement, perplexity. No gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridize.distillation import attention
from hybridize.distillation.losses import divergence
from hybridize.distillation.packing import Batch
from hybridize.modeling import soft_capped

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Fidelity:
    """Means over `tokens` kept tokens, nats at temperature 1; agreement: same most likely token; perplexity: the student's."""

    reverse_kl: float
    forward_kl: float
    agreement: float
    perplexity: float
    tokens: int


def output_weight(model: Any) -> Tensor:
    """The output matrix [V, D] of a causal LM."""
    return model.get_output_embeddings().weight


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Products in `dtype`; off for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def hidden_states(model: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Final hidden states [B, T, D], after the last norm, as the output matrix wants them; computed in `dtype`."""
    told = {}
    if batch.positions is not None and model.config._attn_implementation == attention.NAME:
        told["cu_seq_lens_q"] = batch.boundaries(batch.documents)
    with autocast(batch.ids.device, dtype):
        out = model.base_model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **told)
    return before_output(model, out.last_hidden_state)


def before_output(model: Any, hidden: Tensor) -> Tensor:
    """Final hidden states as the output matrix alone makes logits of them: some families divide the logits (Granite)."""
    scaling = getattr(model.config, "logits_scaling", 1.0)
    return hidden if scaling == 1 else hidden / scaling


def soft_cap(model: Any) -> float | None:
    """What the family bends its logits with, cap * tanh(logits / cap) (Gemma 2), or None."""
    return getattr(model.config, "final_logit_softcapping", None)


@torch.no_grad()
def token_logits(model: Any, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, V] float32 of `hidden_states` [n, D]."""
    return soft_capped((hidden.to(dtype) @ output_weight(model).to(dtype).t()).float(), soft_cap(model))


@torch.no_grad()
def fidelity(student: nn.Module, teacher: nn.Module, batches: Iterable[Batch], dtype: torch.dtype) -> Fidelity:
    """Compares two models on the kept tokens of `batches`, which lie on the models' device."""
    per_batch = fidelity_per_batch(student, teacher, batches, dtype)
    sums, tokens = per_batch[:, :4].sum(0), per_batch[:, 4].sum()
    means = (sums / tokens).tolist()
    return Fidelity(means[0], means[1], means[2], float(torch.exp(sums[3] / tokens)), int(tokens))


@torch.no_grad()
def fidelity_per_batch(student: nn.Module, teacher: nn.Module, batches: Iterable[Batch], dtype: torch.dtype) -> Tensor:
    """[batches, 5] float64 sums: reverse KL, forward KL, agreements, negative log-likelihood, tokens."""
    rows = []
    for batch in batches:
        found = token_measures(student, teacher, batch, dtype)
        rows.append(torch.cat([found[:4].sum(1), torch.tensor([found.shape[1]], dtype=torch.float64)]))
    return torch.stack(rows)


@torch.no_grad()
def token_measures(student: nn.Module, teacher: nn.Module, batch: Batch, dtype: torch.dtype) -> Tensor:
    """[5, n] float64 on the CPU, of each kept token in row order: reverse KL, forward KL, whether both find the same token the
    likeliest, and the negative log-likelihood of the label by the student and by the teacher."""
    kept = batch.keep.flatten()
    ours, theirs = (hidden_states(m, batch, dtype).flatten(0, 1)[kept] for m in (student, teacher))
    labels, parts = batch.labels.flatten()[kept], []
    for begin in range(0, len(labels), CHUNK_TOKENS):
        part = slice(begin, begin + CHUNK_TOKENS)
        log_q = F.log_softmax(token_logits(student, ours[part], dtype), -1)
        log_p = F.log_softmax(token_logits(teacher, theirs[part], dtype), -1)
        measures = [
            divergence("reverse-kl", log_q, log_p), divergence("forward-kl", log_q, log_p),
            (log_q.argmax(-1) == log_p.argmax(-1)).float(),
            *(F.nll_loss(logs, labels[part], reduction="none") for logs in (log_q, log_p)),
        ]  # fmt: skip
        parts.append(torch.stack(measures).double().cpu())
    return torch.cat(parts, 1) if parts else torch.zeros(5, 0, dtype=torch.float64)
