"""Evaluates a checkpoint and writes its results file. Resumable, reuses earlier results, and runs
on one process or several."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridize.checkpoint.atomic import clear_leftovers, write_json_atomic, write_lines_atomic
from hybridize.checkpoint.journal import Journal
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.checkpoint.scores import beside
from hybridize.errors import InputError, setting
from hybridize.evaluation.harness import EvalSettings, evaluate, generates
from hybridize.evaluation.results import check_comparable, make_results, read_results, reusable, sample_records
from hybridize.generation.decoder import looks_at_the_longest
from hybridize.inputs import check_weights, open_checkpoint
from hybridize.modeling import hybrid_config
from hybridize.notes import SILENT, Notes
from hybridize.runtime.distributed import DistributedContext
from hybridize.runtime.loading import load_hybrid, load_model


@dataclass(frozen=True)
class EvalRun:
    """The evaluation of a checkpoint and possibly its baseline by one command.

    manager: lm-eval's task manager, see harness.repeatable; target: folder for the results; ran:
    device, type and backend, see device.ran_on."""

    settings: EvalSettings
    manager: Any
    target: Path
    device: torch.device
    dtype: torch.dtype
    ran: dict[str, str]
    ranks: DistributedContext
    resume: bool = False
    overwrite: bool = False
    log_samples: bool = False
    trust_remote_code: bool = False
    notes: Notes = SILENT

    def results(self, reader: CheckpointReader, tokenizer: Any, baseline: bool = False) -> dict[str, Any]:
        """Evaluates the checkpoint, writes its results into `target` and returns them; an empty
        object on all ranks but the first.

        baseline: writes to baseline.json, which is always replaced.
        """
        prefix = "baseline-" if baseline else ""
        path, answers = self.target / ("baseline.json" if baseline else "results.json"), f"{prefix}answers.part.jsonl"
        check_weights(reader, notes=self.notes)
        kept = None
        if self.resume and self.ranks.main:
            kept = reusable(path, reader.hash, self.settings.to_json(), self.ran)
        kept = self.ranks.first(kept)
        if kept is not None:
            if self.ranks.main:
                (self.target / answers).unlink(missing_ok=True)  # left by a run killed after writing the results
                clear_leftovers(path)
            return dict(kept)
        if path.exists() and not self.overwrite and not baseline:
            raise InputError(
                f"{path} is of another checkpoint or other settings; give another {setting('output')} or {setting('overwrite')}"
            )
        journal = None
        if self.ranks.main:
            identity = {**self.settings.to_json(), **self.ran, "checkpoint": reader.hash}
            journal = Journal(self.target / answers, identity, self.resume, self.overwrite)
        found = self._evaluated(reader, tokenizer, journal)
        if journal is None:
            return {}
        results = make_results(found, self.settings, reader.hash, self.ran)
        if self.settings.apply_chat_template:
            results["chat_template"] = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
        if self.log_samples:
            write_lines_atomic(self.target / f"{prefix}samples.jsonl", sample_records(found["samples"]), default=str)
        write_json_atomic(path, results)
        journal.remove()
        return results

    def _evaluated(self, reader: CheckpointReader, tokenizer: Any, journal: Journal | None) -> dict[str, Any]:
        """Loads the model and returns lm-eval's own results."""
        self.notes.doing(f"loading {reader.path}")
        generating = generates(self.manager, self.settings)
        if generating and not looks_at_the_longest(hybrid_config(reader.config)):  # this class decodes faster
            model: Any = load_hybrid(reader, self.device, self.dtype)
        else:
            model = load_model(reader.path, self.device, self.dtype, self.trust_remote_code)
        started = time.monotonic()
        self.notes.doing("preparing the tasks")

        def progress(done: int, count: int) -> None:
            left = f", {(time.monotonic() - started) / done * (count - done) / 60:,.1f} minutes left" if done else ""
            self.notes.progress(f"{done:,} of {count:,} requests{left}", last=done == count)

        return evaluate(
            model, tokenizer, self.settings, self.manager, journal=journal, ranks=self.ranks, progress=progress
        )  # fmt: skip


def find_baseline(
    name: str | None, target: Path, settings: dict[str, Any], ran: dict[str, str], notes: Notes = SILENT
) -> tuple[dict[str, Any] | None, CheckpointReader | None]:
    """Returns (the baseline's results, None) if usable ones exist, else (None, the checkpoint to
    evaluate); (None, None) without a baseline.

    name: a checkpoint, or a results file with the same settings. InputError if that file is not
    comparable.
    """
    if name is None:
        return None, None
    if Path(name).is_file():
        found = read_results(Path(name))
        check_comparable(settings, ran, found)
        return found, None
    own = open_checkpoint(name, notes=notes)
    for path in (beside(own.path, name, "eval") / "results.json", target / "baseline.json"):
        kept = reusable(path, own.hash, settings, ran)
        if kept is not None:
            notes.note(f"the baseline's results are taken from {path}: same checkpoint, same settings")
            return kept, None
    return None, own
