"""The gate's statistics against independent ones, and its rules."""

from __future__ import annotations

import itertools
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize.errors import InputError, WorkError
from hybridize.evaluation.gate import Rule, TaskDrop, bootstrap, compare, mcnemar, write_junit


def result(scores: list[float], value: float | None = None, better: bool = True, **changes: Any) -> dict[str, Any]:
    documents = [{"doc": i, "hash": f"h{i}", "score": s} for i, s in enumerate(scores)]
    own = {"tasks": ["t"], "num_fewshot": None, "limit": None, "apply_chat_template": False, "gen_kwargs": None, "seed": 0}
    mean = sum(scores) / len(scores) if value is None else value
    task = {"metric": "acc,none", "value": mean, "higher_is_better": better, "documents": documents}
    return {"settings": {**own, **changes}, "tasks": {"t": task}, "ran": {"dtype": "float32"}}


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (9, 1), (1, 9), (5, 5), (3, 0), (40, 22)])
def test_mcnemar_is_the_binomial_test(lost: int, won: int) -> None:
    """Every outcome of lost + won fair coins that is no likelier than this one, enumerated."""
    total = lost + won
    chances = [math.comb(total, k) / 2**total for k in range(total + 1)]
    wanted = sum(c for c in chances if c <= chances[lost] * (1 + 1e-9))
    assert mcnemar(lost, won) == pytest.approx(min(1.0, wanted))


def test_the_interval_covers_as_often_as_it_says() -> None:
    """400 experiments of 120 documents with a true drop of 0.1: a 90% interval must hold it in about 90% of them."""
    generator, inside = torch.Generator().manual_seed(0), 0
    for number in range(400):
        draw = torch.rand(120, generator=generator)
        differences = (draw < 0.2).double() - (draw > 0.9).double()
        low, high = bootstrap(differences, 0.9, number)
        inside += low <= 0.1 <= high
    assert 340 <= inside <= 385


@pytest.mark.parametrize("kinds", [3, 500])
def test_the_interval_is_that_of_a_plain_bootstrap(kinds: int) -> None:
    """Both ways of drawing, by multinomial counts and by picks, against drawing with replacement one by one."""
    generator = torch.Generator().manual_seed(1)
    differences = torch.randint(kinds, (300,), generator=generator).double() / kinds - 0.4
    means = sorted(float(differences[torch.randint(300, (300,), generator=generator)].mean()) for _ in range(4000))
    low, high = bootstrap(differences, 0.95, 0)
    spread = means[3900] - means[100]
    assert abs(low - means[100]) <= 0.08 * spread
    assert abs(high - means[3900]) <= 0.08 * spread


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=40), st.booleans(), st.randoms())
def test_equal_answers_are_no_drop_whatever_the_order(scores: list[float], better: bool, shuffler: Any) -> None:
    ours, theirs = result(scores, better=better), result(scores, better=better)
    shuffler.shuffle(theirs["tasks"]["t"]["documents"])
    (drop,) = compare(ours, theirs)
    assert (drop.drop, drop.low, drop.high, drop.p, drop.lost, drop.won) == (0, 0, 0, 1, 0, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=60))
def test_swapping_sides_turns_the_sign(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = (result([pair[side] for pair in pairs]) for side in (0, 1))
    (there,), (back,) = compare(ours, theirs), compare(theirs, ours)
    assert there.drop == pytest.approx(-back.drop)
    assert (there.lost, there.won, there.p) == (back.won, back.lost, back.p)
    assert there.low <= there.drop + 1e-9
    assert there.high >= there.drop - 1e-9


def test_lower_is_better_turns_everything() -> None:
    (drop,) = compare(result([1, 1, 1, 0], better=False), result([0, 0, 1, 0], better=False))
    assert drop.drop == 0.5
    assert (drop.lost, drop.won) == (2, 0)
    assert drop.low >= 0


def test_a_figure_that_is_no_mean_has_no_interval() -> None:
    (drop,) = compare(result([1, 2, 4], value=7.5), result([1, 1, 1]))
    assert (drop.low, drop.p) == (None, None)
    assert not Rule(100).fails(drop)
    with pytest.raises(WorkError, match="no mean over documents"):
        Rule(0.1, strict=True).fails(drop)


def drop_of(low: float, point: float, high: float) -> TaskDrop:
    return TaskDrop("t", "acc,none", 1.0, 1.0 - point, point, 100, low, high)


def test_the_three_rules() -> None:
    for low, point, high in itertools.combinations_with_replacement([0.0, 0.01, 0.03, 0.05], 3):
        drop = drop_of(low, point, high)
        assert Rule(0.02).fails(drop) == (point > 0.02)
        assert Rule(0.02, confidence=0.9).fails(drop) == (low > 0.02)
        assert Rule(0.02, strict=True).fails(drop) == (high > 0.02)
        assert not Rule().fails(drop)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"confidence": 0.9}, "--confidence needs a --max-drop"),
        ({"strict": True}, "--strict needs a --max-drop"),
        ({"max_drop": 0.1, "confidence": 95.0}, "at least 0.5 and less than 1"),
        ({"max_drop": 0.1, "confidence": 0.9, "strict": True}, "contradict each other"),
        ({"max_drop": float("nan")}, "must be a number"),
    ],
)
def test_rules_that_make_no_sense(told: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Rule(**told)


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_fewshot": 5}, {"limit": 3}, {"gen_kwargs": "temperature=1"}])
def test_other_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="not comparable"):
        compare(result([1.0], **change), result([1.0]))


def test_other_documents_and_other_types_are_refused() -> None:
    other = result([1.0, 0.0])
    other["tasks"]["t"]["documents"][1]["hash"] = "changed"
    with pytest.raises(InputError, match="other documents"):
        compare(result([1.0, 0.0]), other)
    narrow = result([1.0])
    narrow["ran"]["dtype"] = "bfloat16"
    with pytest.raises(InputError, match="in bfloat16, the candidate in float32"):
        compare(result([1.0]), narrow)


def test_junit_is_what_a_service_reads(tmp_path: Path) -> None:
    ours, theirs = result([0.0] * 9 + [1.0], limit=10), result([1.0] * 10, limit=10)
    rule = Rule(0.5)
    write_junit(tmp_path / "out.xml", "h <30>", ours, compare(ours, theirs), rule, 12.5)
    suite = ET.parse(tmp_path / "out.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("time")) == ("1", "1", "12.5")
    assert "h <30>" in suite.get("name")
    (case,) = suite.findall("testcase")
    assert case.get("name") == "t (limited to 10 documents)"
    message = case.find("failure").get("message")
    assert "0.1000" in message
    assert "interval" in message
    assert "--max-drop allows 0.5" in message
    json.dumps(message)
