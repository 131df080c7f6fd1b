"""The plan against what autograd keeps, and against counts made by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hybridize.distillation.plan import GIB, layer_bytes, plan
from hybridize.distillation.settings import DistillSettings
from tests.benchmarks.distill import models
from tests.conftest import Runner, hybrid, hybrid_config


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 64, "head_dim": 24, "num_attention_heads": 8, "intermediate_size": 160}])
def test_an_attention_layer_keeps_what_autograd_says(sizes: dict[str, int]) -> None:
    """Every storage that one layer's forward saves under bfloat16 autocast, but for its weights and
    the rotary tables."""
    mixer = {"kind": "mamba2", "d_inner": sizes.get("num_attention_heads", 4) * sizes.get("head_dim", 8), "d_conv": 4}
    changes = {**sizes, "mixer": {**mixer, "d_state": sizes.get("head_dim", 8)}}
    config = hybrid_config("ma", "mamba2", **changes)
    model, length = hybrid("ma", "mamba2", **changes).train(), 50
    hidden = torch.randn(1, length, config.hidden_size, requires_grad=True)
    told = model.model.layer_inputs(hidden, None, torch.arange(length).unsqueeze(0), packed=False)["full_attention"]
    rotary = {t.untyped_storage().data_ptr() for t in told["position_embeddings"]}
    kept, alive = {}, []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if length in t.shape and t.untyped_storage().data_ptr() not in rotary:  # weights and their casts have no such size
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model.model.layers[1](hidden, **told)
    assert layer_bytes(config, "full_attention", length) * length == sum(kept.values())


def test_weights_and_their_like_by_hand() -> None:
    student, teacher = hybrid("mam"), hybrid("aaa")
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (student, teacher))
    ends = student.lm_head.weight.numel() + student.model.embed_tokens.weight.numel()
    settings = DistillSettings(tokens=10_000, batch_size=4, seq_len=8, micro_batch_size=2, train="body")
    for ranks in (1, 2):
        found = plan(student, teacher, settings, ranks, torch.bfloat16)
        assert found.bytes["student's weights"] * ranks == 4 * ours
        assert found.bytes["gradients"] * ranks == 4 * (ours - ends)
        assert found.bytes["AdamW's moments"] * ranks == 8 * (ours - ends)
        assert found.bytes["teacher's weights"] * ranks == 2 * theirs
        assert found.tokens == 312 * 4 * 8
    waiting = plan(student, teacher, dataclasses.replace(settings, offload_teacher=True), 1, torch.bfloat16)
    layer = sum(p.numel() for p in teacher.model.layers[0].parameters())
    assert waiting.bytes["teacher's weights"] == 2 * (theirs - 2 * layer)
    aligned = plan(student, teacher, dataclasses.replace(settings, stage="align"), 2, torch.bfloat16)
    assert aligned.bytes["student's weights"] == 4 * ours  # whole on every rank
    more = plan(student, teacher, DistillSettings(tokens=10_000, batch_size=4, seq_len=8, train="body"), 1, torch.bfloat16)
    less = plan(student, teacher, settings, 1, torch.bfloat16)
    assert more.bytes["activations"] == 2 * less.bytes["activations"]
    assert more.flops == less.flops


MEASURED = [  # shape, what of distill's settings, ranks, GiB at the peak on H100s: docs/performance.md
    ("smollm2", {"batch_size": 16, "micro_batch_size": 8}, 1, 18.27),
    ("smollm2", {"batch_size": 16, "micro_batch_size": 16, "compile": True, "cuda_graph": True}, 1, 24.10),
    ("smollm2", {"batch_size": 32, "micro_batch_size": 16, "compile": True, "cuda_graph": True, "shard": False}, 2, 24.51),
    ("smollm2", {"batch_size": 32, "micro_batch_size": 16, "compile": True}, 2, 21.00),
    ("llama-1b", {"batch_size": 4, "micro_batch_size": 2, "train": "all"}, 1, 34.70),
    ("llama-3b", {"batch_size": 4, "micro_batch_size": 1}, 1, 70.77),
    ("llama-3b", {"batch_size": 8, "micro_batch_size": 2, "compile": True}, 1, 73.92),
    ("llama-3b", {"batch_size": 16, "micro_batch_size": 2, "compile": True}, 2, 42.02),
]


@pytest.mark.parametrize(("shape", "told", "ranks", "peak"), MEASURED)
def test_the_plan_of_a_measured_run(shape: str, told: dict[str, object], ranks: int, peak: float) -> None:
    """Half of the layers mamba2, 2048 tokens a row."""
    student, teacher = models(shape, "mamba2", torch.device("meta"), torch.bfloat16)
    settings = DistillSettings(**{"steps": 1, "seq_len": 2048, "train": "body", **told})
    assert plan(student, teacher, settings, ranks, torch.bfloat16).total / GIB == pytest.approx(peak, rel=0.15)


def test_dry_run_says_it_and_does_nothing(
    tmp_path: Path, cli: Runner, teacher: Path, traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli("replace", teacher, "--indices", "1,2", "--no-calibrate", "-o", "h2")
    before = sorted(Path(".").rglob("*"))
    text = cli("distill", "h2", "--data", traces, "--tokens", 1_000_000, "--dry-run")
    assert "at the peak" in text
    assert "983,040 tokens" in text
    found = json.loads(cli("distill", "h2", "--data", traces, "--tokens", 1_000_000, "--dry-run", "--json"))
    assert found["total_gib"] == pytest.approx(sum(found["gib"].values()), abs=0.01)
    there = json.loads(cli("distill", "h2", "--data", traces, "--tokens", 1_000_000, "--dry-run", "--json", "--device", "cuda"))
    assert there["hours"] == pytest.approx(there["flops"] / (0.19 * 989e12) / 3600)  # of an H100, which is not here
    assert there["device"] == "cuda"
    assert found["device"] == "cpu"
    assert found["hours"] > 10 * there["hours"]
    assert "Python and its libraries" in found["gib"]
    assert "Python and its libraries" not in there["gib"]
    ce = json.loads(cli("distill", "h2", "--data", traces, "--tokens", 1_000_000, "--loss", "ce", "--dry-run", "--json"))
    assert ce["gib"]["teacher's weights"] == 0
    assert ce["flops"] < found["flops"]
    monkeypatch.setenv("WORLD_SIZE", "2")  # what torchrun says
    graph = ("distill", "h2", "--data", traces, "--steps", 1, "--cuda-graph", "--dry-run")
    assert "give --no-shard too" in cli.fails(*graph)
    cli(*graph, "--no-shard")
    assert sorted(Path(".").rglob("*")) == before
