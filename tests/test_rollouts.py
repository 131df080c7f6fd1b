"""distill --on-policy: sequences that the student writes itself."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.data.corpus import Corpus, open_corpus
from hybridize.data.encode import Document
from hybridize.distillation import rollouts
from hybridize.distillation.optimize import Optimization
from hybridize.distillation.plan import plan
from hybridize.distillation.rollouts import Rollouts
from hybridize.distillation.settings import DistillSettings
from hybridize.errors import InputError, WorkError
from hybridize.generation.settings import read_generation
from hybridize.generation.writing import seed_of
from hybridize.inputs import open_encoder
from hybridize.modeling import HybridForCausalLM
from hybridize.runtime.loading import load_hybrid
from hybridize.surgery.teacher import empty_model
from tests.conftest import Runner, make_place

FLAGS = ("--steps", 6, "--batch-size", 4, "--seq-len", 48, "--on-policy", 0.5, "--on-policy-every", 4,
         "--on-policy-tokens", 8, "--eval-every", 0, "--warmup-steps", 0, "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("rollouts"), ("replace", "teacher", "--indices", 1, "--no-calibrate"))


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("teacher", "h1", "traces.jsonl"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**changes: Any) -> DistillSettings:
    given = {"steps": 6, "batch_size": 4, "seq_len": 48, "on_policy": 0.5, "on_policy_every": 3, "on_policy_tokens": 8}
    return DistillSettings(**{**given, **changes})


def opened(place: Path) -> tuple[HybridForCausalLM, Corpus, frozenset[int]]:
    source = CheckpointReader(place / "h1")
    corpus = open_corpus(str(place / "traces.jsonl"), None, open_encoder(source, "assistant", None, False))
    ends = read_generation(source.path, source.config, corpus.encoder.tokenizer, {}).ends
    return load_hybrid(source, torch.device("cpu"), torch.float32), corpus, ends


def blocks(folder: Path) -> Iterator[list[Document]]:
    for path in sorted(folder.glob("answers-*.jsonl")):
        yield [Document(**json.loads(line)) for line in path.read_text().splitlines()]


@torch.no_grad()
def greedy(model: HybridForCausalLM, prompt: list[int], most: int, ends: frozenset[int]) -> tuple[list[int], bool]:
    """Token by token, each from a forward pass over the whole text."""
    ids = list(prompt)
    for _ in range(most):
        token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


def test_answers_are_those_of_the_student_as_it_is_when_a_block_begins(place: Path) -> None:
    student, corpus, _ = opened(place)
    writer, _, _ = opened(place)
    ends = frozenset(range(3, 260, 7))  # so that some answers end, at various lengths
    drawn = Rollouts(writer, student, corpus, ends, settings(on_policy_temperature=0.0), place)
    batch = next(corpus.training(0, 48, 2))
    for step in range(2 * 3):
        if step == 3:  # the second block is written by other weights
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
            changed = {name: value.clone() for name, value in student.state_dict().items()}
        joined = drawn.join(batch, step, student)
        assert joined.ids.shape == (4, 48)
        assert torch.equal(joined.ids[2:], batch.ids)
        if step == 4:  # in the middle of a block: too late
            with torch.no_grad():
                student.lm_head.weight.zero_()
            drawn.join(batch, step, student)
    first, second = blocks(place)
    before, _, _ = opened(place)
    student.load_state_dict(changed)
    for documents, model in ((first, before), (second, student)):
        for document in documents:
            begin = document.loss_mask.index(True)
            answer, ended = greedy(model, document.ids[:begin], 8, ends)
            assert document.whole == ended
            assert document.ids[begin:] == answer + sorted(ends)[:1] * ended
            assert all(document.loss_mask[begin:])
    assert {document.whole for document in [*first, *second]} == {True, False}


def test_sequences_hold_whole_answers_in_the_order_of_their_prompts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short answers, which are ready first, are not preferred."""
    student, corpus, _ = opened(place)
    writer, _, _ = opened(place)
    ends, plan = frozenset(range(3, 260, 7)), settings(on_policy_every=2, on_policy_tokens=24)
    monkeypatch.setitem(rollouts.MOST, "cpu", 2)  # a long answer in one row, several short ones in the other
    drawn = Rollouts(writer, student, corpus, ends, plan, place)
    drawn.join(next(corpus.training(0, 48, 2)), 0, student)
    (documents,) = blocks(place)
    rows = list(corpus.lines(iter(documents), 48))[: 2 * plan.on_policy_rows]
    assert [batch.ids.tolist() for batch in drawn.batches] == [[row[0] for row in rows[i : i + 2]] for i in (0, 2)]
    assert drawn.count() == len(documents)
    assert max(len(document.ids) for document in documents) <= 48
    assert len({len(document.ids) for document in documents}) > 2
    asked = corpus.prompts(seed_of(plan.seed, "prompts 0") % 2**32, plan.on_policy_prompt)
    assert [d.ids[: d.loss_mask.index(True)] for d in documents] == list(itertools.islice(asked, len(documents)))


