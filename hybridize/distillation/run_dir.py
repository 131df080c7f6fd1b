"""OUT.run/, the directory of an unfinished run: its metrics, evaluations and resumable states."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from hybridize.checkpoint.atomic import clear_leftovers, hold, json_text, write_json_atomic
from hybridize.checkpoint.json_files import read_json
from hybridize.checkpoint.manifest import read_manifest
from hybridize.checkpoint.unfinished import SETTINGS, check_unfinished, run_path
from hybridize.distillation.watch import Trackers, draw_curve
from hybridize.errors import InputError, first_line, setting
from hybridize.runtime.distributed import DistributedContext, leave

LOGS = ("metrics", "eval")
ROOM = "micro-batch.json"
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # expected in runs of one process


class RunDir:
    """The run directory of `output`.

    settings: everything that determines the result; a resumed run must have the same. keep: number
    of states to keep, counting only multiples of `every` steps if that is given; track: see
    Trackers.
    """

    def __init__(
        self,
        output: Path,
        settings: dict[str, Any],
        ranks: DistributedContext | None = None,
        keep: int = 2,
        every: int = 0,
        track: str = "",
    ) -> None:
        self.path = run_path(output)
        self.settings, self.ranks, self.keep, self.every = settings, ranks or DistributedContext(), keep, every
        self.group = self.ranks.another_group()
        self.pending: Any = None
        self.trackers = Trackers(track if self.ranks.main else "", self.path, settings)

    def check(self, resume: bool, overwrite: bool) -> None:
        """InputError if there is an unfinished run and neither `resume` nor `overwrite` is set, if
        it has other settings, or if another process is using it."""
        if self.path.exists() and self.ranks.main:
            os.close(hold(self.path))
        check_unfinished(self.path, json.loads(json.dumps(self.settings)), resume, overwrite)

    def start(self, resume: bool) -> None:
        if self.ranks.main and not (resume and (self.path / SETTINGS).exists()):
            self.path.mkdir(parents=True, exist_ok=True)
            for old in self.path.iterdir():  # not the directory itself, which is locked
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            write_json_atomic(self.path / SETTINGS, self.settings)
        self.ranks.wait()

    @contextlib.contextmanager
    def started(self, resume: bool) -> Iterator[None]:
        """Creates and locks the directory for the duration of the block."""
        lock = None
        if self.ranks.main:  # locked before anything is changed, in case another process starts
            self.path.mkdir(parents=True, exist_ok=True)
            lock = hold(self.path)
        try:
            self.start(resume)
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def made(self, output: Path) -> bool:
        """Whether the checkpoint `output` is the result of this run."""
        found = read_manifest(output) or {}
        return isinstance(found.get("settings"), dict) and found["settings"].get("run") == self.digest

    @property
    def digest(self) -> str:
        """A hash of the settings, which results store to identify their run."""
        return hashlib.sha256(json_text(self.settings).encode()).hexdigest()

    def room(self, what: str) -> int | None:
        """Returns the value that `note_room` recorded under `what`: the micro-batch size that fits
        into memory (or bytes, see scoring.mmr.room_for_all); None if there is none."""
        path = self.path / ROOM
        found = read_json(path).get(what) if path.exists() else None
        return found if isinstance(found, int) and found > 0 else None

    def note_room(self, what: str, sequences: int) -> None:
        before = read_json(self.path / ROOM) if (self.path / ROOM).exists() else {}
        write_json_atomic(self.path / ROOM, {**before, what: sequences})

    def log(self, name: str, record: dict[str, Any]) -> None:
        if not self.ranks.main:
            return
        with (self.path / f"{name}.jsonl").open("a") as out:
            out.write(json.dumps(record) + "\n")
        self.trackers.log({key if key == "step" else f"{name}/{key}": value for key, value in record.items()})

    def read(self, name: str) -> list[dict[str, Any]]:
        """Returns all records of the log `name`."""
        path = self.path / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def save(self, student: nn.Module, optimizer: torch.optim.Optimizer, step: int, wait: bool = False) -> None:
        """Saves the trained weights and AdamW's moments after `step` steps in the background, each
        rank its own part.

        Older states are deleted once this one is complete (see `_spared`). wait: returns only then,
        and ignores a failure of the previous save. OSError if a state cannot be written.
        """
        with contextlib.suppress(OSError) if wait else contextlib.nullcontext():
            self.settle()
        if self.ranks.first(self._whole(step)):
            return
        place = {"checkpoint_id": self.path / f"step-{step:08}", "process_group": self.group, "no_dist": self.ranks.size == 1}
        with _explained(f"the state of the run could not be written to {self.path}"):
            self.pending = async_save(_state(student, optimizer), **place)
        if wait:
            self.settle()

    def settle(self) -> None:
        """Waits until the pending state is complete. OSError if it could not be written."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        with _explained(f"the state of the run could not be written to {self.path}"):
            pending.result()
        if self.ranks.main:
            for step in set(self.steps()) - self._spared():
                shutil.rmtree(self.path / f"step-{step:08}", ignore_errors=True)

    def _spared(self) -> set[int]:
        """Returns the steps of the states to keep: the last one, and the last `keep` of those that
        an uninterrupted run saves too."""
        steps = self.steps()
        regular = [step for step in steps if step % self.every == 0] if self.every else steps
        return {*steps[-1:], *regular[-self.keep :]}

    def merge(self, student: nn.Module, count: int) -> list[int]:
        """Replaces the trained weights by their mean over the last `count` kept states, including
        the last one; returns the steps of these states."""
        steps = self.ranks.first(sorted(self._spared()))[-count:]
        trained = {f"weights/{name}": p for name, p in student.named_parameters() if p.requires_grad}
        sums = {name: torch.zeros_like(p) for name, p in trained.items()}
        for step in steps:
            one = {name: torch.empty_like(p) for name, p in trained.items()}
            with _explained(f"{self.path}: the state after step {step} cannot be read"):
                load(one, checkpoint_id=self.path / f"step-{step:08}", no_dist=self.ranks.size == 1)
            for name, value in one.items():
                sums[name] += value
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(sums[name] / len(steps))
        return steps

    def steps(self) -> list[int]:
        """Returns the steps of all complete states."""
        found = sorted(int(path.name.removeprefix("step-")) for path in self.path.glob("step-*"))
        return [step for step in found if self._whole(step)]

    def _whole(self, step: int) -> bool:
        return (self.path / f"step-{step:08}" / ".metadata").exists()  # written last

    def load(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restores the last complete state, whatever number of ranks saved it; returns its step, or
        0 if there is none.

        Truncates the logs to that step.
        """
        step = self.ranks.first(max(self.steps(), default=0))
        if self.ranks.main:
            for name in LOGS:
                self._cut(self.path / f"{name}.jsonl", step)
            for path in self.path.glob("step-*"):
                if not (path / ".metadata").exists():
                    shutil.rmtree(path, ignore_errors=True)
        self.ranks.wait()
        if step:
            place = self.path / f"step-{step:08}"
            with _explained(f"{place} cannot be read"):
                saved = FileSystemReader(place).read_metadata().state_dict_metadata
            kept = {key.split("/")[1] for key in saved if key.startswith("moments/")}
            names = {id(p): name for name, p in student.named_parameters()}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if names[id(parameter)] not in kept:  # it has had no gradient yet
                        continue
                    moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                    counted = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
                    optimizer.state[parameter] = {"step": torch.zeros((), device=counted), **moments}
            state = _state(student, optimizer)
            with _explained(f"{place} cannot be read"):
                load(state, checkpoint_id=place, no_dist=self.ranks.size == 1)
        return step

    @staticmethod
    def _cut(path: Path, step: int) -> None:
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if 0 < step >= json.loads(line)["step"]:
                    kept.append(line)
            except ValueError:
                continue  # an incomplete line, from a run that was killed
        path.write_text("".join(line + "\n" for line in kept))

    def finish(self, into: Path) -> None:
        """Copies the logs into the finished checkpoint's directory and draws their curve."""
        self.trackers.close()
        for name in LOGS:
            if (self.path / f"{name}.jsonl").exists():
                shutil.copyfile(self.path / f"{name}.jsonl", into / f"{name}.jsonl")
        if (self.path / "tensorboard").exists():
            shutil.copytree(self.path / "tensorboard", into / "tensorboard")
        draw_curve(self.read("metrics"), self.read("eval"), into / "curve.png")

    def remove(self) -> None:
        if self.ranks.main:
            shutil.rmtree(self.path, ignore_errors=True)


def already_made(run: RunDir, path: Path, overwrite: bool, made: Callable[[Path], bool]) -> bool:
    """Whether `path` already holds the result of this run. If so, deletes the run directory and
    leftovers, and leaves the process group. InputError if `path` holds something else and
    `overwrite` is not set. made: whether a path is the result of this run."""
    if overwrite or not path.exists():
        return False
    if run.ranks.first(not made(path)):
        raise InputError(
            f"{path} exists and belongs to another run; give another {setting('output')} or {setting('overwrite')}"
        )
    run.remove()
    clear_leftovers(path)
    leave()
    return True


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns an error of torch's checkpointing into an OSError of one sentence that starts with
    `what`. CheckpointException is a BaseException whose text holds tracebacks."""
    try:
        yield
    except CheckpointException as error:
        inner = [failure for failure, _ in error.failures.values()]
        if any(isinstance(failure, KeyboardInterrupt) for failure in inner):
            raise KeyboardInterrupt from error
        raise OSError(f"{what}: {first_line(inner[0] if inner else error)}") from error
    except Exception as error:
        raise OSError(f"{what}: {first_line(error)}") from error


def _state(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the trained weights and their moments by name, not copied."""
    names = {id(p): name for name, p in student.named_parameters()}
    weights = {f"weights/{name}": p.detach() for name, p in student.named_parameters() if p.requires_grad}
    moments = {f"moments/{names[id(p)]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}
    return weights | moments
