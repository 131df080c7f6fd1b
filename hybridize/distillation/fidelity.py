"""Compares a student with its teacher on held-out text, without gradients: reverse and forward KL,
top-1 agreement, perplexity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridize.data.packing import Batch
from hybridize.distillation.losses import divergence
from hybridize.runtime.forward import CHUNK_TOKENS, hidden_states, token_logits


@dataclass(frozen=True)
class Fidelity:
    """Means over `tokens` tokens of the loss mask; KLs in nats at temperature 1.

    agreement: share of tokens for which both models find the same token most likely; perplexity:
    the student's."""

    reverse_kl: float
    forward_kl: float
    agreement: float
    perplexity: float
    tokens: int


@torch.no_grad()
def fidelity(student: nn.Module, teacher: nn.Module, batches: Iterable[Batch], dtype: torch.dtype) -> Fidelity:
    """Compares two models on the tokens in the loss masks of `batches`, which are on the models'
    device."""
    per_batch = fidelity_per_batch(student, teacher, batches, dtype)
    sums, tokens = per_batch[:, :4].sum(0), per_batch[:, 4].sum()
    means = (sums / tokens).tolist()
    return Fidelity(means[0], means[1], means[2], float(torch.exp(sums[3] / tokens)), int(tokens))


@torch.no_grad()
def fidelity_per_batch(student: nn.Module, teacher: nn.Module, batches: Iterable[Batch], dtype: torch.dtype) -> Tensor:
    """Returns sums per batch, [batches, 5] float64: reverse KL, forward KL, agreements, the
    student's negative log-likelihood, tokens."""
    rows = []
    for batch in batches:
        found = token_measures(student, teacher, batch, dtype)
        rows.append(torch.cat([found[:4].sum(1), torch.tensor([found.shape[1]], dtype=torch.float64)]))
    return torch.stack(rows)


@torch.no_grad()
def token_measures(student: nn.Module, teacher: nn.Module, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Returns metrics of each token in the loss mask, in row order, [5, n] float64 on the CPU:
    reverse KL, forward KL, whether both models find the same token most likely, and the negative
    log-likelihood of the label under the student and under the teacher."""
    kept = batch.loss_mask.flatten()
    ours, theirs = (hidden_states(m, batch, dtype).flatten(0, 1)[kept] for m in (student, teacher))
    labels, parts = batch.labels.flatten()[kept], []
    for begin in range(0, len(labels), CHUNK_TOKENS):
        part = slice(begin, begin + CHUNK_TOKENS)
        log_q = F.log_softmax(token_logits(student, ours[part], dtype), -1)
        log_p = F.log_softmax(token_logits(teacher, theirs[part], dtype), -1)
        metrics = [
            divergence("reverse-kl", log_q, log_p), divergence("forward-kl", log_q, log_p),
            (log_q.argmax(-1) == log_p.argmax(-1)).float(),
            *(F.nll_loss(logs, labels[part], reduction="none") for logs in (log_q, log_p)),
        ]  # fmt: skip
        parts.append(torch.stack(metrics).double().cpu())
    return torch.cat(parts, 1) if parts else torch.zeros(5, 0, dtype=torch.float64)
