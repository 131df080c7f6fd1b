"""What `eval` shows: all figures, recall by length, and what the gate makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import Output

if TYPE_CHECKING:
    from hybridize.evaluation.gate import Rule, Verdict


def warn_of_gate(out: Output, verdicts: list[Verdict], rule: Rule) -> None:
    """Why a gate is not met, or what of it nobody can tell."""
    from hybridize.evaluation.gate import FAIL, UNKNOWN, by_task

    outcomes = by_task(verdicts)
    for verdict in verdicts:
        drop = verdict.drop
        if verdict.outcome == FAIL:
            out.warn(f"gate not met: {drop.describe(rule.level)}; --max-drop allows {rule.max_drop}")
        elif verdict.outcome == UNKNOWN:
            alone = outcomes[drop.task] == UNKNOWN and not rule.allow_inconclusive
            after = "; --allow-inconclusive lets it be" if alone else ""
            out.warn(f"cannot tell by {drop.task} {drop.metric}: {verdict.why}{after}")


def show_results(
    out: Output, path: Path, results: dict[str, Any], other: dict[str, Any] | None, verdicts: list[Verdict], rule: Rule
) -> None:
    """Every figure of every task and group, and below them the drops from the baseline."""
    limit = results["settings"].get("limit")
    title = f"{path}" + (f" (limited to {limit} documents a task)" if limit is not None else "")
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
    held = "" if rule.max_drop is None else f"; held against {rule.max_drop:g}{how}"
    out.table(f"drops from the baseline{held}", columns, rows)


def _figures(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of groups and tasks, by name and lm-eval's key."""
    from hybridize.evaluation.results import values_in

    tasks = {name: values_in(task) for name, task in results["tasks"].items()}
    return {name: dict(group["figures"]) for name, group in results.get("groups", {}).items()} | tasks


def _show_recall(out: Output, results: dict[str, Any], other: dict[str, Any] | None) -> None:
    """Recall by length, the baseline's beside it."""
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
