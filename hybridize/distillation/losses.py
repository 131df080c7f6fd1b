"""Divergences between teacher and student, and the chunked projection that never holds a batch's
logits.

Per token, in float32, p the teacher, q the student (docs/concepts/architecture.md, losses). Knows
nothing of models: hidden states and output matrices in, a scalar and gradients out.

Every divergence is a sum over the vocabulary of f(p, q), and so is all that its gradient needs:
with u = q df/dq, up to multiples of q, which the softmax takes out, the gradient to the student's
logits is u - q sum(u).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridize.errors import InputError, first_line, setting
from hybridize.modeling import soft_capped
from hybridize.parsing import named_numbers
from hybridize.runtime.device import keep_compiled_apart

CHUNK_BYTES = 640 << 20  # of logits, student's and teacher's together: all that a chunk needs besides the gradients
Terms = tuple[Tensor, Tensor]  # f and u, [n, V]


def _reverse_kl(log_q: Tensor, log_p: Tensor) -> Terms:
    value = log_q.exp() * (log_q - log_p)
    return value, value


def _forward_kl(log_q: Tensor, log_p: Tensor) -> Terms:
    p = log_p.exp()
    return p * (log_p - log_q), -p


def _js(log_q: Tensor, log_p: Tensor) -> Terms:
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2 (GKD, 2306.13649, section 3)."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    ours = 0.5 * log_q.exp() * (log_q - log_m)
    return 0.5 * log_p.exp() * (log_p - log_m) + ours, ours


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Terms]] = {"reverse-kl": _reverse_kl, "forward-kl": _forward_kl, "js": _js}


def divergence(name: str, log_q: Tensor, log_p: Tensor) -> Tensor:
    """[n, V] log-probabilities to [n] nats."""
    return DIVERGENCES[name](log_q, log_p)[0].sum(-1)


@dataclass(frozen=True)
class Loss:
    """A weighted sum of divergences and cross-entropy (`ce`). The temperature divides both sides'
    logits of the former and multiplies them by T^2; cross-entropy takes labels and no temperature.
    soft_cap: both sides' logits are cap * tanh(logits / cap) before all else (Gemma 2)."""

    weights: tuple[tuple[str, float], ...] = (("reverse-kl", 1.0),)
    temperature: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def parse(cls, text: str, temperature: float = 1.0) -> Loss:
        """`reverse-kl`, or `reverse-kl=.9,ce=.1`. InputError on an unknown name or a weight that is
        not positive."""
        weights = named_numbers(text, "loss", 1.0)
        for name, _ in weights:
            if name not in (*DIVERGENCES, "ce"):
                raise InputError(f"{setting('loss')} {name!r} is unknown; use {', '.join([*DIVERGENCES, 'ce'])}")
        if len({name for name, _ in weights}) != len(weights):
            raise InputError(f"{setting('loss')} {text!r} names a loss twice")
        if not 0 < temperature < float("inf"):
            raise InputError(f"{setting('temperature')} {temperature} must be positive")
        return cls(tuple(weights), temperature)

    @property
    def needs_teacher(self) -> bool:
        return any(name != "ce" for name, _ in self.weights)

    def per_token(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, V] and label ids [n] to the loss [n], float32, and its gradient to the
        student's logits, float32."""
        scale, cap, student = self.temperature, self.soft_cap, student.float()
        student = soft_capped(student, cap)
        if teacher is not None:
            teacher = soft_capped(teacher.float(), cap)
        value, grad = student.new_zeros(len(student)), torch.zeros_like(student)
        mixed = [(weight, DIVERGENCES[name]) for name, weight in self.weights if name != "ce"]
        if mixed:
            assert teacher is not None
            log_q, log_p = F.log_softmax(student / scale, -1), F.log_softmax(teacher / scale, -1)
            found = [(weight * f, weight * u) for weight, (f, u) in ((w, terms(log_q, log_p)) for w, terms in mixed)]
            f, u = (functools.reduce(torch.add, parts) for parts in zip(*found, strict=True))
            value = value + scale**2 * f.sum(-1)
            grad = grad + scale * (u - log_q.exp() * u.sum(-1, keepdim=True))
        for name, weight in self.weights:
            if name == "ce":
                log_q = F.log_softmax(student, -1)
                value = value - weight * log_q.gather(1, labels.unsqueeze(1)).squeeze(1)
                chosen = torch.arange(student.shape[1], device=student.device) == labels.unsqueeze(1)
                grad = grad + weight * (log_q.exp() - chosen.float())
        return value, grad if cap is None else grad * (1 - (student / cap).square())


