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
from hybridize.evaluation.figures import chance_of, figures_of, held
from hybridize.evaluation.gate import FAIL, PASS, UNKNOWN, Drop, Rule, Verdict, by_task, compare, judge, passes, write_junit
from hybridize.evaluation.intervals import Paired, bootstrap, holm, mcnemar, score_interval, score_statistic
from hybridize.evaluation.results import groups_of


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
    """400 experiments of 120 documents with a true drop of 0.1: a 90% interval must hold it in
    about 90% of them."""
    generator, inside = torch.Generator().manual_seed(0), 0
    for number in range(400):
        draw = torch.rand(120, generator=generator)
        differences = (draw < 0.2).double() - (draw > 0.9).double()
        low, high = bootstrap(differences, 0.9, number)
        inside += low <= 0.1 <= high
    assert 340 <= inside <= 385


@pytest.mark.parametrize("kinds", [3, 500])
def test_the_interval_is_that_of_a_plain_bootstrap(kinds: int) -> None:
    """Both ways of drawing, by multinomial counts and by picks, against drawing with replacement
    one by one."""
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
    assert (drop.drop, drop.paired.p, drop.paired.lost, drop.paired.won) == (0, 1, 0, 0)
    low, high = drop.interval(0.95)
    assert low == pytest.approx(-high)
    assert 0 < high == pytest.approx(3.8414588 / (len(scores) + 3.8414588)), "alike on so many documents is not alike for sure"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=60))
