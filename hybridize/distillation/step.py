"""The gradient of one optimizer step: micro-batch by micro-batch, launched kernel by kernel or as
one CUDA graph.

Knows nothing of optimizers, data or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.checkpoint.experts import has_experts
from hybridize.data.packing import Batch
from hybridize.distillation.losses import Loss, chunked_loss
from hybridize.runtime import packed_attention as attention
from hybridize.runtime.device import captured
from hybridize.runtime.distributed import DistributedContext, average_gradients
from hybridize.runtime.forward import hidden_states, output_weight, soft_cap


class Student(nn.Module):
    """The student as the module that is called: FSDP gathers all of its weights that are no layer's
    for the call's duration, the output matrix too, which the loss takes without the head's own
    forward."""

    def __init__(self, model: nn.Module, loss: Loss, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.loss, self.dtype = model, dataclasses.replace(loss, soft_cap=soft_cap(model)), dtype

    def forward(self, do: Callable[[nn.Module], Any]) -> Any:
        """do(model)."""
        return do(self.model)


def chosen(t: Tensor, kept: Tensor | None) -> Tensor:
    return t if kept is None else t[kept]


class Accumulator:
    """Adds the gradient of the mean loss over all kept tokens of a batch to the student's,
    micro-batch by micro-batch.

    Under several ranks each has its own rows; gradients are then averages over ranks of sums that
    `ranks.size` scaled up, the gradient of the mean over all ranks' tokens again. graph: replay
    micro-batches of full size as a CUDA graph, where `can_graph` says so; from the first batch on,
    gradients must then be zeroed in place and never set to None.
    """

    def __init__(
        self,
        student: Student,
        teacher: nn.Module | None,
        micro: int,
        ranks: DistributedContext | None = None,
        graph: bool = False,
    ) -> None:
        self.student, self.teacher, self.micro, self.wanted = student, teacher, micro, graph
        self.ranks = ranks or DistributedContext()
        self.graph: _StepGraph | None = None

    def __call__(self, batch: Batch, count: int | None = None) -> Tensor:
        """The mean over all ranks, detached; zero where no token is kept.

        batch: this rank's rows; count: kept tokens of all ranks.
        """
        count = batch.kept if count is None else count
        return self.averaged(self.add(batch, count), count)

    def add(self, batch: Batch, count: int) -> Tensor:
        """This rank's part of it: no rank waits for another here, unless its weights are sharded."""
        total = torch.zeros((), device=batch.ids.device)
        for part in batch.split(self.micro) if count else ():
            total = total + self.one(part, count)
        return total

    def averaged(self, total: Tensor, count: int) -> Tensor:
        """The mean over all ranks, of what `add` returned and of gradients that are not sharded."""
        if count == 0:
            return total
        average_gradients(self.student, self.ranks)
        return self.ranks.sum(total) / self.ranks.size

    def one(self, part: Batch, count: int) -> Tensor:
        """Adds the gradient of one micro-batch; returns its part of the mean over `count` tokens,
        times the number of ranks."""
        if self.wanted and self.graph is None:
            self.graph = _StepGraph(self.student, self.teacher, part)
        if self.graph is not None and self.graph.fits(part):
            return self.graph(part, self.ranks.size / count)
        return backward(self.student, self.teacher, part, self.ranks.size / count, part.loss_mask.flatten())

    def shrink(self) -> None:
        """Half as many sequences at once."""
        self.micro, self.graph = self.micro // 2, None


def backward(student: Student, teacher: nn.Module | None, part: Batch, scale: float | Tensor, kept: Tensor | None) -> Tensor:
    """Adds the gradient of one micro-batch and returns its part of the loss, detached.

    kept [n] bool: the tokens to compare, None for all; scale: what each one's loss is multiplied
    by, see chunked_loss.
    """
    dtype = student.dtype
    guide: tuple[Tensor | None, Tensor | None] = (None, None)
    if teacher is not None:
        with torch.no_grad():
            theirs = chosen(hidden_states(teacher, part, dtype).flatten(0, 1), kept)
            guide = theirs, output_weight(teacher).to(dtype)

    def loss(model: nn.Module) -> Tensor:
        ours = chosen(hidden_states(model, part, dtype).flatten(0, 1), kept)
        labels = chosen(part.labels.flatten(), kept)
        return chunked_loss(ours, output_weight(model), *guide, labels, student.loss, scale=scale, dtype=dtype)

    value = student(loss)
    value.backward()
    return value.detach()


class _StepGraph:
    """Forward and backward of a micro-batch of one shape, captured once and replayed: no Python and
    no launches in between.

    Small models wait for their launches most of the time. Holds the activations of a micro-batch
    for as long as it lives. Rows are packed, or not, as in `like`, with room for twice as many
    documents a row; packed rows only without `mamba` layers, which look for documents on the host.
    """

    def __init__(self, student: Student, teacher: nn.Module | None, like: Batch) -> None:
        positions = None if like.positions is None else like.positions.clone()
        self.batch = Batch(like.ids.clone(), positions, like.labels.clone(), like.loss_mask.clone())
        self.batch.__dict__["documents"] = 2 * like.documents
        self.scale = torch.zeros(like.ids.numel(), device=like.ids.device)  # the warm-up adds gradients of zero

        def run() -> Tensor:
            return backward(student, teacher, self.batch, self.scale, None)

        self.graph, self.value = captured(run)

    def fits(self, part: Batch) -> bool:
        packed = part.positions is not None, self.batch.positions is not None
        return packed[0] == packed[1] and part.ids.shape == self.batch.ids.shape and part.documents <= self.batch.documents

    def __call__(self, part: Batch, scale: float) -> Tensor:
        self.batch.ids.copy_(part.ids)
        self.batch.labels.copy_(part.labels)
        if self.batch.positions is not None and part.positions is not None:
            self.batch.positions.copy_(part.positions)
        self.scale.copy_(part.loss_mask.flatten())
        self.scale.mul_(scale)
        self.graph.replay()
        return self.value.clone()


def can_graph(*models: Any) -> bool:
    """Whether a step of these models can be captured: on CUDA, with attention that looks at nothing
    on the host, and without experts, whose tokens are counted there."""
    given = [model for model in models if model is not None]
    if any(has_experts(model) for model in given):
        return False
    return all(m.device.type == "cuda" and m.config._attn_implementation == attention.NAME for m in given)
