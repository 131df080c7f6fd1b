"""The training loop: what it computes, what it writes, how it goes on after an interruption."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hybridize.data.packing import Batch
from hybridize.data.prefetch import prefetched
from hybridize.distillation import loop as training
from hybridize.distillation import step
from hybridize.distillation.fidelity import fidelity
from hybridize.distillation.loop import Training
from hybridize.distillation.losses import Loss
from hybridize.distillation.optimize import Optimization, choose_trained, make_optimizer
from hybridize.distillation.run_dir import RunDir
from hybridize.distillation.schedule import factor
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.step import Accumulator, Student
from hybridize.errors import InputError, WorkError
from tests.conftest import hybrid, worst

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
GPU = {"device": torch.device("cuda"), "dtype": torch.bfloat16}


def batch(seed: int, rows: int = 4, length: int = 12) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (rows, length + 1), generator=g)
    return Batch(ids[:, :-1], torch.arange(length).expand(rows, -1), ids[:, 1:], torch.rand(rows, length, generator=g) > 0.4)


def settings(**changes: object) -> DistillSettings:
    return DistillSettings(**{"steps": 6, "batch_size": 4, "seq_len": 12, "eval_every": 0, "warmup_steps": 2, **changes})


def run(
    path: Path, plan: DistillSettings, stop_at: int | None = None, resume: bool = False, on: dict[str, Any] = CPU
) -> torch.Tensor:
    """The student's weights after a run; stop_at: interrupted when that batch is asked for."""
    kind = "mamba2" if plan.deterministic else "mamba"
    student, teacher = hybrid("mam", kind, seed=1).to(on["device"]), hybrid("aaa", seed=2).to(on["device"])

    def batches():
        for n in range(100):
            if n == stop_at:
                raise KeyboardInterrupt
            yield batch(n)

    home = RunDir(path / "out", {"a": 1})
    home.check(resume, False)
    home.start(resume)
    Training(student, teacher, [batch(999)], plan, home, **on).go(batches(), resume)
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def test_any_micro_batch_gives_the_same_gradient() -> None:
    teacher, gradients = hybrid("aaa", seed=2), []
    for micro in (4, 3, 1):
        student = hybrid("mam", seed=1)
        Accumulator(Student(student, Loss(), torch.float32), teacher, micro)(batch(0))
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert worst(gradients[1], gradients[0]) <= 1e-5
    assert worst(gradients[2], gradients[0]) <= 1e-5


def test_layers_that_run_again_in_backward_give_the_same_gradient(tmp_path: Path) -> None:
    gradients, ran = [], []
    for changes in ({}, {"gradient_checkpointing": True}, {"checkpoint_layers": "0-1"}):
        student = hybrid("mam", seed=1)
        training = start(tmp_path, settings(**changes), student)
        calls: list[int] = []
        for index, layer in enumerate(student.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, index=index, calls=calls: calls.append(index))
        student.train()
        training.accumulate(batch(0))
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
        ran.append([calls.count(index) for index in range(3)])
    assert ran == [[1, 1, 1], [2, 2, 2], [2, 2, 1]]
    assert worst(gradients[1], gradients[0]) <= 1e-5
    assert worst(gradients[2], gradients[0]) <= 1e-5
    with pytest.raises(InputError, match="checkpoint_layers 3: the model has layers 0 to 2"):
        start(tmp_path, settings(checkpoint_layers="3"))
    with pytest.raises(InputError, match="checkpoint_layers 'x' is not a list"):
        settings(checkpoint_layers="x")


def test_the_loss_is_the_mean_over_kept_tokens() -> None:
    student, teacher, data = hybrid("mam", seed=1), hybrid("aaa", seed=2), batch(0)
    value = Accumulator(Student(student, Loss(), torch.float32), teacher, 2)(data)
    log_q, log_p = (F.log_softmax(m(data.ids).logits.double(), -1) for m in (student, teacher))
    each = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert worst(value, each[data.loss_mask].mean()) <= 1e-5
    ce = Accumulator(Student(student, Loss.parse("ce"), torch.float32), None, 2)(data)
    assert worst(ce, F.cross_entropy(student(data.ids).logits.double()[data.loss_mask], data.labels[data.loss_mask])) <= 1e-5