def test_a_resumed_run_trains_on_the_same_answers(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("distill", "h1", *FLAGS, "--save-every", 2, "-o", "whole")
    assert "on-policy: " in cli.stderr
    assert "% ended" in cli.stderr
    update = Optimization.update

    def interrupted(self: Optimization, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt
        update(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Optimization, "update", interrupted)
        cli("distill", "h1", *FLAGS, "--save-every", 2, "-o", "parts", code=130)
    kept = sorted(path.name for path in (place / "parts.run").glob("answers-*"))
    assert kept == ["answers-000000.jsonl", "answers-000001.jsonl"]
    (place / "parts.run/answers-000002.jsonl").write_text("{}\n")  # of a run that went on from an older state
    cli("distill", "h1", *FLAGS, "--save-every", 2, "-o", "parts", "--resume")
    whole, parts = (json.loads((place / name / "hybridize.json").read_text()) for name in ("whole", "parts"))
    assert parts["weights"] == whole["weights"]
    assert parts["data"] == whole["data"]
    own = whole["data"][-1]
    assert (own["path"], own["tokens"]) == ("the student's own answers", 6 * 2 * 48)
    assert own["rows"] > 0
    assert sum(part["tokens"] for part in whole["data"]) == 6 * 4 * 48


def test_answers_of_later_weights_are_forgotten(place: Path) -> None:
    student, corpus, ends = opened(place)
    for block in range(4):
        (place / f"answers-{block:06}.jsonl").write_text("")
    Rollouts(student, student, corpus, ends, settings(), place).forget(step=6)
    assert sorted(path.name for path in place.glob("answers-*")) == [f"answers-{block:06}.jsonl" for block in range(3)]


def test_the_plan_counts_the_copy(place: Path) -> None:
    student = empty_model(CheckpointReader(place / "h1").config, "h1")
    with_copy, without = (plan(student, None, settings(on_policy=share), 1, torch.bfloat16).bytes for share in (0.5, 0.0))
    (extra,) = with_copy.keys() - without.keys()
    assert extra == "copy of the student that answers prompts"
    assert with_copy[extra] == 2 * sum(parameter.numel() for parameter in student.parameters()) > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--mask", "none"), "--on-policy needs --stage distill and --mask assistant"),
        (("--stage", "align"), "--on-policy needs --stage distill"),
        (("--loss", "reverse-kl=.9,ce=.1"), "on its own mistakes"),
        (("--on-policy", 0.01), "is 0 sequences; it must be at least 1, and not all"),
        (("--on-policy", 0.99), "is 4 sequences; it must be at least 1, and not all"),
        (("--on-policy", 1), "--on-policy 1 must be below 1"),
        (("--on-policy", "inf"), "--on-policy inf must be below 1"),
        (("--on-policy-temperature", "inf"), "--on-policy-temperature must be finite"),
        (("--on-policy-tokens", 48), "must leave room for a prompt in --seq-len 48"),
        (("--on-policy-tokens", 46), "no question of at most 1 tokens"),
    ],
)
def test_bad_settings(place: Path, cli: Runner, flags: tuple[object, ...], said: str) -> None:
    assert said in cli.fails("distill", "h1", *FLAGS, *flags)
    assert not (place / "h1-kd.run").exists()


