"""Damaged checkpoints: a sentence that names the file, and the tensor where there is one, before
anything is written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hybridize.checkpoint.integrity import verify
from hybridize.checkpoint.manifest import MANIFEST
from hybridize.checkpoint.reader import INDEX
from hybridize.demo import TASKS
from tests.conftest import Runner
from tests.damage import KEPT, changed_bytes, changed_json, read_all, replaced, subject

SHARD = "model-00001-of-00001.safetensors"
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with scores, and a hybrid of it with results."""
    return subject(tmp_path_factory.mktemp("damage"))


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tensors(**changes: torch.Tensor | None) -> Damage:
    """Rewrites the shard with tensors changed, added or (None) left out; __ stands for a dot. The
    index follows."""

    def apply(path: Path) -> None:
        found = load_file(path / SHARD)
        for flat, value in changes.items():
            name = flat.replace("__", ".")
            found.pop(name, None)
            if value is not None:
                found[name] = value
        save_file(found, path / SHARD, {"format": "pt"})
        index = json.loads((path / INDEX).read_text())
        (path / INDEX).write_text(json.dumps({**index, "weight_map": dict.fromkeys(found, SHARD)}))

    return apply


def config(**changes: Any) -> Damage:
    def apply(path: Path) -> None:
        found = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps({key: value for key, value in found.items() if value != "gone"}))

    return apply


