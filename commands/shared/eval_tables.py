"""Output of `eval`: all metrics, recall by length, and the outcome of the gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import Output

if TYPE_CHECKING:
    from hybridize.evaluation.gate import Rule, Verdict


def warn_of_gate(out: Output, verdicts: list[Verdict], rule: Rule) -> None:
    """Warns of tasks that fail the gate or that are inconclusive."""
    from hybridize.evaluation.gate import FAIL, UNKNOWN, by_task

    outcomes = by_task(verdicts)
    for verdict in verdicts:
        drop = verdict.drop
        if verdict.outcome == FAIL:
            out.warn(f"gate not met: {drop.describe(rule.level)}; --max-drop allows {rule.max_drop}")
        elif verdict.outcome == UNKNOWN:
            alone = outcomes[drop.task] == UNKNOWN and not rule.allow_inconclusive
            after = "; --allow-inconclusive accepts this" if alone else ""
            out.warn(f"inconclusive: {drop.task} {drop.metric}: {verdict.why}{after}")


def show_results(
    out: Output, path: Path, results: dict[str, Any], other: dict[str, Any] | None, verdicts: list[Verdict], rule: Rule
) -> None:
    """Shows every metric of every task and group, then the drops from the baseline."""
    limit = results["settings"].get("limit")
    title = f"{path}" + (f" (limited to {limit} documents per task)" if limit is not None else "")
    theirs = {} if other is None else _figures(other)
    rows = []
    for name, figures in _figures(results).items():
        count = len(results["tasks"][name]["documents"]) if name in results["tasks"] else ""
        for key, value in figures.items():
            before = theirs.get(name, {}).get(key)
            rows.append([name, key, str(count), f"{value:.4f}", "" if before is None else f"{before:.4f}"])
    columns = ["task", "metric", "documents", "value", *(["baseline"] if other is not None else [])]
    out.table(title, columns, [row[: len(columns)] for row in rows])
    _show_recall(out, results, other)
    if verdicts:
        _show_drops(out, verdicts, rule)


def _show_drops(out: Output, verdicts: list[Verdict], rule: Rule) -> None:
    """One row per task and metric: the drop, its interval and test, and the outcome."""
    rows = []
    for verdict in verdicts:
        drop, interval, paired = verdict.drop, verdict.drop.interval(rule.level), verdict.drop.paired
        rows.append([
            drop.task, drop.metric, f"{drop.drop:+.4f}",
            "" if interval is None else f"{interval[0]:+.4f} .. {interval[1]:+.4f}",
            "" if paired is None or not paired.binary else f"{paired.p:.3g}",
            "" if drop.smallest is None else f"{drop.smallest:.4f}", "" if rule.max_drop is None else verdict.outcome,
        ])  # fmt: skip
    columns = ["task", "metric", "drop", f"{rule.level:.0%} interval", "McNemar p", "smallest drop", "outcome"]
    how = f" {rule.said}" if len(verdicts) > 1 else ""
    held = "" if rule.max_drop is None else f"; at most {rule.max_drop:g} allowed{how}"
    out.table(f"drops from the baseline{held}", columns, rows)


def _figures(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics of groups and tasks, by name and by lm-eval's key."""
    from hybridize.evaluation.results import values_in

    tasks = {name: values_in(task) for name, task in results["tasks"].items()}
    return {name: dict(group["figures"]) for name, group in results.get("groups", {}).items()} | tasks


def _show_recall(out: Output, results: dict[str, Any], other: dict[str, Any] | None) -> None:
    """Shows recall by length, with the baseline's in brackets."""
    from hybridize.evaluation.recall import by_length

    ours, theirs = by_length(results["tasks"]), {} if other is None else by_length(other["tasks"])
    if not ours:
        return
    kinds = list(next(iter(ours.values())))

    def cell(length: int, kind: str) -> str:
        beside = theirs.get(length, {}).get(kind)
        return f"{ours[length][kind]:.2f}" + ("" if beside is None else f" ({beside:.2f})")

    rows = [[str(length), *(cell(length, kind) for kind in kinds)] for length in ours]
    out.table("recall by length" + (" (baseline)" if theirs else ""), ["tokens", *kinds], rows)
