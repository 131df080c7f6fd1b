"""Where an exported model comes from, as a model hub has it: teacher, licence, names of the data,
results."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridize.checkpoint.json_files import read_json
from hybridize.checkpoint.manifest import root_of
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.errors import InputError, setting

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


@dataclass(frozen=True)
class Figure:
    """One figure of one task or group; teacher: what the teacher got, if that is known; recall
    tasks are figures as well."""

    task: str
    metric: str
    filter: str
    value: float
    teacher: float | None
    documents: int | None
    limited: bool


@dataclass(frozen=True)
class Origin:
    """base_model: hub id of the teacher; license: as its own card says; both None where nobody says
    so. datasets: names."""

    base_model: str | None = None
    license: str | None = None
    datasets: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    fidelity: dict[str, Any] | None = None


def read_origin(
    source: CheckpointReader, manifest: dict[str, Any] | None, base_model: str | None = None, license_: str | None = None
) -> Origin:
    """What is known of a checkpoint from its manifest, its teacher's directory and what `eval` left
    beside it.

    base_model, license_: what the user says, which wins. InputError where base_model is no hub id.
    """
    if base_model is not None and not _HUB_ID.fullmatch(base_model):
        raise InputError(f"{setting('base_model')} {base_model} is no hub id, as meta-llama/Llama-3.1-8B")
    said = [str(part.get("path", "")) for part in (manifest or {}).get("data", ())]
    names = list(dict.fromkeys(name if _HUB_ID.fullmatch(name) else Path(name).name for name in said if name))
    teacher = root_of(source.path)
    return Origin(
        base_model or _hub_id(source, manifest), license_ or _license(Path(teacher) if teacher else None), names,
        _figures(source.path), _fidelity(source.path),
    )  # fmt: skip


def _hub_id(source: CheckpointReader, manifest: dict[str, Any] | None) -> str | None:
    """The root's hub id: named as one, or in the hub's cache; else what transformers noted when it
    saved the teacher."""
    path = str(manifest["root"]["path"]) if manifest else ""
    if found := _CACHED.search(path):
        return f"{found[1]}/{found[2]}"
    noted = str(source.config.get("_name_or_path") or "")
    return next((name for name in (path, noted) if _HUB_ID.fullmatch(name) and not name.startswith(".")), None)


def _license(teacher: Path | None) -> str | None:
    """From the metadata of the teacher's own card, if there is one."""
    if teacher is None or not (teacher / "README.md").is_file():
        return None
    from huggingface_hub import metadata_load

    try:
        found = (metadata_load(teacher / "README.md") or {}).get("license")
    except Exception:  # a card that nobody can read says nothing
        return None
    return found if isinstance(found, str) else None


def _figures(home: Path) -> list[Figure]:
    """Of eval/results.json, with the teacher's of eval/baseline.json where that was of the same
    settings."""
    from hybridize.evaluation.results import check_comparable, read_results, values_in

    try:
        found = read_results(home / "eval/results.json")
    except InputError:
        return []
    before: dict[str, Any] = {"tasks": {}, "groups": {}}
    try:
        other = read_results(home / "eval/baseline.json")
        check_comparable(found["settings"], found.get("ran"), other)
        before = other
    except InputError:
        pass
    rows = []
    for name, group in found.get("groups", {}).items():
        theirs = before.get("groups", {}).get(name, {}).get("figures", {})
        rows += [_figure(name, key, value, theirs.get(key), None, found) for key, value in group["figures"].items()]
    for name, task in found["tasks"].items():
        theirs = values_in(before["tasks"][name]) if name in before["tasks"] else {}
        rows += [
            _figure(name, key, value, theirs.get(key), len(task["documents"]), found) for key, value in values_in(task).items()
        ]
    return rows


def _figure(task: str, key: str, value: float, theirs: float | None, count: int | None, found: dict[str, Any]) -> Figure:
    metric, _, chosen = key.partition(",")
    return Figure(task, metric, chosen, float(value), theirs, count, bool(found.get("limited")))


def _fidelity(home: Path) -> dict[str, Any] | None:
    try:
        found = read_json(home / "eval/fidelity.json")
        return {key: float(found[key]) for key in ("reverse_kl", "agreement", "tokens")} | {
            "data": str(found["settings"]["data"])
        }
    except (InputError, KeyError, TypeError, ValueError):
        return None


def front_matter(origin: Origin, name: str) -> str:
    """The card's metadata as a hub reads it, between its lines of dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation", task_name="Text generation", dataset_type=figure.task, dataset_name=figure.task,
            metric_type=figure.metric, metric_value=round(figure.value, 6),
            metric_name=figure.metric if figure.filter in ("", "none") else f"{figure.metric} ({figure.filter})",
        )
        for figure in origin.figures
    ]  # fmt: skip
    data = ModelCardData(
        base_model=origin.base_model, license=origin.license, datasets=origin.datasets or None, eval_results=results or None,
        model_name=name if results else None, library_name="transformers", pipeline_tag="text-generation",
        tags=["hybridize", "mamba", "hybrid", "distillation"],
    )  # fmt: skip
    text: str = data.to_yaml()
    return f"---\n{text}\n---"


def plain(text: Any) -> str:
    """Text from a file, safe inside Markdown: no control characters, no markup."""
    return re.sub(r"[^\w./:+ @-]", "_", str(text))[:200]


def result_lines(origin: Origin) -> list[str]:
    """The results as a person reads them."""
    lines: list[str] = []
    if origin.figures:
        lines += ["| task | figure | this model | its teacher | documents |", "|---|---|---|---|---|"]
        for figure in origin.figures:
            before = "" if figure.teacher is None else f"{figure.teacher:.4f}"
            name = figure.metric if figure.filter in ("", "none") else f"{figure.metric}, {figure.filter}"
            count = "" if figure.documents is None else f"{figure.documents}{' (limited)' if figure.limited else ''}"
            lines.append(f"| {plain(figure.task)} | {plain(name)} | {figure.value:.4f} | {before} | {count} |")
        lines += ["", "Measured with lm-evaluation-harness by `hybridize eval`.", ""]
    if origin.fidelity is not None:
        told = origin.fidelity
        lines += [
            f"Against its teacher on {told['tokens']:,.0f} tokens of `{plain(told['data'])}`: reverse KL "
            f"{told['reverse_kl']:.4f} nats a token, the same likeliest token {told['agreement']:.1%} of the time.", "",
        ]  # fmt: skip
    return lines or ["Nothing has been measured on this model yet (`hybridize eval`).", ""]
