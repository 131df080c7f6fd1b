"""The gradient of one optimizer step: micro-batch by micro-batch, launched kernel by kernel or as one CUDA graph.

Knows nothing of optimizers, data or files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybridize.distillation.losses import Loss, chunked_loss
from hybridize.distillation.measure import hidden_states, output_weight
from hybridize.distillation.packing import Batch
from hybridize.distillation.ranks import Ranks, average_gradients

CAUSAL = "hybridize_causal"
WARM_UP = 3  # runs before a capture: kernels tune and compile themselves, the allocator settles


class Student(nn.Module):
    """The student as the module that is called: FSDP gathers all of its weights that are no layer's for the call's duration,
    the output matrix too, which the loss takes without the head's own forward."""

    def __init__(self, model: nn.Module, loss: Loss, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.loss, self.dtype = model, loss, dtype

    def forward(self, do: Callable[[nn.Module], Any]) -> Any:
        """do(model)."""
        return do(self.model)


def chosen(t: Tensor, kept: Tensor | None) -> Tensor:
    return t if kept is None else t[kept]


class Accumulator:
    """Adds the gradient of the mean loss over all kept tokens of a batch to the student's, micro-batch by micro-batch.

    Under several ranks each has its own rows; gradients are then averages over ranks of sums that `ranks.size` scaled up,
    the gradient of the mean over all ranks' tokens again. graph: replay micro-batches of full size as a CUDA graph where
    `can_graph` and the batch allow it; from the first batch on, gradients must then be zeroed in place and never set to None.
    """

    def __init__(
        self, student: Student, teacher: nn.Module | None, micro: int, ranks: Ranks | None = None, graph: bool = False
    ) -> None:
        self.student, self.teacher, self.micro, self.wanted = student, teacher, micro, graph
        self.ranks = ranks or Ranks()
        self.graph: _StepGraph | None = None

    def __call__(self, batch: Batch, count: int | None = None) -> Tensor:
        """The mean over all ranks, detached; zero where no token is kept.

        batch: this rank's rows; count: kept tokens of all ranks.
        """
        count, total = batch.kept if count is None else count, torch.zeros((), device=batch.ids.device)
        if count == 0:
            return total
        for part in batch.split(self.micro):
            total = total + self.one(part, count)
        average_gradients(self.student, self.ranks)
        return self.ranks.sum(total) / self.ranks.size

    def one(self, part: Batch, count: int) -> Tensor:
        """Adds the gradient of one micro-batch; returns its part of the mean over `count` tokens, times the number of ranks."""
        if self.wanted and self.graph is None and part.positions is None:
            self.graph = _StepGraph(self.student, self.teacher, part)
        if self.graph is not None and self.graph.fits(part):
            return self.graph(part, count)
        return backward(self.student, self.teacher, part, self.ranks.size / count, part.keep.flatten())

    def shrink(self) -> None:
        """Half as many sequences at once."""
        self.micro, self.graph = self.micro // 2, None


def backward(student: Student, teacher: nn.Module | None, part: Batch, scale: float | Tensor, kept: Tensor | None) -> Tensor:
    """Adds the gradient of one micro-batch and returns its part of the loss, detached.

    kept [n] bool: the tokens to compare, None for all; scale: what each one's loss is multiplied by, see chunked_loss.
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
    """Forward and backward of a micro-batch of one shape, captured once and replayed: no Python and no launches in between.

    Small models wait for their launches most of the time. Only for rows of one document each (Batch.positions None): packing
    decides on the host. Holds the activations of a micro-batch for as long as it lives. `like` gives shape and device.
    """

    def __init__(self, student: Student, teacher: nn.Module | None, like: Batch) -> None:
        self.batch = Batch(like.ids.clone(), None, like.labels.clone(), like.keep.clone())
        self.scale = torch.zeros(like.ids.numel(), device=like.ids.device)  # the warm-up adds gradients of zero

        def run() -> Tensor:
            return backward(student, teacher, self.batch, self.scale, None)

        with _causal_attention(student.model, teacher):
            aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    run()
            here.wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.value = run()

    def fits(self, part: Batch) -> bool:
        return part.positions is None and part.ids.shape == self.batch.ids.shape

    def __call__(self, part: Batch, count: int) -> Tensor:
        self.batch.ids.copy_(part.ids)
        self.batch.labels.copy_(part.labels)
        self.scale.copy_(part.keep.flatten())
        self.scale.div_(count)
        self.graph.replay()
        return self.value.clone()


def can_graph(student: Any, teacher: Any, length: int) -> bool:
    """Whether a graph computes what the models compute on rows of `length`: plain causal attention by SDPA, on CUDA."""
    models = [model for model in (student, teacher) if model is not None]
    windows = [getattr(model.config, "sliding_window", None) for model in models]
    return (
        next(student.parameters()).device.type == "cuda"
        and all(model.config._attn_implementation == "sdpa" for model in models)
        and all(window is None or window >= length for window in windows)
    )


def _causal(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, **{**kwargs, "is_causal": True})


@contextlib.contextmanager
def _causal_attention(*models: Any) -> Iterator[None]:
    """SDPA without a mask. During a capture transformers cannot look at positions, and makes a mask in case they restart."""
    ALL_ATTENTION_FUNCTIONS.register(CAUSAL, _causal)  # no mask is made for a name that masks do not know
    configs = {id(model.config): model.config for model in models if model is not None}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = CAUSAL
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
