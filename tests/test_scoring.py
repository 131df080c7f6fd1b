"""Scorers against doing the same thing by hand: ablating a layer's weights, replacing a layer on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.distillation.distill import open_corpus
from hybridize.distillation.encode import Encoder
from hybridize.distillation.losses import Loss
from hybridize.distillation.measure import fidelity
from hybridize.distillation.optimize import clip_gradients, make_optimizer, update
from hybridize.distillation.step import Accumulator, Student
from hybridize.modeling import HybridForCausalLM
from hybridize.runtime import load_hybrid, load_model, load_tokenizer
from hybridize.scoring.interface import attention_layers
from hybridize.scoring.loo import LooSettings, loo_kl
from hybridize.scoring.mmr import MmrSettings, mmr
from hybridize.surgery.replace import MixerSettings, plan, starting_values
from hybridize.surgery.teacher import hybrid_config, read_teacher
from tests.conftest import Runner, make_teacher, write_traces
from tests.test_surgery import convert

CPU = torch.device("cpu")


def corpus_for(teacher: Path, traces: Path):
    return open_corpus(str(traces), str(traces), Encoder(load_tokenizer(teacher), "assistant"))


def silence(model, layer: int, what: str):
    """The same ablation through weights: an output projection of zeros adds nothing to the residual stream."""
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
    batches = corpus_for(teacher, traces).measuring(MmrSettings(batch_size=2, seq_len=64).as_distill())
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


@pytest.mark.parametrize("converted", [[], [1]])
def test_mmr_is_replacing_each_layer_and_training_it(
    teacher: Path, traces: Path, tmp_path: Path, converted: list[int], kind: str
) -> None:
    """Each score equals that of a checkpoint in which `replace` converted the layer, trained by the plain loop."""
    convert(teacher, converted, tmp_path / "start", kind=kind)
    source = CheckpointReader(tmp_path / "start")
    settings = MmrSettings(steps=5, batch_size=2, seq_len=48, lr_mixer=1e-2)
    order = corpus_for(teacher, traces).training(settings.as_distill())
    batches = [next(order) for _ in range(5)]
    contract = read_teacher(source)
    surgery = plan(contract, contract.attention_layers, MixerSettings(kind))
    origin = load_model(teacher, CPU, torch.float32)
    student = HybridForCausalLM.from_pretrained(source.path, config=hybrid_config(source.config), dtype=torch.float32)
    before = {name: p.clone() for name, p in student.named_parameters()}
    starts = starting_values(source, surgery, source, seed=0, calibration=None, together=False)
    found = mmr(student, origin, surgery.mixer, starts, batches, settings, torch.float32)
    assert [s.layer for s in found] == [i for i in range(4) if i not in converted]
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    for score in found:
        convert(source.path, [score.layer], tmp_path / f"h{score.layer}", kind=kind)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / f"h{score.layer}", dtype=torch.float32).train()
        for name, parameter in alone.named_parameters():
            parameter.requires_grad_(f"layers.{score.layer}.mixer." in name)
        optimizer, losses = make_optimizer(alone, settings.as_distill()), []
        for step, batch in enumerate(batches):
            losses.append(float(Accumulator(Student(alone, Loss(), torch.float32), origin, 2)(batch)))
            clip_gradients(alone, 1.0)
            update(optimizer, [0.5, 1.0, 1.0, 0.775, 0.325][step])
            optimizer.zero_grad()
        assert score.score == pytest.approx(sum(losses) / 5, rel=1e-3)


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
    assert "measured on another checkpoint" in cli.fails("replace", "h1", "--layers", 2, "--scores", "teacher/scores/loo.json")
    cli("score-mmr", "h2", "--steps", 1, "--batch-size", 1, "--seq-len", 32, "-o", "elsewhere.json")
    assert sorted(s["layer"] for s in json.loads(Path("elsewhere.json").read_text())["layers"]) == [
        i for i, kind in enumerate(json.loads(Path("h2/config.json").read_text())["layer_types"]) if kind == "full_attention"
    ]
