"""Collects the data of a report from the files of checkpoints: layout, lineage, task results,
fidelity, speed and training logs.

Nothing is measured and no weights are read. Files that cannot be read are listed as problems. Paths
are shown without the machine's folders.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from hybridize.anatomy import anatomy, lineage
from hybridize.checkpoint.json_files import read_json
from hybridize.checkpoint.manifest import MANIFEST, read_manifest
from hybridize.errors import InputError, first_line
from hybridize.evaluation.figures import main_figure
from hybridize.evaluation.gate import LEVEL, compare
from hybridize.evaluation.intervals import bootstrap
from hybridize.evaluation.recall import by_length, kind_and_length
from hybridize.evaluation.results import figures_in, read_results, tasks_in_groups
from hybridize.report.entries import Entry, Export, Figure, Key, Report

DEPTH = 3  # levels of subfolders that are searched for checkpoints


def collect(paths: Sequence[Path]) -> Report:
    """Collects the checkpoints below `paths` with their eval/ folders, and every results.json and
    bench.json there. InputError if there is neither a checkpoint nor a results.json.
    """
    report = Report([], [], [path.resolve() if path.is_dir() else path.resolve().parent for path in paths])
    homes = [home for path in paths for home in _below(path, DEPTH)]
    exports = []
    for home in dict.fromkeys(home.resolve() for home in homes):
        if _is_export(home):
            _guarded(report, home / MANIFEST, lambda home=home: exports.append(_export(report, home)))  # type: ignore[misc]
        elif (home / "config.json").is_file():
            _guarded(report, home / "config.json", lambda home=home: report.entries.append(_entry(report, home)))  # type: ignore[misc]
    _disambiguate(report.entries)
    _add_unowned_results(report, paths)
    for entry in list(report.entries):
        _add_own_files(report, entry)
    for file in sorted({file.resolve() for path in paths for file in _files(path, "bench.json")}):
        _guarded(report, file, lambda file=file: _add_bench(report, read_json(file)))  # type: ignore[misc]
    if not report.entries:
        raise InputError(f"no checkpoint and no results.json below {', '.join(map(str, paths))}")
    for export in exports:
        next((entry.exports for entry in report.entries if entry.path == export.parent), report.lost).append(export)
    _ordered(report)
    for entry in report.entries:
        _compare(report, entry)
    return report


def _add_unowned_results(report: Report, paths: Sequence[Path]) -> None:
    """Adds an entry for each results file that belongs to no checkpoint."""
    known = {entry.path for entry in report.entries}
    for file in sorted({file.resolve() for path in paths for file in _files(path, "results.json")}):
        if file.parent.parent in known:
            continue
        home = file.parent.parent if file.parent.name == "eval" else file.parent
        entry = Entry(home.name if file.name == "results.json" else file.stem, file)
        _guarded(report, file, lambda entry=entry, file=file: _add_tasks(report, entry, file))  # type: ignore[misc]
        if entry.results is not None:
            report.entries.append(entry)


def _add_own_files(report: Report, entry: Entry) -> None:
    """Reads results and training logs from the checkpoint's own folder."""
    if entry.shape is None:
        return
    before = entry.lineage[-2]["tokens"] if len(entry.lineage) > 1 else 0
    found: list[tuple[Path, Callable[[Path], None]]] = [
        (entry.path / "eval/results.json", lambda file: _add_tasks(report, entry, file)),
        (entry.path / "eval/baseline.json", lambda file: _add_baseline(report, entry, file)),
        (entry.path / "eval/fidelity.json", lambda file: _add_fidelity(report, entry, file)),
        (entry.path / "metrics.jsonl", lambda file: entry.loss.extend(_curve(file, "loss", before))),
        (entry.path / "eval.jsonl", lambda file: entry.kl.extend(_curve(file, "reverse_kl", before))),
    ]
    for file, add in found:
        if file.is_file():
            _guarded(report, file, lambda add=add, file=file: add(file))  # type: ignore[misc]


def _guarded(report: Report, file: Path, step: Callable[[], Any]) -> None:
    """Runs `step`, which reads `file`; an exception becomes a problem of the report."""
    try:
        step()
    except Exception as error:  # untrusted files: one that is broken must not keep the others from being read
        problem, where = report.clean(first_line(error)), report.shown(file)
        report.problems.append(problem if problem.startswith(where) else f"{where}: {problem}")


