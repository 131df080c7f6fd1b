"""Divergences between teacher and student, and the chunked projection that never holds a batch's logits.

Per token, in float32, p the teacher, q the student (DESIGN section 6). Knows nothing of models: hidden states and output
matrices in, a scalar and gradients out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridize.errors import InputError

CHUNK_TOKENS = 1024


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum q (log q - log p): [n, V] log-probabilities to [n] nats."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum p (log p - log q): [n, V] to [n] nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def js(log_q: Tensor, log_p: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, 2306.13649, section 3): [n, V] to [n] nats."""
    weights = torch.tensor([beta, 1 - beta], device=log_q.device)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]) + weights.log().view(2, 1, 1), 0)
    return beta * forward_kl(log_m, log_p) + (1 - beta) * forward_kl(log_m, log_q)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"reverse-kl": reverse_kl, "forward-kl": forward_kl, "js": js}


@dataclass(frozen=True)
class Loss:
    """A weighted sum of divergences and cross-entropy (`ce`). The temperature divides both sides' logits of the former
    and multiplies them by T^2; cross-entropy takes labels and no temperature."""

    weights: tuple[tuple[str, float], ...] = (("reverse-kl", 1.0),)
    temperature: float = 1.0

    @classmethod
    def parse(cls, text: str, temperature: float = 1.0) -> Loss:
        """`reverse-kl`, or `reverse-kl=.9,ce=.1`. InputError on an unknown name or a weight that is not positive."""
        weights = []
        for part in text.split(","):
            name, _, weight = part.strip().partition("=")
            if name not in (*DIVERGENCES, "ce"):
                raise InputError(f"--loss {name!r} is unknown; use {', '.join([*DIVERGENCES, 'ce'])}")
            try:
                value = float(weight or 1)
            except ValueError as error:
                raise InputError(f"--loss {part.strip()!r}: {weight!r} is not a number") from error
            if not 0 < value < float("inf"):
                raise InputError(f"--loss {part.strip()!r}: the weight must be positive")
            weights.append((name, value))
        if len({name for name, _ in weights}) != len(weights):
            raise InputError(f"--loss {text!r} names a loss twice")
        if not 0 < temperature < float("inf"):
            raise InputError(f"--temperature {temperature} must be positive")
        return cls(tuple(weights), temperature)

    @property
    def needs_teacher(self) -> bool:
        return any(name != "ce" for name, _ in self.weights)

    def per_token(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        """Logits [n, V] float32 and label ids [n] to [n]."""
        total = student.new_zeros(len(student))
        scale = self.temperature
        for name, weight in self.weights:
            if name == "ce":
                total = total + weight * F.cross_entropy(student, labels, reduction="none")
                continue
            assert teacher is not None
            log_q, log_p = F.log_softmax(student / scale, -1), F.log_softmax(teacher / scale, -1)
            total = total + weight * scale**2 * DIVERGENCES[name](log_q, log_p)
        return total


class _Chunked(torch.autograd.Function):
    """Projects, compares and differentiates chunk by chunk in forward; backward only scales what is there."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels, loss, dtype, count, chunk):  # type: ignore[no-untyped-def]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        cast = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for begin in range(0, len(hidden), chunk):
            rows = slice(begin, begin + chunk)
            h = hidden[rows].to(dtype)
            with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
                logits = (h @ cast.t()).float().detach().requires_grad_(need_hidden or need_weight)
                other = None
                if teacher_hidden is not None:
                    other = (teacher_hidden[rows].to(teacher_weight.dtype) @ teacher_weight.t()).float()
                part = loss.per_token(logits, other, labels[rows]).sum() / count
                if logits.requires_grad:
                    (grad,) = torch.autograd.grad(part, logits)
                    grad = grad.to(dtype)
            total += part.detach()
            if grad_hidden is not None:
                grad_hidden[rows] = (grad @ cast).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += (grad.t() @ h).float()
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        grads = [None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, *[None] * 7)


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    loss: Loss,
    *,
    count: int,
    dtype: torch.dtype = torch.float32,
    chunk: int = CHUNK_TOKENS,
) -> Tensor:
    """The summed loss of n tokens over `count`, with gradients to `hidden` and `weight`.

    hidden [n, D], weight [V, D]; teacher_hidden [n, E], teacher_weight [V, E], or None for pure cross-entropy; labels [n].
    count: kept tokens of the whole optimizer step over all micro-batches and ranks, so that any split has the same gradient.
    dtype: of the projections; the divergence is float32. Memory: about four [chunk, V] float32 tensors.
    """
    return _Chunked.apply(hidden, weight, teacher_hidden, teacher_weight, labels, loss, dtype, count, chunk)