def test_fidelity_against_plain_formulas() -> None:
    student, teacher, data = hybrid("mam", seed=1), hybrid("aaa", seed=2), batch(0)
    found = fidelity(student, teacher, [data, batch(1)], torch.float32)
    q, p, labels = [], [], []
    for part in (data, batch(1)):
        q.append(F.log_softmax(student(part.ids).logits.double(), -1)[part.loss_mask])
        p.append(F.log_softmax(teacher(part.ids).logits.double(), -1)[part.loss_mask])
        labels.append(part.labels[part.loss_mask])
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
    assert RunDir(tmp_path / "b/out", {}).steps() == [stop_at]
    with pytest.raises(InputError, match="holds an unfinished run"):
        run(tmp_path / "b", settings())
    assert torch.equal(run(tmp_path / "b", settings(), resume=True), whole)
    logs = [[json.loads(line)["loss"] for line in (tmp_path / p / "out.run/metrics.jsonl").open()] for p in "ab"]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("when", ["measure", "log", "update", "last"])
def test_an_interrupt_anywhere_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """During a measure after the step, while logging, in the middle of the optimizer step, and
    after the last step."""
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
        interrupting(Optimization if when == "update" else training, *where[when])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", plan)
    monkeypatch.undo()
    assert RunDir(tmp_path / "b/out", {}).steps()[-1] == {"measure": 2, "last": 6, "update": 3, "log": 3}[when]
    assert torch.equal(run(tmp_path / "b", plan, resume=True), whole)


