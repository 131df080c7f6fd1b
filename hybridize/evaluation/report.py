"""What is known of a family of checkpoints, gathered from their own files: layout, lineage, tasks, fidelity, speed.

Nothing is measured and no weight is read. A file that cannot be read is named, and the rest goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from hybridize.anatomy import Anatomy, anatomy, lineage
from hybridize.checkpoint.reader import read_json
from hybridize.errors import InputError, first_line

from .gate import LEVEL
from .intervals import bootstrap
from .results import read_results

DEPTH = 3  # folders below those given in which checkpoints are looked for


@dataclass
class Entry:
    """A checkpoint, or a results file without one. tasks: by task metric, value, low, high, documents, limited; steps,
    generations: bench.json's."""

    name: str
    path: Path
    shape: Anatomy | None = None
    tokens: int = 0
    lineage: list[dict[str, Any]] = field(default_factory=list)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    fidelity: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    generations: list[dict[str, Any]] = field(default_factory=list)
    machine: str = ""

    @property
    def quality(self) -> float | None:
        """Mean over the tasks."""
        values = [task["value"] for task in self.tasks.values()]
        return sum(values) / len(values) if values else None

    def throughput(self, context: int, batch: int) -> float | None:
        """Tokens a second of decoding, in that cell of the bench."""
        for step in self.steps:
            if (step["context"], step["batch"]) == (context, batch) and step["tokens_per_second"] is not None:
                return float(step["tokens_per_second"])
        return None


@dataclass
class Report:
    entries: list[Entry]
    problems: list[str]

    @property
    def cell(self) -> tuple[int, int] | None:
        """Context and batch of the largest cell of the bench that most checkpoints have."""
        have: dict[tuple[int, int], int] = {}
        for entry in self.entries:
            for step in entry.steps:
                if step["tokens_per_second"] is not None:
                    key = step["context"], step["batch"]
                    have[key] = have.get(key, 0) + 1
        return max(have, key=lambda key: (have[key], key[0] * key[1], key), default=None)

    @property
    def tasks(self) -> list[str]:
        return sorted({task for entry in self.entries for task in entry.tasks})


def collect(paths: Sequence[Path]) -> Report:
    """Checkpoints below `paths` with their eval/ folders, and every results.json and bench.json that lies among them.

    InputError where there is nothing at all.
    """
    report = Report([], [])
    homes = [home for path in paths for home in _checkpoints(path)]
    for home in dict.fromkeys(home.resolve() for home in homes):
        _guarded(report, home / "config.json", lambda home=home: report.entries.append(_entry(home)))  # type: ignore[misc]
    _named_apart(report.entries)
    for file in sorted({file.resolve() for path in paths for file in _files(path, "bench.json")}):
        _guarded(report, file, lambda file=file: _add_bench(report.entries, read_json(file)))  # type: ignore[misc]
    known = {entry.path for entry in report.entries}
    for file in sorted({file.resolve() for path in paths for file in _files(path, "results.json")}):
        if file.parent.parent not in known:
            entry = Entry(file.parent.name if file.name == "results.json" else file.stem, file)
            _guarded(report, file, lambda entry=entry, file=file: _add_tasks(entry, file))  # type: ignore[misc]
            if entry.tasks:
                report.entries.append(entry)
    for entry in report.entries:
        for name, add in (("results.json", _add_tasks), ("fidelity.json", _add_fidelity)):
            file = entry.path / "eval" / name
            if entry.shape is not None and file.is_file():
                _guarded(report, file, lambda add=add, entry=entry, file=file: add(entry, file))  # type: ignore[misc]
    if not report.entries:
        raise InputError(f"no checkpoint and no results.json below {', '.join(map(str, paths))}")
    return report


def _guarded(report: Report, file: Path, step: Any) -> None:
    try:
        step()
    except Exception as error:  # files of strangers: whatever is wrong with one, the others are read
        report.problems.append(f"{file}: {first_line(error)}")


