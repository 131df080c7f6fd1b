"""Finds the first tensor that is infinite or NaN after a loss or gradient became so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.data.packing import Batch
from hybridize.distillation.step import Student
from hybridize.runtime.distributed import DistributedContext, local, reshard
from hybridize.runtime.forward import hidden_states


@torch.no_grad()
def first_bad(student: Student, parts: Sequence[Batch], ranks: DistributedContext) -> str:
    """Names the first weight that is not finite, else the first module output in forward order,
    else the gradient of the last such parameter in forward order (where backward starts), else the
    loss. All ranks must call this and get the same answer."""
    model = student.model
    bad = next((name for name, parameter in model.named_parameters() if not _finite(parameter)), None)
    if where := ranks.found(f"the weight {bad}" if bad else ""):
        return where
    found: list[str] = []

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(output, Tensor) and not _finite(output):
                found.append(f"the output of {name}")

        return hook

    handles = [
        module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if not _has_children(module)
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            for part in parts:  # no early exit: gathering sharded weights needs all ranks for every part
                student(lambda model, part=part: hidden_states(model, part, student.dtype))
    finally:
        reshard(student)
        for handle in handles:
            handle.remove()
    if where := ranks.found(found[0] if found else ""):
        return where
    grads = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    return ranks.found(f"the gradient of {grads[-1]}" if grads else "") or "the loss itself"


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(local(tensor)).all())


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None