def _replace(loss: Loss, student: Tensor, teacher: Tensor | None, labels: Tensor, scale: Tensor) -> Tensor:
    """The summed loss of logits [n, V], each token's times its `scale` [n]; its gradient replaces
    the student's logits."""
    value, grad = loss.per_token(student, teacher, labels)
    student.copy_(grad * scale.unsqueeze(1))
    return (value * scale).sum()


@functools.cache
def _fused() -> Callable[..., Tensor]:
    """`_replace`, compiled: it reads the logits three times instead of some twenty and keeps
    nothing in between."""
    keep_compiled_apart()
    # a log-probability reads logits, maximum and sum, a term two of them: more than what the
    # compiler by itself computes twice instead of keeping it as another float32 [n, V]
    chosen = [torch.compile(_replace, options={"realize_reads_threshold": 16})]

    def replace(loss: Loss, student: Tensor, teacher: Tensor | None, labels: Tensor, scale: Tensor) -> Tensor:
        for tensor in (student, teacher, labels, scale):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return chosen[0](loss, student, teacher, labels, scale)
        except RuntimeError as error:
            if not isinstance(error, torch._dynamo.exc.TorchDynamoException) and "C compiler" not in str(error):
                raise  # Triton says of itself that it has no C compiler; all else is no matter of compiling
            warnings.warn(f"the loss could not be compiled and will be slow: {first_line(error)}", stacklevel=2)
            chosen[0] = _replace
            return _replace(loss, student, teacher, labels, scale)

    return replace


class _Chunked(torch.autograd.Function):
    """Projects, compares and differentiates chunk by chunk in forward; backward only scales what is
    there."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels, loss, dtype, scale, chunk):  # type: ignore[no-untyped-def]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        cast, vocabulary = weight.detach().to(dtype), len(weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        chunk = min(chunk or _rows(vocabulary, dtype), max(1, len(hidden)))
        ours = hidden.new_empty(chunk, vocabulary, dtype=dtype)
        project = teacher_weight is not None
        theirs = hidden.new_empty(chunk, vocabulary, dtype=teacher_weight.dtype) if project else None
        replace = _fused() if hidden.is_cuda else _replace
        for begin in range(0, len(hidden), chunk):
            h = hidden[begin : begin + chunk].detach().to(dtype)
            logits = torch.mm(h, cast.t(), out=ours[: len(h)])
            other = None
            if teacher_hidden is not None:
                other = teacher_hidden[begin : begin + chunk]
                if theirs is not None:
                    other = torch.mm(other.to(teacher_weight.dtype), teacher_weight.t(), out=theirs[: len(h)])
            total += replace(loss, logits, other, labels[begin : begin + chunk], scale[begin : begin + chunk])
            if grad_hidden is not None:
                grad_hidden[begin : begin + chunk] = logits @ cast
            if need_weight:
                grad_weight = _add_product(grad_weight, logits.t(), h, weight.dtype)
        if need_weight and grad_weight is None:  # no token at all: other ranks may have some, and wait for this one's zeros
            grad_weight = torch.zeros_like(weight)
        ctx.grads = grad_hidden, grad_weight
        return total

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        grads = [None if g is None else g.mul_(upstream.to(g.dtype)) for g in ctx.grads]
        del ctx.grads  # they are the caller's now
        return (*grads, *[None] * 7)


def _rows(vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens a chunk, a multiple of 128 where that fits."""
    rows = CHUNK_BYTES // (2 * vocabulary * dtype.itemsize)
    return max(1, rows // 128 * 128 or rows)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right as `dtype`, where a product's type is narrower on the way in, but not on
    the way out; in place."""
    if left.dtype == dtype:
        return left @ right if total is None else total.addmm_(left, right)
    if left.is_cuda and dtype == torch.float32:
        if total is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.addmm(total, left, right, out_dtype=dtype, out=total)
    product = (left @ right).to(dtype)
    return product if total is None else total.add_(product)


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    loss: Loss,
    *,
    scale: float | Tensor,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
) -> Tensor:
    """The summed loss of n tokens, each times its `scale`, with gradients to `hidden` and `weight`,
    once.

    hidden [n, D], weight [V, D]; teacher_hidden [n, E], teacher_weight [V, E], or both None for
    pure cross-entropy, or in place of the hidden states the teacher's logits [n, V] and no weight;
    labels [n]. scale: one, or [n] float32: over the kept tokens of the whole optimizer step, all
    micro-batches and ranks, so that any split has the same gradient. dtype: of the projections and
    of the logits' gradient; the divergence is float32. chunk: tokens at a time, by default what
    CHUNK_BYTES hold. Floor: four products of n D V multiply-adds (three with a frozen head) and
    three passes over the logits.
    """
    if not isinstance(scale, Tensor):
        scale = torch.full((len(hidden),), scale, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Chunked.apply(hidden, weight, teacher_hidden, teacher_weight, labels, loss, dtype, scale, chunk)
