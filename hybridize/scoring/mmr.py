"""MIL-Mamba-Replacement: how far a few steps of distillation bring each attention layer once it is
a mixer (Apriel-H1, 2511.02651, section 3). Each layer alone is converted and trained on the same
batches, all else as it was."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hybridize.checkpoint.scores import LayerScore, read_scores
from hybridize.data.packing import Batch
from hybridize.distillation.losses import Loss
from hybridize.distillation.optimize import Optimization
from hybridize.distillation.run_dir import RunDir, already_made
from hybridize.distillation.step import Accumulator, Student
from hybridize.errors import WorkError, setting
from hybridize.inputs import check_weights, warn_of_length
from hybridize.modeling import MIXER_LAYER, HybridForCausalLM
from hybridize.notes import Notes
from hybridize.runtime.device import limit_memory, note_tuning
from hybridize.runtime.distributed import DistributedContext, leave
from hybridize.runtime.forward import output_weight
from hybridize.scoring.candidates import Candidates, converted, narrow, train, write_tensors
from hybridize.scoring.mmr_memory import ACTIVATIONS, MemoryPlan, memory_plan, share_of
from hybridize.scoring.scorer import Progress, Scorer
from hybridize.scoring.settings import MmrSettings
from hybridize.scoring.setup import Ranking, Setup
from hybridize.scoring.uncertainty import scored

LAST = 10  # steps whose mean loss is the score


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
    """The losses [steps] of one candidate trained by itself, in a copy of the student: what `train`
    says, the plain way."""
    model: Any = copy.deepcopy(student)
    model.model.layers[layer] = converted(model, mixer, layer, values).to(output_weight(model).device)
    kinds = list(model.config.layer_types)
    model.config.mixer, model.config.layer_types = mixer, [*kinds[:layer], MIXER_LAYER, *kinds[layer + 1 :]]
    plain = settings.as_distill()
    model.train().requires_grad_(settings.train == "all")
    model.model.layers[layer].mixer.requires_grad_(True)
    narrow(model, dtype)
    optimization = Optimization(model, plain)
    accumulate = Accumulator(Student(model, Loss.parse(settings.loss), dtype), teacher, settings.batch_size)
    losses = [optimization.take(step, functools.partial(accumulate, batch)) for step, batch in enumerate(batches)]
    return torch.stack(losses)


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
    ranks: DistributedContext | None = None,
    progress: Progress = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> list[LayerScore]:
    """Scores of all ranks' candidates: the mean loss of the last steps over all repeats.

    starts: this rank's candidates, with the parameters that their mixers start with; batches: from
    a repeat's number to its batches, one a step; room: bytes for activations, None: as many as it
    takes; states: a folder in which a killed run finds what it had.
    """
    ranks = ranks or DistributedContext()
    kept = sorted(starts, key=lambda start: start[0])
    layers = [layer for layer, _ in kept]
    losses = []
    for repeat in range(settings.repeats if layers else 0):
        if settings.train == "all":
            made = _one_by_one(student, teacher, mixer, kept, batches, settings, dtype, repeat, states, progress)
        else:
            candidates = Candidates(student, teacher, mixer, kept, settings.as_distill(), dtype, room)
            if repeat == 0 and len(candidates.groups) > 1:
                note(f"{len(layers)} candidates in {len(candidates.groups)} groups, since no more fit into memory side by side")
            place = None if states is None else states / f"{repeat}-rank{ranks.rank}.safetensors"
            made = train(candidates, batches(repeat), place, progress).cpu()
            del candidates  # whose memory the next repeat needs
        losses.append(made)
    return _ranked(ranks.all((layers, losses)), settings.repeats)


def _one_by_one(
    student: HybridForCausalLM, teacher: Any, mixer: dict[str, Any], starts: Sequence[tuple[int, dict[str, Tensor]]],
    batches: Callable[[int], Iterable[Batch]], settings: MmrSettings, dtype: torch.dtype, repeat: int, states: Path | None,
    progress: Progress,
) -> Tensor:  # fmt: skip
    """The losses [steps, candidates] of one repeat, each candidate trained alone; those in `states`
    are not trained again."""
    parts: list[Tensor] = []
    for layer, values in starts:
        place = None if states is None else states / f"{repeat}-{layer}.safetensors"
        if place is not None and place.exists():
            part = load_file(place)["losses"]
        else:
            part = alone(student, teacher, mixer, layer, values, batches(repeat), settings, dtype).cpu()
            if place is not None:
                write_tensors({"losses": part}, place)
        parts.append(part)
        progress((repeat * len(starts) + len(parts)) * settings.steps, settings.repeats * len(starts) * settings.steps)
    return torch.stack(parts, 1)


def _ranked(found: Iterable[tuple[list[int], list[Tensor]]], repeats: int) -> list[LayerScore]:
    """Scores by the mean loss of the last steps. found: of each rank its layers, and the losses of
    each repeat."""
    tails: dict[int, list[Tensor]] = {}
    for layers, losses in found:
        for column, layer in enumerate(layers):
            tails[layer] = [run[-LAST:, column].double() for run in losses]
    for layer, runs in tails.items():
        if not all(bool(torch.isfinite(run).all()) for run in runs):
            raise WorkError(f"layer {layer}: the loss is not finite; try a lower {setting('lr_mixer')}")
    order = sorted(tails)
    measured = [torch.stack([tails[layer][repeat] for layer in order], 1) for repeat in range(repeats)]
    return scored(order, [(run, torch.ones(len(run), dtype=torch.float64)) for run in measured], seeds=repeats > 1)


class MmrScorer(Scorer):
    """resume: go on with the run beside the scores, if there is one, else `overwrite` them.
    max_memory: GiB to stay within, see memory_plan."""

    kind = "mmr"
    summary = "Rank layers by how badly each converts."
    settings = MmrSettings
    trains = True

    def __init__(self, resume: bool = False, overwrite: bool = False, max_memory: float | None = None) -> None:
        self.resume, self.overwrite, self.max_memory = resume, overwrite, max_memory

    @contextlib.contextmanager
    def ranked(self, setup: Setup, settings: MmrSettings) -> Iterator[Ranking | None]:
        """As in Scorer. Under torchrun each process has its share of the candidates, and the first
        one the ranking to write."""
        setup.join()
        warn_of_length(setup.source, settings.seq_len, setup.notes)
        setup.check_filled(settings.seq_len)
        said = asdict(settings) | setup.described()
        ranks, (device, dtype) = setup.ranks, setup.compute
        planned = memory_plan(
            setup.source, setup.origin, setup.shape, settings, device, dtype, ranks.size, self.max_memory
        )  # fmt: skip
        check_weights(setup.source, setup.origin, notes=setup.notes)
        identity = {
            "settings": said, "checkpoint": setup.source.hash, "teacher": setup.origin.hash, "data": setup.corpus.hash,
            "template": setup.encoder.template, "ranks": ranks.size,
        }  # fmt: skip
        run = RunDir(setup.path, identity, ranks)
        overwrite = self.overwrite if self.resume else setup.request.overwrite
        if already_made(run, setup.path, overwrite, lambda path: _is_of(path, run)):
            yield None
            return
        run.check(self.resume, overwrite)
        ranks.wait()  # before the first one changes what the others look at
        if self.max_memory is not None:
            limit_memory(device, self.max_memory)
        with run.started(self.resume):
            found = self._measured(setup, settings, run, room_for_all(planned, run, ranks, setup.notes))
            leave()
            label = f"{settings.loss} after {settings.steps} steps"
            yield Ranking(found, settings.loss, label, said | {"run": run.digest}, mixed=True)
            run.remove()

    def _measured(self, setup: Setup, settings: MmrSettings, run: RunDir, room: int) -> list[LayerScore]:
        """The scores of all candidates of all ranks."""
        ranks, (device, dtype), notes = setup.ranks, setup.compute, setup.notes
        mine = share_of(setup.contract.attention_layers, ranks.rank, ranks.size)
        starts = list(setup.starts(mine, together=False))
        notes.doing("loading the models")
        student, teacher = setup.student(torch.float32), setup.teacher()
        note_tuning(device, setup.shape, notes)

        def batches(repeat: int) -> Iterator[Batch]:
            order = setup.corpus.training(settings.seed + repeat, settings.seq_len, settings.batch_size)
            return (batch.to(device) for batch in itertools.islice(order, settings.steps))

        notes.doing("the first step, in which kernels are compiled and tuned")
        return measure(
            student, teacher, setup.shape, starts, batches, settings, dtype, room=room, states=run.path, ranks=ranks,
            progress=setup.counted("steps"), note=notes.note,
        )  # fmt: skip


def _is_of(path: Path, run: RunDir) -> bool:
    """Whether a score file is what this run comes to."""
    return read_scores(path).settings.get("run") == run.digest


def room_for_all(planned: MemoryPlan, run: RunDir, ranks: DistributedContext, notes: Notes) -> int:
    """Bytes that all ranks may fill with activations, the same as before the run was cut off:
    groups are summed apart."""
    room = min(ranks.all(ranks.first(run.room(ACTIVATIONS)) or max(1, int(planned.room))))
    if ranks.main:
        (notes.warn if planned.may_run_out else notes.note)(str(planned))
        run.note_room(ACTIVATIONS, room)
    return int(room)
