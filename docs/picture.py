"""Draws docs/quality-speed.png, quality against speed, from two tables of docs/results.md, so that
figures stand there alone.

python docs/picture.py
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
RUN, BATCH = "mamba2:z+conv+decay+scale", "64"
COLOURS = {"0": "#9aa5b1", "2 M": "#5b8def", "8 M": "#1f4fb4"}


def rows(heading: str) -> list[list[str]]:
    """The cells of every table row below a heading of results.md, without its marks of emphasis."""
    text = (HERE / "results.md").read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    body = re.split(r"\n#+ ", text, maxsplit=1)[0]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in lines]


def quality() -> dict[str, float]:
    """Reverse KL from the teacher by tokens of training: the default mixer and calibration."""
    found = [row for row in rows("## Mixers and calibration, 8 M tokens (H100)") if row[0] == RUN]
    (_, start, end, *_), (_, middle, *_) = found
    return {"0": float(start), "2 M": float(middle), "8 M": float(end)}


def speed() -> dict[int, float]:
    """How many times as fast as the teacher a decoding step is, by context, at the largest batch."""
    return {int(row[0]): float(row[-1]) for row in rows("### SmolLM2") if row[1] == BATCH}


def draw(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    fast = speed()
    axes.plot([1.0], [0.0], "s", color="black", markersize=8)
    axes.annotate("teacher", (1.0, 0.0), (1.012, 0.03), va="top")
    for tokens, kl in quality().items():
        axes.plot(
            list(fast.values()), [kl] * len(fast), "o-", color=COLOURS[tokens], label=f"{tokens} tokens of training: {kl:g}"
        )
    for context, times in fast.items():
        axes.annotate(
            f"{context:,} tokens\n{times:g}x",
            (times, quality()["0"]),
            (0, -8),
            textcoords="offset points",
            ha="center",
            va="top",
        )
    axes.set(
        xlabel=f"decoding speed, times the teacher's (batch {BATCH}, by context)",
        ylabel="reverse KL from the teacher, nats per token",
        title="SmolLM2-135M, 15 of 30 attention layers as Mamba-2, one H100",
        xlim=(0.95, 1.72), ylim=(2.5, -0.15),
    )  # fmt: skip
    axes.legend(title="hybrid after", loc="center right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    draw(HERE / "quality-speed.png")
