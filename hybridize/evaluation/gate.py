"""The gate between two results of the same settings: the difference of each figure, its
uncertainty, and whether it passes.

Both models answered the same documents, so differences are paired: documents with equal scores add
no noise.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridize.checkpoint.atomic import write_text_atomic
from hybridize.errors import InputError, WorkError, setting
from hybridize.evaluation.figures import TOLERANCE, held, is_mean
from hybridize.evaluation.intervals import Paired, holm
from hybridize.evaluation.results import check_comparable, figures_in, tasks_in_groups

LEVEL = 0.95
PASS, FAIL, UNKNOWN = "pass", "fail", "cannot tell"


@dataclass(frozen=True)
class Rule:
    """When a drop counts as larger than `max_drop` and fails.

    By default its point value decides. With `confidence` it fails only if the whole interval of
    that level lies above `max_drop` (the drop is significant; over several figures by Holm's
    procedure). With `strict` it fails as soon as the interval reaches above `max_drop` (the drop
    cannot be ruled out; each figure at the full level). max_drop None: nothing fails.
    allow_inconclusive: inconclusive tasks do not fail the gate."""

    max_drop: float | None = None
    confidence: float | None = None
    strict: bool = False
    allow_inconclusive: bool = False

    def __post_init__(self) -> None:
        if self.max_drop is None:
            if self.confidence is not None or self.strict or self.allow_inconclusive:
                given = "strict" if self.strict else "confidence" if self.confidence is not None else "allow_inconclusive"
                raise InputError(f"{setting(given)} needs a {setting('max_drop')} to compare the drop with")
            return
        if not math.isfinite(self.max_drop):
            raise InputError(f"{setting('max_drop')} {self.max_drop} must be a number")
        if self.confidence is not None and not 0.5 <= self.confidence < 1:
            raise InputError(f"{setting('confidence')} {self.confidence} must be at least 0.5 and less than 1")
        if self.strict and self.confidence is not None:
            raise InputError(
                f"{setting('strict')} and {setting('confidence')} contradict each other: "
                "the first fails a drop that cannot be ruled out, the second only a significant one"
            )

    @property
    def level(self) -> float:
        return LEVEL if self.confidence is None else self.confidence

    @property
    def said(self) -> str:
        """Describes how several figures are judged."""
        if self.strict:
            return f"each figure at the full level of {self.level:.0%}"
        return (
            f"by Holm's procedure over all figures, {self.level:.0%}"
            if self.confidence is not None
            else "by their point values"
        )


@dataclass(frozen=True)
class Drop:
    """The difference of one figure between candidate and baseline.

    drop: positive if the candidate is worse, whatever the figure's direction. paired: the
    documents' differences, None if the figure is not a mean over documents. chance: accuracy of
    guessing for an accuracy-like figure, else None. seed: of the bootstrap.
    """

    task: str
    metric: str
    baseline: float
    candidate: float
    drop: float
    documents: int
    paired: Paired | None = None
    chance: float | None = None
    seed: int = 0

    def interval(self, level: float) -> tuple[float, float] | None:
        return None if self.paired is None else self.paired.interval(level, self.seed)

    @property
    def smallest(self) -> float | None:
        """The smallest drop that this number of documents can show."""
        return None if self.chance is None else 1 / self.documents

    def blind(self, max_drop: float) -> str | None:
        """Returns why these documents cannot show whether the drop is larger than `max_drop`, None
        if they can."""
        if self.chance is None:
            return None
        if self.baseline <= self.chance + max_drop + TOLERANCE:
            guess = "zero" if self.chance == 0 else f"the {self.chance:.4f} of guessing"
            return f"the baseline's {self.baseline:.4f} is not more than {max_drop:g} above {guess}: there is nothing to lose"
        if 0 < self.documents * max_drop < 1 - TOLERANCE:
            return f"the smallest drop that {self.documents} documents can show is {1 / self.documents:.4f}, above {max_drop:g}"
        return None

    def describe(self, level: float) -> str:
        words = f"{self.task} {self.metric} is {self.candidate:.4f}, {self.drop:+.4f} below the baseline's {self.baseline:.4f}"
        found = self.interval(level)
        if self.paired is None or found is None:
            return words
        counts = (
            f", McNemar p {self.paired.p:.3g} ({self.paired.lost} lost, {self.paired.won} won)" if self.paired.binary else ""
        )
        return f"{words} ({level:.0%} interval {found[0]:+.4f} to {found[1]:+.4f} over {self.documents} documents{counts})"


@dataclass(frozen=True)
class Verdict:
    """A figure's outcome; why: the reason if it is inconclusive."""

    drop: Drop
    outcome: str
    why: str = ""


