"""bench: what it counts against what is there, and what it does where memory is short. Times
themselves are not tested."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridize.benchmark import grid as under_test
from hybridize.benchmark.grid import break_even, random_hybrid, step_bytes, weight_bytes
from hybridize.generation.decoder import Decoder
from tests.conftest import Runner, hybrid

SMALL = ("--contexts", "8,16", "--batches", "1,3", "--steps", 2, "--repeats", 1)


def test_bytes_are_those_of_the_tensors(kind: str) -> None:
    """A step reads all weights but the embeddings, every cached key and value, and states twice: in
    and out."""
    model = hybrid("amma", kind)
    table = model.model.embed_tokens.weight.numel() * 4
    held = Decoder(model, 3, 32).cache.bytes()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tied = model.config.tie_word_embeddings
    assert step_bytes(model, 3, 32) == weights - (0 if tied else table) + held["kv"] + 2 * held["state"]


def test_a_model_of_random_weights_is_the_real_shape(kind: str) -> None:
    for tied in (False, True):
        real = hybrid("amma", kind, tie_word_embeddings=tied)
        made = random_hybrid(real.config, torch.device("cpu"), torch.bfloat16)
        assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
        assert not any(p.is_meta for p in (*made.parameters(), *made.buffers()))
        narrow = real.to(torch.bfloat16)
        assert weight_bytes(made) == weight_bytes(narrow)
        assert torch.isfinite(made(torch.ones(1, 5, dtype=torch.long)).logits).all()


def steps(batch: int, **times: float | None) -> list[dict[str, Any]]:
    return [{"context": int(name[1:]), "batch": batch, "ms": ms} for name, ms in times.items()]


def test_break_even() -> None:
    base = steps(4, c100=1.0, c200=2.0, c400=4.0)
    assert break_even(steps(4, c100=0.5, c200=1.0, c400=1.5), base, 4) == 100
    assert break_even(steps(4, c100=2.0, c200=1.0, c400=1.5), base, 4) == 150
    assert break_even(steps(4, c100=0.5, c200=3.0, c400=3.0), base, 4) == 300
    assert break_even(steps(4, c100=0.5, c200=1.0, c400=4.5), base, 4) is None
    assert break_even(steps(4, c100=2.0, c200=None, c400=2.0), base, 4) == pytest.approx(100 + 300 / 3)
    assert break_even(steps(4, c100=0.5), base, 8) is None


@given(st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=6))
def test_after_break_even_it_stays_faster(pairs: list[tuple[float, float]]) -> None:
    ours = [{"context": 10 * i, "batch": 1, "ms": a} for i, (a, _) in enumerate(pairs)]
    theirs = [{"context": 10 * i, "batch": 1, "ms": b} for i, (_, b) in enumerate(pairs)]
    at = break_even(ours, theirs, 1)
    if at is None:
        assert pairs[-1][0] >= pairs[-1][1]
        return
    assert all(a < b for i, (a, b) in enumerate(pairs) if 10 * i > at)
    assert at == 0 or pairs[int(at // 10)][0] >= pairs[int(at // 10)][1]


def test_teacher_and_hybrid_in_one_run(cli: Runner, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli("replace", teacher, "--indices", "1,2", "--no-calibrate", "-o", "h2", "-q")
    found = json.loads(cli("bench", teacher, "h2", *SMALL, "--json"))
    assert found.pop("bench") == "bench/bench.json"
    assert found == json.loads((tmp_path / "bench/bench.json").read_text())
    assert found["interleaved"]
    assert list(found["checkpoints"]) == [teacher.name, "h2"]
    for told in found["checkpoints"].values():
        assert [(s["context"], s["batch"]) for s in told["steps"]] == [(8, 1), (8, 3), (16, 1), (16, 3)]
        assert [p["context"] for p in told["prefill"]] == [8, 16]
        for step in told["steps"]:
            assert 0 < step["least_ms"] <= step["ms"] <= step["most_ms"]
            assert step["tokens_per_second"] == pytest.approx(step["batch"] / step["ms"] * 1e3)
            floor = step["step_bytes"] / found["bandwidth"] * 1e3
            assert step["times_floor"] == pytest.approx(step["ms"] / floor)
    kv = [told["steps"][0]["kv_bytes"] for told in found["checkpoints"].values()]
    assert kv[1] * 2 == kv[0]
    assert "exists" in cli.fails("bench", teacher, *SMALL)
    assert "h2 against" in cli("bench", teacher, "h2", *SMALL, "--overwrite")


def test_configs_alone_and_what_does_not_fit(cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, kinds in (("full", "aaaa"), ("half", "amma")):
        hybrid(kinds, "mamba2").config.save_pretrained(tmp_path / name)
    weights = weight_bytes(hybrid("amma", "mamba2"))
    told = (*SMALL, "--random-weights", "--memory", (weights * 1.2) / 2**30, "--json", "--dtype", "float32")
    found = json.loads(cli("bench", "full", "half", *told, "--generations", "4:40,1:100000"))
    assert not found["interleaved"]
    full, half = (found["checkpoints"][name] for name in ("full", "half"))
    assert full["generations"][1]["batch"] == 0
    for entry in (full["generations"][0], half["generations"][0]):
        assert entry["batch"] >= 1
        assert entry["tokens_per_second"] == pytest.approx(
            entry["batch"] * 40 / (entry["prefill_seconds"] + entry["decode_seconds"])
        )
    huge = json.loads(cli("bench", "full", *told, "--contexts", 10**6, "--overwrite"))
    assert all(step["ms"] is None for step in huge["checkpoints"]["full"]["steps"])
    assert huge["checkpoints"]["full"]["prefill"] == []


def test_one_model_at_a_time_and_no_cell_that_costs_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []

    def load() -> Any:
        gc.collect()
        alive.append(sum(model() is not None for model in made))
        model = hybrid("amma", "mamba2").eval()
        made.append(weakref.ref(model))
        return model

    timed = under_test.time_steps

    def short(models: Any, batch: int, *told: Any) -> Any:
        if batch == 2:
            raise torch.OutOfMemoryError
        return timed(models, batch, *told)

    monkeypatch.setattr(under_test, "time_steps", short)
    settings = under_test.BenchSettings((8,), (1, 2), ((2, 4),), steps=2, repeats=1)
    memory = 2 * weight_bytes(hybrid("amma", "mamba2"))
    found = under_test.bench({"a": load, "b": load}, settings, torch.device("cpu"), memory)
    assert alive == [0, 0]
    for told in found["checkpoints"].values():
        assert [step["ms"] is None for step in told["steps"]] == [False, True]
        assert told["generations"][0]["batch"] > 0


def test_bad_input(cli: Runner, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ("-o", tmp_path / "b")
    assert "whole numbers" in cli.fails("bench", teacher, "--contexts", "1k", *out)
    assert "PROMPT:NEW" in cli.fails("bench", teacher, "--generations", "100", *out)
    assert "at least 1" in cli.fails("bench", teacher, "--batches", "0", *out)
    assert "given twice" in cli.fails("bench", teacher, teacher, *out)
    assert cli.fails("bench", tmp_path / "none", *out)
    config = json.loads((teacher / "config.json").read_text())
    home = shutil.copytree(teacher, tmp_path / "dynamic")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (home / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    monkeypatch.setattr("hybridize.runtime.loading.load_hybrid", None)  # all before any weight is read
    assert "dynamic or longrope" in cli.fails("bench", home, *out)
    assert "dynamic or longrope" in cli.fails("bench", home, "--random-weights", *out)
    assert "dynamic or longrope" in cli.fails("generate", home, "hi")
    assert not (tmp_path / "b").exists()
