"""generate --correct: which answers come to the known results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybridize.generation import results, traces
from hybridize.generation.results import compare, known_result
from tests.conftest import Runner

SOLVED = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "3 + 1 = <<3+1=4>>4\n#### 4"}]}


@pytest.mark.parametrize(
    ("known", "answer", "same"),
    [
        ("3 * 5 = 15\n#### 1,200", "That makes 1200 dollars.", True),
        ("#### 12", "First 12, then 13, so 25.", False),
        ("#### 8", "20 / 240 = 8.33...%\n#### 8", True),
        (r"so \boxed{\frac12}", "It is 0.5.", True),
        (r"so \boxed{\frac12}", r"It is \boxed{\frac13}.", False),
        (r"\frac{3}{4}", r"\boxed{0.75}", True),
        ("x+1", r"$\boxed{1+x}$", True),
        ("7", "I do not know.", False),
        ("#### 12 apples", "12", True),
        ("Paris", "It is Paris.", None),
        ("A", "The answer is A.", None),
        ("(C)", "The answer is (C).", None),
        ("10:30", "It is 10:30.", None),
        ("1e-05", "0.00001", True),
        ("#### 5", "#### 5 \nI hope it helps, 7 times.", True),
        ("7", "#### Step 2\nWe did it in 2 steps: 7.", True),
        (r"\boxed{}", "4", None),
    ],
)
def test_results_are_compared_as_mathematics(known: str, answer: str, same: bool | None) -> None:
    assert compare([(known, answer)]) == [same]


def test_many_answers_are_compared_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results.os, "cpu_count", lambda: 2)
    pairs = [(f"#### {i}", f"{i if i % 3 else i + 1}") for i in range(2 * results.PART)]
    assert compare(pairs) == [bool(i % 3) for i in range(len(pairs))]


@pytest.mark.parametrize(
    ("row", "known"),
    [
        ({"prompt": "2 + 2?", "answer": 4}, "4"),
        ({"prompt": "2 + 2?", "answer": "4", "response": "#### Step 1\n3 + 1 = 4\n#### Step 2\nDone."}, "4"),
        ({"prompt": "2 + 2?", "solution": r"so \boxed{4}"}, r"so \boxed{4}"),
        ({"prompt": "2 + 2?", "answer": "3 + 1 = 4\n#### 4"}, "3 + 1 = 4\n#### 4"),
        ({"prompt": "2 + 2?", "response": "#### Step 1\nDone."}, None),
        (
            {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": [{"role": "assistant", "content": "#### 4"}]},
            "#### 4",
        ),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "model", "value": "#### 4"}]}, "#### 4"),
        (
            {"messages": [SOLVED["messages"][0], {"role": "assistant", "content": [{"type": "text", "text": "#### 4"}]}]},
            "#### 4",
        ),
        ({"prompt": "2 + 2?", "answer": r"\frac{8}{2}"}, r"\frac{8}{2}"),
        ({"prompt": "2 + 2?", "response": "#### 4"}, "#### 4"),
        (SOLVED, "3 + 1 = <<3+1=4>>4\n#### 4"),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "#### 4"}]}, "#### 4"),
        ({"prompt": "2 + 2?", "answer": True}, None),
        ({"prompt": "2 + 2?", "answer": " "}, None),
        ({"prompt": "What is #### in Markdown?"}, None),
        ({"messages": [{"role": "user", "content": "Explain ####"}]}, None),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 4"}]}, None),
    ],
)
def test_the_known_result_of_a_row(row: dict[str, Any], known: str | None) -> None:
    assert known_result(row, "row 1") == known


def test_wrong_answers_are_left_out(cli: Runner, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": text, **more}) + "\n" for text, more in (
        ("one", {"answer": "Paris"}), ("two", {"answer": 4}), ("three", {}), ("four", {"answer": 5}),
    )))  # fmt: skip
    given = ("generate", teacher, "--prompts", asked, "--max-new-tokens", 4)
    cli(*given, "-o", tmp_path / "all.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    told = {row["row"]: row["response"] if "response" in row else row["messages"][-1]["content"] for row in rows}
    monkeypatch.setattr(results, "_same", lambda pair: {"4": pair[1] == told[1], "5": False}.get(pair[0]))
    summary = json.loads(cli(*given, "--correct", "-o", tmp_path / "cut.jsonl", "--json"))
    assert (summary["cut"], summary["correct"], summary["wrong"]) == (4, 0, 2)  # what is cut has no result
    made_of = traces.trace_of
    monkeypatch.setattr(traces, "trace_of", lambda *parts: made_of(*parts) | {"finish": "stop"})
    summary = json.loads(cli(*given, "--correct", "-o", tmp_path / "right.jsonl", "--json"))
    assert (summary["correct"], summary["wrong"], summary["answers"]) == (1, 1, len(rows) - 1)
    kept = [json.loads(line) for line in (tmp_path / "right.jsonl").read_text().splitlines()]
    assert [(row["row"], row.get("correct")) for row in kept] == [(0, None), (1, True), (2, None)]
    assert f"1 answers are correct, 1 are wrong (in {tmp_path / 'right.jsonl.rejected'}), 2 could not be checked" in cli.stderr
    rejected = [json.loads(line) for line in (tmp_path / "right.jsonl.rejected").read_text().splitlines()]
    assert [(row["row"], row["correct"]) for row in rejected] == [(3, False)]
    made = json.loads((tmp_path / "right.jsonl.provenance.json").read_text())
    assert (made["source"], made["seed"], made["samples"]) == (str(asked), 0, 1)
    assert (made["answers"], made["written"], made["correct"], made["wrong"]) == (4, 3, 1, 1)
    assert made["known_results"] is not None
    assert json.loads((tmp_path / "all.jsonl.provenance.json").read_text())["known_results"] is None
    cli("distill", teacher, "--teacher", teacher, "--data", tmp_path / "right.jsonl", "--steps", 1, "--seq-len", 16,
        "--batch-size", 1, "-o", tmp_path / "kd")  # fmt: skip
    assert "`correct`" not in cli.stderr  # no key that training would have to ignore


def test_the_rejected_answers_of_a_replaced_file_go_with_it(cli: Runner, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"prompt": "one", "answer": 4}\n')
    given = ("generate", teacher, "--prompts", tmp_path / "asked.jsonl", "--max-new-tokens", 4, "-o", tmp_path / "made.jsonl")
    cli(*given, "--correct")
    assert (tmp_path / "made.jsonl.rejected").read_text().count("\n") == 1
    cli(*given, "--overwrite")
    assert not (tmp_path / "made.jsonl.rejected").exists()


def test_what_correct_needs_is_checked_first(
    cli: Runner, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asked.jsonl").write_text('{"prompt": "one"}\n')
    assert "--correct requires --prompts" in cli.fails("generate", teacher, "one", "--correct")
    assert "no row of" in cli.fails("generate", teacher, "--prompts", tmp_path / "asked.jsonl", "--correct")
    monkeypatch.setattr(results.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'hybridize[math]'" in cli.fails("generate", teacher, "--prompts", tmp_path / "asked.jsonl", "--correct")
