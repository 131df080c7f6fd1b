"""The report's pictures: quality against throughput, and quality against tokens spent."""

from __future__ import annotations

import io
from typing import Any

from .report import Report


def pictures(report: Report) -> dict[str, bytes] | None:
    """PNGs by name, as many as there are figures for; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    found: dict[str, bytes] = {}
    cell = report.cell
    if cell is not None:
        told = f"tokens a second, batch {cell[1]} after {cell[0]:,} tokens"
        fast = [(entry.name, entry.throughput(*cell), entry) for entry in report.entries]
        by_tasks = [(name, x, entry.quality) for name, x, entry in fast]
        by_text = [(name, x, None if entry.fidelity is None else entry.fidelity["agreement"]) for name, x, entry in fast]
        for points, title in ((by_tasks, "mean over tasks"), (by_text, "agreement with the teacher")):
            if "frontier" not in found and sum(None not in point for point in points) > 1:
                found["frontier"] = _drawn(Figure, points, told, title)
    for title, key in (("mean over tasks", "tasks"), ("reverse KL to the teacher", "reverse_kl")):
        spent = [
            (entry.name, entry.tokens / 1e6, entry.quality if key == "tasks" else (entry.fidelity or {}).get(key))
            for entry in report.entries
        ]
        if "tokens" not in found and sum(None not in point for point in spent) > 1:
            found["tokens"] = _drawn(Figure, spent, "million tokens of distillation", title)
    return found


def _drawn(figure_class: Any, points: list[Any], across: str, up: str) -> bytes:
    """points: name, x, y of every checkpoint, None where it has none; each keeps its colour from picture to picture."""
    figure = figure_class(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for number, (name, x, y) in enumerate(points):
        if x is None or y is None:
            continue
        axis.plot([x], [y], "o", color=f"C{number % 10}", markersize=8)
        axis.annotate(name, (x, y), xytext=(7, 5), textcoords="offset points", fontsize=8, parse_math=False)
    axis.set(xlabel=across, ylabel=up)
    axis.margins(0.18)
    axis.grid(alpha=0.3)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()
