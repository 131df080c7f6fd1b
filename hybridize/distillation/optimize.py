"""What is trained, at which rate, and the optimizer step."""

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
    """Sets requires_grad by `train`. InputError when nothing is left to train."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(settings.trains(name))
    if not any(p.requires_grad for p in student.parameters()):
        raise InputError(f"{setting('train')} {settings.train}: no parameter of the checkpoint has such a name")


def make_optimizer(student: nn.Module, settings: DistillSettings) -> torch.optim.AdamW:
    """AdamW (.9, .95); rates by `lr_groups`, else one for mixers and one for the rest; decay only
    on matrices, never on A_log.

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
def clip_gradients(student: nn.Module, clip: float, ranks: DistributedContext | None = None) -> Tensor:
    """Scales all gradients to a common norm of at most `clip`; returns the norm before, over all
    ranks' shards."""
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    squares = torch.stack(torch._foreach_norm([local(g) for g in grads])).float().square()
    sharded = torch.tensor([isinstance(g, DTensor) for g in grads], device=squares.device)
    total = squares[~sharded].sum() + (ranks or DistributedContext()).sum(squares[sharded].sum())
    norm = total.sqrt()
    torch._foreach_mul_([local(g) for g in grads], (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm


class Optimization:
    """What follows each gradient: clipping, one AdamW step at the schedule's rate, zeroed
    gradients.

    parts: modules whose gradients are clipped each by itself; all that is trained together unless
    given.
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
        """Scales the gradients; returns the norm before, of the last part."""
        return [clip_gradients(part, self.settings.clip, self.ranks) for part in self.parts][-1]

    def rate(self, step: int) -> float:
        """The share of the peak rates at `step`, from 0."""
        settings = self.settings
        return factor(settings.schedule, step, settings.total_steps, settings.warmup)

    def update(self, step: int) -> None:
        """One optimizer step at the rates of `step`."""
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * self.rate(step)
        self.adamw.step()

    def zero(self) -> None:
        """Gradients are zero again; in place where a CUDA graph holds their addresses."""
        self.adamw.zero_grad(set_to_none=not self.settings.cuda_graph)

    def take(self, step: int, gradient: Callable[[], Tensor]) -> Tensor:
        """A whole optimizer step: what `gradient` returns, once it has added gradients."""
        value = gradient()
        self.clip()
        self.update(step)
        self.zero()
        return value
