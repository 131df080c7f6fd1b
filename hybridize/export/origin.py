"""Provenance of an exported model for its model card: teacher, licence, data sets and results."""

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
    """One metric of a task, a group or a recall task.

    filter: lm-eval's filter. teacher: the teacher's value, if it is known. documents: how many were
    evaluated, None for a group. limited: only a part of the documents was evaluated.
    """

    task: str
    metric: str
    filter: str
    value: float
    teacher: float | None
    documents: int | None
    limited: bool


@dataclass(frozen=True)
class Origin:
    """base_model: hub id of the teacher. license: from the teacher's own model card. Both are None
    if unknown. datasets: names."""

    base_model: str | None = None
    license: str | None = None
    datasets: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    fidelity: dict[str, Any] | None = None


def read_origin(
    source: CheckpointReader, manifest: dict[str, Any] | None, base_model: str | None = None, license_: str | None = None
) -> Origin:
    """Collects the origin of a checkpoint from its manifest, its teacher's directory and the files
    that `eval` wrote beside it.

    base_model, license_: given by the user, they override what is found. InputError if base_model
    is not a hub id.
    """
    if base_model is not None and not _HUB_ID.fullmatch(base_model):
        raise InputError(f"{setting('base_model')} {base_model} is not a hub id such as meta-llama/Llama-3.1-8B")
    paths = [str(part.get("path", "")) for part in (manifest or {}).get("data", ())]
    names = list(dict.fromkeys(name if _HUB_ID.fullmatch(name) else Path(name).name for name in paths if name))
    teacher = root_of(source.path)
    return Origin(
        base_model or _hub_id(source, manifest), license_ or _license(Path(teacher) if teacher else None), names,
        _figures(source.path), _fidelity(source.path),
    )  # fmt: skip


def _hub_id(source: CheckpointReader, manifest: dict[str, Any] | None) -> str | None:
    """The hub id of the root teacher, or None: taken from its path (a hub id or a folder of the
    hub's cache), else from `_name_or_path`, which transformers writes into config.json."""
    path = str(manifest["root"]["path"]) if manifest else ""
    if found := _CACHED.search(path):
        return f"{found[1]}/{found[2]}"
    saved = str(source.config.get("_name_or_path") or "")
    return next((name for name in (path, saved) if _HUB_ID.fullmatch(name) and not name.startswith(".")), None)


def _license(teacher: Path | None) -> str | None:
    """The licence in the metadata of the teacher's own model card, or None."""
    if teacher is None or not (teacher / "README.md").is_file():
        return None
    from huggingface_hub import metadata_load

    try:
        found = (metadata_load(teacher / "README.md") or {}).get("license")
    except Exception:  # an unreadable card is treated as a card without a licence
        return None
    return found if isinstance(found, str) else None


def _figures(home: Path) -> list[Figure]:
    """The metrics in eval/results.json. The teacher's are added from eval/baseline.json if that was
    measured with the same settings."""
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
    """The model card's YAML metadata, between its `---` lines."""
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
    """Text from a file, made safe for Markdown: at most 200 characters, no control characters or
    markup."""
    return re.sub(r"[^\w./:+ @-]", "_", str(text))[:200]


def result_lines(origin: Origin) -> list[str]:
    """The results as lines of Markdown: a table of metrics and the fidelity to the teacher."""
    lines: list[str] = []
    if origin.figures:
        lines += ["| task | metric | this model | teacher | documents |", "|---|---|---|---|---|"]
        for figure in origin.figures:
            before = "" if figure.teacher is None else f"{figure.teacher:.4f}"
            name = figure.metric if figure.filter in ("", "none") else f"{figure.metric}, {figure.filter}"
            count = "" if figure.documents is None else f"{figure.documents}{' (limited)' if figure.limited else ''}"
            lines.append(f"| {plain(figure.task)} | {plain(name)} | {figure.value:.4f} | {before} | {count} |")
        lines += ["", "Measured with lm-evaluation-harness by `hybridize eval`.", ""]
    if origin.fidelity is not None:
        fidelity = origin.fidelity
        lines += [
            f"Against its teacher on {fidelity['tokens']:,.0f} tokens of `{plain(fidelity['data'])}`: reverse KL "
            f"{fidelity['reverse_kl']:.4f} nats per token, top-1 agreement {fidelity['agreement']:.1%}.", "",
        ]  # fmt: skip
    return lines or ["This model has not been evaluated yet (`hybridize eval`).", ""]
