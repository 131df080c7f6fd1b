"""results.json: what an evaluation found, per task and per document, and the comparison of two of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybridize.checkpoint.manifest import libraries
from hybridize.checkpoint.reader import read_json
from hybridize.errors import InputError
from hybridize.evaluation.harness import EvalSettings, document_scores, main_metric

FORMAT = 1


@dataclass(frozen=True)
class TaskDrop:
    """baseline - candidate in the direction in which the metric is better; positive means worse than the baseline."""

    task: str
    metric: str
    baseline: float
    candidate: float
    drop: float
    documents: int


def make_results(found: dict[str, Any], settings: EvalSettings, checkpoint: str, ran: dict[str, Any]) -> dict[str, Any]:
    """results.json's object out of lm-eval's own. `checkpoint`: the content hash; `ran`: device, type, engine."""
    tasks = {}
    for task, samples in found["samples"].items():
        key, value = main_metric(found["results"][task])
        better = found.get("higher_is_better", {}).get(task, {}).get(key.split(",")[0], True)
        tasks[task] = {
            "metric": key, "value": value, "higher_is_better": bool(better), "documents": document_scores(samples, key),
        }  # fmt: skip
    own = {
        key: found[key] for key in ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better") if key in found
    }
    return {
        "format": FORMAT, "checkpoint": checkpoint, "settings": settings.to_json(), "limited": settings.limit is not None,
        "ran": ran, "libraries": libraries(), "tasks": tasks, "lm_eval": own,
    }  # fmt: skip


def read_results(path: Path) -> dict[str, Any]:
    """InputError when the file is not one of ours."""
    found = read_json(path)
    if found.get("format") != FORMAT or not all(isinstance(found.get(key), dict) for key in ("tasks", "settings")):
        raise InputError(f"{path} is not a results.json of format {FORMAT}")
    return found


def check_comparable(settings: dict[str, Any], baseline: dict[str, Any]) -> None:
    """InputError unless `baseline` was measured with these settings."""
    for key in ("tasks", "num_fewshot", "limit", "apply_chat_template", "gen_kwargs", "seed"):
        ours, theirs = settings.get(key), baseline["settings"].get(key)
        if ours != theirs:
            raise InputError(f"the baseline was evaluated with {key} {theirs!r}, the candidate with {ours!r}: not comparable")


def compare(candidate: dict[str, Any], baseline: dict[str, Any]) -> list[TaskDrop]:
    """Paired over documents. InputError when the two were measured differently or on other documents."""
    check_comparable(candidate["settings"], baseline)
    drops = []
    for task, ours in candidate["tasks"].items():
        theirs = baseline["tasks"].get(task)
        if theirs is None or theirs["metric"] != ours["metric"]:
            raise InputError(f"the baseline has no {ours['metric']} for task {task}")
        hashes = [[(d["doc"], d["hash"]) for d in side["documents"]] for side in (ours, theirs)]
        if sorted(hashes[0]) != sorted(hashes[1]):
            raise InputError(f"task {task}: the baseline answered other documents than the candidate")
        sign = 1.0 if ours["higher_is_better"] else -1.0
        drop = sign * (theirs["value"] - ours["value"])
        drops.append(TaskDrop(task, ours["metric"], theirs["value"], ours["value"], drop, len(ours["documents"])))
    return drops


def drops_json(drops: list[TaskDrop]) -> list[dict[str, Any]]:
    return [asdict(drop) for drop in drops]
