"""The gate between two results of the same settings: per task the difference, how sure it is, and whether it may pass.

Both answered the same documents, so everything is paired: what the two got alike says nothing and adds no noise.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint.atomic import write_text_atomic
from hybridize.errors import InputError, WorkError
from hybridize.evaluation.results import check_comparable

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Rule:
    """When a drop of more than `max_drop` fails: by its point value, or with `confidence` only where the interval of that level
    lies above it as a whole (a drop that is sure), or with `strict` already where the interval reaches above it (a drop that
    cannot be ruled out). max_drop None: nothing ever fails."""

    max_drop: float | None = None
    confidence: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.max_drop is None:
            if self.confidence is not None or self.strict:
                raise InputError(f"--{'strict' if self.strict else 'confidence'} needs a --max-drop to hold the drop against")
            return
        if not math.isfinite(self.max_drop):
            raise InputError(f"--max-drop {self.max_drop} must be a number")
        if self.confidence is not None and not 0.5 <= self.confidence < 1:
            raise InputError(f"--confidence {self.confidence} must be at least 0.5 and less than 1")
        if self.strict and self.confidence is not None:
            raise InputError("--strict and --confidence contradict each other: one fails unless sure, the other if sure")

    @property
    def level(self) -> float:
        return LEVEL if self.confidence is None else self.confidence

    def fails(self, drop: TaskDrop) -> bool:
        """WorkError where the rule goes by an interval that the task's figure does not have."""
        if self.max_drop is None:
            return False
        if not self.strict and self.confidence is None:
            return drop.drop > self.max_drop
        if drop.low is None or drop.high is None:
            flag = "strict" if self.strict else "confidence"
            raise WorkError(f"--{flag}: {drop.metric} of {drop.task} is no mean over documents and has no interval")
        return (drop.high if self.strict else drop.low) > self.max_drop


@dataclass(frozen=True)
class TaskDrop:
    """drop: baseline - candidate in the direction in which the metric is better; positive means worse than the baseline.

    low, high: the paired bootstrap's interval of the drop, None where the figure is no mean over documents. p: McNemar's exact
    two-sided test, where each document is right or wrong; lost, won: documents that only the baseline, only the candidate got
    right.
    """

    task: str
    metric: str
    baseline: float
    candidate: float
    drop: float
    documents: int
    low: float | None = None
    high: float | None = None
    p: float | None = None
    lost: int | None = None
    won: int | None = None

    def describe(self, level: float) -> str:
        words = f"{self.task} {self.metric} is {self.candidate:.4f}, {self.drop:+.4f} below the baseline's {self.baseline:.4f}"
        if self.low is None or self.high is None:
            return words
        sure = "" if self.p is None else f", McNemar p {self.p:.3g} ({self.lost} lost, {self.won} won)"
        return f"{words} ({level:.0%} interval {self.low:+.4f} to {self.high:+.4f} over {self.documents} documents{sure})"


def compare(candidate: dict[str, Any], baseline: dict[str, Any], level: float = LEVEL, seed: int = 0) -> list[TaskDrop]:
    """Two objects of results.json, paired over documents. InputError when they were measured differently or on other ones."""
    check_comparable(candidate["settings"], candidate.get("ran"), baseline)
    drops = []
    for task, ours in candidate["tasks"].items():
        theirs = baseline["tasks"].get(task)
        if theirs is None or theirs["metric"] != ours["metric"]:
            raise InputError(f"the baseline has no {ours['metric']} for task {task}")
        sides = [{(d["doc"], d["hash"]): float(d["score"]) for d in side["documents"]} for side in (ours, theirs)]
        if sides[0].keys() != sides[1].keys():
            raise InputError(f"task {task}: the baseline answered other documents than the candidate")
        order = sorted(sides[0], key=str)
        mine, other = (torch.tensor([side[key] for key in order], dtype=torch.float64) for side in sides)
        sign = 1.0 if ours["higher_is_better"] else -1.0
        told: dict[str, Any] = {}
        if _is_mean(mine, ours["value"]) and _is_mean(other, theirs["value"]):
            told["low"], told["high"] = bootstrap(sign * (other - mine), level, seed)
            if all(bool(((side == 0) | (side == 1)).all()) for side in (mine, other)):
                worse, better = ((other > mine), (mine > other)) if sign > 0 else ((mine > other), (other > mine))
                told["lost"], told["won"] = int(worse.sum()), int(better.sum())
                told["p"] = mcnemar(told["lost"], told["won"])
        drop = sign * (theirs["value"] - ours["value"])
        drops.append(TaskDrop(task, ours["metric"], theirs["value"], ours["value"], drop, len(order), **told))
    return drops


def _is_mean(scores: Tensor, value: float) -> bool:
    return len(scores) > 0 and abs(float(scores.mean()) - value) <= 1e-6 * max(1.0, abs(value))


def bootstrap(differences: Tensor, level: float, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean of `differences` [n] over RESAMPLES draws of n of them (Efron 1979)."""
    count, generator = len(differences), torch.Generator().manual_seed(seed)
    # equal differences are drawn together: how often each value comes is multinomial, whatever the number of documents
    values, times = differences.unique(return_counts=True)
    if len(values) == 1:
        return float(values[0]), float(values[0])
    means = torch.zeros(RESAMPLES, dtype=torch.float64)
    left, mass = torch.full((RESAMPLES,), float(count), dtype=torch.float64), 1.0
    if len(values) <= 64:
        for value, share in zip(values, times / count, strict=True):
            drawn = torch.binomial(left, torch.full_like(left, min(1.0, float(share) / mass)), generator=generator)
            means += value * drawn
            left, mass = left - drawn, max(mass - float(share), 1e-12)
        means /= count
    else:
        for begin in range(0, RESAMPLES, 500):
            picks = torch.randint(count, (min(500, RESAMPLES - begin), count), generator=generator)
            means[begin : begin + len(picks)] = differences[picks].mean(1)
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p of `lost` against `won` discordant pairs, alike under the null (McNemar 1947, binomial form)."""
    total, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def drops_json(drops: Sequence[TaskDrop], rule: Rule) -> list[dict[str, Any]]:
    return [{**asdict(drop), "failed": rule.fails(drop)} for drop in drops]


def write_junit(path: Path, name: str, results: dict[str, Any], drops: Sequence[TaskDrop], rule: Rule, seconds: float) -> None:
    """Each task as a test case that fails where the gate does, in the XML that CI services show."""
    by_task = {drop.task: drop for drop in drops}
    limit = results["settings"].get("limit")
    limited = f" (limited to {limit} documents)" if limit is not None else ""
    failed = [drop for drop in drops if rule.fails(drop)]
    suite = ET.Element("testsuite", name=f"hybridize eval {name}{limited}", tests=str(len(results["tasks"])),
                       failures=str(len(failed)), errors="0", time=f"{seconds:.1f}")  # fmt: skip
    for task, found in results["tasks"].items():
        case = ET.SubElement(suite, "testcase", classname=name, name=f"{task}{limited}")
        drop = by_task.get(task)
        text = f"{task} {found['metric']} is {found['value']:.4f}" if drop is None else drop.describe(rule.level)
        if drop in failed:
            ET.SubElement(case, "failure", message=f"{text}; --max-drop allows {rule.max_drop}")
        ET.SubElement(case, "system-out").text = text
    ET.indent(suite)
    write_text_atomic(path, ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n")
