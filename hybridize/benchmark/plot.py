"""Plots bench.json: time per step against context length, one panel per batch size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from hybridize.benchmark.grid import break_even
from hybridize.checkpoint.atomic import write_bytes_atomic


def draw(found: dict[str, Any], path: Path) -> None:
    """Writes the plot as a PNG. A run without a grid gets none."""
    from matplotlib.figure import Figure

    names, batches = list(found["checkpoints"]), found["settings"]["batches"]
    if not found["settings"]["contexts"]:
        return
    figure = Figure(figsize=(4.5 * len(batches), 3.6), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)
    base = found["checkpoints"][names[0]]["steps"]
    for panel, batch in zip(panels[0], batches, strict=True):
        for number, name in enumerate(names):
            steps = [e for e in found["checkpoints"][name]["steps"] if e["batch"] == batch and e["ms"] is not None]
            panel.plot([e["context"] for e in steps], [e["ms"] for e in steps], marker="o", color=f"C{number}", label=name)
            at = break_even(found["checkpoints"][name]["steps"], base, batch) if number else None
            if at is not None:
                panel.axvline(at, color=f"C{number}", linestyle=":", linewidth=1)
        panel.set(title=f"batch {batch}", xlabel="context (tokens)", ylabel="ms per step", xscale="log", ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0][0].legend(title="dotted: break-even")
    figure.suptitle(found["machine"])
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_bytes_atomic(path, data.getvalue())