def test_swapping_sides_turns_the_sign(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = (result([pair[side] for pair in pairs]) for side in (0, 1))
    (there,), (back,) = compare(ours, theirs), compare(theirs, ours)
    assert there.drop == pytest.approx(-back.drop)
    assert (there.paired.lost, there.paired.won, there.paired.p) == (back.paired.won, back.paired.lost, back.paired.p)
    assert there.interval(0.9) == pytest.approx([-edge for edge in back.interval(0.9)][::-1], abs=1e-9)
    low, high = there.interval(0.9)
    assert low <= there.drop + 1e-9
    assert high >= there.drop - 1e-9


def test_lower_is_better_turns_everything() -> None:
    (drop,) = compare(result([1, 1, 1, 0], better=False), result([0, 0, 1, 0], better=False))
    assert drop.drop == 0.5
    assert (drop.paired.lost, drop.paired.won) == (2, 0)
    assert drop.chance is None


def test_a_figure_that_is_no_mean_has_no_interval() -> None:
    (drop,) = compare(result([1, 2, 4], value=7.5), result([1, 1, 1]))
    assert drop.interval(0.95) is None
    assert judge([drop], Rule(100))[0].outcome == PASS
    with pytest.raises(WorkError, match="not a mean over documents"):
        judge([drop], Rule(0.1, strict=True))


@pytest.mark.parametrize(
    ("lost", "won", "count"), [(0, 0, 30), (3, 0, 20), (12, 5, 100), (40, 41, 300), (0, 7, 50), (20, 0, 20)]
)
def test_the_score_interval_is_where_its_statistic_is_z(lost: int, won: int, count: int) -> None:
    """Tango's statistic with the likeliest share found by brute force in place of his closed form."""
    z = 1.959963985

    def brute(drop: float) -> float:
        grid = torch.linspace(max(0.0, -drop), (1 - drop) / 2, 200_001, dtype=torch.float64)[
            1:-1
        ]  # of only-candidate documents
        logs = lost * (grid + drop).log() + won * grid.log() + (count - lost - won) * (1 - drop - 2 * grid).log()
        if won == 0:  # the likelihood may be largest at the edge
            edge = max(0.0, -drop)
            grid = torch.cat([torch.tensor([edge], dtype=torch.float64), grid])
            at_edge = (
                lost * math.log(edge + drop) + (count - lost) * math.log(1 - drop - 2 * edge) if edge + drop > 0 else -math.inf
            )
            logs = torch.cat([torch.tensor([at_edge], dtype=torch.float64), logs])
        share = float(grid[logs.argmax()])
        return (lost - won - count * drop) / math.sqrt(count * (2 * share + drop - drop * drop))

    for drop in (0.02, 0.1, 0.3):
        assert score_statistic(lost, won, count, drop) == pytest.approx(brute(drop), rel=2e-3, abs=2e-3)
    low, high = score_interval(lost, won, count, 0.95)
    assert low < (lost - won) / count + 1e-9
    assert high > (lost - won) / count - 1e-9
    for edge, sign in ((low, 1), (high, -1)):
        if abs(edge) < 1 - 1e-9:
            assert sign * score_statistic(lost, won, count, edge) == pytest.approx(z, abs=1e-6)


COVERED: dict[int, dict[tuple[int, int], tuple[float, float]]] = {}


@pytest.mark.parametrize("count", [20, 30, 100, 500, 2000])
@pytest.mark.parametrize(
    ("drop", "won"), [(0.0, 0.0), (0.0, 0.1), (0.02, 0.01), (0.05, 0.0), (0.05, 0.05), (0.1, 0.2), (0.2, 0.03)]
)
def test_the_score_interval_keeps_its_level(count: int, drop: float, won: float) -> None:
    """2,000 experiments: the 95% interval holds the true drop in at least 92% (the least in a wide
    search was 92.8%), and its upper edge, by which --strict passes, lies below the true drop in at
    most 4%."""
    generator = torch.Generator().manual_seed(count)
    draw = torch.rand(2000, count, generator=generator)
    losses, wins = (draw < won + drop).sum(1).tolist(), ((draw >= won + drop) & (draw < 2 * won + drop)).sum(1).tolist()
    cache = COVERED.setdefault(count, {})
    inside = passed = 0
    for pair in zip(losses, wins, strict=True):
        if pair not in cache:
            cache[pair] = score_interval(*pair, count, 0.95)
        low, high = cache[pair]
        inside += low <= drop + 1e-12 and high >= drop - 1e-12
        passed += high < drop - 1e-12
    print(f"coverage {inside / 2000:.3f}, below {passed / 2000:.3f}")
    assert inside >= 0.92 * 2000
    assert passed <= 0.04 * 2000


def test_strict_rarely_passes_a_true_drop() -> None:
    """The gate of the issue: 30 documents, a true drop of .05, --max-drop 0.02: the bootstrap's [0,
    0] passed 21% of them."""
    generator, found = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        lost = (torch.rand(100, generator=generator) < 0.05).double()
        (drop,) = compare(result((1 - lost).tolist()), result([1.0] * 100))
        found += judge([drop], Rule(0.02, strict=True))[0].outcome == PASS
    assert found <= 0.025 * 400


def drop_of(mean: float, spread: float = 0.0, count: int = 400, task: str = "t", **changes: Any) -> Drop:
    differences = torch.full((count,), mean, dtype=torch.float64)
    differences[::2] += spread
    differences[1::2] -= spread
    return Drop(task, "acc,none", 1.0, 1.0 - mean, mean, count, Paired((differences,), False, False), **changes)


def test_the_three_rules() -> None:
    """On drops whose 95% interval is narrow, wide or far."""
    for mean, spread in itertools.product([0.0, 0.015, 0.025, 0.05], [0.0, 0.05, 0.5]):
        drop = drop_of(mean, spread)
        low, high = drop.interval(0.95)
        outcome = lambda **told: judge([drop], Rule(0.02, **told))[0].outcome  # noqa: B023, E731
        assert (outcome() == FAIL) == (mean > 0.02)
        assert (outcome(strict=True) == FAIL) == (high > 0.02)
        assert (outcome(confidence=0.95) == FAIL) == (low > 0.02)
        assert judge([drop], Rule())[0].outcome == PASS


@pytest.mark.parametrize("count", [10, 50, 100, 250, 1000])
def test_at_the_boundary_counts_decide(count: int) -> None:
    """1.00 -> 0.98 with --max-drop 0.02 passes: not one document more than that is lost, whatever
    the floats say."""
    for limit in range(1, count):
        allowed = limit / count
        for lost, wanted in ((limit, PASS), (limit + 1, FAIL)):
            if lost <= count and allowed < 0.99:
                (drop,) = compare(result([0.0] * lost + [1.0] * (count - lost)), result([1.0] * count))
                verdict = judge([drop], Rule(round(allowed, 6)))[0]
                assert verdict.outcome in (wanted, UNKNOWN if count * allowed < 1 else wanted), (limit, count)


def test_where_there_is_nothing_to_lose_nobody_can_tell() -> None:
    ours, theirs = result([0.0] * 200), result([0.0] * 200)
    (verdict,) = judge(compare(ours, theirs), Rule(0.02))
    assert (verdict.outcome, verdict.drop.smallest) == (UNKNOWN, 1 / 200)
    assert "there is nothing to lose" in verdict.why
    assert not passes([verdict], Rule(0.02))
    assert passes([verdict], Rule(0.02, allow_inconclusive=True))
    ours["tasks"]["t"]["chance"] = 0.25
    guessing = [1.0] * 53 + [0.0] * 147
    (verdict,) = judge(
        compare({**ours, "tasks": {"t": result(guessing)["tasks"]["t"] | {"chance": 0.25}}}, result(guessing)), Rule(0.02)
    )
    assert verdict.outcome == UNKNOWN
    assert "0.2500 of guessing" in verdict.why
    (verdict,) = judge(compare(result([1.0] * 20), result([1.0] * 20)), Rule(0.02))
    assert verdict.outcome == UNKNOWN
    assert "the smallest drop that 20 documents can show is 0.0500" in verdict.why
    (verdict,) = judge(compare(result([0.0] * 20), result([1.0] * 20)), Rule(0.02))
    assert verdict.outcome == FAIL, "a drop that is sure is one on any number of documents"
    (verdict,) = judge(compare(result([1.0] * 20), result([1.0] * 20)), Rule(0.0))
    assert verdict.outcome == PASS, "no drop at all can be seen on any number of documents"


def figured(**figures: list[float]) -> dict[str, Any]:
    made = {
        key.replace("__", ","): {"value": sum(v) / len(v), "higher_is_better": True, "scores": v} for key, v in figures.items()
    }
    found = result(next(iter(figures.values())))
    found["tasks"]["t"] |= {"metric": next(iter(made)), "figures": made}
    return found


def test_every_accuracy_like_figure_is_held() -> None:
    """gsm8k: the strict filter finds nothing on either side, the flexible one a drop."""
    ours, theirs = (
        figured(
            **{"exact_match__strict-match": [0.0] * 200, "exact_match__flexible-extract": [1.0] * right + [0.0] * (200 - right)}
        )
        for right in (26, 55)
    )
    verdicts = judge(compare(ours, theirs), Rule(0.02))
    assert [v.outcome for v in verdicts] == [UNKNOWN, FAIL]
    assert by_task(verdicts) == {"t": FAIL}
    (strict,) = judge(compare(ours, theirs, {"t": "strict-match"}), Rule(0.02))
    assert strict.outcome == UNKNOWN
    assert len(compare(ours, theirs, {"t": "exact_match"})) == 2
    (one,) = compare(ours, theirs, {"t": "exact_match,flexible-extract"})
    assert one.metric == "exact_match,flexible-extract"
    with pytest.raises(InputError, match="metric t=acc: the task has exact_match,strict-match; exact_match,flexible-extract"):
        compare(ours, theirs, {"t": "acc"})
    with pytest.raises(InputError, match="names 'other', which is not one of the evaluated tasks"):
        compare(ours, theirs, {"other": "acc"})
    good = judge(compare(theirs, theirs), Rule(0.02))
    assert by_task(good) == {"t": PASS}, "what one filter cannot tell another can"


def test_which_figures_are_accuracy_like() -> None:
    figures = figured(acc__none=[1.0, 0.0], loss__none=[3.0, 4.0])["tasks"]["t"]["figures"]
    figures["ppl,none"] = {"value": 9.0, "higher_is_better": False, "scores": [0.5, 0.5]}
    figures["macro,none"] = {"value": 0.9, "higher_is_better": True, "scores": [1.0, 0.0]}
    assert held(figures) == ["acc,none"]
    assert held({"ppl,none": figures["ppl,none"]}) == ["ppl,none"]
    assert held(figures | {"acc,maj@3": figures["acc,none"]}, samples=3) == ["acc,maj@3"]


def grouped(right: dict[str, int], sizes: dict[str, int], weighed: bool) -> dict[str, Any]:
    tasks = {}
    for task, size in sizes.items():
        scores = [1.0] * right[task] + [0.0] * (size - right[task])
        tasks[task] = {
            **result(scores)["tasks"]["t"],
            "documents": [{"doc": i, "hash": f"{task}{i}", "score": s} for i, s in enumerate(scores)],
        }
    means = [right[task] / size for task, size in sizes.items()]
    value = sum(right.values()) / sum(sizes.values()) if weighed else sum(means) / len(means)
    return {**result([1.0]), "tasks": tasks, "groups": {"g": {"tasks": list(tasks), "figures": {"acc,none": value}}}}


@pytest.mark.parametrize("weighed", [True, False])
def test_a_group_is_one_gate(weighed: bool) -> None:
    """Fifty subtasks of two equally good models, some better and some worse: one figure, in
    lm-eval's own weighing."""
    sizes = {f"s{n}": 20 + 3 * n for n in range(50)}
    theirs = grouped({task: size * 3 // 4 for task, size in sizes.items()}, sizes, weighed)
    ours = grouped({task: size * 3 // 4 + (2 if n % 2 else -2) for n, (task, size) in enumerate(sizes.items())}, sizes, weighed)
    (drop,) = compare(ours, theirs)
    assert (drop.task, drop.documents) == ("g", sum(sizes.values()))
    assert drop.drop == pytest.approx(theirs["groups"]["g"]["figures"]["acc,none"] - ours["groups"]["g"]["figures"]["acc,none"])
    low, high = drop.interval(0.95)
    assert low < drop.drop < high
    assert len(drop.paired.parts) == (1 if weighed else 50)
    assert judge([drop], Rule(0.02))[0].outcome == PASS


def test_groups_are_those_that_were_asked_for() -> None:
    found = {
        "samples": {"a": [], "b": [], "c": []}, "group_subtasks": {"all": ["part", "c"], "part": ["a", "b"]},
        "results": {"all": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "all"}, "part": {"acc,none": 0.4}, "a": {}},
    }  # fmt: skip
    assert groups_of(found, ["all"]) == {"all": {"tasks": ["a", "b", "c"], "figures": {"acc,none": 0.5}}}
    assert groups_of(found, ["c"]) == {}


def test_several_figures_under_confidence_go_by_holm() -> None:
    assert holm([0.01, 0.04, 0.03], 0.05) == [True, False, False]
    assert holm([0.01, 0.02, 0.03], 0.05) == [True, True, True]
    assert holm([], 0.05) == []
    alone = [drop_of(0.05, 0.25, task=f"t{n}") for n in range(12)]
    assert judge(alone[:1], Rule(0.02, confidence=0.95))[0].outcome == FAIL
    assert {v.outcome for v in judge(alone, Rule(0.02, confidence=0.95))} == {PASS}
    assert {v.outcome for v in judge(alone, Rule(0.02, strict=True))} == {FAIL}
    assert "Holm" in Rule(0.02, confidence=0.95).said
    assert "full level" in Rule(0.02, strict=True).said


def test_what_guessing_gets() -> None:
    sample = lambda doc, count: {"doc_id": doc, "filtered_resps": [(0.0, False)] * count}  # noqa: E731
    assert chance_of([sample(0, 4), sample(1, 4)]) == 0.25
    assert chance_of([sample(0, 2), sample(1, 4)]) == 0.375
    assert chance_of([{"doc_id": 0, "filtered_resps": ["text"]}]) is None
    assert chance_of([]) is None


def test_a_figure_that_is_not_finite_is_no_figure() -> None:
    found = {"results": {"t": {"acc,none": math.nan}}, "samples": {"t": []}}
    with pytest.raises(WorkError, match="task t: acc,none is nan"):
        figures_of(found, "t")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"confidence": 0.9}, "confidence needs a max_drop"),
        ({"strict": True}, "strict needs a max_drop"),
        ({"allow_inconclusive": True}, "allow_inconclusive needs a max_drop"),
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
    with pytest.raises(InputError, match="answered different documents"):
        compare(result([1.0, 0.0]), other)
    narrow = result([1.0])
    narrow["ran"]["dtype"] = "bfloat16"
    with pytest.raises(InputError, match="in bfloat16, the candidate in float32"):
        compare(result([1.0]), narrow)


def test_junit_is_what_a_service_reads(tmp_path: Path) -> None:
    ours, theirs = result([0.0] * 9 + [1.0], limit=10), result([1.0] * 10, limit=10)
    rule = Rule(0.5)
    write_junit(tmp_path / "out.xml", "h <30>", ours, judge(compare(ours, theirs), rule), rule, 12.5)
    suite = ET.parse(tmp_path / "out.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("time")) == ("1", "1", "12.5")
    assert "h <30>" in suite.get("name")
    (case,) = suite.findall("testcase")
    assert case.get("name") == "t (limited to 10 documents)"
    message = case.find("failure").get("message")
    assert "0.1000" in message
    assert "interval" in message
    assert "a drop of at most 0.5 is allowed" in message
    json.dumps(message)


def test_junit_of_what_nobody_can_tell(tmp_path: Path) -> None:
    ours = result([0.0] * 100)
    for allowed, tags in ((False, ["failure"]), (True, ["skipped"])):
        rule = Rule(0.02, allow_inconclusive=allowed)
        write_junit(tmp_path / "out.xml", "h", ours, judge(compare(ours, ours), rule), rule, 1.0)
        (case,) = ET.parse(tmp_path / "out.xml").getroot().findall("testcase")
        assert [child.tag for child in case][:-1] == tags
        assert "cannot tell" in case[0].get("message")
    write_junit(tmp_path / "out.xml", "h", ours, [], Rule(), 1.0)
    assert ET.parse(tmp_path / "out.xml").getroot().get("tests") == "1"
    assert Verdict(drop_of(0.0), PASS).why == ""