def test_texts_have_no_question(place: Path, cli: Runner) -> None:
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i} and some more text"}) + "\n" for i in range(40)))
    assert "has no question" in cli.fails("distill", "h1", *FLAGS, "--data", "texts.jsonl")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "assistant", "content": "An answer to nothing."}]},
        {"prompt": "", "response": "An answer to nothing."},
        {"text": "A text."},
    ],
)
def test_rows_without_a_question_are_omitted(place: Path, row: dict[str, Any]) -> None:
    rows = (place / "traces.jsonl").read_text().splitlines()[:3]
    (place / "mixed.jsonl").write_text("".join(f"{line}\n" for line in [json.dumps(row), *rows]))
    source = CheckpointReader(place / "h1")
    corpus = open_corpus(str(place / "mixed.jsonl"), None, open_encoder(source, "assistant", None, False), hold_out=False)
    corpus.check_prompts(40)
    asked = {tuple(prompt) for prompt in itertools.islice(corpus.prompts(0, 40), 12)}
    assert asked == {tuple(corpus.encoder.prompt(json.loads(line), "")) for line in rows}


def test_questions_are_asked_by_the_shares_of_their_sources(place: Path) -> None:
    rows = [json.loads(line) for line in (place / "traces.jsonl").read_text().splitlines()]
    for name, part in (("few", rows[:2]), ("many", rows[2:])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    source = CheckpointReader(place / "h1")
    encoder = open_encoder(source, "assistant", None, False)
    corpus = open_corpus("few.jsonl=.75,many.jsonl=.25", None, encoder, hold_out=False)
    few = {tuple(encoder.prompt(row, "")) for row in rows[:2]}
    prompts = list(itertools.islice(corpus.prompts(0, 40), 400))
    assert sum(len(ids) for ids in prompts if tuple(ids) in few) / sum(map(len, prompts)) == pytest.approx(0.75, abs=0.02)


def test_the_last_block_is_as_long_as_what_is_left(place: Path) -> None:
    student, corpus, ends = opened(place)
    drawn = Rollouts(student, student, corpus, ends, settings(steps=4, on_policy_every=3), place)
    drawn.join(next(corpus.training(0, 48, 2)), 3, student)
    assert len(drawn.batches) == 1


def test_a_student_that_the_decoder_does_not_know(place: Path) -> None:
    writer, corpus, ends = opened(place)
    with pytest.raises(InputError, match="does not support models of type Linear"):
        Rollouts(writer, torch.nn.Linear(2, 2), corpus, ends, settings(), place)


def test_runs_that_began_before_the_setting_can_be_resumed() -> None:
    assert not any(key.startswith("on_policy") for key in settings(on_policy=0.0).decisive())
    assert settings().decisive()["on_policy"] == 0.5


def test_a_row_that_fails_later_ends_the_run_with_its_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, corpus, ends = opened(place)
    drawn = Rollouts(student, student, corpus, ends, settings(), place)

    def broken(self: Corpus, seed: int, longest: int) -> Iterator[list[int]]:
        raise InputError("traces.jsonl:7 is broken")
        yield

    monkeypatch.setattr(Corpus, "prompts", broken)
    with pytest.raises(WorkError, match="jsonl:7 is broken"):
        drawn.join(next(corpus.training(0, 48, 2)), 0, student)


@pytest.mark.gpu
def test_on_a_gpu_with_graph_and_compilation(place: Path, cli: Runner) -> None:
    gpu = (*FLAGS[:-1], "cuda", "--cuda-graph", "--compile")
    cli("distill", "h1", *gpu, "-o", "kd")
    assert cli.stderr.count("on-policy: ") == 2
