"""The gradient of one optimizer step, accumulated over micro-batches, each run eagerly or as one
CUDA graph.

Does not depend on optimizers, data sources or files.
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
    """Wraps the student so that FSDP gathers the weights outside its layers for the duration of a
    call, including the output matrix, which the loss uses without calling the head."""

    def __init__(self, model: nn.Module, loss: Loss, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.loss, self.dtype = model, dataclasses.replace(loss, soft_cap=soft_cap(model)), dtype

    def forward(self, do: Callable[[nn.Module], Any]) -> Any:
        """Returns do(model)."""
        return do(self.model)


def chosen(t: Tensor, kept: Tensor | None) -> Tensor:
    return t if kept is None else t[kept]


class Accumulator:
    """Adds the gradient of the mean loss over a batch's tokens in the loss mask to the student's
    gradients, micro-batch by micro-batch.

    With several ranks each has its own rows. Each rank scales its sum by `ranks.size` and gradients
    are averaged over ranks, which gives the gradient of the mean over all ranks' tokens. graph:
    replay full-size micro-batches as a CUDA graph (requires `can_graph`); gradients must then be
    zeroed in place from the first batch on, never set to None.
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
        """Adds the gradient of one batch and returns the mean loss over all ranks, detached; zero
        if no token is in the loss mask.

        batch: this rank's rows; count: tokens in the loss masks of all ranks.
        """
        count = batch.kept if count is None else count
        return self.averaged(self.add(batch, count), count)

    def add(self, batch: Batch, count: int) -> Tensor:
        """Adds this rank's gradient and returns its part of the loss. Does not communicate unless
        weights are sharded."""
        total = torch.zeros((), device=batch.ids.device)
        for part in batch.split(self.micro) if count else ():
            total = total + self.one(part, count)
        return total

    def averaged(self, total: Tensor, count: int) -> Tensor:
        """Averages the gradients that are not sharded over all ranks, and returns the mean over
        ranks of `total`, the loss from `add`."""
        if count == 0:
            return total
        average_gradients(self.student, self.ranks)
        return self.ranks.sum(total) / self.ranks.size

    def one(self, part: Batch, count: int) -> Tensor:
        """Adds the gradient of one micro-batch; returns its part of the mean loss over `count`
        tokens, times the number of ranks."""
        if self.wanted and self.graph is None:
            self.graph = _StepGraph(self.student, self.teacher, part)
        if self.graph is not None and self.graph.fits(part):
            return self.graph(part, self.ranks.size / count)
        return backward(self.student, self.teacher, part, self.ranks.size / count, part.loss_mask.flatten())

    def shrink(self) -> None:
        """Halves the micro-batch size."""
        self.micro, self.graph = self.micro // 2, None


def backward(student: Student, teacher: nn.Module | None, part: Batch, scale: float | Tensor, kept: Tensor | None) -> Tensor:
    """Adds the gradient of one micro-batch and returns its part of the loss, detached.

    kept [n] bool: the flattened loss mask, None for all tokens; scale: weight of each token's loss,
    see chunked_loss.
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
    """Forward and backward of a micro-batch of one shape, captured once as a CUDA graph and
    replayed, since kernel launches dominate the time of small models.

    Holds the activations of a micro-batch for its lifetime. Rows are packed if those of `like` are,
    with room for twice as many documents per row. Packed rows are not possible with `mamba` layers,
    which find document boundaries on the host.
    """

    def __init__(self, student: Student, teacher: nn.Module | None, like: Batch) -> None:
        positions = None if like.positions is None else like.positions.clone()
        self.batch = Batch(like.ids.clone(), positions, like.labels.clone(), like.loss_mask.clone())
        self.batch.__dict__["documents"] = 2 * like.documents
        self.scale = torch.zeros(like.ids.numel(), device=like.ids.device)  # zero, so that the warm-up adds zero gradients

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
    """Whether a step of these models can be captured: they are on CUDA, their attention does not
    read from the host, and they have no experts, whose tokens are counted on the host."""
    given = [model for model in models if model is not None]
    if any(has_experts(model) for model in given):
        return False
    return all(m.device.type == "cuda" and m.config._attn_implementation == attention.NAME for m in given)
