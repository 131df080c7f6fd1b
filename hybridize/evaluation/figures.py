"""The figures of a task, one per metric and filter, with each document's score, and the selection
of those that a gate checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybridize.errors import InputError, WorkError, setting

TOLERANCE = 1e-9  # rounding error of a mean of scores, within which two figures count as equal


def figures_of(found: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """Returns value, direction and scores of each figure by lm-eval's name (`metric,filter`).
    Scores are in the documents' order, or None if there are none.

    found: lm-eval's results with samples. WorkError naming task and figure if one is not finite.
    """
    better = found.get("higher_is_better", {}).get(task, {})
    figures = {}
    for key, value in _values(found["results"][task]).items():
        if not math.isfinite(value):
            raise WorkError(
                f"task {task}: {key} is {value}; the model's answers are not finite (try {setting('dtype')} float32)"
            )
        rows = document_scores(found["samples"][task], key)
        scores = [row["score"] for row in rows] if rows else None
        figures[key] = {"value": value, "higher_is_better": better.get(key.split(",")[0]) is not False, "scores": scores}
    if not figures:
        raise WorkError(f"task {task} reports no figure")
    return figures


def group_figures(found: Mapping[str, Any], group: str) -> dict[str, float]:
    """Returns a group's own aggregates by lm-eval's name; empty if it has none."""
    return _values(found["results"].get(group, {}))


def _values(result: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in result.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }


def main_figure(figures: Mapping[str, Any], samples: int = 1) -> str:
    """Returns a task's main figure: acc rather than acc_norm, exact_match for generation, and with
    several samples the majority's."""
    names = [key for key in figures if samples > 1 and key.endswith(f"maj@{samples}")] or list(figures)
    for wanted in ("acc", "exact_match", "acc_norm", "f1"):
        for key in names:
            if key.split(",")[0] == wanted:
                return key
    return names[0]


def accuracy_like(figure: Mapping[str, Any]) -> bool:
    """Whether a figure is a mean of document scores between 0 and 1, higher being better."""
    scores = figure["scores"]
    if not scores or not figure["higher_is_better"] or not all(0 <= score <= 1 for score in scores):
        return False
    return is_mean(scores, figure["value"])


def is_mean(scores: Sequence[float], value: float) -> bool:
    return bool(scores) and abs(math.fsum(scores) / len(scores) - value) <= 1e-6 * max(1.0, abs(value))


def matching(figures: Mapping[str, Any], name: str) -> list[str]:
    """Returns the figures that match `name`: lm-eval's `metric,filter`, a metric or a filter."""
    return [key for key in figures if name in (key, *key.split(",", 1))]


def held(figures: Mapping[str, dict[str, Any]], samples: int = 1, name: str | None = None, where: str = "") -> list[str]:
    """Returns the figures that a gate checks: those that match `name`, else every accuracy-like one
    (with several samples the majority's), else the main one. InputError listing the figures if none
    matches `name`. where: task or group, for the message."""
    if name is not None:
        chosen = matching(figures, name)
        if not chosen:
            raise InputError(f"{setting('metric')} {where}={name}: the task has {'; '.join(figures)}")
        return chosen
    voted = [key for key in figures if samples > 1 and key.endswith(f"maj@{samples}")]
    return [key for key in voted or figures if accuracy_like(figures[key])] or [main_figure(figures, samples)]


def document_scores(samples: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Returns each document's id, lm-eval's hash of it, and its score for the figure `key`."""
    metric, _, chosen = key.partition(",")
    return [
        {"doc": sample["doc_id"], "hash": sample["doc_hash"], "score": float(sample[metric])}
        for sample in samples
        if sample.get("filter") == chosen and isinstance(sample.get(metric), int | float | bool)
    ]


def chance_of(samples: Sequence[dict[str, Any]]) -> float | None:
    """Returns the accuracy of guessing in a multiple-choice task: the mean of 1 / number of
    choices. None for other tasks."""
    shares = {}
    for sample in samples:
        answers = sample["filtered_resps"]
        if len(answers) < 2 or not all(isinstance(answer, list | tuple) and len(answer) == 2 for answer in answers):
            return None
        shares[sample["doc_id"]] = 1 / len(answers)
    return math.fsum(shares.values()) / len(shares) if shares else None
