"""How far a paired difference can be trusted: score intervals for right and wrong answers, the
bootstrap for other scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import torch
from torch import Tensor

RESAMPLES = 10_000
_STEPS = 60  # of a bisection: below the last bit of a float64


@dataclass(frozen=True)
class Paired:
    """Differences baseline - candidate of one figure, by document; positive: the candidate is
    worse.

    parts: one tensor [n] for each subtask of a group that weighs its subtasks equally, else a
    single one. binary: every score was right or wrong, so that each difference is -1, 0 or 1.
    bounded: every score lies between 0 and 1.
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
        """Whether the score interval is used: for right and wrong answers, and where no two bounded
        scores differ, of which a bootstrap would be sure."""
        return (self.binary and len(self.parts) == 1) or (self.bounded and not (self.lost or self.won))

    def interval(self, level: float, seed: int = 0) -> tuple[float, float]:
        """Of the mean, two-sided."""
        if self.by_score:
            return score_interval(self.lost, self.won, self.documents, level)
        edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        low, high = torch.quantile(self._resampled(seed), edges).tolist()
        return low, high

    def chance_of(self, drop: float, seed: int = 0) -> float:
        """One-sided p: how likely so large a mean is where the true one is at most `drop`."""
        if self.by_score:
            return 1 - NormalDist().cdf(score_statistic(self.lost, self.won, self.documents, drop))
        return (float((self._resampled(seed) <= drop).sum()) + 1) / (RESAMPLES + 1)

    def _resampled(self, seed: int) -> Tensor:
        return torch.stack([resampled(part, seed + number) for number, part in enumerate(self.parts)]).mean(0)

    @cached_property
    def p(self) -> float:
        return mcnemar(self.lost, self.won)


def score_statistic(lost: int, won: int, count: int, drop: float) -> float:
    """How many standard errors the mean difference (lost - won) / count lies above `drop`, the
    variance being the likeliest one where `drop` is true. For a difference of paired proportions
    (Tango, Statistics in Medicine 17, 1998, equation 6)."""
    a, c = 2 * count, -won * drop * (1 - drop)
    b = -lost - won + (2 * count - lost + won) * drop
    share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # of documents that only the candidate gets right
    variance = count * (2 * share + drop * (1 - drop))
    distance = lost - won - count * drop
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0


def score_interval(lost: int, won: int, count: int, level: float) -> tuple[float, float]:
    """The drops that `score_statistic` does not rule out at this two-sided level. It keeps its
    level also where no document, or every one, is answered alike."""
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
    """Means of RESAMPLES draws of n of the differences [n], with replacement (Efron 1979); float64."""
    count, generator = len(differences), torch.Generator().manual_seed(seed)
    # equal differences are drawn together: how often each value comes is multinomial, whatever the
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
    """Percentile interval of the mean of `values` [n]."""
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(resampled(values, seed), edges).tolist()
    return low, high


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p of `lost` against `won` discordant pairs, alike under the null (McNemar
    1947, binomial form)."""
    total, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def holm(chances: Sequence[float], alpha: float) -> list[bool]:
    """Which of these p values are rejected so that any false rejection at all has at most the
    chance `alpha` (Holm 1979)."""
    order = sorted(range(len(chances)), key=lambda at: chances[at])
    found = [False] * len(chances)
    for rank, at in enumerate(order):
        if chances[at] > alpha / (len(chances) - rank):
            break
        found[at] = True
    return found
