"""The training loop: trains a student on batches, logs metrics and held-out evaluations, and saves
resumable state.

It depends neither on checkpoint formats nor on the command line; it passes events to `report`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.data.packing import Batch
from hybridize.distillation.align import Aligner
from hybridize.distillation.fidelity import fidelity
from hybridize.distillation.losses import Loss
from hybridize.distillation.optimize import Optimization, choose_trained
from hybridize.distillation.rollouts import Rollouts
from hybridize.distillation.run_dir import RunDir
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.step import Accumulator, Student, can_graph
from hybridize.distillation.watch import Rising, model_flops, peak_flops
from hybridize.distillation.watchdog import first_bad
from hybridize.errors import InputError, WorkError, setting
from hybridize.runtime.device import be_deterministic, compile_layers
from hybridize.runtime.distributed import DistributedContext, reshard, shard
from hybridize.runtime.offload import offload
from hybridize.runtime.packed_attention import can_attend, use_packed_attention
from hybridize.runtime.signals import noted_signals, uninterrupted

Report = Callable[[dict[str, Any]], None]
FLAT = 0.005  # relative improvement of the reverse KL from which an evaluation counts as better


@dataclass
class _Clock:
    """Seconds spent in steps of this process, those of its first step (also counted in `spent`),
    and when the last state was saved."""

    spent: float = 0.0
    warm_up: float = 0.0
    saved_at: float = 0.0


class Training:
    """One run of `settings` on a student; `go` runs it to its last step.

    finished: optimizer steps done. measures: held-out reverse KL by step. agreed: whether all ranks
    know that the run is ending, so that all of them can take part in saving a last state.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        heldout: list[Batch],
        settings: DistillSettings,
        run: RunDir,
        *,
        device: torch.device,
        dtype: torch.dtype,
        log_every: int = 1,
        ranks: DistributedContext | None = None,
        sources: tuple[CheckpointReader | None, CheckpointReader | None] = (None, None),
        rollouts: Rollouts | None = None,
        report: Report = lambda _: None,
    ) -> None:
        """Prepares the models: trainable parameters, gradient checkpointing, sharding, compilation.

        teacher: on `device`, or on the CPU if it is to be offloaded. sources: the checkpoints of
        student and teacher, if the models have no weights yet (see distributed.shard). rollouts:
        write a part of each batch.
        """
        self.rollouts = rollouts
        self.student, self.teacher, self.settings, self.run, self.report = student, teacher, settings, run, report
        self.device, self.dtype, self.log_every, self.ranks = device, dtype, log_every, ranks or DistributedContext()
        self.rows = self.ranks.share(settings.batch_size, "batch_size")
        self.sharded = settings.sharded(self.ranks.size)
        if settings.deterministic:
            be_deterministic()
        loss = Loss.parse(settings.loss, settings.temperature)
        choose_trained(student, settings)
        self._prepare_layers()
        self.flops, self.peak = model_flops(student, teacher), peak_flops(device)
        root = Student(student, loss, dtype)
        self._place(root, sources)
        self.optimization = Optimization(student, settings, self.ranks)
        self.optimizer = self.optimization.adamw
        micro = min(settings.micro, settings.batch_size // self.ranks.size)
        if settings.stage == "align":
            self.accumulate: Accumulator = Aligner(root, teacher, micro, self.ranks)
        else:
            guide = teacher if loss.needs_teacher else None
            self.accumulate = Accumulator(root, guide, micro, self.ranks, settings.cuda_graph)
        self.held = [batch.to(device) for batch in heldout]
        self.measures: dict[int, float] = {}
        self.rising = Rising()
        self.agreed = True
        self.skipped = self.finished = 0

    def _prepare_layers(self) -> None:
        """Sets up gradient checkpointing, and attention without masks where that is equivalent.
        InputError if a CUDA graph is requested but not possible."""
        settings, student = self.settings, self.student
        layers = student.base_model.layers
        recomputed = settings.recomputed(len(layers))
        if recomputed:
            student.gradient_checkpointing_enable({"use_reentrant": False})
            for index, layer in enumerate(layers):
                layer.gradient_checkpointing = index in recomputed
        models = [model for model in (student, self.teacher) if model is not None]
        if self.device.type == "cuda" and all(can_attend(model, settings.seq_len) for model in models):
            for model in models:
                use_packed_attention(model)
        if settings.cuda_graph and not can_graph(*models):
            raise InputError(f"{setting('cuda_graph')} needs CUDA and SDPA attention without a window")

    def _place(self, root: Student, sources: tuple[CheckpointReader | None, CheckpointReader | None]) -> None:
        """Offloads, shards or moves the models to the device, and compiles their layers. root: the
        module that contains the student."""
        settings, student, teacher = self.settings, self.student, self.teacher
        if teacher is not None:
            teacher.requires_grad_(False)
        if teacher is not None and settings.offload_teacher:
            offload(teacher, self.device)
        elif teacher is not None and self.sharded:
            shard(teacher.base_model, teacher, self.ranks, self.device, None, sources[1])
        if self.sharded and settings.stage != "align":
            narrow = self.dtype if self.dtype != torch.float32 else None
            shard(root, student, self.ranks, self.device, narrow, sources[0])
        else:  # alignment calls mixers without their layers, so FSDP's hooks would not run
            student.to(self.device)
        for model in (student, None if settings.offload_teacher else teacher):  # offloaded layers are not compiled
            if settings.compile and model is not None:
                compile_layers(model)

    def go(self, batches: Iterator[Batch], resume: bool = False, stop_now: bool = False) -> int:
        """Runs to the last step and returns the run's training tokens.

        batches: start at the first step, also when resuming. stop_now: takes no step, so that the
        student has the weights that were saved last.

        Raises WorkError when the loss or a gradient is not finite, before it reaches a weight. When
        an exception stops the run, its last finished step is saved first; with several ranks only
        if all of them stop for the same reason, which holds for signals and WorkErrors.
        """
        settings, run = self.settings, self.run
        start, steps = self._restored(resume), settings.total_steps
        batches = itertools.islice(batches, start, None)
        clock = _Clock(saved_at=time.monotonic())
        self.agreed = self.ranks.size == 1
        with noted_signals(self.ranks.size > 1) as signals:
            try:
                if start == 0 or (settings.eval_every and start % settings.eval_every == 0 and start != steps):
                    self.measure(start)
                while self.finished < steps and not stop_now and not self._flat():
                    self._step(batches, start, clock)
                    if self.ranks.found("stop" if signals else ""):
                        self.agreed = True
                        raise KeyboardInterrupt
                    self._save_if_due(clock)
                    if settings.eval_every and self.finished % settings.eval_every == 0 and self.finished != steps:
                        self.measure(self.finished)
                self._merge(self.finished)
                if self.finished == steps or stop_now or settings.checkpoint_merge > 1:
                    self.measure(self.finished, keep=not stop_now)
                run.settle()
            except BaseException:
                if self.finished > start and self.agreed:
                    with contextlib.suppress(Exception):
                        run.save(self.student, self.optimizer, self.finished, wait=True)
                raise
        return self.finished * settings.batch_size * settings.seq_len

    def _restored(self, resume: bool) -> int:
        """Restores the state and logs of a resumed run; returns the number of steps already done."""
        run = self.run
        self.finished = run.load(self.student, self.optimizer) if resume else 0
        if self.rollouts is not None:
            self.rollouts.forget(self.finished)
        self._as_before(self.ranks.first(run.room(self._room)))
        self.ranks.wait()
        if self.ranks.main:
            run.note_room(self._room, self.accumulate.micro)
        self.measures = {record["step"]: record["reverse_kl"] for record in run.read("eval")}
        self.skipped = sum(1 for record in run.read("metrics") if record.get("skipped"))
        self.ranks.wait()  # all ranks have read the logs before the first one appends to them
        return self.finished

    def _step(self, batches: Iterator[Batch], start: int, clock: _Clock) -> None:
        """Takes one optimizer step and logs it. start: the step at which this process began."""
        settings, began = self.settings, time.perf_counter()
        if self.finished == start:
            self.report({"kind": "doing", "text": "the first step, in which kernels are compiled and tuned"})
        batch = next(batches)
        if self.rollouts is not None:
            batch = self.rollouts.join(batch, self.finished, self.student)
        part = batch.rows(self.rows).to(self.device)
        value, norm = self._gradient(part, batch.kept)
        good = math.isfinite(value) and math.isfinite(norm)
        if not good:
            self._tolerate(self.finished + 1, value, norm, part)
        with uninterrupted():
            rate = self.optimization.rate(self.finished)
            if good:
                self.optimization.update(self.finished)
            self.optimization.zero()
            self.finished += 1
            clock.spent += time.perf_counter() - began
            record = {
                "step": self.finished, "tokens": self.finished * settings.batch_size * settings.seq_len, "loss": value,
                "lr": settings.peaks[0] * rate, "lr_rest": settings.peaks[1] * rate, "grad_norm": norm,
                "seconds": round(clock.spent, 3),
            }  # fmt: skip
            self.run.log("metrics", record if good else {**record, "loss": None, "grad_norm": None, "skipped": True})
        clock.warm_up = clock.spent if self.finished == start + 1 else clock.warm_up
        if good and (risen := self.rising.add(value)) is not None:
            self.report({"kind": "rising", "step": self.finished, "best": risen[0], "now": risen[1]})
        if good and (self.finished % self.log_every == 0 or self.finished == settings.total_steps):
            self._tell(record, self.finished - start, clock)

    def _save_if_due(self, clock: _Clock) -> None:
        """Saves a state if one is due by `save_minutes` or `save_every`, or after the last step."""
        settings, wait = self.settings, 60 * self.settings.save_minutes
        late = wait > 0 and self.ranks.first(time.monotonic() - clock.saved_at > wait)
        regular = settings.save_every and (self.finished % settings.save_every == 0 or self.finished == settings.total_steps)
        if late or regular:
            with uninterrupted():  # a signal in between would lose track of the pending save
                self.run.save(self.student, self.optimizer, self.finished)
            clock.saved_at = time.monotonic()

    def _merge(self, finished: int) -> None:
        """Replaces the student's weights by the mean of the last `checkpoint_merge` states,
        including the one after `finished` steps."""
        count = self.settings.checkpoint_merge
        if count <= 1:
            return
        # the last state to be saved: merged weights must not be resumed from
        self.run.save(self.student, self.optimizer, finished, wait=True)
        merged = self.run.merge(self.student, count)
        self.measures.pop(finished, None)
        self.report({"kind": "note", "text": f"weights: the mean of the states after steps {merged}"})

    def _tell(self, record: dict[str, Any], done: int, clock: _Clock) -> None:
        """Reports a step, with the speed over the `done` steps of this process."""
        steps, tokens = self.settings.total_steps, self.settings.batch_size * self.settings.seq_len
        # the first step also loads, tunes and compiles kernels, so it does not predict later ones
        speed = tokens / clock.spent if done == 1 else (done - 1) * tokens / (clock.spent - clock.warm_up)
        share = None if self.peak is None else speed * self.flops / (self.peak * self.ranks.size)
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None
        left = (steps - record["step"]) * tokens / speed
        more = {
            "kind": "step", "steps": steps, "tokens_per_second": speed, "seconds_left": left,
            "first_step_seconds": clock.warm_up, "mfu": share, "peak_memory_gib": memory,
        }  # fmt: skip
        self.report({**record, **more})

    def measure(self, step: int, keep: bool = True) -> None:
        """Evaluates, logs and reports held-out fidelity, unless this step was evaluated before.
        keep: whether the evaluation is recorded as part of the run."""
        if not self.held or self.teacher is None or step in self.measures:
            return
        self.student.eval()
        self.report({"kind": "doing", "text": "evaluating on held-out text"})
        with torch.compiler.set_stance("force_eager"):  # a few batches do not justify compiling more graphs
            compare = lambda model: fidelity(model, self.teacher, self.held, self.dtype)  # noqa: E731
            try:
                found = vars(self.accumulate.student(compare))
            finally:
                reshard(self.accumulate.student)
        tokens = step * self.settings.batch_size * self.settings.seq_len
        record = self.ranks.first({"step": step, "tokens": tokens, "heldout_tokens": found.pop("tokens"), **found})
        if keep:
            self.measures[step] = record["reverse_kl"]
            self.run.log("eval", record)
        self.report({"kind": "eval", **record})

    def _flat(self) -> bool:
        """Whether the last `stop_when_flat` evaluations did not improve on the best one before
        them."""
        wait, found = self.settings.stop_when_flat, list(self.measures.values())
        if not wait or len(found) <= wait:
            return False
        return min(found[-wait:]) > (1 - FLAT) * min(found[:-wait])

    def _gradient(self, batch: Batch, count: int) -> tuple[float, float]:
        """Returns the loss and gradient norm of one batch, and clips the gradient.

        If memory runs out on any rank, all ranks halve the micro-batch and repeat the batch. Ranks
        with sharded weights communicate in every layer and cannot recover: the smaller micro-batch
        is recorded for the next start and WorkError ends the run.
        """
        self.student.train()
        while True:
            value, micro = None, self.accumulate.micro
            try:
                value = self.accumulate.add(batch, count)
            except torch.cuda.OutOfMemoryError as error:
                if micro == 1 and (self.sharded or self.ranks.size == 1):
                    raise
                if self.sharded:
                    self.run.note_room(self._room, micro // 2)
                    raise WorkError(
                        f"out of GPU memory with {micro} sequences at once; {setting('resume')} continues from the "
                        f"last saved state with {micro // 2} (automatic under torchrun --max-restarts 4)"
                    ) from error
            if self.sharded or not self.ranks.found("full" if value is None else ""):
                assert value is not None
                value = self.accumulate.averaged(value, count)
                found = torch.stack([value.float(), self.optimization.clip()]).tolist()
                return found[0], found[1]
            del value
            if micro == 1:
                self.agreed = True
                raise WorkError(
                    f"out of GPU memory with one sequence at once on one of the ranks; "
                    f"{setting('dry_run')} shows what is needed"
                )
            if self.ranks.main:
                self.run.note_room(self._room, micro // 2)
            self.accumulate.shrink()
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.report({"kind": "note", "text": f"out of memory with {micro} sequences at once, continuing with {micro // 2}"})

    @property
    def _room(self) -> str:
        """Describes what determines a rank's memory use besides the micro-batch size."""
        placed = {"sharded": self.sharded, "teacher offloaded": self.settings.offload_teacher}
        return ", ".join([f"{self.ranks.size} ranks", *(name for name, so in placed.items() if so)])

    def _as_before(self, micro: int | None) -> None:
        """Restores the micro-batch size that the run used before it was interrupted, so that sums
        have the same order whatever memory is free now."""
        if micro is not None and micro != self.accumulate.micro:
            self.accumulate.micro = micro
            self.report({"kind": "note", "text": f"{micro} sequences at once, as before the run was interrupted"})

    def _tolerate(self, step: int, value: float, norm: float, batch: Batch) -> None:
        """Skips a non-finite batch; WorkError that names what is not finite once `skip_bad_batches`
        is exceeded."""
        self.skipped += 1
        where = first_bad(self.accumulate.student, batch.split(self.accumulate.micro), self.ranks)
        found = f"step {step}: the loss is {value}, the gradient norm {norm}; first not finite: {where}"
        if self.skipped > self.settings.skip_bad_batches:
            self.agreed = True  # every rank has the same loss and norm
            raise WorkError(found)
        self.report({"kind": "note", "text": f"{found}; batch {self.skipped} of {self.settings.skip_bad_batches} skipped"})
