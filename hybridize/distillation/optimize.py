"""Trainable parameters, their learning rates, and the optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridize.distillation.schedule import factor
from hybridize.distillation.settings import DistillSettings
from hybridize.errors import InputError, setting
from hybridize.runtime.distributed import DistributedContext, local, small


def choose_trained(student: nn.Module, settings: DistillSettings) -> None:
    """Sets requires_grad according to `train`. InputError if that selects no parameter."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(settings.trains(name))
    if not any(p.requires_grad for p in student.parameters()):
        raise InputError(f"{setting('train')} {settings.train} matches no parameter of the checkpoint")


def make_optimizer(student: nn.Module, settings: DistillSettings) -> torch.optim.AdamW:
    """Returns AdamW with betas (.9, .95). Rates follow `lr_groups`, else `lr_mixer` for mixers and
    `lr` for the rest; weight decay applies to matrices, but never to A_log.

    A_log, D and dt bias have groups of their own, because FSDP does not shard them.
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
def clip_gradients(student: nn.Module, clip: float, ranks: DistributedContext | None = None) -> Tensor:
    """Scales all gradients so that their global norm is at most `clip`; returns the norm before
    clipping, over all ranks' shards."""
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    squares = torch.stack(torch._foreach_norm([local(g) for g in grads])).float().square()
    sharded = torch.tensor([isinstance(g, DTensor) for g in grads], device=squares.device)
    total = squares[~sharded].sum() + (ranks or DistributedContext()).sum(squares[sharded].sum())
    norm = total.sqrt()
    torch._foreach_mul_([local(g) for g in grads], (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm


class Optimization:
    """Applies gradients: clipping, an AdamW step at the scheduled rate, zeroing.

    parts: modules whose gradients are clipped separately; by default all gradients are clipped
    together.
    """

    def __init__(
        self,
        trained: nn.Module,
        settings: DistillSettings,
        ranks: DistributedContext | None = None,
        parts: Sequence[nn.Module] | None = None,
    ) -> None:
        self.settings, self.ranks, self.parts = settings, ranks, [trained] if parts is None else parts
        self.adamw = make_optimizer(trained, settings)

    def clip(self) -> Tensor:
        """Clips the gradients; returns the last part's norm before clipping."""
        return [clip_gradients(part, self.settings.clip, self.ranks) for part in self.parts][-1]

    def rate(self, step: int) -> float:
        """Returns the factor on the peak rates at `step`, counted from 0."""
        settings = self.settings
        return factor(settings.schedule, step, settings.total_steps, settings.warmup)

    def update(self, step: int) -> None:
        """Takes one AdamW step at the rates of `step`."""
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * self.rate(step)
        self.adamw.step()

    def zero(self) -> None:
        """Zeroes the gradients, in place if a CUDA graph holds their addresses."""
        self.adamw.zero_grad(set_to_none=not self.settings.cuda_graph)

    def take(self, step: int, gradient: Callable[[], Tensor]) -> Tensor:
        """Takes a whole optimizer step. gradient: adds gradients and returns a value, which is
        returned."""
        value = gradient()
        self.clip()
        self.update(step)
        self.zero()
        return value