def text(name: str, content: bytes | str) -> Damage:
    return lambda path: (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def index(**weights: str) -> Damage:
    return text(INDEX, json.dumps({"weight_map": {name.replace("__", "."): file for name, file in weights.items()}}))


def link(name: str, to: str) -> Damage:
    def apply(path: Path) -> None:
        target = path.parent / to
        shutil.move(path / name, target)
        (path / name).symlink_to(target)

    return apply


def head(path: Path, size: int) -> None:
    os.truncate(path / SHARD, size)


def doubled(path: Path) -> None:
    shutil.copy(path / SHARD, path / "b.safetensors")
    index(a=SHARD, b="b.safetensors")(path)


UP = "model__layers__0__mlp__up_proj__weight"
NAN = torch.full((48, 32), 1.0)
NAN[3, 4] = torch.nan
DAMAGES: list[tuple[str, Damage, str]] = [
    ("shard cut in the middle", lambda p: head(p, 9000), f"{SHARD} is not a readable safetensors file"),
    ("shard cut in its header", lambda p: head(p, 200), f"{SHARD} is not a readable safetensors file"),
    ("shard of four bytes", lambda p: head(p, 4), f"{SHARD} is not a readable safetensors file"),
    ("empty shard", lambda p: head(p, 0), f"{SHARD} is not a readable safetensors file"),
    ("a header without end", text(SHARD, b"\xff" * 64), f"{SHARD} is not a readable safetensors file"),
    ("shard gone", lambda p: (p / SHARD).unlink(), f"{SHARD} is missing"),
    ("shard is a directory", lambda p: ((p / SHARD).unlink(), (p / SHARD).mkdir()), SHARD),
    ("index leads up", index(a="../traces.jsonl"), "not a file of this directory"),
    ("index leads away", index(a="/etc/passwd"), "not a file of this directory"),
    ("index says nothing", text(INDEX, "{}"), "has no weight_map"),
    ("index names no file", index(a=""), "h2"),
    ("index is a list", text(INDEX, "[]"), "must hold a JSON object"),
    ("shard is a link", link(SHARD, "away.safetensors"), "is a link out of its directory"),
    ("config is a link", link("config.json", "away.json"), "is a link out of its directory"),
    ("tokenizer is a link", link("tokenizer.json", "away.json"), "is a link out of its directory"),
    ("a tensor twice", doubled, "in more than one"),
    ("a tensor gone", tensors(**{UP: None}), "has no tensor model.layers.0.mlp.up_proj.weight"),
    ("another shape", tensors(**{UP: torch.ones(48, 31)}), "mlp.up_proj.weight has shape (48, 31), but the config"),
    ("another rank", tensors(**{UP: torch.ones(48)}), "model.layers.0.mlp.up_proj.weight has shape (48,)"),
    ("whole numbers", tensors(**{UP: torch.ones(48, 32, dtype=torch.int8)}), "is of type I8"),
    ("eight bits", tensors(**{UP: torch.ones(48, 32).to(torch.float8_e4m3fn)}), "is of type F8_E4M3"),
    ("NaN", tensors(**{UP: NAN}), f"{SHARD}: tensor model.layers.0.mlp.up_proj.weight holds values that are not finite"),
    ("infinity", tensors(**{UP: NAN.nan_to_num(torch.inf)}), "not finite"),
    ("a tensor too many", tensors(model__layers__0__self_attn__sinks=torch.ones(4)), "self_attn.sinks has no place in"),
    ("a layer too many", tensors(model__layers__4__mlp__up_proj__weight=torch.ones(48, 32)), "layers, but the weights have 5"),
    ("config cut", text("config.json", '{"model_type": '), "config.json is not readable JSON"),
    ("config empty", text("config.json", ""), "config.json is not readable JSON"),
    ("config in Latin", text("config.json", '{"model_type": "ü"}'.encode("latin-1")), "config.json is not readable JSON"),
    ("config binary", text("config.json", bytes(range(256))), "config.json is not readable JSON"),
    ("config of 10 MB", text("config.json", json.dumps({"x": ["y" * 100] * 100_000})), "is a 'None' model"),
    ("config of 100 MB", lambda p: os.truncate(p / "config.json", 100 << 20), "has 100 MiB"),
    ("config without bottom", text("config.json", "[" * 100_000), "config.json is not readable JSON"),
    ("config with NaN", text("config.json", '{"model_type": "llama", "rms_norm_eps": NaN}'), "NaN is not a JSON number"),
    ("layers without number", config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, not"),
    ("layers in words", config(num_hidden_layers="four"), "num_hidden_layers is 'four', not"),
    ("no hidden size", config(hidden_size=0), "hidden_size is 0"),
    ("a hidden size in words", config(hidden_size="32"), "hidden_size is '32'"),
    ("heads as big as the sky", config(head_dim=10**12), "head_dim is 1000000000000"),
    ("another family", config(base_model_type="bert"), "is a 'bert' model"),
    ("a family of lists", config(base_model_type=["llama"]), "supported families"),
    ("another model", config(architectures=["LlamaForTokenClassification"]), "not a causal language model"),
    ("architectures in words", config(architectures="LlamaForCausalLM"), "h2"),
    ("quantised", config(quantization_config={"bits": 4}), "is quantised"),
    ("layers that contradict the tensors", config(layer_types=["full_attention"] * 4), "no tensor model.layers.1.self_attn"),
    ("too few kinds of layers", config(layer_types=["full_attention"]), "layer_types names 1 layers"),
    ("no mixer", config(mixer="gone"), "has no `mixer`"),
    ("a mixer of another kind", config(mixer={"kind": "rwkv"}), "of unknown kind 'rwkv'"),
    ("a mixer in words", config(mixer="mamba2"), "not a valid llama config"),
    ("a mixer without sizes", config(mixer={"kind": "mamba2"}), "lacks d_inner"),
    ("a mixer of no size", config(mixer={"kind": "mamba2", "d_inner": 32, "d_state": 8, "d_conv": []}), "has d_conv []; these"),
    ("a mixer of another size", config(mixer={"kind": "mamba2", "d_inner": 64, "d_state": 8, "d_conv": 4}), "the config says"),
    ("RoPE in words", config(rope_parameters="default"), "not a valid llama config"),
]  # fmt: skip
COMMANDS = {
    "replace": ("replace", "h2", "--indices", "0", "--calibrate", "traces.jsonl", "--calibration-tokens", "200", "-o", "out"),
    "export": ("export", "h2", "--no-verify", "-o", "out"),
    "distill": ("distill", "h2", "--data", "traces.jsonl", "--steps", "1", "--batch-size", "1", "--seq-len", "16", "-o", "out"),
    "score-loo": ("score-loo", "h2", "--metric", "kl", "--data", "traces.jsonl", "--seq-len", "9", "--windows", "1", "-o", "o"),
    "eval": ("eval", "h2", "--fidelity", "traces.jsonl", "--seq-len", "16", "--windows", "1", "-o", "out"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=[name for name, _, _ in DAMAGES])
def test_damage_is_said_before_anything_is_written(place: Path, cli: Runner, damage: tuple[str, Damage, str]) -> None:
    name, apply, says = damage
    apply(place / "h2")
    before = sorted(path.name for path in place.iterdir())
    wanted = ["replace", "export"] if name == "tokenizer is a link" else list(COMMANDS)
    for command in wanted:
        began = time.monotonic()
        assert says in cli.fails(*COMMANDS[command]), command
        assert time.monotonic() - began < 20
        assert sorted(path.name for path in place.iterdir()) == before
    cli("verify", "h2", code=1)


def manifest(**changes: Any) -> Damage:
    def apply(path: Path) -> None:
        found = json.loads((path / MANIFEST).read_text()) | changes
        (path / MANIFEST).write_text(json.dumps(found))

    return apply


@pytest.mark.parametrize(
    ("apply", "says"),
    [
        (text(MANIFEST, "{"), "hybridize.json is not readable JSON"),
        (text(MANIFEST, "[]"), "must hold a JSON object"),
        (manifest(format=7), "is not a manifest of format 1"),
        (manifest(root="teacher"), "is not a manifest of format 1"),
        (manifest(root={}), "is not a manifest of format 1"),
        (manifest(layers=["x"]), "is not a manifest of format 1"),
        (manifest(layers=[]), "describes 0 layers, but config.json has 4"),
        (manifest(data=[1]), "is not a manifest of format 1"),
        (manifest(root={"path": 5, "hash": "x"}), "is not a manifest of format 1"),
    ],
)
def test_a_damaged_manifest(place: Path, cli: Runner, apply: Damage, says: str) -> None:
    apply(place / "h2")
    for command in ("replace", "distill", "export"):
        assert says in cli.fails(*COMMANDS[command])
    assert not (place / "out").exists()


def scores(**changes: Any) -> Damage:
    def apply(path: Path) -> None:
        found = json.loads((path / "scores/loo.json").read_text()) | changes
        (path / "scores/loo.json").write_text(json.dumps(found))

    return apply


@pytest.mark.parametrize(
    ("apply", "says"),
    [
        (text("scores/loo.json", "{"), "loo.json is not readable JSON"),
        (text("scores/loo.json", b"\xff\xfe"), "loo.json is not readable JSON"),
        (scores(layers=[{"layer": 0, "score": float("nan")}]), "NaN is not a JSON number"),
        (scores(layers=[{"layer": 0, "score": "nan"}]), "the score of layer 0 is nan"),
        (scores(layers=[{"layer": 0, "score": 1.0}]), "loo.json: the scores do not cover exactly the attention layers"),
        (scores(layers=[{"layer": 0, "score": 1}, {"layer": 0, "score": 2}]), "scores a layer twice"),
        (scores(layers=[{"layer": 0, "score": 1}, {"layer": 3, "score": 2, "stderr": "x"}]), "is not a score file"),
        (scores(layers=[{"layer": "x", "score": 1}]), "is not a score file"),
        (scores(layers={"a": 1}), "is not a score file"),
        (scores(checkpoint=None), "does not name its kind of score"),
        (scores(checkpoint="another"), "was measured on another checkpoint"),
        (scores(format="1"), "is not a score file of format 1"),
    ],
)
def test_damaged_scores(place: Path, cli: Runner, apply: Damage, says: str) -> None:
    apply(place / "h2")
    assert says in cli.fails("replace", "h2", "--layers", 3, "--no-calibrate", "-o", "out")
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [{"value": None}, {"value": 10**400}, {"metric": 1}, {"higher_is_better": "yes"}, {"documents": [1]},
     {"documents": [{"doc": 0, "hash": "0", "score": "x"}]}, {"documents": [{"doc": [], "hash": "0", "score": 1.0}]}],
)  # fmt: skip
def test_damaged_results(place: Path, cli: Runner, changes: dict[str, Any]) -> None:
    """Told before a model is loaded, not when there is something to compare."""
    found = json.loads((place / "h2/eval/results.json").read_text())
    found["tasks"]["t"] |= changes
    (place / "bad.json").write_text(json.dumps(found))
    argv = ("eval", "teacher", "--tasks", "wordproblems_choice", "--include-path", TASKS, "--baseline", "bad.json")
    assert "bad.json: task t lacks its metric, value, direction" in cli.fails(*argv, "-o", "out")
    assert not (place / "out").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe\x00", b'{"model": {"type": "BPE"}}', b"[" * 10_000])
def test_a_damaged_tokenizer(place: Path, cli: Runner, content: bytes) -> None:
    (place / "h2/tokenizer.json").write_bytes(content)
    assert "no usable tokenizer" in cli.fails("generate", "h2", "hello", "--max-new-tokens", 2)
    assert "no usable tokenizer" in cli.fails(*COMMANDS["distill"])


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"\xff", b'{"temperature": "hot", "do_sample": true}', b'{"eos_token_id": {}}']
)
def test_damaged_generation_settings(place: Path, cli: Runner, content: bytes) -> None:
    (place / "h2/generation_config.json").write_bytes(content)
    assert "generation_config.json" in cli.fails("generate", "h2", "hello", "--max-new-tokens", 2)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_readers_answer_whatever_they_are_given(
    home: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """InputError or an answer; neither another exception nor more than a little time and memory."""
    path = tmp_path_factory.mktemp("x") / "h2"
    shutil.copytree(home / "h2", path)
    name = data.draw(
        st.sampled_from(["config.json", MANIFEST, INDEX, SHARD, "scores/loo.json", "eval/results.json", "tokenizer.json"])
    )
    before = (path / name).read_bytes()
    structured = name.endswith(".json") and data.draw(st.booleans())
    (path / name).write_bytes(data.draw(changed_json(before) if structured else changed_bytes(before)))
    began, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_all(path)
    assert time.monotonic() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 << 10  # KiB
    shutil.rmtree(path.parent)


def test_what_the_fuzz_run_kept_is_answered(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "h2", tmp_path / "h2")
    with zipfile.ZipFile(KEPT) as kept:
        inputs = [kept.read(name) for name in kept.namelist()]
    assert len(inputs) > 50
    for data in inputs:
        with replaced(tmp_path / "h2", data):
            read_all(tmp_path / "h2")


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_verify_sees_any_single_byte(home: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    from hybridize.errors import InputError

    path = tmp_path_factory.mktemp("x") / "h2"
    shutil.copytree(home / "h2", path)
    assert not verify(path).damage
    file = data.draw(st.sampled_from(sorted(file for file in path.iterdir() if file.is_file())))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, min(len(content), 3000) - 1) | st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        assert verify(path).damage
    except InputError:
        assert file.name == MANIFEST  # no longer one at all
    shutil.rmtree(path.parent)


def test_verify_names_what_differs(place: Path, cli: Runner) -> None:
    """A tensor, a file that is gone, one that came, and one that the parent no longer has."""
    assert "all as written" in cli("verify", "h2", "--deep")
    content = load_file(place / "teacher/model.safetensors")
    content["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
    save_file(content, place / "teacher/model.safetensors", {"format": "pt"})
    assert "all as written" in cli("verify", "h2")
    assert "model.layers.3.mlp.up_proj.weight differs from its parent" in cli("verify", "h2", "--deep", code=1)
    shutil.rmtree(place / "teacher")
    assert "is not on this disk" in cli.fails("verify", "h2", "--deep")
    tensors(**{UP: torch.zeros(48, 32)})(place / "h2")
    (place / "h2/tokenizer_config.json").unlink()
    (place / "h2/modeling_evil.py").write_text("1")
    found = json.loads(cli("verify", "h2", "--json", code=1))
    assert not found["intact"]
    said = "\n".join(found["damage"])
    for words in (
        f"{SHARD}: tensor model.layers.0.mlp.up_proj.weight has changed since it was written",
        f"{INDEX} has changed since it was written",
        "tokenizer_config.json is missing", "modeling_evil.py is not in the manifest",
    ):  # fmt: skip
        assert words in said
    assert "up_proj" not in said.replace("model.layers.0.mlp.up_proj.weight", "")


def test_only_what_hybridize_wrote_can_be_verified(place: Path, cli: Runner) -> None:
    assert "has no hybridize.json" in cli.fails("verify", "teacher")
    found = json.loads((place / "h2" / MANIFEST).read_text())
    (place / "h2" / MANIFEST).write_text(
        json.dumps({key: found[key] for key in found if key not in ("weights", "files", "seal")})
    )
    assert "has no hashes" in cli.fails("verify", "h2")
    assert "exists" in cli.fails(*COMMANDS["export"][:-1], "teacher")
