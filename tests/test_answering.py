"""eval's way of answering: stock lm-eval's answers, whatever the batch, the ranks and the
interruptions; votes and thinking."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.errors import InputError
from hybridize.evaluation.answering import Answering, Majority, last_boxed
from hybridize.evaluation.harness import EvalSettings, evaluate, open_tasks, repeatable
from hybridize.runtime.loading import load_hybrid, load_model, load_tokenizer
from tests.conftest import Runner, make_teacher
from tests.test_cli import write_tasks

CPU = torch.device("cpu")
MATHS = """
task: tiny_{name}
custom_dataset: !function maths.load
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{problem}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
process_results: !function maths.{name}
generation_kwargs: {{until: ["Question:"], do_sample: false, max_gen_toks: 40}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
MATHS_LOADER = """
import datasets
from lm_eval.tasks.aime.utils import process_results as aime
from lm_eval.tasks.hendrycks_math.utils import process_results as math500
def load(**_):
    rows = [{"problem": f"{i}+{i}?", "Answer": str(2 * i), "answer": str(2 * i), "solution": "So \\\\boxed{%d}." % (2 * i)}
            for i in range(6)]
    return {"test": datasets.Dataset.from_list(rows)}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_teacher(tmp_path / "teacher")
    tasks = write_tasks(tmp_path / "tasks")
    (tasks / "maths.py").write_text(MATHS_LOADER)
    for name in ("aime", "math500"):
        (tasks / f"{name}.yaml").write_text(MATHS.format(name=name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(found: dict[str, Any]) -> dict[str, list[tuple[int, Any]]]:
    return {
        task: sorted((s["doc_id"], s["resps"], s["filtered_resps"]) for s in samples)
        for task, samples in found["samples"].items()
    }


@pytest.mark.parametrize("batch_size", [1, 16])
def test_answers_are_those_of_stock_lm_eval(place: Path, batch_size: int) -> None:
    """On the untouched teacher: the same texts and choices, log-likelihoods within 1e-4; batched
    with padding, and not."""
    chosen = EvalSettings(("tiny_choice", "tiny_exact"), batch_size=batch_size, include_path="tasks")
    manager, tokenizer = repeatable(open_tasks(chosen)), load_tokenizer(place / "teacher")
    stock = HFLM(pretrained=load_model(place / "teacher", CPU, torch.float32), tokenizer=tokenizer, batch_size=batch_size)
    wanted = simple_evaluate(model=stock, tasks=list(chosen.tasks), task_manager=manager, log_samples=True, bootstrap_iters=0)
    ours = load_hybrid(CheckpointReader(place / "teacher"), CPU, torch.float32)
    found = evaluate(ours, tokenizer, chosen, manager)
    assert said(found)["tiny_exact"] == said(wanted)["tiny_exact"]
    for mine, theirs in zip(said(found)["tiny_choice"], said(wanted)["tiny_choice"], strict=True):
        for (value, greedy), (other, best) in zip(mine[2], theirs[2], strict=True):
            assert abs(float(value) - float(other)) <= 1e-4
            assert greedy == best
    for task in chosen.tasks:
        key = "acc,none" if task == "tiny_choice" else "exact_match,none"
        assert found["results"][task][key] == wanted["results"][task][key]


def test_two_ranks_say_what_one_says(place: Path, cli: Runner) -> None:
    common = ["eval", "teacher", "--tasks", "tiny_choice,tiny_exact", "--include-path", "tasks", "--device", "cpu"]
    cli(*common, "-o", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run([*command, "hybridize.commands", *common, "-o", "two"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((place / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["tasks"] == two["tasks"]
    assert done.stdout.count("tiny_exact") == 1
    assert not list(place.glob("two/*.part*"))


def test_an_interrupted_evaluation_is_gone_on_with(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["eval", "teacher", "--tasks", "tiny_choice,tiny_exact", "--include-path", "tasks", "--device", "cpu"]
    cli(*common, "-o", "whole")
    note, count = Answering._note, Counter[str]()

    def interrupted(self: Answering, key: str, answer: Any) -> None:
        if len(self.known) == 40:
            raise KeyboardInterrupt
        note(self, key, answer)

    with monkeypatch.context() as patched:
        patched.setattr(Answering, "_note", interrupted)
        cli.fails(*common, "-o", "part", code=130)
    assert not (place / "part/results.json").exists()
    assert "continue it with --resume" in cli.fails(*common, "-o", "part")
    assert "started with another seed" in cli.fails(*common, "-o", "part", "--resume", "--seed", 5)

    def counted(self: Answering, key: str, answer: Any) -> None:
        count["asked"] += 1
        note(self, key, answer)

    with monkeypatch.context() as patched:
        patched.setattr(Answering, "_note", counted)
        cli(*common, "-o", "part", "--resume")
    whole, part = (json.loads((place / name / "results.json").read_text()) for name in ("whole", "part"))
    assert whole["tasks"] == part["tasks"]
    assert count["asked"] == 12 * 3 + 12 - 40
    assert sorted(p.name for p in (place / "part").iterdir()) == ["results.json"]


def test_resuming_takes_no_other_run_s_results(place: Path, cli: Runner) -> None:
    common = ["eval", "teacher", "--tasks", "tiny_choice", "--include-path", "tasks", "-o", "out"]
    cli(*common)
    before = (place / "out/results.json").read_text()
    assert "of another checkpoint or other settings" in cli.fails(*common, "--resume", "--limit", 3)
    assert (place / "out/results.json").read_text() == before
    cli(*common, "--resume")
    assert (place / "out/results.json").read_text() == before


def test_a_temperature_alone_samples(place: Path, cli: Runner) -> None:
    """lm-eval takes it so; answers to one question then differ, and temperature 0 cannot be sampled
    at."""
    task = (place / "tasks/exact.yaml").read_text()
    (place / "tasks/exact.yaml").write_text(
        task.replace("max_gen_toks: 6", "max_gen_toks: 6, temperature: 1.5") + "repeats: 4\n"
    )
    cli("eval", "teacher", "--tasks", "tiny_exact", "--include-path", "tasks", "--log-samples")
    lines = [json.loads(line) for line in (place / "teacher/eval/samples.jsonl").read_text().splitlines()]
    assert all(len(line["resps"][0]) == 4 for line in lines)
    assert sum(len(set(line["resps"][0])) > 1 for line in lines) > 6
    told = ["--gen-kwargs", "do_sample=true,temperature=0", "--overwrite"]
    assert "above 0" in cli.fails("eval", "teacher", "--tasks", "tiny_exact", "--include-path", "tasks", *told, code=1)


def test_a_gate_interrupted_in_its_baseline(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    make_teacher(place / "other", seed=1)
    common = ["eval", "other", "--tasks", "tiny_choice", "--include-path", "tasks", "--baseline", "teacher", "-o", "gate"]
    note, seen = Answering._note, Counter[str]()

    def interrupted(self: Answering, key: str, answer: Any) -> None:
        seen["answers"] += 1
        if seen["answers"] == 40:  # 36 are the candidate's
            raise KeyboardInterrupt
        note(self, key, answer)

    with monkeypatch.context() as patched:
        patched.setattr(Answering, "_note", interrupted)
        cli.fails(*common, code=130)
    assert sorted(p.name for p in (place / "gate").iterdir()) == ["baseline-answers.part.jsonl", "results.json"]
    assert "exists" in cli.fails(*common)
    seen.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Answering, "_note", lambda *told: (seen.update(["answers"]), note(*told)))
        cli(*common, "--resume")
    assert seen["answers"] == 36 - 3
    assert sorted(p.name for p in (place / "gate").iterdir()) == ["baseline.json", "results.json"]


def test_answers_that_are_cut_are_counted(place: Path, cli: Runner) -> None:
    cli("eval", "teacher", "--tasks", "tiny_exact", "--include-path", "tasks", "--log-samples")
    entry = json.loads((place / "teacher/eval/results.json").read_text())["tasks"]["tiny_exact"]
    lines = [json.loads(line) for line in (place / "teacher/eval/samples.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(place / "teacher")
    whole = sum(len(tokenizer(line["resps"][0][0])["input_ids"]) >= 6 for line in lines)
    assert entry["cut"] >= whole > 0
    assert f"tiny_exact: {entry['cut']} of 12 answers were cut" in cli.stderr


def test_the_majority_of_samples(place: Path, cli: Runner) -> None:
    told = ["eval", "teacher", "--tasks", "tiny_exact", "--include-path", "tasks", "--samples", 5, "--log-samples"]
    assert "needs sampling" in cli.fails(*told)
    cli(*told, "--gen-kwargs", "do_sample=true,temperature=1.0")
    entry = json.loads((place / "teacher/eval/results.json").read_text())["tasks"]["tiny_exact"]
    assert entry["metric"] == "exact_match,maj@5"
    lines = [json.loads(line) for line in (place / "teacher/eval/samples.jsonl").read_text().splitlines()]
    voted = {line["doc_id"]: line for line in lines if line["filter"] == "maj@5"}
    for line in voted.values():
        (answers,) = line["resps"]
        assert len(answers) == 5
        most = Counter(answer.strip() for answer in answers).most_common(1)[0]
        assert line["filtered_resps"][0].strip() == most[0]
    assert len({tuple(line["resps"][0]) for line in voted.values()}) > 1
    assert any(len(set(line["resps"][0])) > 1 for line in voted.values())
    assert [d["score"] for d in entry["documents"]] == [line["exact_match"] for line in voted.values()]


def test_votes_are_for_what_is_boxed() -> None:
    answers = [r"so \boxed{3}", r"\boxed{4}", r"hence \boxed{ 3}", "3"]
    assert Majority().apply([answers, ["b", "a", "a "]], None) == [[answers[0]], ["a"]]
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}}!") == r"\frac{1}{2}"
    assert last_boxed("none") is None
    assert last_boxed(r"\boxed{open") is None


def test_mathematics_tasks_of_lm_eval_judge_what_is_written(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """AIME's and MATH500's own judging, over thinking, stop sequences and majority."""

    def scripted(
        model: Any, wanted: Any, longest: int, new: int, ends: Any, settings: Any, rows: int, rules: Any, stop: Any
    ) -> Any:
        from hybridize.generation.writing import Written

        tokenizer = load_tokenizer(place / "teacher")
        for one in wanted:
            number = int(tokenizer.decode(one.ids).split(": ")[1].split("+")[0])
            right = number if number % 2 else number + 1
            text = f"Question: I wonder, \\boxed{{99}}?</think>So ${2 * right}$.Question: more"
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            seen = [stop(one.key, ids[:at]) for at in range(1, len(ids) + 1, 3)]
            assert not any(seen[: len(seen) // 2]), "a stop sequence counts only after the thinking"
            assert stop(one.key, ids)
            yield Written(one.key, ids, True)

    monkeypatch.setattr("hybridize.evaluation.answering.write", scripted)
    told = ["--include-path", "tasks", "--think-end", "</think>", "--samples", 3, "--gen-kwargs", "do_sample=true"]
    cli("eval", "teacher", "--tasks", "tiny_aime,tiny_math500", *told, "--log-samples")
    tasks = json.loads((place / "teacher/eval/results.json").read_text())["tasks"]
    for task in ("tiny_aime", "tiny_math500"):
        assert tasks[task]["metric"] == "exact_match,maj@3"
        assert [d["score"] for d in tasks[task]["documents"]] == [0, 1, 0, 1, 0, 1]
        assert tasks[task]["cut"] == 0


def test_an_end_of_thinking_that_is_never_shown_is_refused(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any weight is read."""
    monkeypatch.setattr("hybridize.runtime.loading.load_hybrid", None)
    tokenizer = load_tokenizer(place / "teacher")
    hidden = tokenizer.eos_token
    told = cli.fails("eval", "teacher", "--tasks", "tiny_exact", "--include-path", "tasks", "--think-end", hidden)
    assert "special token" in told


def test_settings_that_make_no_sense() -> None:
    for bad in ({"samples": 0}, {"samples": 3}, {"samples": 3, "gen_kwargs": "do_sample=false"}, {"think_end": ""}):
        with pytest.raises(InputError):
            EvalSettings(("x",), **bad)  # type: ignore[arg-type]
