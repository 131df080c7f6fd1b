"""MIL-Mamba-Replacement (MMR): scores an attention layer by the loss after a few steps of
distillation with that layer converted (Apriel-H1, 2511.02651, section 3). Each layer is converted
on its own, and all candidates train on the same batches."""

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

LAST = 10  # the score is the mean loss of this many last steps


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
    """Trains one candidate in a copy of the student; returns its losses [steps]. For
    train="mixers" the result is that of `train`, without sharing computation."""
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
    """Returns the scores of all ranks' candidates: the mean loss of the last steps over all
    repeats.

    starts: this rank's candidates with the initial parameters of their mixers; batches: maps the
    number of a repeat to its batches, one per step; room: bytes for activations, None for no limit;
    states: folder for states from which an interrupted run resumes.
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
                note(f"{len(layers)} candidates train in {len(candidates.groups)} groups to fit into memory")
            place = None if states is None else states / f"{repeat}-rank{ranks.rank}.safetensors"
            made = train(candidates, batches(repeat), place, progress).cpu()
            del candidates  # frees memory for the next repeat
        losses.append(made)
    return _ranked(ranks.all((layers, losses)), settings.repeats)


def _one_by_one(
    student: HybridForCausalLM, teacher: Any, mixer: dict[str, Any], starts: Sequence[tuple[int, dict[str, Tensor]]],
    batches: Callable[[int], Iterable[Batch]], settings: MmrSettings, dtype: torch.dtype, repeat: int, states: Path | None,
    progress: Progress,
) -> Tensor:  # fmt: skip
    """Trains each candidate separately; returns the losses [steps, candidates] of one repeat.
    Candidates with a file in `states` are not trained again."""
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
    """Returns scores by the mean loss of the last steps. found: for each rank its layers and the
    losses [steps, candidates] of each repeat. WorkError if a loss is not finite."""
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
    """Ranks layers by the loss after converting and briefly training each.

    resume: continue an unfinished run if there is one; overwrite: with `resume`, replace existing
    scores. max_memory: limit in GiB, see memory_plan."""

    kind = "mmr"
    summary = "Rank layers by how badly each converts."
    settings = MmrSettings
    trains = True

    def __init__(self, resume: bool = False, overwrite: bool = False, max_memory: float | None = None) -> None:
        self.resume, self.overwrite, self.max_memory = resume, overwrite, max_memory

    @contextlib.contextmanager
    def ranked(self, setup: Setup, settings: MmrSettings) -> Iterator[Ranking | None]:
        """See Scorer.ranked. Under torchrun the processes share the candidates, and the first one
        writes the ranking."""
        setup.join()
        warn_of_length(setup.source, settings.seq_len, setup.notes)
        setup.check_filled(settings.seq_len)
        described = asdict(settings) | setup.described()
        ranks, (device, dtype) = setup.ranks, setup.compute
        planned = memory_plan(
            setup.source, setup.origin, setup.shape, settings, device, dtype, ranks.size, self.max_memory
        )  # fmt: skip
        check_weights(setup.source, setup.origin, notes=setup.notes)
        identity = {
            "settings": described, "checkpoint": setup.source.hash, "teacher": setup.origin.hash, "data": setup.corpus.hash,
            "template": setup.encoder.template, "ranks": ranks.size,
        }  # fmt: skip
        run = RunDir(setup.path, identity, ranks)
        overwrite = self.overwrite if self.resume else setup.request.overwrite
        if already_made(run, setup.path, overwrite, lambda path: _is_of(path, run)):
            yield None
            return
        run.check(self.resume, overwrite)
        ranks.wait()  # all ranks have checked before the first one changes files
        if self.max_memory is not None:
            limit_memory(device, self.max_memory)
        with run.started(self.resume):
            found = self._measured(setup, settings, run, room_for_all(planned, run, ranks, setup.notes))
            leave()
            label = f"{settings.loss} after {settings.steps} steps"
            yield Ranking(found, settings.loss, label, described | {"run": run.digest}, mixed=True)
            run.remove()

    def _measured(self, setup: Setup, settings: MmrSettings, run: RunDir, room: int) -> list[LayerScore]:
        """Trains this rank's candidates; returns the scores of all ranks' candidates."""
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
    """Whether the score file `path` is the result of this run."""
    return read_scores(path).settings.get("run") == run.digest


def room_for_all(planned: MemoryPlan, run: RunDir, ranks: DistributedContext, notes: Notes) -> int:
    """Returns the bytes that each rank may use for activations. A resumed run gets the same value
    as before, since groups determine the order of sums."""
    room = min(ranks.all(ranks.first(run.room(ACTIVATIONS)) or max(1, int(planned.room))))
    if ranks.main:
        (notes.warn if planned.may_run_out else notes.note)(str(planned))
        run.note_room(ACTIVATIONS, room)
    return int(room)
