"""MIL-Mamba-Replacement: how far a few steps of distillation bring each attention layer once it is a mixer
(Apriel-H1, 2511.02651, section 3). Each layer alone is converted and trained on the same batches, all else as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hybridize.checkpoint.scores import LayerScore
from hybridize.data.packing import Batch
from hybridize.distillation.losses import Loss
from hybridize.distillation.optimize import clip_gradients, make_optimizer, update
from hybridize.distillation.plan import PROCESS, kept_bytes
from hybridize.distillation.schedule import factor
from hybridize.distillation.settings import DistillSettings, check_positive
from hybridize.distillation.step import Accumulator, Student
from hybridize.errors import InputError, WorkError, setting
from hybridize.modeling import MIXER_LAYER, HybridForCausalLM, converted_layer
from hybridize.runtime.distributed import Ranks
from hybridize.runtime.forward import output_weight
from hybridize.scoring.candidates import Candidates, converted, narrow, train, write_tensors
from hybridize.scoring.scorer import Progress, attention_layers
from hybridize.scoring.uncertainty import scored

TRAINED = ("mixers", "all")
ACTIVATIONS = "activations"
LAST = 10  # steps whose mean loss is the score


@dataclass(frozen=True)
class MmrSettings:
    """Each candidate: `steps` steps of `batch_size` sequences of `seq_len` tokens, on `repeats` orders of the data. train: the
    new mixer alone (`mixers`), or the whole student with it (`all`), which no two candidates can share."""

    steps: int = 100
    batch_size: int = 8
    seq_len: int = 512
    lr_mixer: float = 1e-3
    loss: str = "reverse-kl"
    mask: str = "assistant"
    train: str = "mixers"
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self, ("steps", "batch_size", "seq_len", "lr_mixer", "repeats"))
        if self.train not in TRAINED:
            raise InputError(f"{setting('train')} {self.train} is unknown; use {' or '.join(TRAINED)}")

    def as_distill(self) -> DistillSettings:
        """The same run in the trainer's terms, for data and optimizer."""
        return DistillSettings(
            loss=self.loss, mask=self.mask, steps=self.steps, batch_size=self.batch_size, seq_len=self.seq_len,
            lr_mixer=self.lr_mixer, train=self.train, warmup_steps=min(10, self.steps // 2), seed=self.seed,
        )  # fmt: skip


def alone(
    student: HybridForCausalLM,
    teacher: Any,
    mixer: dict[str, Any],
    layer: int,
    values: dict[str, Tensor],
    batches: Iterable[Batch],
    settings: MmrSettings,
    dtype: torch.dtype,
) -> Tensor:
    """The losses [steps] of one candidate trained by itself, in a copy of the student: what `train` says, the plain way."""
    model: Any = copy.deepcopy(student)
    model.model.layers[layer] = converted(model, mixer, layer, values).to(output_weight(model).device)
    kinds = list(model.config.layer_types)
    model.config.mixer, model.config.layer_types = mixer, [*kinds[:layer], MIXER_LAYER, *kinds[layer + 1 :]]
    plain = settings.as_distill()
    model.train().requires_grad_(settings.train == "all")
    model.model.layers[layer].mixer.requires_grad_(True)
    narrow(model, dtype)
    optimizer, losses = make_optimizer(model, plain), []
    accumulate = Accumulator(Student(model, Loss.parse(settings.loss), dtype), teacher, settings.batch_size)
    for step, batch in enumerate(batches):
        losses.append(accumulate(batch))
        clip_gradients(model, plain.clip)
        update(optimizer, factor(plain.schedule, step, settings.steps, plain.warmup_steps))
        optimizer.zero_grad()
    return torch.stack(losses)


def share_of(layers: Sequence[int], rank: int, size: int) -> list[int]:
    """One rank's candidates, dealt to and fro, since a low layer costs more than a high one."""
    return [layer for place, layer in enumerate(layers) if min(place % (2 * size), 2 * size - 1 - place % (2 * size)) == rank]


def measure(
    student: HybridForCausalLM,
    teacher: Any,
    mixer: dict[str, Any],
    starts: Iterable[tuple[int, dict[str, Tensor]]],
    batches: Callable[[int], Iterable[Batch]],
    settings: MmrSettings,
    dtype: torch.dtype,
    *,
    room: int | None = None,
    states: Path | None = None,
    ranks: Ranks | None = None,
    progress: Progress = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> list[LayerScore]:
    """Scores of all ranks' candidates: the mean loss of the last steps over all repeats.

    starts: this rank's candidates, with the parameters that their mixers start with; batches: from a repeat's number to its
    batches, one a step; room: bytes for activations, None: as many as it takes; states: a folder in which a killed run finds
    what it had.
    """
    ranks, losses = ranks or Ranks(), []
    kept = sorted(starts, key=lambda start: start[0])
    layers = [layer for layer, _ in kept]
    for repeat in range(settings.repeats):
        if not layers:
            continue
        if settings.train == "all":
            parts = []
            for layer, values in kept:
                place = None if states is None else states / f"{repeat}-{layer}.safetensors"
                if place is None or not place.exists():
                    part = alone(student, teacher, mixer, layer, values, batches(repeat), settings, dtype).cpu()
                    if place is not None:
                        write_tensors({"losses": part}, place)
                parts.append(part if place is None else load_file(place)["losses"])
                progress((repeat * len(kept) + len(parts)) * settings.steps, settings.repeats * len(kept) * settings.steps)
            losses.append(torch.stack(parts, 1))
            continue
        candidates = None  # the last repeat's, whose memory the next one needs
        candidates = Candidates(student, teacher, mixer, kept, settings.as_distill(), dtype, room)
        if repeat == 0 and len(candidates.groups) > 1:
            note(f"{len(layers)} candidates in {len(candidates.groups)} groups, since no more fit into memory side by side")
        place = None if states is None else states / f"{repeat}-rank{ranks.rank}.safetensors"
        losses.append(train(candidates, batches(repeat), place, progress).cpu())
    found: dict[int, list[Tensor]] = {}
    for theirs, all_losses in ranks.all((layers, losses)):
        for column, layer in enumerate(theirs):
            found[layer] = [run[-LAST:, column].double() for run in all_losses]
    for layer, tails in found.items():
        if not all(bool(torch.isfinite(tail).all()) for tail in tails):
            raise WorkError(f"layer {layer}: the loss is not finite; try a lower {setting('lr_mixer')}")
    order = sorted(found)
    measured = [torch.stack([found[layer][repeat] for layer in order], 1) for repeat in range(settings.repeats)]
    return scored(order, [(run, torch.ones(len(run), dtype=torch.float64)) for run in measured], seeds=settings.repeats > 1)


def memory(
    student: Any, teacher: Any, mixer: dict[str, Any], settings: MmrSettings, ranks: int, dtype: torch.dtype,
    device: str = "cuda",
) -> dict[str, int]:  # fmt: skip
    """Bytes by part on the rank with most candidates, all of them side by side; models may be without storage. What groups can
    make less stands under ACTIVATIONS."""
    config, tokens = student.config, settings.batch_size * settings.seq_len
    kinds, before = list(config.layer_types), config.mixer
    layers = attention_layers(student)
    mine = share_of(layers, 0, ranks)
    sizes = [kept_bytes(config, kind, settings.seq_len, dtype, device) for kind in kinds]
    with torch.device("meta"):
        config.mixer = mixer
        made: Any = converted_layer(type(student.model.layers[layers[0]]), config, layers[0]).mixer
        config.mixer = before
    new = sum(p.numel() for p in made.parameters())
    linear = sum(m.weight.numel() for m in student.model.layers.modules() if isinstance(m, nn.Linear))
    count, wide = sum(p.numel() for p in student.parameters()), dtype.itemsize
    shared = {
        "teacher's weights": wide * sum(p.numel() for p in teacher.parameters()),
        "teacher's logits": wide * tokens * config.vocab_size,
    }
    if device == "cpu":
        shared["Python and its libraries"] = PROCESS
    if settings.train == "all":
        # the student that all start from, and the copy that one candidate trains
        parts = {"student's weights": 4 * count, "a candidate's weights, gradients and moments": 16 * (count + new)}
        return shared | parts | {ACTIVATIONS: tokens * sum(sizes)}
    return shared | {
        "student's weights": 4 * (count - linear) + wide * linear,
        "mixers, gradients and AdamW's moments": 16 * new * len(mine),
        "layers' inputs": 4 * tokens * config.hidden_size * len(layers),
        ACTIVATIONS: tokens * sum(sum(sizes[layer:]) for layer in mine),
    }
