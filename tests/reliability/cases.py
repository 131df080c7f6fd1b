"""The commands that write, each on the embedded teacher, with what must hold of what they write."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.checkpoint.integrity import verify
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.checkpoint.scores import read_scores
from tests.reliability.server import Server

SMALL = ("--batch-size", "2", "--seq-len", "64", "--limit", "40")
TASKS = ("--tasks", "wordproblems_choice,wordproblems_exact", "--include-path", "tasks", "--limit", "4", "--batch-size", "4")
Look = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """argv of a command; its output below the working directory; `look` gives what two complete
    outputs share, and raises when one is not complete; again: flags of a second run after a kill;
    unfinished: names of what may lie there until then."""

    name: str
    argv: tuple[str, ...]
    output: str
    look: Look
    again: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()

    def overwriting(self) -> Case:
        return Case(
            f"{self.name} over an old one", (*self.argv, "--overwrite"), self.output, self.look, self.again, self.unfinished
        )


def checkpoint(path: Path) -> Any:
    exported(path)
    return CheckpointReader(path).hash


def exported(path: Path) -> Any:
    found = verify(path)
    assert not found.damage, found.damage
    return sorted(file.name for file in path.iterdir())


def scores(path: Path) -> Any:
    found = read_scores(path)
    assert all(math.isfinite(s.score) for s in found.layers)
    return found.checkpoint, [(s.layer, round(s.score, 5)) for s in found.layers]


def results(path: Path) -> Any:
    found = json.loads(path.read_text())
    return found["checkpoint"], {task: entry["documents"] for task, entry in found["tasks"].items()}


def fidelity(path: Path) -> Any:
    found = json.loads(path.read_text())
    return found["checkpoint"], round(found["reverse_kl"], 6), found["greedy"]


def lines(path: Path) -> Any:
    return [json.loads(line) for line in path.read_text().splitlines()]


def page(path: Path) -> Any:
    text = path.read_text()
    assert text.rstrip().endswith("</html>")
    return sorted(file.name for file in path.parent.iterdir() if not file.name.startswith("."))


def bench(path: Path) -> Any:
    return sorted(json.loads(path.read_text()))


def folder(path: Path) -> Any:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


CASES = [
    Case("demo", ("demo", "new"), "new/tasks", folder),
    Case("replace", ("replace", "teacher", "--indices", "2,3", "--calibration-tokens", "600", "-o", "out"), "out", checkpoint),
    Case(
        "distill",
        ("distill", "h2", "--steps", "6", "--save-every", "2", "--eval-every", "3", "--eval-windows", "2", *SMALL, "-o", "out"),
        "out", checkpoint, ("--resume",), ("out.run",),
    ),
    Case(
        "score-loo", ("score-loo", "teacher", "--metric", "kl", "--windows", "2", *SMALL), "teacher/scores/loo.json", scores,
    ),
    Case(
        "score-mmr", ("score-mmr", "teacher", "--steps", "12", "--calibration-tokens", "600", *SMALL),
        "teacher/scores/mmr.json", scores, ("--resume",), ("mmr.json.run",),
    ),
    Case(
        "score-restore",
        ("score-restore", "teacher", "--steps", "2", "--windows", "2", "--calibration-tokens", "600", *SMALL),
        "teacher/scores/restore.json", scores,
    ),
    Case(
        "eval", ("eval", "h2", *TASKS, "-o", "results"), "results/results.json", results, ("--resume",),
        ("answers.part.jsonl",),
    ),
    Case(
        "eval --fidelity",
        ("eval", "h2", "--fidelity", "teacher/traces.jsonl", "--windows", "2", "--seq-len", "64", "--limit", "20", "-o",
         "results"),
        "results/fidelity.json", fidelity,
    ),
    Case("export hf", ("export", "h2", "-o", "out"), "out", exported),
    Case("export granite", ("export", "h2", "--format", "granite", "-o", "out"), "out", exported),
    Case("export gguf", ("export", "h2", "--format", "gguf", "--no-verify", "-o", "out"), "out", exported),
    Case(
        "generate",
        ("generate", "h2", "--prompts", "teacher/traces.jsonl", "--limit", "6", "--batch-size", "2", "--max-new-tokens", "8",
         "-o", "made.jsonl"),
        "made.jsonl", lines, ("--resume",), ("made.jsonl.part",),
    ),
    Case(
        "bench",
        ("bench", "teacher", "h2", "--contexts", "16", "--batches", "1", "--generations", "", "--steps", "2", "--repeats", "1",
         "--memory", "1", "-o", "timed"),
        "timed/bench.json", bench,
    ),
    Case("report", ("report", "h2", "teacher", "-o", "page"), "page/index.html", page),
]  # fmt: skip


def prepare(server: Server, place: Path) -> None:
    """What the commands read: the embedded teacher, its tasks, a hybrid of it with scores and
    results."""
    place.mkdir(parents=True)
    for argv in (
        ["demo"],
        ["replace", "teacher", "--indices", "4,5", "--calibration-tokens", "600", "-o", "h2"],
        ["eval", "h2", *TASKS],
    ):  # fmt: skip
        done = server.run(argv, place)
        assert done["rc"] == 0, done