def _ordered(report: Report) -> None:
    """Sorts the entries: each teacher, followed by the checkpoints made from it, by number of Mamba
    layers and position in the lineage."""
    teachers = [entry for entry in report.entries if any(report.teacher(other) is entry for other in report.entries)]

    def position(entry: Entry) -> tuple[Any, ...]:
        teacher = report.teacher(entry) or entry
        family = teachers.index(teacher) if teacher in teachers else len(teachers) + (entry.shape is None)
        return family, entry not in teachers, entry.mixers, len(entry.lineage), entry.tokens, entry.name

    report.entries.sort(key=position)


def _compare(report: Report, entry: Entry) -> None:
    """Compares an entry's results with the teacher's, as the gate of `eval` does."""
    teacher = report.teacher(entry)
    for baseline in (None if teacher is None else teacher.results, entry.baseline):
        if entry.drops or not entry.results or not baseline:
            continue
        try:
            found, entry.apart = compare(entry.results, baseline), None
            entry.drops = {(drop.task, drop.metric): drop for drop in found}
        except Exception as error:  # untrusted files, see _guarded
            entry.apart = report.clean(first_line(error))


def _below(path: Path, depth: int) -> Iterator[Path]:
    """`path` and its subfolders down to `depth`, without hidden ones and symbolic links."""
    yield path
    if depth and path.is_dir():
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                yield from _below(child, depth - 1)


def _files(path: Path, name: str) -> list[Path]:
    """Files of this name below `path`, or `path` itself if it is such a file."""
    if path.is_file():
        return [path] if path.name == name or (name == "results.json" and path.suffix == ".json" != path.name) else []
    return [home / name for home in _below(path, DEPTH + 1) if (home / name).is_file()]


def _is_export(home: Path) -> bool:
    try:
        return (home / MANIFEST).is_file() and read_json(home / MANIFEST).get("command") == "export"
    except InputError:
        return False


def _export(report: Report, home: Path) -> Export:
    found = read_manifest(home)
    assert found is not None
    form = " ".join(str(found["settings"][key]) for key in ("format", "outtype") if found["settings"].get(key))
    card = home / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    section = re.search(r"^## Verified\s+(.+)$", text, re.MULTILINE)
    sentence = "" if section is None else report.clean(section[1].split("float32: ")[-1])[:300].rstrip(".")
    verified = sentence if "greedy tokens equal" in sentence or sentence.startswith("not verified") else None
    return Export(report.shown(home), form or "unknown format", (home / found["parent"]["path"]).resolve(), verified)


def _entry(report: Report, home: Path) -> Entry:
    entry = Entry(home.name, home, anatomy(read_json(home / "config.json"), str(home)))
    entry.lineage = [
        {"checkpoint": report.shown(step["checkpoint"]), "command": step["command"], "tokens": int(step.get("tokens") or 0)}
        for step in lineage(home)
    ]
    entry.tokens = entry.lineage[-1]["tokens"]
    found = read_manifest(home)
    if found is not None:
        entry.origin = (home / found["root"]["path"]).resolve(), found["root"]["hash"]
    return entry


def _disambiguate(entries: list[Entry]) -> None:
    """Adds the parent folder to the names of entries that have the same name."""
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            entry.name = f"{entry.path.parent.name}/{entry.path.name}"


def _add_tasks(report: Report, entry: Entry, file: Path) -> None:
    _set_tasks(entry, read_results(file))
    if not entry.figures and not entry.recall:
        raise InputError(f"{report.shown(file)} holds no task")


def _add_baseline(report: Report, entry: Entry, file: Path) -> None:
    """Reads the teacher's results, unless they belong to another checkpoint, and gives them to the
    teacher's entry if that has none of its own."""
    found = read_results(file)
    if not entry.origin[1] or found.get("checkpoint") != entry.origin[1]:
        return
    entry.baseline, teacher = found, report.teacher(entry)
    if teacher is None:
        teacher = Entry(Path(entry.lineage[0]["checkpoint"]).name, file)
        report.entries.append(teacher)
    if teacher.results is None and not (teacher.path / "eval/results.json").is_file():
        _set_tasks(teacher, found)


