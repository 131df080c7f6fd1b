"""Divergences between teacher and student, and a chunked projection that never holds the logits of
a whole batch.

Computed per token in float32; p is the teacher, q the student (docs/concepts/architecture.md,
losses). Takes hidden states and output matrices and returns a scalar with gradients; it does not
depend on any model class.

Every divergence is a sum over the vocabulary of f(p, q). With u = q df/dq, defined up to multiples
of q, which cancel in the softmax, the gradient with respect to the student's logits is
u - q sum(u).
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

CHUNK_BYTES = 640 << 20  # of a chunk's logits, student's and teacher's together; besides them only gradients take memory
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
    """Returns the divergence per token [n], in nats, of log-probabilities [n, V]."""
    return DIVERGENCES[name](log_q, log_p)[0].sum(-1)


@dataclass(frozen=True)
class Loss:
    """A weighted sum of divergences and cross-entropy (`ce`).

    temperature: T; divergences are computed on both models' logits divided by T and multiplied by
    T^2, cross-entropy ignores it. soft_cap: both models' logits first become
    cap * tanh(logits / cap) (Gemma 2)."""

    weights: tuple[tuple[str, float], ...] = (("reverse-kl", 1.0),)
    temperature: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def parse(cls, text: str, temperature: float = 1.0) -> Loss:
        """Parses `reverse-kl` or `reverse-kl=.9,ce=.1`. InputError for an unknown or repeated name,
        or for a weight or temperature that is not positive."""
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
        """Returns the loss [n] and its gradient with respect to the student's logits [n, V], both
        float32, from both models' logits [n, V] and label ids [n]."""
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
    """Returns the loss of logits [n, V], summed over tokens with weights `scale` [n]. Overwrites
    the student's logits with its gradient."""
    value, grad = loss.per_token(student, teacher, labels)
    student.copy_(grad * scale.unsqueeze(1))
    return (value * scale).sum()


@functools.cache
def _fused() -> Callable[..., Tensor]:
    """Returns `_replace`, compiled: it reads the logits three times instead of about twenty and
    stores no intermediates."""
    keep_compiled_apart()
    # each log-probability reads logits, maximum and sum, and a term uses two of them. That exceeds
    # the compiler's default for recomputing instead of storing another float32 [n, V]
    chosen = [torch.compile(_replace, options={"realize_reads_threshold": 16})]

    def replace(loss: Loss, student: Tensor, teacher: Tensor | None, labels: Tensor, scale: Tensor) -> Tensor:
        for tensor in (student, teacher, labels, scale):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return chosen[0](loss, student, teacher, labels, scale)
        except RuntimeError as error:
            if not isinstance(error, torch._dynamo.exc.TorchDynamoException) and "C compiler" not in str(error):
                raise  # not a compilation problem (a missing C compiler is reported by Triton itself)
            warnings.warn(f"the loss could not be compiled and will be slow: {first_line(error)}", stacklevel=2)
            chosen[0] = _replace
            return _replace(loss, student, teacher, labels, scale)

    return replace


class _Chunked(torch.autograd.Function):
    """Projects, computes the loss and its gradients chunk by chunk in forward; backward only scales
    the stored gradients."""

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
        if need_weight and grad_weight is None:  # no tokens here, but other ranks reduce gradients with this one
            grad_weight = torch.zeros_like(weight)
        ctx.grads = grad_hidden, grad_weight
        return total

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        grads = [None if g is None else g.mul_(upstream.to(g.dtype)) for g in ctx.grads]
        del ctx.grads  # scaled in place: they belong to the caller now
        return (*grads, *[None] * 7)


def _rows(vocabulary: int, dtype: torch.dtype) -> int:
    """Returns the number of tokens per chunk, a multiple of 128 where that fits."""
    rows = CHUNK_BYTES // (2 * vocabulary * dtype.itemsize)
    return max(1, rows // 128 * 128 or rows)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns total + left @ right in `dtype`, in place where possible. The factors may have a
    narrower type."""
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
    """Returns the loss summed over n tokens with weights `scale`, differentiable once with respect
    to `hidden` and `weight`.

    hidden [n, D], weight [V, D], labels [n]. teacher_hidden [n, E] and teacher_weight [V, E]; both
    None for pure cross-entropy; or the teacher's logits [n, V] as teacher_hidden and no weight.
    scale: a number, or [n] float32; 1 / (tokens in the loss mask of the whole optimizer step, over
    all micro-batches and ranks) gives the same gradient for any split. dtype: of the projections
    and of the logits' gradient; the divergence is float32. chunk: tokens at a time, by default as
    many as CHUNK_BYTES allow. Lower bound of the cost: four products of n D V multiply-adds (three
    with a frozen head) and three passes over the logits.
    """
    if not isinstance(scale, Tensor):
        scale = torch.full((len(hidden),), scale, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Chunked.apply(hidden, weight, teacher_hidden, teacher_weight, labels, loss, dtype, scale, chunk)
