"""The uncertainty of scores and ranks, by the bootstrap over the measured units (Efron, 1979)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from hybridize.checkpoint.scores import LayerScore

RESAMPLES = 1000
SURE = 0.9  # level of the rank intervals

Measured = tuple[Tensor, Tensor]  # values [units, layers], each a sum over `weights` [units]; both float64


def scored(layers: Sequence[int], measured: Sequence[Measured], seeds: bool = False) -> list[LayerScore]:
    """Returns scores with standard errors and rank intervals. A score is the mean over parts of
    sum of values / sum of weights.

    measured: parts with equal weights. Units (questions, batches, steps) are resampled within each
    part, in the same way for all layers. seeds: the parts are runs with different seeds, and are
    resampled too. With few units the bootstrap underestimates the spread (ten steps: intervals of
    90% covered 81%), so it is widened as in Student's t distribution.
    """
    generator = torch.Generator().manual_seed(0)
    score = torch.stack([values.sum(0) / weights.sum() for values, weights in measured]).mean(0)
    if max(len(weights) for _, weights in measured) < 2 and not (seeds and len(measured) > 1):
        return [LayerScore(layer, value) for layer, value in zip(layers, score.tolist(), strict=True)]
    parts = []
    for values, weights in measured:
        drawn = torch.randint(len(weights), (RESAMPLES, len(weights)), generator=generator)
        counts = torch.zeros(RESAMPLES, len(weights), dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        again, centre = (counts @ values) / (counts @ weights).unsqueeze(1), values.sum(0) / weights.sum()
        parts.append(centre + (again - centre) * (len(weights) / max(1, len(weights) - 1)) ** 0.5)
    found = torch.stack(parts)  # [parts, resamples, layers]
    if seeds:
        which = torch.randint(len(parts), (len(parts), RESAMPLES), generator=generator)
        found = found.gather(0, which.unsqueeze(2).expand(-1, -1, found.shape[2]))
    again = found.mean(0)
    few = len(measured) if seeds and len(measured) > 1 else min(len(weights) for _, weights in measured)
    first, last = _places(score + (again - score) * _students(few - 1))
    low = torch.quantile(first, (1 - SURE) / 2, dim=0, interpolation="nearest")
    high = torch.quantile(last, (1 + SURE) / 2, dim=0, interpolation="nearest")
    rows = zip(layers, score.tolist(), again.std(0).tolist(), low.int().tolist(), high.int().tolist(), strict=True)
    return [LayerScore(layer, value, error, (best, worst)) for layer, value, error, best, worst in rows]


def _students(freedom: int) -> float:
    """Returns the ratio of the two-sided quantiles at level SURE of Student's t distribution with
    `freedom` degrees of freedom and of the normal distribution (Cornish-Fisher expansion;
    Abramowitz and Stegun, 26.7.5)."""
    if freedom < 1:
        return 1.0
    z, v = NormalDist().inv_cdf(0.5 + SURE / 2), freedom
    terms = (z**3 + z) / (4 * v), (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return (z + sum(terms) + third) / z


def _places(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first and last rank, counted from 1, that each layer may have among layers with
    equal scores; scores and ranks [resamples, layers], float64."""
    one, other = scores.unsqueeze(2), scores.unsqueeze(1)
    near = 1e-9 * scores.abs().max().clamp(min=1e-300)
    return (one > other + near).sum(2).double() + 1, (one >= other - near).sum(2).double()


def rank_uncertainty(scores: Sequence[LayerScore]) -> float | None:
    """Returns the median width of the rank intervals as a share of all ranks, 0 to 1; None without
    intervals."""
    widths = [score.ranks[1] - score.ranks[0] for score in scores if score.ranks is not None]
    return statistics.median(widths) / max(1, len(scores) - 1) if widths else None
