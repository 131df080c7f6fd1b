"""Confidence intervals and p values of paired differences: score intervals for right and wrong
answers, the bootstrap for other scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import torch
from torch import Tensor

RESAMPLES = 10_000
_STEPS = 60  # bisection steps, enough for the precision of float64


@dataclass(frozen=True)
class Paired:
    """Differences of one figure by document; positive if the candidate is worse than the baseline.

    parts: a tensor [n] per subtask of a group that weights its subtasks equally, else a single one.
    binary: every score is 0 or 1, so that each difference is -1, 0 or 1. bounded: every score lies
    between 0 and 1.
    """

    parts: tuple[Tensor, ...]
    binary: bool
    bounded: bool

    @property
    def documents(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def mean(self) -> float:
        return float(torch.stack([part.mean() for part in self.parts]).mean())

    @property
    def lost(self) -> int:
        """Documents that only the baseline got right."""
        return sum(int((part > 0).sum()) for part in self.parts)

    @property
    def won(self) -> int:
        """Documents that only the candidate got right."""
        return sum(int((part < 0).sum()) for part in self.parts)

    @property
    def by_score(self) -> bool:
        """Whether the score interval is used: for binary scores, and for bounded scores without any
        difference, where the bootstrap's interval would have width zero."""
        return (self.binary and len(self.parts) == 1) or (self.bounded and not (self.lost or self.won))

    def interval(self, level: float, seed: int = 0) -> tuple[float, float]:
        """Returns the two-sided confidence interval of the mean at this level."""
        if self.by_score:
            return score_interval(self.lost, self.won, self.documents, level)
        edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        low, high = torch.quantile(self._resampled(seed), edges).tolist()
        return low, high

    def chance_of(self, drop: float, seed: int = 0) -> float:
        """Returns the one-sided p value of the null hypothesis that the mean is at most `drop`."""
        if self.by_score:
            return 1 - NormalDist().cdf(score_statistic(self.lost, self.won, self.documents, drop))
        return (float((self._resampled(seed) <= drop).sum()) + 1) / (RESAMPLES + 1)

    def _resampled(self, seed: int) -> Tensor:
        return torch.stack([resampled(part, seed + number) for number, part in enumerate(self.parts)]).mean(0)

    @cached_property
    def p(self) -> float:
        return mcnemar(self.lost, self.won)


def score_statistic(lost: int, won: int, count: int, drop: float) -> float:
    """Returns the score statistic of a difference of paired proportions: how many standard errors
    (lost - won) / count lies above `drop`, with the maximum-likelihood variance under `drop`
    (Tango, Statistics in Medicine 17, 1998, equation 6)."""
    a, c = 2 * count, -won * drop * (1 - drop)
    b = -lost - won + (2 * count - lost + won) * drop
    share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # share of documents that only the candidate gets right
    variance = count * (2 * share + drop * (1 - drop))
    distance = lost - won - count * drop
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0


def score_interval(lost: int, won: int, count: int, level: float) -> tuple[float, float]:
    """Returns the interval of drops that `score_statistic` does not reject at this two-sided level.
    Its coverage holds even if no document, or every one, has equal answers."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    mean = (lost - won) / count

    def edge(inside: float, outside: float, sign: float) -> float:
        for _ in range(_STEPS):
            middle = (inside + outside) / 2
            if sign * score_statistic(lost, won, count, middle) < z:
                inside = middle
            else:
                outside = middle
        return inside

    return edge(mean, -1.0, 1.0), edge(mean, 1.0, -1.0)


def resampled(differences: Tensor, seed: int) -> Tensor:
    """Returns the bootstrap means [RESAMPLES], float64, of the differences [n] (Efron 1979)."""
    count, generator = len(differences), torch.Generator().manual_seed(seed)
    # counts of distinct values are multinomial, so with few values the cost does not depend on the
    # number of documents
    values, times = differences.unique(return_counts=True)
    if len(values) == 1:
        return values.double().expand(RESAMPLES)
    means = torch.zeros(RESAMPLES, dtype=torch.float64)
    if len(values) <= 64:
        left, mass = torch.full((RESAMPLES,), float(count), dtype=torch.float64), 1.0
        for value, share in zip(values, times / count, strict=True):
            drawn = torch.binomial(left, torch.full_like(left, min(1.0, float(share) / mass)), generator=generator)
            means += value * drawn
            left, mass = left - drawn, max(mass - float(share), 1e-12)
        return means / count
    for begin in range(0, RESAMPLES, 500):
        picks = torch.randint(count, (min(500, RESAMPLES - begin), count), generator=generator)
        means[begin : begin + len(picks)] = differences[picks].mean(1)
    return means


def bootstrap(values: Tensor, level: float, seed: int) -> tuple[float, float]:
    """Returns the bootstrap percentile interval of the mean of `values` [n]."""
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(resampled(values, seed), edges).tolist()
    return low, high


def mcnemar(lost: int, won: int) -> float:
    """Returns the exact two-sided p value of McNemar's test (1947, binomial form) for `lost` and
    `won` discordant pairs."""
    total, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def holm(chances: Sequence[float], alpha: float) -> list[bool]:
    """Returns for each p value whether its hypothesis is rejected at family-wise error rate `alpha`
    (Holm 1979)."""
    order = sorted(range(len(chances)), key=lambda at: chances[at])
    found = [False] * len(chances)
    for rank, at in enumerate(order):
        if chances[at] > alpha / (len(chances) - rank):
            break
        found[at] = True
    return found