def judge(drops: Sequence[Drop], rule: Rule) -> list[Verdict]:
    """Returns every figure's outcome. WorkError if the rule needs an interval that a figure does
    not have."""
    if rule.max_drop is None:
        return [Verdict(drop, PASS) for drop in drops]
    if rule.strict or rule.confidence is not None:
        for drop in drops:
            if drop.paired is None:
                given = "strict" if rule.strict else "confidence"
                raise WorkError(
                    f"{setting(given)}: {drop.metric} of {drop.task} is not a mean over documents and has no interval"
                )
    limit = rule.max_drop
    sure: list[bool] = []
    if rule.confidence is not None:
        chances = [drop.paired.chance_of(limit, drop.seed) for drop in drops if drop.paired is not None]
        sure = holm(chances, (1 - rule.confidence) / 2)
    verdicts = []
    for at, drop in enumerate(drops):
        interval, blind = drop.interval(rule.level), drop.blind(limit)
        if rule.confidence is not None:
            failed = sure[at]
        elif rule.strict:
            assert interval is not None
            failed = interval[1] > limit + TOLERANCE
        else:
            failed = drop.drop > limit + TOLERANCE
        if blind is not None and not (interval is not None and interval[0] > limit + TOLERANCE):
            verdicts.append(Verdict(drop, UNKNOWN, blind))
        else:
            verdicts.append(Verdict(drop, FAIL if failed else PASS))
    return verdicts


