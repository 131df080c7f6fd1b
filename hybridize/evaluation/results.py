"""results.json: the results of an evaluation per task and per document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hybridize.checkpoint.json_files import read_json
from hybridize.checkpoint.manifest import libraries
from hybridize.errors import InputError, setting
from hybridize.evaluation.figures import chance_of, document_scores, figures_of, group_figures, main_figure
from hybridize.evaluation.harness import EvalSettings

FORMAT = 1


def make_results(found: dict[str, Any], settings: EvalSettings, checkpoint: str, ran: dict[str, Any]) -> dict[str, Any]:
    """Builds the object of results.json from lm-eval's results. checkpoint: its content hash; ran:
    device, number type and backend."""
    tasks = {}
    for task, samples in found["samples"].items():
        figures = figures_of(found, task)
        key = main_figure(figures, settings.samples)
        tasks[task] = {
            "metric": key, "value": figures[key]["value"], "higher_is_better": figures[key]["higher_is_better"],
            "documents": document_scores(samples, key), "chance": chance_of(samples), "figures": figures,
        }  # fmt: skip
        if task in found.get("cut", {}):
            tasks[task]["cut"] = found["cut"][task]
    own = {
        key: found[key] for key in ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better") if key in found
    }
    return {
        "format": FORMAT, "checkpoint": checkpoint, "settings": settings.to_json(), "limited": settings.limit is not None,
        "ran": ran, "libraries": libraries(), "tasks": tasks, "groups": groups_of(found, settings.tasks), "lm_eval": own,
    }  # fmt: skip


def groups_of(found: dict[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the aggregates of the requested groups, as weighted by lm-eval, and all tasks below
    them."""
    below = found.get("group_subtasks", {})

    def leaves(name: str) -> list[str]:
        return [leaf for child in below[name] for leaf in leaves(child)] if below.get(name) else [name]

    tasks = {name: [task for task in leaves(name) if task in found["samples"]] for name in names if below.get(name)}
    made = {name: {"tasks": tasks[name], "figures": group_figures(found, name)} for name in tasks}
    return {name: group for name, group in made.items() if group["figures"] and group["tasks"]}


def figures_in(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns all figures of a task in results.json; older files have only one."""
    if "figures" in task:
        return dict(task["figures"])
    scores = [float(document["score"]) for document in task["documents"]]
    return {task["metric"]: {"value": task["value"], "higher_is_better": task["higher_is_better"], "scores": scores or None}}


def values_in(task: dict[str, Any]) -> dict[str, float]:
    """Returns the values of all figures of a task."""
    return {key: figure["value"] for key, figure in figures_in(task).items()}


def tasks_in_groups(results: dict[str, Any]) -> set[str]:
    """Returns the tasks in results.json that belong to one of its groups."""
    return {task for group in (results.get("groups") or {}).values() for task in group["tasks"]}


def sample_records(samples: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yields each document of each task: the prompt, the model's output, the extracted answer, the
    target and the metrics."""
    kept = ("doc_id", "doc_hash", "filter", "arguments", "resps", "filtered_resps", "target", "metrics")
    return (
        {"task": task, **{key: sample[key] for key in kept if key in sample}}
        | {key: sample[key] for key in sample.get("metrics", []) if key in sample}
        for task, found in samples.items()
        for sample in found
    )


def read_results(path: Path) -> dict[str, Any]:
    """Reads a results.json. InputError if the file has another format, or a task lacks what a
    comparison needs."""
    found = read_json(path)
    if found.get("format") != FORMAT or not all(isinstance(found.get(key), dict) for key in ("tasks", "settings")):
        raise InputError(f"{path} is not a results.json of format {FORMAT}")
    for task, entry in found["tasks"].items():
        try:
            whole = (
                isinstance(entry["metric"], str) and isinstance(entry["higher_is_better"], bool) and _is_number(entry["value"])
            )
            documents = [
                (isinstance(d["doc"], int), isinstance(d["hash"], str), _is_number(d["score"])) for d in entry["documents"]
            ]
            whole = whole and all(map(_is_figure, figures_in(entry).values()))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            whole = False
        if not whole or not all(map(all, documents)):
            raise InputError(f"{path}: task {task} lacks its metric, value, direction or a score for each document")
    return found


def _is_figure(figure: Any) -> bool:
    scores = figure["scores"]
    return (
        _is_number(figure["value"]) and isinstance(figure["higher_is_better"], bool)
        and (scores is None or (isinstance(scores, list) and all(map(_is_number, scores))))
    )  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_comparable(settings: dict[str, Any], ran: dict[str, Any] | None, baseline: dict[str, Any]) -> None:
    """InputError unless `baseline` was evaluated with the same settings and number type."""
    for key in ("tasks", "num_fewshot", "limit", "apply_chat_template", "gen_kwargs", "seed", "samples", "think_end"):
        usual = 1 if key == "samples" else None  # for results older than this setting
        ours, theirs = settings.get(key, usual), baseline["settings"].get(key, usual)
        if ours != theirs:
            raise InputError(f"the baseline was evaluated with {key} {theirs!r}, the candidate with {ours!r}: not comparable")
    kinds = [side.get("dtype") if isinstance(side, dict) else None for side in (ran, baseline.get("ran"))]
    if None not in kinds and kinds[0] != kinds[1]:
        raise InputError(
            f"the baseline was evaluated in {kinds[1]}, the candidate in {kinds[0]}: not comparable; see {setting('dtype')}"
        )


def reusable(path: Path, checkpoint: str, settings: dict[str, Any], ran: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the results in `path` if they match this checkpoint (content hash), settings, number
    type and version of lm-eval, else None."""
    if not path.is_file():
        return None
    try:
        found = read_results(path)
        check_comparable(settings, ran, found)
    except InputError:
        return None
    versions = [side.get("lm_eval") if isinstance(side, dict) else None for side in (found.get("libraries"), libraries())]
    return found if found.get("checkpoint") == checkpoint and versions[0] == versions[1] else None