def _below(path: Path, depth: int) -> Iterator[Path]:
    yield path
    if depth and path.is_dir():
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                yield from _below(child, depth - 1)


def _checkpoints(path: Path) -> list[Path]:
    return [home for home in _below(path, DEPTH) if (home / "config.json").is_file()]


def _files(path: Path, name: str) -> list[Path]:
    """Files of this name below `path`, or `path` itself where it is one."""
    if path.is_file():
        return [path] if path.name == name or (name == "results.json" and path.suffix == ".json" != path.name) else []
    return [home / name for home in _below(path, DEPTH + 1) if (home / name).is_file()]


def _entry(home: Path) -> Entry:
    entry = Entry(home.name, home, anatomy(read_json(home / "config.json"), str(home)))
    entry.lineage = [{**step, "tokens": int(step.get("tokens") or 0)} for step in lineage(home)]
    entry.tokens = entry.lineage[-1]["tokens"]
    return entry


def _named_apart(entries: list[Entry]) -> None:
    """Folders of the same name are called by their parents' too."""
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            entry.name = f"{entry.path.parent.name}/{entry.path.name}"


def _add_tasks(entry: Entry, file: Path) -> None:
    found = read_results(file)
    for task, told in found["tasks"].items():
        scores = torch.tensor([float(d["score"]) for d in told["documents"]], dtype=torch.float64)
        low, high = _interval(scores) if abs(float(scores.mean()) - told["value"]) < 1e-6 else (None, None)
        entry.tasks[str(task)] = {
            "metric": str(told["metric"]), "value": float(told["value"]), "low": low, "high": high,
            "documents": len(scores), "limited": bool(found.get("limited")),
        }  # fmt: skip


def _interval(scores: torch.Tensor) -> tuple[float | None, float | None]:
    """Of the mean at LEVEL: Wilson's score interval (JASA 22, 1927) where documents are right or wrong, since a bootstrap of
    answers that are all alike is sure of itself; else the bootstrap over documents."""
    count = len(scores)
    if count < 2:
        return None, None
    if not bool(((scores == 0) | (scores == 1)).all()):
        return bootstrap(scores, LEVEL, 0)
    z, share = NormalDist().inv_cdf(0.5 + LEVEL / 2), float(scores.mean())
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def _add_fidelity(entry: Entry, file: Path) -> None:
    found = read_json(file)
    wanted = ("reverse_kl", "forward_kl", "agreement", "perplexity", "teacher_perplexity")
    entry.fidelity = {key: float(found[key]) for key in wanted} | {"data": str(found["settings"]["data"])}


def _add_bench(entries: list[Entry], found: dict[str, Any]) -> None:
    """To the checkpoints that were timed, by path, else by name."""
    for name, told in found["checkpoints"].items():
        path = Path(str(found["paths"].get(name, name)))
        match = [e for e in entries if e.path == path.resolve()] or [e for e in entries if e.path.name == path.name]
        for entry in match[:1]:
            entry.machine = str(found["machine"])
            kept = {(step["context"], step["batch"]): step for step in entry.steps}
            kept |= {(step["context"], step["batch"]): step for step in map(_step, told["steps"])}
            entry.steps = [kept[key] for key in sorted(kept)]
            made = {(g["prompt"], g["new"]): g for g in entry.generations}
            made |= {(g["prompt"], g["new"]): g for g in map(_generation, told["generations"])}
            entry.generations = [made[key] for key in sorted(made)]


def _step(told: dict[str, Any]) -> dict[str, Any]:
    speed = None if told["ms"] is None else float(told["tokens_per_second"])
    return {"context": int(told["context"]), "batch": int(told["batch"]), "tokens_per_second": speed}


def _generation(told: dict[str, Any]) -> dict[str, Any]:
    speed = told.get("tokens_per_second")
    sizes = {key: int(told[key]) for key in ("prompt", "new", "batch")}
    return sizes | {"tokens_per_second": None if speed is None else float(speed)}
