"""The exported directory, loaded by transformers in an environment that has no hybridize."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.export.card import model_card
from hybridize.export.formats.hf import modeling_files
from tests.conftest import Runner
from tests.test_surgery import convert

SCRIPT = """
import importlib.util, json, sys
assert importlib.util.find_spec("hybridize") is None, "hybridize must not be here"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
batch = tokenizer(["1 and 1?", "a longer prompt"], return_tensors="pt", padding=True)
ids = torch.arange(4, 44).view(2, 20)
torch.save({
    "logits": model(ids).logits, "tokens": model.generate(**batch, max_new_tokens=12, do_sample=False),
    "types": [str(p.dtype) for n, p in model.named_parameters() if n.endswith("A_log")], "kind": type(model).__name__,
}, out)
"""


@pytest.mark.parametrize("layers", [[1, 2], [0, 1, 2, 3]])
def test_it_loads_without_hybridize_and_computes_the_same(
    teacher: Path, tmp_path: Path, layers: list[int], cli: Runner, kind: str
) -> None:
    convert(teacher, layers, tmp_path / "h", kind=kind)
    cli("export", tmp_path / "h", "-o", tmp_path / "release")
    # a bare environment; PYTHONPATH adds this one's packages but not its .pth files, so no editable
    # hybridize
    venv.create(tmp_path / "env", symlinks=True)
    script = tmp_path / "load.py"
    script.write_text(SCRIPT)
    environment = {
        "PYTHONPATH": sysconfig.get_paths()["purelib"], "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path), "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    command = [tmp_path / "env/bin/python", script, tmp_path / "release", tmp_path / "found.pt"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "h")
    assert found["kind"] == "HybridForCausalLM"
    assert set(found["types"]) == {"torch.float32"}
    assert torch.equal(found["logits"], model(torch.arange(4, 44).view(2, 20)).logits)
    from tests.conftest import make_tokenizer

    batch = make_tokenizer()(["1 and 1?", "a longer prompt"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    assert torch.equal(found["tokens"], model.generate(**batch, max_new_tokens=12, do_sample=False))


def test_weights_are_the_sources_bytes(teacher: Path, tmp_path: Path, cli: Runner) -> None:
    convert(teacher, [1], tmp_path / "h")
    text = cli("export", tmp_path / "h", "-o", tmp_path / "out")
    assert "largest difference of a logit 0.0e+00" in text
    assert "largest difference of a logit 0.0e+00" in (tmp_path / "out/README.md").read_text()
    for file in (tmp_path / "h").glob("*.safetensors*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    for file in modeling_files():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text())["auto_map"]["AutoConfig"].endswith("HybridConfig")


def test_the_modeling_files_stand_alone() -> None:
    """torch, transformers and siblings only: all else fails under trust_remote_code."""
    import ast

    names = {file.stem for file in modeling_files()}
    for file in modeling_files():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert node.module in names
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                for module in modules:
                    top = module.split(".")[0]
                    assert top in {"torch", "transformers", "__future__"} | set(sys.stdlib_module_names), (file, module)


def test_the_card_escapes_what_it_quotes(teacher: Path, tmp_path: Path) -> None:
    source = convert(teacher, [1], tmp_path / "h")
    manifest = json.loads((tmp_path / "h/hybridize.json").read_text())
    manifest["root"]["path"] = "x`\n## [click](http://evil)<script>"
    card = model_card(CheckpointReader(tmp_path / "h"), manifest, "")
    assert "<script>" not in card
    assert "](http" not in card
    assert "\n## [" not in card
    assert source.hash[:16] in card
