"""inspect: figures against a real model's own, without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hybridize.anatomy import LONG, anatomy
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.runtime.loading import load_empty, load_model
from hybridize.surgery.replace import MixerSettings, plan, replace
from hybridize.surgery.teacher import empty_model, read_teacher
from tests.conftest import Runner, make_teacher
from tests.families import FAMILY, make_family


def held(cache: object) -> int:
    """Bytes of all tensors in a transformers cache."""
    total = 0
    for layer in cache.layers:  # type: ignore[attr-defined]
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                total += tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0
    return total


@pytest.mark.parametrize("name", FAMILY)
def test_parameters_and_bytes_are_those_of_the_model(name: str, kind: str, tmp_path: Path) -> None:
    source = CheckpointReader(make_family(tmp_path / "t", name))
    surgery = plan(read_teacher(source), [0, 3], MixerSettings(kind))
    replace(source, "t", surgery, tmp_path / "h", donor=source, init_from="checkpoint", seed=0, overwrite=True, settings={})
    model = load_model(tmp_path / "h", torch.device("cpu"), torch.float32)
    raw = json.loads((tmp_path / "h/config.json").read_text())
    found = anatomy(raw, "x")
    assert found.parameters["total"] == sum(p.numel() for p in model.parameters())
    assert found.parameters["mixers"] == sum(p.numel() for n, p in model.named_parameters() if ".mixer." in n)
    with torch.no_grad():
        sizes = {n: held(model(torch.full((1, n), 5), use_cache=True).past_key_values) for n in (32, 64)}
    windows = sum(k == "sliding_attention" for k in found.kinds)
    per_token = (sizes[64] - sizes[32]) / 32
    assert found.kv == per_token  # windows are full after 8 tokens
    if not windows:
        assert found.state == sizes[32] - 32 * per_token
        assert found.at_long == found.state + LONG * found.kv
    assert found.teacher_at_long == anatomy(source.config, "x").at_long


def test_the_command_shows_layout_lineage_and_scores(teacher: Path, traces: Path, tmp_path: Path, cli: Runner) -> None:
    cli("replace", teacher, "--indices", "1", "--no-calibrate", "-o", tmp_path / "h1")
    cli("replace", tmp_path / "h1", "--indices", "2", "--no-calibrate", "-o", tmp_path / "h2")
    cli("score-loo", tmp_path / "h2", "--metric", "kl", "--teacher", teacher, "--data", traces, "--seq-len", 32, "--windows", 1)
    text = cli("inspect", tmp_path / "h2")
    assert "aMMa" in text
    assert "loo: " in text
    lines = [line.strip().removeprefix("`- ") for line in text.splitlines() if str(tmp_path) in line or str(teacher) in line]
    assert lines[1:] == [str(teacher), f"{tmp_path / 'h1'} (replace)", f"{tmp_path / 'h2'} (replace)"]
    found = json.loads(cli("inspect", tmp_path / "h2", "--json"))
    assert found["kinds"].count("linear_attention") == 2
    assert [step["command"] for step in found["lineage"]] == [None, "replace", "replace"]
    assert sorted(found["scores"][0]["ranking"]) == [0, 3]
    assert "aaaa" in cli("inspect", teacher)
    assert "does not exist" in cli.fails("inspect", "./nowhere")


def test_a_hub_id_costs_its_json_files(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Runner) -> None:
    import huggingface_hub

    asked = {}

    def fetch(name: str, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        assert not local_files_only
        asked.update(name=name, patterns=allow_patterns)
        folder = tmp_path / "hub"
        folder.mkdir()
        (folder / "config.json").write_bytes((teacher / "config.json").read_bytes())
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert "llama, 4 layers" in cli("inspect", "some/model")
    assert asked == {"name": "some/model", "patterns": ["*.json"]}


@pytest.mark.parametrize("tied", [True, False])
def test_models_without_storage_are_those_that_are_loaded(tmp_path: Path, tied: bool) -> None:
    """The same parameters under the same names: tied ones once."""
    path = make_teacher(tmp_path / "teacher", tie_word_embeddings=tied)
    raw = json.loads((path / "config.json").read_text())
    loaded = {name: p.shape for name, p in load_model(path, torch.device("cpu"), torch.float32).named_parameters()}
    for model in (empty_model(raw, str(path)), load_empty(path, torch.float32)):
        assert {name: p.shape for name, p in model.named_parameters()} == loaded
        assert all(p.is_meta for p in model.parameters())
