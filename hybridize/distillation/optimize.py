"""What is trained, at which rate, and the optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridize.distillation.settings import DistillSettings
from hybridize.errors import InputError, setting
from hybridize.runtime.distributed import Ranks, local, small


def choose_trained(student: nn.Module, settings: DistillSettings) -> None:
    """Sets requires_grad by `train`. InputError when nothing is left to train."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(settings.trains(name))
    if not any(p.requires_grad for p in student.parameters()):
        raise InputError(f"{setting('train')} {settings.train}: no parameter of the checkpoint has such a name")


def make_optimizer(student: nn.Module, settings: DistillSettings) -> torch.optim.AdamW:
    """AdamW (.9, .95); rates by `lr_groups`, else one for mixers and one for the rest; decay only on matrices, never on A_log.

    A_log, D and dt bias are apart from the rest: under FSDP they are no sharded tensors.
    """
    apart = small(student)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith("A_log")
            key = settings.rate_of(name), 0.0 if plain else settings.weight_decay, name in apart
            groups.setdefault(key, []).append(parameter)
    fused = next(student.parameters()).device.type == "cuda"
    parts = [{"params": params, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay, _), params in groups.items()]
    return torch.optim.AdamW(parts, betas=(0.9, 0.95), fused=fused)


@torch.no_grad()
def clip_gradients(student: nn.Module, clip: float, ranks: Ranks | None = None) -> Tensor:
    """Scales all gradients to a common norm of at most `clip`; returns the norm before, over all ranks' shards."""
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    squares = torch.stack(torch._foreach_norm([local(g) for g in grads])).float().square()
    sharded = torch.tensor([isinstance(g, DTensor) for g in grads], device=squares.device)
    total = squares[~sharded].sum() + (ranks or Ranks()).sum(squares[sharded].sum())
    norm = total.sqrt()
    torch._foreach_mul_([local(g) for g in grads], (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm


def update(optimizer: torch.optim.AdamW, factor: float) -> None:
    """One optimizer step at `factor` of the peak rates."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    optimizer.step()