def by_task(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Returns each task's outcome: it fails if any of its figures does, passes if none fails and at
    least one passes, and is inconclusive otherwise."""
    found: dict[str, str] = {}
    for verdict in verdicts:
        outcomes = {found.get(verdict.drop.task, UNKNOWN), verdict.outcome}
        found[verdict.drop.task] = next(one for one in (FAIL, PASS, UNKNOWN) if one in outcomes)
    return found


def passes(verdicts: Sequence[Verdict], rule: Rule) -> bool:
    """Whether the gate passes: no task fails, and none is inconclusive unless that is allowed."""
    met = {PASS, UNKNOWN} if rule.allow_inconclusive else {PASS}
    return set(by_task(verdicts).values()) <= met


def compare(
    candidate: dict[str, Any], baseline: dict[str, Any], chosen: Mapping[str, str] | None = None, seed: int = 0
) -> list[Drop]:
    """Compares two objects of results.json, paired over documents. Returns the drop of each figure
    that a gate checks, for all tasks and groups that were requested.

    chosen: figure names by task or group (see figures.held). InputError if the results have
    different settings or documents, or lack a figure.
    """
    check_comparable(candidate["settings"], candidate.get("ran"), baseline)
    chosen, samples = dict(chosen or {}), candidate["settings"].get("samples", 1)
    drops: list[Drop] = []
    inside = tasks_in_groups(candidate)
    for group, own in candidate.get("groups", {}).items():
        drops += _group_drops(candidate, baseline, group, own, chosen.pop(group, None), samples, seed)
    for task in candidate["tasks"]:
        if task not in inside:
            drops += [
                _drop(candidate, baseline, (task,), task, key, seed)
                for key in held(figures_in(candidate["tasks"][task]), samples, chosen.pop(task, None), task)
            ]
    if chosen:
        raise InputError(
            f"{setting('metric')} names {next(iter(chosen))!r}, which is not one of the evaluated tasks and groups"
        )
    return drops


def _group_drops(
    candidate: dict[str, Any],
    baseline: dict[str, Any],
    group: str,
    own: dict[str, Any],
    name: str | None,
    samples: int,
    seed: int,
) -> Iterator[Drop]:
    """Yields the drops of a group's own aggregates, for the figures that a gate checks in its
    tasks. own: the group's entry in the candidate's results."""
    keys = dict.fromkeys(
        key for task in own["tasks"] for key in held(figures_in(candidate["tasks"][task]), samples, name, group)
    )
    found = [key for key in keys if key in own["figures"]]
    if not found:
        raise InputError(f"group {group} has no aggregate of {', '.join(keys)}; name its tasks in {setting('tasks')} instead")
    for key in found:
        ours, theirs = own["figures"][key], baseline.get("groups", {}).get(group, {}).get("figures", {}).get(key)
        if theirs is None:
            raise InputError(f"the baseline has no {key} for group {group}")
        yield _drop(candidate, baseline, tuple(own["tasks"]), group, key, seed, (ours, theirs))


def _drop(
    candidate: dict[str, Any], baseline: dict[str, Any], tasks: tuple[str, ...], name: str, key: str, seed: int,
    values: tuple[float, float] | None = None,
) -> Drop:  # fmt: skip
    """Returns the drop of the figure `key` over `tasks`. values: for a group, its aggregates
    (candidate, baseline) as weighted by lm-eval."""
    sides = [_side(candidate["tasks"][task], baseline["tasks"].get(task), task, key) for task in tasks]
    better = sides[0][0]["higher_is_better"]
    ours, theirs = values or (sides[0][0]["value"], sides[0][1]["value"])
    sign = 1.0 if better else -1.0
    sizes = [len(candidate["tasks"][task]["documents"]) for task in tasks]
    drop = Drop(name, key, theirs, ours, sign * (theirs - ours), sum(sizes), seed=seed)
    if any(figure["scores"] is None for pair in sides for figure in pair):
        return drop
    mine, other = ([torch.tensor(pair[at]["scores"], dtype=torch.float64) for pair in sides] for at in (0, 1))
    parts = _weighted([sign * (b - a) for a, b in zip(mine, other, strict=True)], drop.drop)
    if parts is None or (values is None and not all(is_mean(figure["scores"], figure["value"]) for figure in sides[0])):
        return drop
    weights = sizes if len(parts) == 1 else [1] * len(tasks)
    guesses = [weight * (candidate["tasks"][task].get("chance") or 0.0) for task, weight in zip(tasks, weights, strict=True)]
    every = torch.cat([*mine, *other])
    binary, bounded = bool(((every == 0) | (every == 1)).all()), bool(((every >= 0) & (every <= 1)).all())
    chance = sum(guesses) / sum(weights) if bounded and better else None
    return Drop(name, key, theirs, ours, drop.drop, sum(sizes), Paired(parts, binary, bounded), chance, seed)


def _weighted(parts: list[torch.Tensor], drop: float) -> tuple[torch.Tensor, ...] | None:
    """Returns the differences grouped so that their mean is the group's drop: all documents
    together, or by task with equal weights; None if neither gives the drop."""
    joined = torch.cat(parts)
    if abs(float(joined.mean()) - drop) <= 1e-6:
        return (joined,)
    return tuple(parts) if abs(float(torch.stack([part.mean() for part in parts]).mean()) - drop) <= 1e-6 else None


def _side(ours: dict[str, Any], theirs: dict[str, Any] | None, task: str, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the figure `key` of both results, the baseline's scores in the order of the
    candidate's documents. InputError unless both have it and answered the same documents."""
    mine, other = figures_in(ours).get(key), None if theirs is None else figures_in(theirs).get(key)
    if theirs is None or mine is None or other is None:
        raise InputError(f"the baseline has no {key} for task {task}")
    places = [{(d["doc"], d["hash"]): at for at, d in enumerate(side["documents"])} for side in (ours, theirs)]
    if places[0].keys() != places[1].keys():
        raise InputError(f"task {task}: baseline and candidate answered different documents")
    if any(figure["scores"] is None or len(figure["scores"]) != len(places[0]) for figure in (mine, other)):
        return mine | {"scores": None}, other
    return mine, other | {"scores": [other["scores"][places[1][document]] for document in places[0]]}


def verdicts_json(verdicts: Sequence[Verdict], rule: Rule) -> list[dict[str, Any]]:
    found = []
    for verdict in verdicts:
        drop, interval = verdict.drop, verdict.drop.interval(rule.level)
        paired = drop.paired if drop.paired is not None and drop.paired.binary else None
        found.append({
            "task": drop.task, "metric": drop.metric, "baseline": drop.baseline, "candidate": drop.candidate,
            "drop": drop.drop, "documents": drop.documents, "low": None if interval is None else interval[0],
            "high": None if interval is None else interval[1], "p": None if paired is None else paired.p,
            "lost": None if paired is None else paired.lost, "won": None if paired is None else paired.won,
            "chance": drop.chance, "smallest_drop": drop.smallest, "outcome": verdict.outcome, "why": verdict.why or None,
            "failed": verdict.outcome == FAIL,
        })  # fmt: skip
    return found


def write_junit(
    path: Path, name: str, results: dict[str, Any], verdicts: Sequence[Verdict], rule: Rule, seconds: float
) -> None:
    """Writes a JUnit XML report for CI services, with each figure as a test case."""
    limit = results["settings"].get("limit")
    limited = f" (limited to {limit} documents)" if limit is not None else ""
    open_ = [] if rule.allow_inconclusive else [task for task, outcome in by_task(verdicts).items() if outcome == UNKNOWN]
    cases = [(verdict, verdict.outcome == FAIL or verdict.drop.task in open_) for verdict in verdicts]
    bare = [] if verdicts else list(results["tasks"].items())
    suite = ET.Element("testsuite", name=f"hybridize eval {name}{limited}", tests=str(len(cases) + len(bare)),
                       failures=str(sum(failed for _, failed in cases)), errors="0", time=f"{seconds:.1f}")  # fmt: skip
    for verdict, failed in cases:
        several = sum(other.drop.task == verdict.drop.task for other, _ in cases) > 1
        title = f"{verdict.drop.task} {verdict.drop.metric}" if several else verdict.drop.task
        case = ET.SubElement(suite, "testcase", classname=name, name=f"{title}{limited}")
        text = verdict.drop.describe(rule.level)
        if failed:
            allowed = f"a drop of at most {rule.max_drop} is allowed"
            reason = f"cannot tell: {verdict.why}" if verdict.outcome == UNKNOWN else allowed
            ET.SubElement(case, "failure", message=f"{text}; {reason}")
        elif verdict.outcome == UNKNOWN:
            ET.SubElement(case, "skipped", message=f"cannot tell: {verdict.why}")
        ET.SubElement(case, "system-out").text = text
    for task, found in bare:
        case = ET.SubElement(suite, "testcase", classname=name, name=f"{task}{limited}")
        ET.SubElement(case, "system-out").text = f"{task} {found['metric']} is {found['value']:.4f}"
    ET.indent(suite)
    write_text_atomic(path, ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n")
