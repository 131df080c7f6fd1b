"""MIL-Mamba-Replacement: how far a few steps of distillation bring each attention layer once it is a mixer
(Apriel-H1, 2511.02651, section 3). Each layer alone is converted, trained on the same batches, and put back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.checkpoint.scores import LayerScore
from hybridize.distillation.losses import Loss
from hybridize.distillation.optimize import clip_gradients, make_optimizer, update
from hybridize.distillation.packing import Batch
from hybridize.distillation.schedule import factor
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.step import Accumulator, Student
from hybridize.errors import InputError, WorkError
from hybridize.modeling import HybridForCausalLM, converted_layer
from hybridize.scoring.interface import Progress

LAST = 10  # steps whose mean loss is the score


@dataclass(frozen=True)
class MmrSettings:
    """Each candidate: `steps` steps of `batch_size` sequences of `seq_len` tokens; only the new mixer is trained."""

    steps: int = 100
    batch_size: int = 8
    seq_len: int = 512
    lr_mixer: float = 1e-3
    loss: str = "reverse-kl"
    mask: str = "assistant"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "lr_mixer"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must be positive")

    def as_distill(self) -> DistillSettings:
        """The same run in the trainer's terms, for data and optimizer."""
        return DistillSettings(
            loss=self.loss, mask=self.mask, steps=self.steps, batch_size=self.batch_size, seq_len=self.seq_len,
            lr_mixer=self.lr_mixer, train="mixers", warmup_steps=min(10, self.steps // 2), seed=self.seed,
        )  # fmt: skip


def mmr(
    student: HybridForCausalLM,
    teacher: Any,
    mixer: dict[str, Any],
    starts: Iterable[tuple[int, dict[str, Tensor]]],
    batches: Sequence[Batch],
    settings: MmrSettings,
    dtype: torch.dtype,
    progress: Progress = lambda *_: None,
) -> list[LayerScore]:
    """Scores the attention layers of `starts`; score = mean loss of the last 10 steps, stderr over them.

    batches: one per step, the same for all candidates, on the student's device. mixer: the new mixers' config entry;
    starts: for each layer the parameters its mixer starts with.
    The student is left as it was.
    """
    config, layers, device = student.config, student.model.layers, batches[0].ids.device
    student.requires_grad_(False)
    scores = []
    kinds, shape = list(config.layer_types), config.mixer
    config.mixer = mixer
    try:
        for layer, values in starts:
            attention = layers[layer]
            mixed = _convert(attention, student, layer, values).to(device)
            layers[layer], config.layer_types = mixed, [*kinds[:layer], "linear_attention", *kinds[layer + 1 :]]
            try:
                losses = _train(student, mixed, teacher, batches, settings, dtype)
            finally:
                layers[layer], config.layer_types = attention, kinds
            tail = torch.tensor(losses[-LAST:], dtype=torch.float64)
            if not bool(torch.isfinite(tail).all()):
                raise WorkError(f"layer {layer}: the loss is not finite; try a lower --lr-mixer")
            error = float(tail.std() / len(tail) ** 0.5) if len(tail) > 1 else None
            scores.append(LayerScore(layer, float(tail.mean()), error))
            progress(layer, scores[-1].score)
    finally:
        config.mixer = shape
    return scores


def _convert(attention: nn.Module, student: Any, layer: int, values: dict[str, Tensor]) -> nn.Module:
    """A converted copy of one layer: the mixer with `values`, everything else shared with the original."""
    mixed = converted_layer(type(attention), student.config, layer)
    mixed.mixer.load_state_dict({name: value.float() for name, value in values.items()})  # type: ignore[union-attr, operator]
    for name, module in attention.named_children():
        if name != "self_attn":
            setattr(mixed, name, module)
    mixed.mixer.requires_grad_(True)  # type: ignore[union-attr]
    return mixed


def _train(
    student: Any, mixed: nn.Module, teacher: Any, batches: Sequence[Batch], settings: MmrSettings, dtype: torch.dtype
) -> list[float]:
    student.train()
    plain = settings.as_distill()
    optimizer, losses = make_optimizer(mixed, plain), []
    accumulate = Accumulator(Student(student, Loss.parse(settings.loss), dtype), teacher, settings.batch_size)
    for step, batch in enumerate(batches):
        losses.append(accumulate(batch))
        clip_gradients(mixed, plain.clip)
        update(optimizer, factor(plain.schedule, step, settings.steps, plain.warmup_steps))
        optimizer.zero_grad()
    return [float(value) for value in losses]
