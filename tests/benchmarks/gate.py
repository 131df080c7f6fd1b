"""Coverage of the gate's 95% intervals: the table in docs/results.md.

    python -m tests.benchmarks.gate [--gates 4000]

For each number of documents, 25 pairs of true rates (the drop; how often only the candidate is
right), `--gates` gates each.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch

from hybridize.evaluation.intervals import score_interval

DROPS, WINS = (0.0, 0.02, 0.05, 0.1, 0.2), (0.0, 0.01, 0.03, 0.1, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", type=int, default=4000)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    for count in (20, 30, 50, 100, 300, 1000, 2000):
        cache: dict[tuple[int, int], tuple[float, float]] = {}
        covered, missed = [], []
        for drop in DROPS:
            for won in WINS:
                rates = torch.tensor([won + drop, won, 1 - 2 * won - drop]).expand(args.gates, 3)
                draws = torch.multinomial(rates, count, replacement=True, generator=generator)
                pairs = Counter(zip((draws == 0).sum(1).tolist(), (draws == 1).sum(1).tolist(), strict=True))
                inside = below = 0
                for pair, times in pairs.items():
                    if pair not in cache:
                        cache[pair] = score_interval(*pair, count, 0.95)
                    low, high = cache[pair]
                    inside += times * (low <= drop + 1e-12 and high >= drop - 1e-12)
                    below += times * (high < drop - 1e-12)
                covered.append(inside / args.gates)
                missed.append(below / args.gates)
        print(f"| {count} | {sum(covered) / len(covered):.3f} | {min(covered):.3f} | {max(missed):.3f} |", flush=True)


if __name__ == "__main__":
    main()
