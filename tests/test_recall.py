"""Recall tasks, and what else `eval` takes: shares of documents, automatic batches, tasks that run
code, broken models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hybridize.errors import InputError
from hybridize.evaluation.answering import Answering
from hybridize.evaluation.harness import EvalSettings, parse_batch_size, parse_limit
from hybridize.evaluation.recall import ANSWER, KINDS, SHORTEST, by_length, judge, make_document, parse_lengths
from tests.conftest import Runner, make_place, make_tokenizer
from tests.test_answering import place as answering_place

TOKENIZER = make_tokenizer()
place = answering_place  # a teacher with tasks of choices and of answers beside it


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)), length=st.integers(SHORTEST * 4, 6000), seed=st.integers(0, 99), number=st.integers(0, 9)
)  # fmt: skip
def test_a_document_has_its_length_and_its_answer(kind: str, length: int, seed: int, number: int) -> None:
    """In the tokenizer's own tokens, here bytes; the answer stands in the text once, and not at its
    end alone."""
    document = make_document(TOKENIZER, kind, length, seed, number)
    assert document == make_document(TOKENIZER, kind, length, seed, number)
    whole = f"{document['text']} {document['prefix']} {document['answer']}"
    size = len(TOKENIZER(whole)["input_ids"])
    assert length - 3 * ANSWER - 320 <= size <= length
    assert document["text"].count(document["answer"].split()[0] if kind == "variables" else document["answer"]) >= 1
    assert judge(document, [f" {document['answer']}.\nAnd more 123"]) == {"recall": 1.0}
    assert judge(document, [f"12345 A0 {document['answer']}"]) == {"recall": 0.0}
    assert judge(document, [""]) == {"recall": 0.0}
    other = make_document(TOKENIZER, kind, length, seed, number + 1)
    assert other != document


def test_needles_lie_at_all_depths_and_variables_lead_to_one_value() -> None:
    depths = []
    for number in range(60):
        document = make_document(TOKENIZER, "needle", 4000, 0, number)
        depths.append(document["text"].index(document["answer"]) / len(document["text"]))
    assert min(depths) < 0.15
    assert max(depths) > 0.8
    for number in range(20):
        document = make_document(TOKENIZER, "variables", 4000, 1, number)
        steps = dict(re.findall(r"VAR (\w\d) = (?:VAR )?(\w+)\.", document["text"]))
        value = re.search(r"the value (\d+) are", document["prefix"])[1]
        chain = [next(name for name, old in steps.items() if old == value)]
        while (new := next((name for name, old in steps.items() if old == chain[-1]), None)) is not None:
            chain.append(new)
        assert " ".join(chain) == document["answer"]
        assert len(steps) == 3
        listed = ":\n\n" + "\n".join(f"{at}. VAR {name}" for at, name in enumerate(reversed(chain), 1))
        assert judge(document, [listed]) == {"recall": 1.0}
        assert judge(document, [listed.replace(chain[1], "Z0")]) == {"recall": 0.0}
    lookup = make_document(TOKENIZER, "lookup", 4000, 0, 0)
    pairs = dict(re.findall(r"(\w+): (\d+);", lookup["text"]))
    assert pairs[lookup["prefix"].rstrip(":")] == lookup["answer"]
    assert len(pairs) > 200


def test_lengths() -> None:
    assert parse_lengths(None) == (1024, 4096)
    assert parse_lengths("4096,1024") == (1024, 4096)
    for wrong, says in (("many", "numbers of tokens"), ("100", "at least 512"), ("", "numbers of tokens")):
        with pytest.raises(InputError, match=says):
            parse_lengths(wrong)


def test_recall_by_length_side_by_side(cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    cli("replace", "teacher", "--indices", "1", "--no-calibrate")
    common = ("--tasks", "recall", "--recall-lengths", "1200,2048", "--limit", 2, "--device", "cpu", "--baseline", "teacher")
    cli("eval", "h1", *common, "--max-drop", 0.5, code=3)
    assert "recall by length (baseline)" in cli.stdout
    assert "inconclusive: recall recall,none: the baseline's 0.0000" in cli.stderr
    assert "requests" in cli.stderr
    found = json.loads((tmp_path / "h1/eval/results.json").read_text())
    assert set(by_length(found["tasks"])) == {1200, 2048}
    assert {*by_length(found["tasks"])[1200]} == set(KINDS)
    assert found["groups"]["recall"]["tasks"] == [f"recall_{kind}_{length}" for length in (1200, 2048) for kind in KINDS]
    assert found["settings"]["recall_lengths"] == [1200, 2048]
    assert "has no use without --tasks recall" in cli.fails("eval", "h1", "--tasks", "x", "--recall-lengths", 1024)
    assert "supported by eval only" in cli.fails("score-loo", "--metric", "margin", "--tasks", "recall")


def test_limits_and_batch_sizes_as_lm_eval_has_them(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (parse_limit(None), parse_limit("3"), parse_limit("0.1")) == (None, 3, 0.1)
    assert (parse_batch_size("8"), parse_batch_size("auto"), parse_batch_size("auto:4")) == (8, "auto", "auto:4")
    for text in ("many", "auto:x", "-1", "1.5"):
        with pytest.raises(InputError, match="is neither a number nor auto"):
            parse_batch_size(text)
    with pytest.raises(InputError, match="is neither a number of documents"):
        parse_limit("many")
    for limit in (0, -1, 1.5):
        with pytest.raises(InputError, match="must be a whole number of documents, or a share"):
            EvalSettings(("t",), limit=limit)
    common = ("eval", "teacher", "--tasks", "tiny_choice,tiny_exact", "--include-path", "tasks", "--device", "cpu")
    cli(*common, "-o", "fixed", "--batch-size", 3)
    cli(*common, "-o", "auto", "--batch-size", "auto:2")
    cli(*common, "-o", "half", "--limit", 0.5)
    fixed, auto, half = (json.loads((place / name / "results.json").read_text()) for name in ("fixed", "auto", "half"))
    for task in ("tiny_choice", "tiny_exact"):
        assert [d["score"] for d in auto["tasks"][task]["documents"]] == [d["score"] for d in fixed["tasks"][task]["documents"]]
        count = len(fixed["tasks"][task]["documents"])
        assert len(half["tasks"][task]["documents"]) == -(-count // 2)
    real, sizes = Answering._asked, []

    def out_of_memory(self: Answering, ask: Any, requests: Any, keys: Any, scored: bool) -> Any:
        def failing(part: Any, which: Any) -> Any:
            sizes.append(self.batch_size_per_gpu)
            if self.batch_size_per_gpu > 2:
                raise torch.cuda.OutOfMemoryError
            return ask(part, which)

        return real(self, failing, requests, keys, scored)

    monkeypatch.setattr(Answering, "_asked", out_of_memory)
    cli("eval", "teacher", "--tasks", "tiny_choice", "--include-path", "tasks", "-o", "small", "--batch-size", "auto")
    assert sizes[:3] == [8, 4, 2]
    small = json.loads((place / "small/results.json").read_text())
    assert small["tasks"]["tiny_choice"]["value"] == fixed["tasks"]["tiny_choice"]["value"]


def test_tasks_that_run_code_want_a_word(place: Path, cli: Runner) -> None:
    text = next(p.read_text() for p in (place / "tasks").glob("*.yaml") if "task: tiny_exact" in p.read_text())
    (place / "tasks/running.yaml").write_text(text.replace("task: tiny_exact", "task: running") + "\nunsafe_code: true\n")
    common = ("eval", "teacher", "--tasks", "running", "--include-path", "tasks", "--limit", 2)
    assert "task running runs the code that the model writes; --confirm-run-unsafe-code" in cli.fails(*common)
    cli(*common, "--confirm-run-unsafe-code")
    judge = (
        "import subprocess\ndef judge(doc, results):\n    return {'exact_match': float(subprocess.run(['true']).returncode)}\n"
    )
    (place / "tasks/judging.py").write_text(judge)
    (place / "tasks/unmarked.yaml").write_text(
        text.replace("task: tiny_exact", "task: unmarked") + "\nprocess_results: !function judging.judge\n"
    )
    given = ("eval", "teacher", "--tasks", "unmarked", *common[4:], "-o", "out")
    assert "task unmarked runs the code" in cli.fails(*given), "also where nobody has marked it"
    cli(*given, "--confirm-run-unsafe-code")


@pytest.mark.parametrize("task", ["tiny_choice", "tiny_exact"])
@pytest.mark.parametrize("way", ["ours", "stock"])
def test_what_is_not_finite_ends_the_evaluation(place: Path, cli: Runner, task: str, way: str) -> None:
    """Weights that overflow: the largest of NaN is the first choice, which is often the right one."""
    broken = shutil.copytree(place / "teacher", place / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e38
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e38
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    if way == "stock":
        (broken / "generation_config.json").write_text('{"num_beams": 2, "eos_token_id": 1}')
    common = ("--include-path", "tasks", "--device", "cpu", "--dtype", "float32")
    said = cli.fails("eval", "broken", "--tasks", task, *common, code=1)
    assert re.search(rf"task {task}, document \d+", said), said
    assert "not finite" in said or "nan" in said
    assert not (place / "broken/eval/results.json").exists()
    if way == "ours":
        if task == "tiny_exact":
            assert "a logit of the answer is not finite" in cli.fails("generate", "broken", "hi", "--device", "cpu", code=1)
        else:
            given = ("score-loo", "broken", "--metric", "margin", "--tasks", task)
            assert "a log-likelihood is" in cli.fails(*given, *common, code=1)
