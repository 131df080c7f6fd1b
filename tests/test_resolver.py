"""Which files of a directory are the checkpoint: the same for every part of the program, and those
of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.runtime.loading import load_hybrid, load_model
from tests.conftest import Runner, make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def home(teacher: Path, tmp_path: Path) -> Path:
    return shutil.copytree(teacher, tmp_path / "home")


def test_a_single_file_beside_shards_is_read_everywhere(home: Path, cli: Runner) -> None:
    """As a merged model that was saved over a sharded one: what lies in the shards is older."""
    weights = load_file(home / "model.safetensors")
    old, names = {name: value * 0.5 for name, value in weights.items()}, sorted(weights)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: files[at % 2] for at, name in enumerate(names)}
    for file in files:
        part = {name: old[name] for name in names if where[name] == file}
        save_file(part, home / file, metadata={"format": "pt"})
    (home / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    reader = CheckpointReader(home)
    assert not reader.sharded
    plain = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).state_dict()
    for found in (load_model(home, CPU, torch.float32).state_dict(), load_hybrid(reader, CPU, torch.float32).state_dict()):
        for name in names:
            assert torch.equal(reader.tensor(name), plain[name])
            assert torch.equal(found[name], plain[name])
    cli("replace", home, "--indices", "1", "--no-calibrate", "-o", home.parent / "h1")
    assert "has both model.safetensors and shards with an index; model.safetensors is read" in cli.stderr
    hybrid_reader = CheckpointReader(home.parent / "h1")
    assert hybrid_reader.sharded
    assert torch.equal(hybrid_reader.tensor("model.layers.0.mlp.up_proj.weight"), weights["model.layers.0.mlp.up_proj.weight"])


def test_an_adapter_is_told_to_be_merged(home: Path, cli: Runner) -> None:
    (home / "adapter_config.json").write_text("{}")
    assert "is a LoRA adapter (adapter_config.json), not a model: merge it" in cli.fails("replace", home, "--indices", 1)
    (home / "config.json").unlink()
    (home / "model.safetensors").rename(home / "adapter_model.safetensors")
    assert "is a LoRA adapter" in cli.fails("score-mmr", home)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_a_byte_order_mark_is_named(home: Path, cli: Runner, name: str) -> None:
    content = (home / name).read_bytes() if (home / name).exists() else b"{}"
    (home / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert f"{name} begins with a byte order mark" in cli.fails("generate", home, "hi")


def test_weights_that_the_config_names_are_refused(home: Path, cli: Runner) -> None:
    config = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    assert "names its own weights file (transformers_weights)" in cli.fails("replace", home, "--indices", "1")


def test_named_templates_are_carried_along(home: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.parent)
    (home / "additional_chat_templates").mkdir()
    (home / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}" + make_tokenizer().chat_template)
    cli("replace", "home", "--indices", "1", "--no-calibrate", "-o", "h1")
    cli("export", "h1", "--format", "hf", "-o", "out", "--no-verify")
    for made in ("h1", "out"):
        file = Path(made, "additional_chat_templates/tool_use.jinja")
        assert file.read_text().startswith("{{ tools }}")
        cli("verify", made)
    file.write_text("other")
    cli("verify", "out", code=1)
    assert "tool_use.jinja has changed since it was written" in cli.stdout + cli.stderr
    file.with_name("evil.jinja").write_text("x")
    cli("verify", "out", code=1)
    assert "evil.jinja is not in the manifest" in cli.stdout + cli.stderr
