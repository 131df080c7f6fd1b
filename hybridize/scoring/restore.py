"""What each attention layer would be worth if all others were mixers: from a student whose attention layers are all converted
and briefly aligned, one is given back at a time, and the KL that this recovers is its score (after KL-guided selection,
2512.20569).

Where leave-one-out asks what the untouched model loses without a layer, this asks what the finished hybrid would gain by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint.scores import LayerScore
from hybridize.data.packing import Batch
from hybridize.distillation.align import Aligner
from hybridize.distillation.losses import Loss
from hybridize.distillation.optimize import clip_gradients, make_optimizer, update
from hybridize.distillation.schedule import factor
from hybridize.distillation.settings import DistillSettings, check_positive
from hybridize.distillation.step import Student
from hybridize.errors import InputError, WorkError, setting
from hybridize.modeling import MIXER_LAYER, HybridForCausalLM
from hybridize.scoring.candidates import converted
from hybridize.scoring.loo import kl_changes
from hybridize.scoring.scorer import Progress


@dataclass(frozen=True)
class RestoreSettings:
    """Alignment: `steps` steps of `batch_size` sequences of `seq_len` tokens, at `lr_mixer`; 0 steps compare mere starts."""

    steps: int = 100
    batch_size: int = 8
    seq_len: int = 512
    lr_mixer: float = 1e-3
    mask: str = "assistant"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(f"{setting('steps')} {self.steps} must not be negative")
        check_positive(self, ("batch_size", "seq_len", "lr_mixer"))

    def as_distill(self) -> DistillSettings:
        """The alignment in the trainer's terms."""
        return DistillSettings(
            stage="align", mask=self.mask, steps=max(1, self.steps), batch_size=self.batch_size, seq_len=self.seq_len,
            lr_mixer=self.lr_mixer, warmup_steps=min(10, self.steps // 2), seed=self.seed,
        )  # fmt: skip


def restore(
    student: HybridForCausalLM,
    teacher: Any,
    mixer: dict[str, Any],
    starts: Iterable[tuple[int, dict[str, Tensor]]],
    training: Iterable[Batch],
    heldout: Sequence[Batch],
    settings: RestoreSettings,
    dtype: torch.dtype,
    progress: Progress = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> list[LayerScore]:
    """Score = the forward KL from `teacher` on `heldout` that giving the layer back takes away.

    student: becomes the one with all attention layers converted; starts: their mixers' parameters; training: a batch a step.
    """
    config, originals = student.config, {}
    kinds = list(config.layer_types)
    for layer, values in starts:
        originals[layer] = student.model.layers[layer]
        student.model.layers[layer] = converted(student, mixer, layer, values).to(student.lm_head.weight.device)
    config.mixer, config.layer_types = mixer, [MIXER_LAYER] * len(kinds)
    plain = settings.as_distill()
    student.requires_grad_(False)
    for layer in originals:  # mixers that were there before stay as they are
        student.model.layers[layer].mixer.requires_grad_(True)  # type: ignore[union-attr]
    optimizer = make_optimizer(student, plain)
    aligner = Aligner(Student(student, Loss(), dtype), teacher, settings.batch_size)
    aligner.layers = sorted(originals)
    value = torch.zeros(())
    student.train()
    for step, batch in zip(range(settings.steps), training, strict=False):
        value = aligner(batch)
        clip_gradients(student, plain.clip)
        update(optimizer, factor(plain.schedule, step, settings.steps, plain.warmup_steps))
        optimizer.zero_grad()
        progress(step + 1, settings.steps)
    if not bool(torch.isfinite(value)):
        raise WorkError(f"the alignment's loss is not finite; try a lower {setting('lr_mixer')}")
    said = f", aligned to a relative error of {float(value):.3f}" if settings.steps else ""
    note(f"{len(originals)} attention layers converted{said}")
    student.eval()

    def given_back(index: int, _: Any, hidden: Tensor, told: dict[str, dict[str, Any]]) -> Tensor:
        return originals[index](hidden, **told[kinds[index]])

    layers = sorted(originals)
    more = sorted({kinds[layer] for layer in layers})
    return kl_changes(student, teacher, layers, given_back, heldout, dtype, kinds=more, sign=-1.0, progress=progress)