def _set_tasks(entry: Entry, found: dict[str, Any]) -> None:
    """Sets an entry's metrics: the aggregates of groups, and the tasks that are in no group. Recall
    tasks become the accuracy by length."""
    groups = found.get("groups") or {}
    inside = tasks_in_groups(found)
    figures: dict[Key, Figure] = {}
    for name, group in groups.items():
        own = {str(key): float(value) for key, value in group["figures"].items()}
        better = figures_in(found["tasks"][group["tasks"][0]])
        for key, value in own.items():
            more = bool(better[key]["higher_is_better"]) if key in better else True
            figures[name, key] = Figure(value, more, key == main_figure(own))
    for task, result in found["tasks"].items():
        if task in inside or kind_and_length(task):
            continue
        for key, figure in figures_in(result).items():
            low, high = _spread(figure)
            figures[task, key] = Figure(float(figure["value"]), figure["higher_is_better"], key == result["metric"], low, high)
    entry.results, entry.figures, entry.limited = found, figures, bool(found.get("limited"))
    entry.recall = {length: sum(kinds.values()) / len(kinds) for length, kinds in by_length(found["tasks"]).items()}


def _spread(figure: dict[str, Any]) -> tuple[float | None, float | None]:
    """Confidence interval of a metric, or (None, None) if it is not the mean of its documents'
    scores."""
    if not figure["scores"]:
        return None, None
    scores = torch.tensor([float(score) for score in figure["scores"]], dtype=torch.float64)
    return _interval(scores) if abs(float(scores.mean()) - figure["value"]) < 1e-6 else (None, None)


def _interval(scores: torch.Tensor) -> tuple[float | None, float | None]:
    """Confidence interval of the mean at LEVEL. Scores of 0 and 1 get Wilson's score interval (JASA
    22, 1927), since a bootstrap over identical answers has width zero; others get a bootstrap over
    documents."""
    count = len(scores)
    if count < 2:
        return None, None
    if not bool(((scores == 0) | (scores == 1)).all()):
        return bootstrap(scores, LEVEL, 0)
    z, share = NormalDist().inv_cdf(0.5 + LEVEL / 2), float(scores.mean())
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def _add_fidelity(report: Report, entry: Entry, file: Path) -> None:
    found = read_json(file)
    wanted = ("reverse_kl", "forward_kl", "agreement", "perplexity", "teacher_perplexity")
    data = str(found["settings"]["data"])
    data = report.shown(data) if data.startswith(("/", "~")) else report.clean(data)
    entry.fidelity = {key: float(found[key]) for key in wanted} | {"data": data}


def _curve(file: Path, key: str, before: int) -> Iterator[tuple[float, float]]:
    """Pairs of tokens since the teacher and the logged value, without values that are not
    finite."""
    for line in file.read_text().splitlines():
        row = json.loads(line)
        value, tokens = row.get(key), float(row["tokens"])
        if value is not None and math.isfinite(float(value)) and math.isfinite(tokens):
            yield before + tokens, float(value)


def _add_bench(report: Report, found: dict[str, Any]) -> None:
    """Adds timings to the checkpoints that were timed, found by path, otherwise by name."""
    machine = report.clean(str(found["machine"]))
    for name, timed in found["checkpoints"].items():
        path = Path(str(found["paths"].get(name, name)))
        match = [e for e in report.entries if e.path == path.resolve()]
        match = match or [e for e in report.entries if path.name in (e.path.name, e.name)]
        for entry in match[:1]:
            kept = {(step["context"], step["batch"]): step for step in entry.steps}
            kept |= {(step["context"], step["batch"]): step for step in (_step(step, machine) for step in timed["steps"])}
            entry.steps = [kept[key] for key in sorted(kept)]
            made = {(g["prompt"], g["new"]): g for g in entry.generations}
            made |= {(g["prompt"], g["new"]): g for g in map(_generation, timed["generations"])}
            entry.generations = [made[key] for key in sorted(made)]


def _step(timed: dict[str, Any], machine: str) -> dict[str, Any]:
    speed = None if timed["ms"] is None else float(timed["tokens_per_second"])
    speed = None if speed is None or not 0 < speed < math.inf else speed
    return {"context": int(timed["context"]), "batch": int(timed["batch"]), "tokens_per_second": speed, "machine": machine}


def _generation(timed: dict[str, Any]) -> dict[str, Any]:
    speed = timed.get("tokens_per_second")
    sizes = {key: int(timed[key]) for key in ("prompt", "new", "batch")}
    return sizes | {"tokens_per_second": None if speed is None else float(speed)}
