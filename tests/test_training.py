"""The training loop: what it computes, what it writes, how it goes on after an interruption."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hybridize.distillation import training
from hybridize.distillation.losses import Loss
from hybridize.distillation.measure import fidelity
from hybridize.distillation.packing import Batch
from hybridize.distillation.run_dir import RunDir
from hybridize.distillation.schedule import cosine
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.step import Accumulator
from hybridize.distillation.training import choose_trained, make_optimizer, prefetched, train
from hybridize.errors import InputError, WorkError
from tests.conftest import hybrid, worst


def batch(seed: int, rows: int = 4, length: int = 12) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (rows, length + 1), generator=g)
    return Batch(ids[:, :-1], torch.arange(length).expand(rows, -1), ids[:, 1:], torch.rand(rows, length, generator=g) > 0.4)


def settings(**changes: object) -> DistillSettings:
    return DistillSettings(**{"steps": 6, "batch_size": 4, "seq_len": 12, "eval_every": 0, "warmup_steps": 2, **changes})


def run(path: Path, plan: DistillSettings, stop_at: int | None = None, resume: bool = False) -> torch.Tensor:
    """The student's weights after a run; stop_at: interrupted when that batch is asked for."""
    student, teacher = hybrid("mam", seed=1), hybrid("aaa", seed=2)

    def batches():
        for n in range(100):
            if n == stop_at:
                raise KeyboardInterrupt
            yield batch(n)

    home = RunDir(path / "out", {"a": 1})
    home.check(resume, False)
    home.start(resume)
    train(student, teacher, batches(), [batch(999)], plan, home, dtype=torch.float32, resume=resume)
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def test_any_micro_batch_gives_the_same_gradient() -> None:
    teacher, gradients = hybrid("aaa", seed=2), []
    for micro in (4, 3, 1):
        student = hybrid("mam", seed=1)
        Accumulator(student, teacher, Loss(), micro, torch.float32)(batch(0))
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert worst(gradients[1], gradients[0]) <= 1e-5
    assert worst(gradients[2], gradients[0]) <= 1e-5


def test_the_loss_is_the_mean_over_kept_tokens() -> None:
    student, teacher, data = hybrid("mam", seed=1), hybrid("aaa", seed=2), batch(0)
    value = Accumulator(student, teacher, Loss(), 2, torch.float32)(data)
    log_q, log_p = (F.log_softmax(m(data.ids).logits.double(), -1) for m in (student, teacher))
    each = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert worst(value, each[data.keep].mean()) <= 1e-5
    ce = Accumulator(student, None, Loss.parse("ce"), 2, torch.float32)(data)
    assert worst(ce, F.cross_entropy(student(data.ids).logits.double()[data.keep], data.labels[data.keep])) <= 1e-5


def test_fidelity_against_plain_formulas() -> None:
    student, teacher, data = hybrid("mam", seed=1), hybrid("aaa", seed=2), batch(0)
    found = fidelity(student, teacher, [data, batch(1)], torch.float32)
    q, p, labels = [], [], []
    for part in (data, batch(1)):
        q.append(F.log_softmax(student(part.ids).logits.double(), -1)[part.keep])
        p.append(F.log_softmax(teacher(part.ids).logits.double(), -1)[part.keep])
        labels.append(part.labels[part.keep])
    log_q, log_p, target = torch.cat(q).detach(), torch.cat(p).detach(), torch.cat(labels)
    assert found.tokens == len(target)
    assert found.reverse_kl == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum(-1).mean()), rel=1e-5)
    assert found.forward_kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)
    assert found.agreement == pytest.approx(float((log_q.argmax(-1) == log_p.argmax(-1)).double().mean()))
    assert found.perplexity == pytest.approx(math.exp(F.nll_loss(log_q, target)), rel=1e-5)