def test_a_killed_run_resumes_from_its_last_save(tmp_path: Path) -> None:
    """After SIGKILL nothing is saved at the end: the state is the last periodic one, and later log
    lines go."""
    whole = run(tmp_path / "a", settings(save_every=2))
    run(tmp_path / "b", settings(save_every=2))  # saved at 2 and 4, then went on to 6
    metrics = tmp_path / "b/out.run/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 7, "lo')
    assert torch.equal(run(tmp_path / "b", settings(save_every=2), resume=True), whole)
    assert [json.loads(line)["step"] for line in metrics.open()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_on_a_gpu_a_deterministic_run_is_resumed_bit_for_bit(tmp_path: Path, graph: bool) -> None:
    plan = settings(deterministic=True, cuda_graph=graph)
    try:
        whole = run(tmp_path / "a", plan, on=GPU)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b", plan, stop_at=4, on=GPU)
        assert torch.equal(run(tmp_path / "b", plan, resume=True, on=GPU), whole)
    finally:
        torch.use_deterministic_algorithms(False)


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    RunDir(tmp_path / "out", {"lr": 1.0}).start(False)
    with pytest.raises(InputError, match=r"lr was 1\.0, now it is 2\.0"):
        RunDir(tmp_path / "out", {"lr": 2.0}).check(True, False)
    RunDir(tmp_path / "other", {}).check(True, False)  # nothing to go on with: a run that is started over and over begins


@pytest.mark.parametrize("merge", [0, 2])
def test_a_run_may_go_on_placed_and_saved_otherwise(merge: int) -> None:
    """What states there are decides what a merge of them is; where weights lie decides nothing."""
    one = settings(checkpoint_merge=merge).decisive()
    assert one == settings(checkpoint_merge=merge, shard=False, offload_teacher=True).decisive()
    assert (one == settings(checkpoint_merge=merge, keep_last=3, save_every=7).decisive()) == (merge == 0)


def test_one_process_at_a_time_works_in_a_run_s_directory(tmp_path: Path) -> None:
    with RunDir(tmp_path / "out", {}).started(False):
        for resume, overwrite in ((True, False), (False, True)):
            with pytest.raises(InputError, match=r"out\.run is being written by another process"):
                RunDir(tmp_path / "out", {}).check(resume, overwrite)
            with pytest.raises(InputError, match="another process"), RunDir(tmp_path / "out", {}).started(resume):
                pass
    RunDir(tmp_path / "out", {}).check(True, False)


def test_two_that_begin_at_the_same_moment(tmp_path: Path) -> None:
    """One has the run, and its settings lie there; the other says so and touches nothing."""
    said: list[str] = []

    def begin(me: int) -> None:
        for _ in range(150):
            try:
                with RunDir(tmp_path / "out", {"me": me}).started(False):
                    said.append(
                        "" if f'"me": {me}' in (tmp_path / "out.run/settings.json").read_text() else "another's settings"
                    )
            except Exception as error:
                said.append("" if isinstance(error, InputError) and "another process" in str(error) else repr(error))

    threads = [threading.Thread(target=begin, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 300
    assert not any(said), {text for text in said if text}


def start(
    path: Path, plan: DistillSettings, student: torch.nn.Module | None = None, resume: bool = False, **more: object
) -> Training:
    home = RunDir(path / "out", {}, keep=plan.keep_last, every=plan.save_every)
    home.start(resume)
    return Training(student or hybrid("mam", seed=1), hybrid("aaa", seed=2), [], plan, home, **CPU, **more)


def batches(count: int = 100):
    return (batch(n) for n in range(count))


@pytest.mark.parametrize("where", ["weight", "output", "gradient"])
def test_what_is_not_finite_is_named_and_reaches_no_weight(tmp_path: Path, where: str) -> None:
    """The first tensor in the order of the forward pass; everything as the last good step left it."""
    student = hybrid("mam", seed=1)
    training = start(tmp_path, settings(save_every=1), student)
    real, calls = Accumulator.add, []

    def accumulate(self: Accumulator, *arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            with torch.no_grad():
                if where == "weight":
                    student.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
                elif where == "output":  # overflows on the way, from weights that are finite
                    student.model.layers[1].mlp.up_proj.weight.mul_(1e30)
                    student.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
        value = real(self, *arguments)
        if len(calls) == 3 and where == "gradient":
            student.model.layers[1].mlp.up_proj.weight.grad[0, 0] = torch.inf
        return value

    training.accumulate.__class__ = type("Breaking", (Accumulator,), {"add": accumulate})
    names = {"weight": "the weight model.layers.1.mlp.up_proj.weight", "output": "the output of model.layers.1.mlp.",
             "gradient": "the gradient of model.layers.1.mlp.up_proj.weight"}  # fmt: skip
    with pytest.raises(WorkError, match=f"^step 3: the loss is .*first not finite: {names[where]}"):
        training.go(batches())
    assert training.run.steps()[-1] == 2
    if where == "gradient":
        assert all(torch.isfinite(p).all() for p in student.parameters())


def test_bad_batches_may_be_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A skipped step changes nothing but the schedule and the data; the log says which it was."""
    student, notes = hybrid("mam", seed=1), []
    training = start(tmp_path, settings(skip_bad_batches=1, steps=3), student, report=notes.append)
    real, seen = training._gradient, []

    def gradient(part: Batch, count: int) -> tuple[float, float]:
        seen.append([p.detach().clone() for p in student.parameters()])
        found = real(part, count)
        return (math.nan, found[1]) if len(seen) == 2 else found

    monkeypatch.setattr(training, "_gradient", gradient)
    assert training.go(batches()) == 3 * 48
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    lines = [json.loads(line) for line in (tmp_path / "out.run/metrics.jsonl").open()]
    assert [line.get("skipped", False) for line in lines] == [False, True, False]
    assert lines[1]["loss"] is None
    assert "batch 1 of 1 skipped" in next(n["text"] for n in notes if n["kind"] == "note")


def test_out_of_memory_halves_the_micro_batch_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, notes = run(tmp_path / "a", settings(steps=2)), []
    student = hybrid("mam", seed=1)
    training = start(tmp_path / "b", settings(steps=2), student, report=notes.append)
    real = step.hidden_states

    def hungry(model: torch.nn.Module, part: Batch, dtype: torch.dtype) -> torch.Tensor:
        if len(part.ids) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(model, part, dtype)

    monkeypatch.setattr(step, "hidden_states", hungry)
    training.go(batches())
    assert [n["text"] for n in notes if n["kind"] == "note"] == [
        "out of memory with 4 sequences at once, continuing with 2",
        "out of memory with 2 sequences at once, continuing with 1",
    ]  # fmt: skip
    assert worst(torch.cat([p.detach().flatten() for p in student.parameters()]), whole) <= 1e-5
    monkeypatch.setattr(step, "hidden_states", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("CUDA out")))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        start(tmp_path / "c", settings(steps=2)).go(batches())


def test_it_ends_when_the_measures_are_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([9.0, 5.0, 6.0, 4.0, 3.999, 4.5, 1.0])
    plan = settings(steps=50, eval_every=2, stop_when_flat=2)
    training = start(tmp_path, plan)
    training.held = [batch(0)]
    measured = lambda *_: type(fidelity(hybrid("m"), hybrid("a"), [batch(0)], torch.float32))(next(values), 1.0, 1.0, 1.0, 9)  # noqa: E731
    monkeypatch.setattr("hybridize.distillation.loop.fidelity", measured)
    assert training.go(batches()) == 10 * 48  # 3.999 is no better than 4, 4.5 is worse
    with pytest.raises(InputError, match="give eval_every"):
        settings(eval_every=0, stop_when_flat=1)


def test_the_last_states_are_kept_and_a_broken_one_is_not_used(tmp_path: Path) -> None:
    training = start(tmp_path, settings(save_every=1, keep_last=3))
    training.go(batches())
    assert training.run.steps() == [4, 5, 6]
    (tmp_path / "out.run/step-00000006/.metadata").unlink()  # as a run leaves it that was killed while writing
    assert training.run.load(training.student, training.optimizer) == 5
    assert not (tmp_path / "out.run/step-00000006").exists()


def test_the_result_may_be_the_mean_of_the_last_states(tmp_path: Path) -> None:
    plan = settings(save_every=1, keep_last=3, checkpoint_merge=3)
    seen, notes = {}, []
    training = start(tmp_path, plan, report=notes.append)
    training.held = [batch(0)]
    real = training.run.save

    def save(student, optimizer, step, wait=False) -> None:
        seen[step] = [p.detach().double().clone() for p in student.parameters()]
        real(student, optimizer, step, wait)

    training.run.save = save
    training.go(batches())
    mean = [sum(parts) / 3 for parts in zip(seen[4], seen[5], seen[6], strict=True)]
    for parameter, wanted in zip(training.student.parameters(), mean, strict=True):
        assert worst(parameter, wanted) <= 1e-6
    assert [n["text"] for n in notes if n["kind"] == "note"][-1] == "weights: the mean of the states after steps [4, 5, 6]"
    direct = fidelity(training.student, training.teacher, [batch(0)], torch.float32).reverse_kl
    assert notes[-1]["reverse_kl"] == direct
    for wrong in ({"save_every": 0, "checkpoint_merge": 2}, {"save_every": 1, "keep_last": 2, "checkpoint_merge": 3}):
        with pytest.raises(InputError, match=r"checkpoint_merge .* averages saved states"):
            settings(**wrong)


def resumed(path: Path, plan: DistillSettings, when: int | None) -> tuple[torch.Tensor, list[int], list[int]]:
    """A run that is interrupted in its step `when`, then goes on: weights, steps measured, states."""
    calls = []

    def go(resume: bool, interrupt: int | None) -> Training:
        student = hybrid("mam", seed=1)
        home = RunDir(path / "out", {}, keep=plan.keep_last, every=plan.save_every)
        home.start(resume)
        training = Training(student, hybrid("aaa", seed=2), [batch(999)], plan, home, **CPU)
        if interrupt is not None:
            real = training._gradient

            def gradient(*arguments: object) -> tuple[float, float]:
                calls.append(1)
                if len(calls) == interrupt:
                    raise KeyboardInterrupt
                return real(*arguments)

            training._gradient = gradient
            with pytest.raises(KeyboardInterrupt):
                training.go(batches(), resume)
        else:
            training.go(batches(), resume)
        return training

    if when is not None:
        go(False, when)
    training = go(when is not None, None)
    weights = torch.cat([p.detach().flatten() for p in training.student.parameters()])
    return weights, [r["step"] for r in training.run.read("eval")], training.run.steps()


@pytest.mark.parametrize("when", [2, 4, 6])
def test_a_merge_after_an_interruption_is_the_same_merge(tmp_path: Path, when: int) -> None:
    plan = settings(save_every=2, keep_last=3, checkpoint_merge=3)
    whole, parts = resumed(tmp_path / "a", plan, None), resumed(tmp_path / "b", plan, when)
    assert torch.equal(parts[0], whole[0])
    assert whole[2] == parts[2] == [2, 4, 6]


def test_a_merge_without_any_regular_state_is_the_last_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = settings(steps=50, eval_every=1, stop_when_flat=1, save_every=40, keep_last=2, checkpoint_merge=2)
    training = start(tmp_path, plan)
    monkeypatch.setattr(training, "_flat", lambda: len(training.measures) > 3)
    training.held = [batch(0)]
    assert training.go(batches()) == 3 * 48
    assert training.run.steps() == [3]
    assert all(torch.isfinite(p).all() for p in training.student.parameters())


def test_merged_weights_are_no_state_to_go_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = settings(save_every=3, keep_last=2, checkpoint_merge=2)
    training = start(tmp_path, plan)
    before: list[torch.Tensor] = []
    real = training.run.merge

    def merge(*arguments: object) -> list[int]:
        before.extend(p.detach().clone() for p in training.student.parameters())
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(training.run, "merge", merge)
    with pytest.raises(KeyboardInterrupt):
        training.go(batches())
    again = start(tmp_path, plan, resume=True)
    assert again.run.load(again.student, again.optimizer) == 6
    assert all(torch.equal(a, b) for a, b in zip(again.student.parameters(), before, strict=True))


def measured_after_going_on(path: Path, plan: DistillSettings) -> list[int]:
    again = start(path, plan, resume=True)
    again.held = [batch(999)]
    again.go(batches(), resume=True)
    return [r["step"] for r in again.run.read("eval")]


@pytest.mark.parametrize("when", [3, 5])
def test_a_measure_that_an_interruption_ate_is_made_up(tmp_path: Path, when: int) -> None:
    """The state is older than the measure that belongs to its step: resumed runs measure, and stop,
    as others do."""
    plan = settings(eval_every=2, save_every=2)
    whole, parts = resumed(tmp_path / "a", plan, None), resumed(tmp_path / "b", plan, when)
    assert whole[1] == parts[1] == [0, 2, 4, 6]
    assert torch.equal(parts[0], whole[0])
    log = tmp_path / "b/out.run/eval.jsonl"
    log.write_text("".join(line for line in log.open() if json.loads(line)["step"] < 6))  # killed between save and measure
    assert measured_after_going_on(tmp_path / "b", plan) == [0, 2, 4, 6]


def test_a_measure_in_the_middle_that_was_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = settings(eval_every=2, save_every=2)
    training = start(tmp_path, plan)
    training.held = [batch(999)]
    real = training.measure

    def measure(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt
        real(step)

    monkeypatch.setattr(training, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        training.go(batches())
    assert measured_after_going_on(tmp_path, plan) == [0, 2, 4, 6]


def test_a_run_whose_first_batch_was_skipped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = settings(skip_bad_batches=1, save_every=1)
    training = start(tmp_path, plan)
    real, calls = training._gradient, []

    def gradient(*arguments: object) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return math.nan, real(*arguments)[1]

    monkeypatch.setattr(training, "_gradient", gradient)
    with pytest.raises(KeyboardInterrupt):
        training.go(batches())
    again = start(tmp_path, plan, resume=True)
    again.go(batches(), resume=True)
    assert [r.get("skipped", False) for r in again.run.read("metrics")] == [True] + 5 * [False]


def test_a_save_that_failed_does_not_cost_the_last_step(tmp_path: Path) -> None:
    from concurrent.futures import Future

    training = start(tmp_path, settings())
    failed: Future[None] = Future()
    failed.set_exception(OSError("disk full"))
    training.run.pending = failed
    training.run.save(training.student, training.optimizer, 3, wait=True)
    assert training.run.steps() == [3]
    training.run.pending = failed
    with pytest.raises(OSError, match=r"could not be written to .*: disk full"):
        training.run.save(training.student, training.optimizer, 4)


def test_states_are_saved_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr("hybridize.distillation.loop.time.monotonic", lambda: next(clock))
    training = start(tmp_path, settings(save_every=0, save_minutes=1.5, keep_last=9))
    training.go(batches())
    assert training.run.steps() == [3, 6]


def test_what_is_trained_and_how_fast() -> None:
    student = hybrid("mam", tie_word_embeddings=True)
    counts = {}
    for what in ("all", "body", "mixers"):
        choose_trained(student, settings(train=what))
        counts[what] = {n for n, p in student.named_parameters() if p.requires_grad}
    assert counts["all"] - counts["body"] == {"model.embed_tokens.weight"}
    assert counts["mixers"] == {n for n in counts["all"] if ".mixer." in n}
    choose_trained(student, settings())
    names = {id(p): n for n, p in student.named_parameters()}
    optimizer = make_optimizer(student, settings(lr_mixer=3.0, lr=2.0, weight_decay=0.5))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["peak"] == (3.0 if ".mixer." in name else 2.0)
            plain = parameter.ndim == 1 or "A_log" in name
            assert group["weight_decay"] == (0.0 if plain else 0.5)


def test_rates_and_patterns_by_name() -> None:
    student = hybrid("mam", seed=1)
    plan = settings(train="*mixer.A_log, *lm_head*", lr_groups="*lm_head*=5e-3", lr_mixer=3.0)
    choose_trained(student, plan)
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert trained == {"lm_head.weight", *(f"model.layers.{i}.mixer.A_log" for i in (0, 2))}
    rates = {len(group["params"]): group["peak"] for group in make_optimizer(student, plan).param_groups}
    assert rates == {1: 5e-3, 2: 3.0}
    with pytest.raises(InputError, match="matches no parameter of the checkpoint"):
        choose_trained(student, settings(train="nothing"))
    for wrong in ("x", "x=", "=1", "a=0", "a=nan", "a=1,b"):
        with pytest.raises(InputError, match=r"lr_groups .* must have the form NAME=NUMBER"):
            settings(lr_groups=wrong)


def test_default_rates_follow_the_width() -> None:
    """docs/results.md: what is best at a hidden size of 576 diverges at 896."""
    plan = settings()
    assert plan.with_rates(576).peaks == (1e-3, 1e-4)
    assert plan.with_rates(896).peaks == (3e-4, 3e-5)
    assert settings(lr_mixer=2e-3).with_rates(896).peaks == (2e-3, 3e-5)
    assert settings(lr=2e-3).with_rates(576).rate_of("lm_head.weight") == 2e-3
    assert not {"lr", "lr_mixer"} & set(plan.decisive())  # known only with the checkpoint
    assert plan.with_rates(896).decisive()["lr_mixer"] == 3e-4


def test_schedules() -> None:
    for kind in ("cosine", "linear", "wsd"):
        assert [factor(kind, s, 10, 4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
        assert factor(kind, 4, 10, 4) == 1.0
        assert factor(kind, 10, 10, 4) == pytest.approx(0.1)
        assert factor(kind, 0, 1, 0) == 1.0
    assert factor("cosine", 7, 10, 4) == pytest.approx(0.55)
    assert factor("linear", 7, 10, 4) == pytest.approx(0.55)
    assert [factor("wsd", s, 100, 0) for s in (1, 79, 80, 90)] == pytest.approx([1.0, 1.0, 1.0, 0.55])
    with pytest.raises(InputError, match="schedule steps is unknown; use cosine, wsd, linear"):
        settings(schedule="steps")


def test_no_prefetching_thread_outlives_its_use() -> None:
    """One that makes an item while the interpreter ends takes the process down: a rank of torchrun
    died so, once in a while."""
    before, begun = threading.active_count(), []

    def slow() -> Iterator[int]:
        for number in range(1000):
            begun.append(number)
            time.sleep(0.05)
            yield number

    items = prefetched(slow())
    assert next(items) == 0
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before
    made = len(begun)
    time.sleep(0.2)
    assert len(begun) == made


def test_prefetching_hands_on_items_and_errors() -> None:
    assert list(prefetched(iter(range(20)))) == list(range(20))

    def broken():
        yield 1
        raise InputError("row 2")

    items = prefetched(broken())
    assert next(items) == 1
    with pytest.raises(InputError, match="row 2"):
        next(items)
