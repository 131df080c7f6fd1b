"""A distillation's curve as a PNG: `python tests/benchmarks/plot_run.py CHECKPOINT OUT.png` (needs matplotlib)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(checkpoint: Path, output: Path) -> None:
    steps, measures = (
        [json.loads(line) for line in (checkpoint / name).read_text().splitlines()] for name in ("metrics.jsonl", "eval.jsonl")
    )
    figure, axis = plt.subplots(figsize=(7, 4), dpi=120)
    axis.plot([s["tokens"] / 1e6 for s in steps], [s["loss"] for s in steps], lw=0.8, label="training loss")
    tokens = [m["tokens"] / 1e6 for m in measures]
    axis.plot(tokens, [m["reverse_kl"] for m in measures], "o-", label="held-out reverse KL")
    axis.set(xlabel="million tokens", ylabel="nats per token", yscale="log")
    other = axis.twinx()
    other.plot(tokens, [m["agreement"] for m in measures], "s--", color="tab:green", label="held-out agreement")
    other.set_ylabel("top-1 agreement with the teacher")
    lines = [*axis.get_lines(), *other.get_lines()]
    axis.legend(lines, [line.get_label() for line in lines], loc="center right")
    figure.tight_layout()
    figure.savefig(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