def test_training_lowers_the_divergence_and_logs_it(tmp_path: Path) -> None:
    run(tmp_path, settings(steps=40, lr_mixer=1e-2, lr=1e-2, eval_every=20))
    lines = [json.loads(line) for line in (tmp_path / "out.run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[-1]["tokens"] == 40 * 4 * 12
    assert lines[0]["lr"] == pytest.approx(1e-2 / 2)
    measures = [json.loads(line) for line in (tmp_path / "out.run/eval.jsonl").read_text().splitlines()]
    assert [m["step"] for m in measures] == [0, 20, 40]
    assert [m["tokens"] for m in measures] == [0, 20 * 48, 40 * 48]
    assert {m["heldout_tokens"] for m in measures} == {batch(999).kept}
    assert measures[-1]["reverse_kl"] < measures[0]["reverse_kl"]


@pytest.mark.parametrize("stop_at", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, stop_at: int) -> None:
    whole = run(tmp_path / "a", settings())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", settings(), stop_at=stop_at)
    state = json.loads((tmp_path / "b/out.run/state/state.json").read_text())
    assert state["step"] == stop_at
    with pytest.raises(InputError, match="holds an unfinished run"):
        run(tmp_path / "b", settings())
    assert torch.equal(run(tmp_path / "b", settings(), resume=True), whole)
    logs = [[json.loads(line)["loss"] for line in (tmp_path / p / "out.run/metrics.jsonl").open()] for p in "ab"]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("when", ["measure", "log", "update", "last"])
def test_an_interrupt_anywhere_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """During a measure after the step, while logging, in the middle of the optimizer step, and after the last step."""
    plan = settings(eval_every=2)
    whole = run(tmp_path / "a", plan)
    calls = []

    def interrupting(module, name: str, at: int) -> None:
        real = getattr(module, name)

        def wrapped(*arguments, **keywords):
            calls.append(name)
            if len(calls) == at:
                if name == "update":
                    found = real(*arguments, **keywords)
                    signal.raise_signal(signal.SIGINT)
                    return found
                raise KeyboardInterrupt
            return real(*arguments, **keywords)

        monkeypatch.setattr(module, name, wrapped)

    where = {"measure": ("fidelity", 2), "last": ("fidelity", 4), "update": ("update", 3)}
    if when == "log":
        interrupting(RunDir, "log", 5)  # measure 0, steps 1 and 2, measure 2, step 3
    else:
        interrupting(training, *where[when])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", plan)
    monkeypatch.undo()
    step = json.loads((tmp_path / "b/out.run/state/state.json").read_text())["step"]
    assert step == {"measure": 2, "last": 6, "update": 3, "log": 3}[when]
    assert torch.equal(run(tmp_path / "b", plan, resume=True), whole)


def test_a_killed_run_resumes_from_its_last_save(tmp_path: Path) -> None:
    """After SIGKILL nothing is saved at the end: the state is the last periodic one, and later log lines go."""
    whole = run(tmp_path / "a", settings(save_every=2))
    run(tmp_path / "b", settings(save_every=2))  # saved at 2 and 4, then went on to 6
    metrics = tmp_path / "b/out.run/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 7, "lo')
    assert torch.equal(run(tmp_path / "b", settings(save_every=2), resume=True), whole)
    assert [json.loads(line)["step"] for line in metrics.open()] == [1, 2, 3, 4, 5, 6]


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    RunDir(tmp_path / "out", {"lr": 1.0}).start(False)
    with pytest.raises(InputError, match=r"lr was 1\.0, now it is 2\.0"):
        RunDir(tmp_path / "out", {"lr": 2.0}).check(True, False)
    with pytest.raises(InputError, match="there is no unfinished run"):
        RunDir(tmp_path / "other", {}).check(True, False)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    student = hybrid("mam")
    with torch.no_grad():
        student.model.norm.weight.fill_(float("inf"))
    home = RunDir(tmp_path / "out", {})
    home.start(False)
    with pytest.raises(WorkError, match="step 1: the loss is"):
        train(student, hybrid("aaa"), iter([batch(0)] * 9), [], settings(), home, dtype=torch.float32)


def test_what_is_trained_and_how_fast() -> None:
    student = hybrid("mam", tie_word_embeddings=True)
    counts = {}
    for what in ("all", "body", "mixers"):
        choose_trained(student, what)
        counts[what] = {n for n, p in student.named_parameters() if p.requires_grad}
    assert counts["all"] - counts["body"] == {"model.embed_tokens.weight"}
    assert counts["mixers"] == {n for n in counts["all"] if ".mixer." in n}
    choose_trained(student, "all")
    names = {id(p): n for n, p in student.named_parameters()}
    optimizer = make_optimizer(student, settings(lr_mixer=3.0, lr=2.0, weight_decay=0.5))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["peak"] == (3.0 if ".mixer." in name else 2.0)
            plain = parameter.ndim == 1 or "A_log" in name
            assert group["weight_decay"] == (0.0 if plain else 0.5)


def test_schedule() -> None:
    assert [cosine(s, 10, 4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine(4, 10, 4) == 1.0
    assert cosine(7, 10, 4) == pytest.approx(0.55)
    assert cosine(10, 10, 4) == pytest.approx(0.1)
    assert cosine(0, 1, 0) == 1.0


def test_prefetching_hands_on_items_and_errors() -> None:
    assert list(prefetched(iter(range(20)))) == list(range(20))

    def broken():
        yield 1
        raise InputError("row 2")

    items = prefetched(broken())
    assert next(items) == 1
    with pytest.raises(InputError, match="row 2"):
        next(items)
