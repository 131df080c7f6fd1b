"""Scorers against doing the same thing by hand: ablating a layer's weights, replacing a layer on
disk."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.data.corpus import open_corpus
from hybridize.data.encode import Encoder
from hybridize.distillation.fidelity import fidelity
from hybridize.distillation.losses import Loss
from hybridize.distillation.optimize import clip_gradients, make_optimizer
from hybridize.distillation.step import Accumulator, Student
from hybridize.errors import InputError, WorkError
from hybridize.evaluation.harness import margins
from hybridize.runtime.loading import load_empty, load_hybrid, load_model, load_tokenizer
from hybridize.scoring.candidates import Candidates
from hybridize.scoring.loo import loo_kl
from hybridize.scoring.mmr import alone, measure
from hybridize.scoring.mmr_memory import memory, share_of
from hybridize.scoring.restore import restore
from hybridize.scoring.scorer import attention_layers
from hybridize.scoring.settings import LooSettings, MmrSettings, RestoreSettings
from hybridize.surgery.replace import MixerSettings, plan, starting_values
from hybridize.surgery.teacher import empty_model, read_teacher
from tests.conftest import Runner, make_teacher, write_traces
from tests.test_surgery import convert

CPU = torch.device("cpu")


def corpus_for(teacher: Path, traces: Path):
    return open_corpus(str(traces), str(traces), Encoder(load_tokenizer(teacher), "assistant"))


def silence(model, layer: int, what: str):
    """The same ablation through weights: an output projection of zeros adds nothing to the residual
    stream."""
    model = copy.deepcopy(model)
    block = model.model.layers[layer]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        if what == "block":
            block.mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("what", ["block", "mixer"])
def test_loo_kl_is_the_kl_of_each_ablated_model(teacher: Path, traces: Path, what: str) -> None:
    model = load_model(teacher, CPU, torch.float32)
    batches = corpus_for(teacher, traces).held_out(24, 64, 2)
    ours = load_hybrid(CheckpointReader(teacher), CPU, torch.float32)
    for other in (None, model):
        found = loo_kl(ours, other, LooSettings("kl", what), batches, torch.float32)
        assert [s.layer for s in found] == [0, 1, 2, 3]
        for score in found:
            expected = fidelity(silence(model, score.layer, what), model, batches, torch.float32).forward_kl
            assert score.score == pytest.approx(expected, rel=1e-5)
            assert score.score > 0


def test_attention_layers_of_teachers_and_hybrids(teacher: Path, tmp_path: Path) -> None:
    convert(teacher, [1, 3], tmp_path / "h")
    assert attention_layers(load_model(teacher, CPU, torch.float32)) == [0, 1, 2, 3]
    assert attention_layers(load_model(tmp_path / "h", CPU, torch.float32)) == [0, 2]


def start(teacher: Path, traces: Path, path: Path, converted: list[int], kind: str, **changes: Any):
    """What `measure` takes, for a teacher of which some layers are mixers already."""
    convert(teacher, converted, path, kind=kind)
    source = CheckpointReader(path)
    settings = MmrSettings(**{"steps": 5, "batch_size": 2, "seq_len": 48, "lr_mixer": 1e-2, **changes})
    corpus, contract = corpus_for(teacher, traces), read_teacher(source)
    surgery = plan(contract, contract.attention_layers, MixerSettings(kind))

    def batches(repeat: int):
        order = corpus.training(repeat, settings.seq_len, settings.batch_size)
        return [next(order) for _ in range(settings.steps)]

    origin, student = load_model(teacher, CPU, torch.float32), load_hybrid(source, CPU, torch.float32)
    starts = list(starting_values(source, surgery, source, seed=0, calibration=None, together=False))
    return student, origin, surgery.mixer, starts, batches, settings


@pytest.mark.parametrize("converted", [[], [1]])
@pytest.mark.parametrize("room", [None, 1])
def test_mmr_is_replacing_each_layer_and_training_it(
    teacher: Path, traces: Path, tmp_path: Path, converted: list[int], kind: str, room: int | None,
) -> None:  # fmt: skip
    """Each score equals that of a checkpoint in which `replace` converted the layer, trained by the
    plain loop; room 1: one candidate at a time."""
    student, origin, mixer, starts, batches, settings = start(teacher, traces, tmp_path / "start", converted, kind)
    before, notes = {name: p.clone() for name, p in student.named_parameters()}, []
    found = measure(student, origin, mixer, starts, batches, settings, torch.float32, room=room, note=notes.append)
    assert len(notes) == (room is not None)
    assert [s.layer for s in found] == [i for i in range(4) if i not in converted]
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    for score in found:
        convert(tmp_path / "start", [score.layer], tmp_path / f"h{score.layer}", kind=kind)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / f"h{score.layer}", dtype=torch.float32).train()
        for name, parameter in alone.named_parameters():
            parameter.requires_grad_(f"layers.{score.layer}.mixer." in name)
        optimizer, losses = make_optimizer(alone, settings.as_distill()), []
        for step, batch in enumerate(batches(0)):
            losses.append(float(Accumulator(Student(alone, Loss(), torch.float32), origin, 2)(batch)))
            clip_gradients(alone, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * [0.5, 1.0, 1.0, 0.775, 0.325][step]
            optimizer.step()
            optimizer.zero_grad()
        assert score.score == pytest.approx(sum(losses) / 5, rel=1e-3)


def test_training_all_weights_is_each_candidate_alone(teacher: Path, traces: Path, tmp_path: Path) -> None:
    given = start(teacher, traces, tmp_path / "start", [2], "mamba2", steps=3, train="all")
    student, origin, mixer, starts, batches, settings = given
    layer, values = starts[1]
    score = measure(*given, torch.float32, states=None)[1]
    whole = alone(student, origin, mixer, layer, values, batches(0), settings, torch.float32)
    assert (score.layer, score.score) == (layer, pytest.approx(float(whole.double().mean()), rel=1e-6))
    few = alone(student, origin, mixer, layer, values, batches(0), dataclasses.replace(settings, train="mixers"), torch.float32)
    assert float(few[0]) == pytest.approx(float(whole[0]), rel=1e-6)
    assert abs(float(few[2]) - float(whole[2])) > 1e-5


@pytest.mark.parametrize("trained", ["mixers", "all"])
def test_a_killed_run_goes_on_to_the_same_scores(
    teacher: Path, traces: Path, tmp_path: Path, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridize.scoring.candidates.SAVE_EVERY", 2)
    states, asked = tmp_path / "states", []
    states.mkdir()
    given = start(teacher, traces, tmp_path / "start", [], "mamba2", repeats=2, train=trained)
    whole = measure(*given, torch.float32)
    student, origin, mixer, starts, batches, settings = given

    def stopped(repeat: int):
        for number, batch in enumerate(batches(repeat)):
            asked.append(number)
            if len(asked) == 9:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        measure(student, origin, mixer, starts, stopped, settings, torch.float32, states=states)
    assert list(states.iterdir())
    assert (
        measure(
            *start(teacher, traces, tmp_path / "again", [], "mamba2", repeats=2, train=trained), torch.float32, states=states
        )
        == whole
    )
    spread = [s.stderr for s in whole]
    assert all(value is not None and value > 0 for value in spread)


def test_losses_that_are_not_finite_are_told(teacher: Path, traces: Path, tmp_path: Path) -> None:
    given = start(teacher, traces, tmp_path / "start", [], "mamba2", steps=3, lr_mixer=1e30)
    with pytest.raises(WorkError, match=r"layer \d: the loss is not finite"):
        measure(*given, torch.float32)


def test_score_files_and_what_replace_makes_of_them(tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_teacher(tmp_path / "teacher")
    write_traces(tmp_path / "traces.jsonl")
    table = cli("score-loo", "--metric", "kl", "--windows", 4, "--seq-len", 32, "--ablate", "mixer")
    assert table.count("#") >= 4
    loo = json.loads(Path("teacher/scores/loo.json").read_text())
    assert loo["checkpoint"] == CheckpointReader(tmp_path / "teacher").hash
    assert (loo["kind"], loo["metric"], loo["settings"]["ablate"]) == ("loo", "kl", "mixer")
    assert sorted(s["layer"] for s in loo["layers"]) == [0, 1, 2, 3]
    cli("replace", "--layers", 1)
    assert "loo.json" in cli.stderr
    first = sorted(loo["layers"], key=lambda s: (s["score"], s["layer"]))[0]["layer"]
    assert json.loads(Path("h1/config.json").read_text())["layer_types"][first] == "linear_attention"
    cli("score-mmr", "--steps", 2, "--batch-size", 2, "--seq-len", 32, "--json")
    mmr_file = json.loads(Path("teacher/scores/mmr.json").read_text())
    assert json.loads(cli.stdout)["layers"] == mmr_file["layers"]
    assert (mmr_file["mixer"], mmr_file["init"]) == ("mamba2", "calibrated")
    cli("replace", "--layers", 2, "--overwrite")
    assert "mmr.json" in cli.stderr
    assert "exists" in cli.fails("score-loo", "--metric", "kl")
    other = json.loads(Path("teacher/scores/loo.json").read_text()) | {"checkpoint": "0" * 64}
    Path("other.json").write_text(json.dumps(other))
    assert "measured on another checkpoint" in cli.fails("replace", "h1", "--layers", 2, "--scores", "other.json")
    cli("score-mmr", "h2", "--steps", 1, "--batch-size", 1, "--seq-len", 32, "-o", "elsewhere.json")
    assert sorted(s["layer"] for s in json.loads(Path("elsewhere.json").read_text())["layers"]) == [
        i for i, kind in enumerate(json.loads(Path("h2/config.json").read_text())["layer_types"]) if kind == "full_attention"
    ]


def test_mmr_on_the_command_line(
    tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch, teacher: Path, traces: Path
) -> None:
    """Killed and resumed, under torchrun, and as a plan: the same scores as in one go."""
    monkeypatch.setattr("hybridize.scoring.candidates.SAVE_EVERY", 1)
    run = (
        "score-mmr",
        teacher,
        "--data",
        traces,
        "--steps",
        4,
        "--batch-size",
        2,
        "--seq-len",
        32,
        "--no-calibrate",
        "--repeats",
        2,
    )

    def layers(name: str) -> list[dict[str, Any]]:
        return json.loads((tmp_path / name).read_text())["layers"]

    cli(*run, "-o", tmp_path / "one.json")
    assert [row["layer"] for row in layers("one.json")] == [0, 1, 2, 3]
    assert all(1 <= row["ranks"][0] <= row["ranks"][1] <= 4 and row["stderr"] > 0 for row in layers("one.json"))
    assert "could be" in cli.stdout
    real, steps = Candidates.step, []

    def interrupted(self: Candidates, batch: Any) -> None:
        steps.append(batch)
        if len(steps) == 7:
            raise KeyboardInterrupt
        real(self, batch)

    monkeypatch.setattr(Candidates, "step", interrupted)
    cli(*run, "-o", tmp_path / "two.json", code=130)
    assert "unfinished run" in cli.fails(*run, "-o", tmp_path / "two.json")
    assert "--resume: lr_mixer was 0.001, now it is 0.1" in cli.fails(
        *run, "--lr-mixer", "0.1", "-o", tmp_path / "two.json", "--resume"
    )
    cli(*run, "-o", tmp_path / "two.json", "--resume")
    assert len(steps) == 9
    assert layers("two.json") == layers("one.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]

    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "hybridize.commands",
    ]
    calm = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [*map(str, run), "-o", str(tmp_path / "ranks.json")]
    ran = subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=300, env=calm, check=False)
    assert ran.returncode == 0, ran.stderr
    for one, other in zip(layers("one.json"), layers("ranks.json"), strict=True):
        assert other["score"] == pytest.approx(one["score"], rel=1e-5)
        assert other["ranks"] == one["ranks"]

    cli(*run, "--dry-run", "--json", "-o", tmp_path / "none.json")
    planned = json.loads(cli.stdout)
    assert planned["total_gib"] == pytest.approx(sum(planned["gib"].values()), abs=0.01)
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("converted", [[], [1]])
@pytest.mark.parametrize("steps", [0, 3])
def test_restore_is_what_giving_a_layer_back_takes_off_the_kl(
    teacher: Path, traces: Path, tmp_path: Path, converted: list[int], steps: int, kind: str
) -> None:
    student, origin, mixer, starts, batches, _ = start(teacher, traces, tmp_path / "start", converted, kind)
    settings, attention = RestoreSettings(steps, 2, 48, 1e-2), [i for i in range(4) if i not in converted]
    heldout = corpus_for(teacher, traces).held_out(24, settings.seq_len, settings.batch_size)
    notes: list[str] = []
    found = restore(student, origin, mixer, starts, batches(0), heldout, settings, torch.float32, note=notes.append)
    assert [s.layer for s in found] == attention
    convert(tmp_path / "start", attention, tmp_path / "all", kind=kind)
    whole = load_model(tmp_path / "all", CPU, torch.float32)
    moved = {n for n, p in whole.named_parameters() if not torch.equal(p, student.get_parameter(n))}
    assert {int(name.split(".")[2]) for name in moved} == (set(attention) if steps else set())
    assert all(".mixer." in name for name in moved)
    whole.load_state_dict(student.state_dict())
    worse = fidelity(whole, origin, heldout, torch.float32).forward_kl
    for score in found:
        rest = [layer for layer in attention if layer != score.layer]
        convert(tmp_path / "start", rest, tmp_path / f"without{score.layer}", kind=kind)
        back = load_model(tmp_path / f"without{score.layer}", CPU, torch.float32)
        back.load_state_dict(student.state_dict(), strict=False)
        assert score.score == pytest.approx(
            worse - fidelity(back, origin, heldout, torch.float32).forward_kl, rel=1e-4, abs=1e-6
        )


def test_restore_on_the_command_line(tmp_path: Path, cli: Runner, teacher: Path, traces: Path) -> None:
    run = ("score-restore", teacher, "--data", traces, "--batch-size", 2, "--seq-len", 32, "--windows", 8)
    cli(*run, "--steps", 2, "-o", tmp_path / "a.json", "--calibration-tokens", 64)
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["kind"], found["mixer"], found["init"], found["metric"]) == (
        "restore",
        "mamba2",
        "calibrated",
        "kl recovered",
    )
    assert "relative error" in cli.stderr
    cli("replace", teacher, "--layers", 2, "--scores", tmp_path / "a.json", "--no-calibrate", "-o", tmp_path / "h2")
    assert "restore, kl recovered" in cli.stderr
    assert "--steps -1 must not be negative" in cli.fails(*run, "--steps", -1, "-o", tmp_path / "b.json")
    assert "does not fill one sequence" in cli.fails(*run, "--seq-len", 99999, "--mask", "none", "-o", tmp_path / "b.json")


def test_candidates_are_dealt_to_and_fro() -> None:
    """Every layer to one rank; a candidate costs the layers above it, and no rank has much more to
    do than another."""
    for size in (1, 2, 3, 8):
        shares = [share_of(range(32), rank, size) for rank in range(size)]
        assert sorted(layer for share in shares for layer in share) == list(range(32))
        costs = [sum(32 - layer for layer in share) for share in shares]
        assert max(costs) <= 1.15 * min(costs)


def test_a_margin_needs_answers_that_differ() -> None:
    """Where the choice stands in the context, as in winogrande, every answer is the same text."""
    sample = {"filtered_resps": [(-1.0, False), (-2.0, False)], "target": " the end", "doc_id": 0, "doc_hash": ""}
    with pytest.raises(InputError, match="whose answers differ"):
        margins([{**sample, "arguments": [("Ann", " the end"), ("Bob", " the end")]}])
    (found,) = margins([{**sample, "arguments": [("Who", " the start"), ("Who", " the end")]}])
    assert found["score"] == -1.0


def test_memory_is_counted_from_shapes(teacher: Path) -> None:
    source = CheckpointReader(teacher)
    surgery = plan(read_teacher(source), [0, 1, 2, 3], MixerSettings("mamba2"))
    student, origin = empty_model(source.config, "x"), load_empty(teacher, torch.float32)
    settings = MmrSettings(batch_size=2, seq_len=32)
    found = memory(student, origin, surgery.mixer, settings, 1, torch.float32)
    values = next(iter(starting_values(source, surgery, source, 0, None, together=False)))[1]
    assert found["mixers, gradients and AdamW's moments"] == 16 * 4 * sum(v.numel() for v in values.values())
    assert found["student's weights"] == 4 * sum(p.numel() for p in load_model(teacher, CPU, torch.float32).parameters())
    every = memory(student, origin, surgery.mixer, dataclasses.replace(settings, train="all"), 1, torch.float32)
    whole = found["student's weights"] + 4 * sum(v.numel() for v in values.values())
    assert every["a candidate's weights, gradients and moments"] == 4 * whole
    shared = memory(student, origin, surgery.mixer, settings, 2, torch.float32)
    assert shared["mixers, gradients and AdamW's moments"] * 2 == found["mixers, gradients and AdamW's moments"]
