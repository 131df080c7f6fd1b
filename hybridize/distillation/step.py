"""The gradient of one optimizer step: micro-batch by micro-batch, launched kernel by kernel or as one CUDA graph.

Knows nothing of optimizers, data or files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybridize.distillation.losses import Loss, chunked_loss
from hybridize.distillation.measure import hidden_states, output_weight
from hybridize.distillation.packing import Batch

CAUSAL = "hybridize_causal"
WARM_UP = 3  # runs before a capture: kernels tune and compile themselves, the allocator settles


class Accumulator:
    """Adds the gradient of the mean loss over all kept tokens of a batch to the student's, micro-batch by micro-batch.

    graph: replay micro-batches of full size as a CUDA graph where `can_graph` and the batch allow it; from the first batch on,
    gradients must then be zeroed in place and never set to None.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, loss: Loss, micro: int, dtype: torch.dtype, graph: bool = False
    ) -> None:
        self.student, self.teacher, self.loss, self.micro, self.dtype = student, teacher, loss, micro, dtype
        self.wanted = graph
        self.graph: _StepGraph | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The mean, detached; zero where the batch keeps no token."""
        count, total = batch.kept, torch.zeros((), device=batch.ids.device)
        if count == 0:
            return total
        parts = batch.split(self.micro)
        if self.wanted and self.graph is None and batch.positions is None:
            self.graph = _StepGraph(self.student, self.teacher, self.loss, self.dtype, parts[0])
        for part in parts:
            if self.graph is not None and self.graph.fits(part):
                total = total + self.graph(part, count)
            else:
                kept = part.keep.flatten()
                total = total + backward(self.student, self.teacher, part, self.loss, 1 / count, self.dtype, kept)
        return total


def backward(
    student: nn.Module, teacher: nn.Module | None, part: Batch, loss: Loss, scale: float | Tensor, dtype: torch.dtype,
    kept: Tensor | None,
) -> Tensor:  # fmt: skip
    """Adds the gradient of one micro-batch and returns its part of the loss, detached.

    kept [n] bool: the tokens to compare, None for all; scale: what each one's loss is multiplied by, see chunked_loss.
    """

    def chosen(t: Tensor) -> Tensor:
        return t if kept is None else t[kept]

    hidden = chosen(hidden_states(student, part, dtype).flatten(0, 1))
    teacher_hidden = teacher_weight = None
    if teacher is not None:
        with torch.no_grad():
            teacher_hidden = chosen(hidden_states(teacher, part, dtype).flatten(0, 1))
            teacher_weight = output_weight(teacher).to(dtype)
    labels = chosen(part.labels.flatten())
    value = chunked_loss(hidden, output_weight(student), teacher_hidden, teacher_weight, labels, loss, scale=scale, dtype=dtype)
    value.backward()
    return value.detach()


class _StepGraph:
    """Forward and backward of a micro-batch of one shape, captured once and replayed: no Python and no launches in between.

    Small models wait for their launches most of the time. Only for rows of one document each (Batch.positions None): packing
    decides on the host. Holds the activations of a micro-batch for as long as it lives. `like` gives shape and device.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, loss: Loss, dtype: torch.dtype, like: Batch) -> None:
        self.batch = Batch(like.ids.clone(), None, like.labels.clone(), like.keep.clone())
        self.scale = torch.zeros(like.ids.numel(), device=like.ids.device)  # the warm-up adds gradients of zero

        def run() -> Tensor:
            return backward(student, teacher, self.batch, loss, self.scale, dtype, None)

        with _causal_attention(student, teacher):
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
