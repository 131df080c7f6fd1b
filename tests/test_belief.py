"""Scores, their standard errors and rank intervals against formulas written here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize.checkpoint.scores import LayerScore
from hybridize.scoring.uncertainty import _students, rank_uncertainty, scored
from hybridize.surgery.select import ambiguous_at_cut


def draws(units: int, means: list[float], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(units, len(means), generator=generator, dtype=torch.float64) + torch.tensor(means, dtype=torch.float64)


def ones(values: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(values), dtype=torch.float64)


def test_the_score_is_the_mean_over_parts_and_its_error_the_textbooks() -> None:
    one, other = draws(400, [0.0, 1.0]), draws(100, [2.0, 1.0], seed=1)
    found = scored([5, 7], [(one, ones(one)), (other, ones(other))])
    for place, score in enumerate(found):
        assert score.layer == [5, 7][place]
        assert score.score == pytest.approx(float((one[:, place].mean() + other[:, place].mean()) / 2))
        variance = one[:, place].var() / 400 + other[:, place].var() / 100
        assert score.stderr == pytest.approx(float(variance.sqrt() / 2), rel=0.1)


def test_weights_make_it_a_mean_over_tokens() -> None:
    sums, tokens = torch.tensor([[1.0], [8.0]], dtype=torch.float64), torch.tensor([1.0, 4.0], dtype=torch.float64)
    assert scored([0], [(sums, tokens)])[0].score == pytest.approx(9 / 5)


def test_ranks_are_sure_where_scores_are_and_wide_where_they_are_not() -> None:
    apart = draws(200, [0.0, 5.0, 10.0])
    assert [s.ranks for s in scored([0, 1, 2], [(apart, ones(apart))])] == [(1, 1), (2, 2), (3, 3)]
    same = draws(200, [0.0] * 5)
    found = scored(list(range(5)), [(same - same.mean(0), ones(same))])
    assert all(s.ranks == (1, 5) for s in found)
    assert rank_uncertainty(found) == 1.0


def test_equal_scores_are_no_order() -> None:
    values = draws(40, [0.0, 0.0, 0.0, 9.0])
    values[:, :3] = values[:, :1]
    found = scored([0, 1, 2, 3], [(values, ones(values))])
    assert [s.ranks for s in found] == [(1, 3), (1, 3), (1, 3), (4, 4)]
    assert ambiguous_at_cut(found, 2) == [0, 1, 2]
    assert ambiguous_at_cut(found, 3) == []
    nothing = scored([0, 1, 2, 3], [(torch.zeros_like(values), ones(values))])
    assert rank_uncertainty(nothing) == 1.0


def test_what_layers_share_does_not_blur_their_order() -> None:
    """Questions differ a lot, layers by little, but always the same way: the resamples are the same
    for all layers."""
    hard = draws(50, [0.0]) * 100
    found = scored([0, 1], [(torch.cat([hard, hard + 0.1], 1), ones(hard))])
    assert [s.ranks for s in found] == [(1, 1), (2, 2)]
    assert found[0].stderr is not None
    assert found[0].stderr > 1


def test_runs_of_other_seeds_are_drawn_again_themselves() -> None:
    runs = [draws(10, [shift]) * 0.001 + 0 for shift in (0.0, 1000.0)]
    found = scored([0], [(run, ones(run)) for run in runs], seeds=True)[0]
    assert found.stderr == pytest.approx(1 / 2**1.5, rel=0.1)  # the mean of two draws from {0, 1}
    assert scored([0], [(run, ones(run)) for run in runs])[0].stderr < 0.01  # type: ignore[operator]


def test_one_measurement_has_no_spread() -> None:
    found = scored([3], [(torch.tensor([[2.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64))])
    assert found == [LayerScore(3, 2.0)]
    assert rank_uncertainty(found) is None


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(6)), st.integers(2, 30))
def test_the_order_of_layers_changes_nothing(order: list[int], units: int) -> None:
    values = draws(units, [0.0, 0.1, 0.2, 0.5, 1.0, 3.0], seed=units)
    plain = scored(list(range(6)), [(values, ones(values))])
    turned = scored(order, [(values[:, order], ones(values))])
    assert sorted(turned, key=lambda s: s.layer) == plain


def test_a_cut_inside_a_tie_names_who_could_be_on_either_side() -> None:
    scores = [
        LayerScore(4, 0.1, 0.1, (1, 1)),
        LayerScore(2, 0.2, 0.1, (2, 3)),
        LayerScore(9, 0.3, 0.1, (2, 4)),
        LayerScore(0, 1.0, None),
    ]
    assert ambiguous_at_cut(scores, 1) == []
    assert ambiguous_at_cut(scores, 2) == [2, 9]
    assert ambiguous_at_cut(scores, 3) == [9]


@pytest.mark.parametrize(("freedom", "quantile"), [(9, 1.833113), (4, 2.131847), (30, 1.697261), (1000, 1.646379)])
def test_students_quantiles(freedom: int, quantile: float) -> None:
    """Against a table of t at .95."""
    assert _students(freedom) * 1.6448536 == pytest.approx(quantile, rel=2e-3)


def test_ten_steps_hold_the_truth_as_often_as_they_say() -> None:
    """MMR's own case, 400 experiments of eight layers, ten steps each. Drawn again as they are, ten
    steps gave standard errors whose 90% intervals held 84%; and ranks are held at least as often as
    they say."""
    means, inside, ranked = [0.33 * layer for layer in range(8)], 0, 0
    for seed in range(400):
        values = draws(10, means, seed)
        found = scored(list(range(8)), [(values, ones(values))])
        inside += sum(abs(s.score - means[s.layer]) <= 1.6448536 * _students(9) * s.stderr for s in found)
        ranked += sum(s.ranks[0] <= s.layer + 1 <= s.ranks[1] for s in found)
    print(f"scores held {inside / 3200:.3f}, ranks {ranked / 3200:.3f}")
    assert 0.88 * 3200 <= inside <= 0.92 * 3200
    assert ranked >= 0.9 * 3200
