"""Export to GraniteMoeHybridForCausalLM: the stock class computes the same, and what it cannot
compute is refused by name."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hybridize.export.formats import FORMATS
from hybridize.export.formats.granite import OLDEST
from hybridize.modeling import HybridForCausalLM
from tests.conftest import Runner, hybrid, make_teacher, make_tokenizer, worst
from tests.test_surgery import convert

MODERN = tuple(int(part) for part in metadata.version("transformers").split(".")[:2]) >= OLDEST
stock = pytest.mark.skipif(not MODERN, reason="transformers before 5.23 computes another function for these weights")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SHAPES = {  # what must be embedded: changes to the tiny teacher, and the stock class's expand, heads and head size
    "as it is": ({}, (1, 4, 8)),
    "padded to one and a half": ({"hidden_size": 48}, (1, 6, 8)),
    "wide heads": ({"head_dim": 16}, (2, 4, 16)),
    "wide heads, padded": ({"hidden_size": 48, "head_dim": 16}, (2, 6, 16)),
    "llama3 rope, tied": ({"rope_parameters": LLAMA3, "tie_word_embeddings": True}, (1, 4, 8)),
}
IDS = torch.randint(4, 260, (2, 40), generator=torch.Generator().manual_seed(0))


def disturbed(path: Path) -> Path:
    """A hybrid with every mixer parameter away from its starting value, as after training."""
    (file,) = path.glob("*.safetensors")
    tensors, g = load_file(file), torch.Generator().manual_seed(5)
    for name in sorted(tensors):
        if ".mixer." in name:
            tensors[name] = tensors[name] + 0.1 * torch.randn(tensors[name].shape, generator=g)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def make_hybrid(folder: Path, layers: list[int] | None = None, kind: str = "mamba2", **changes: object) -> Path:
    make_teacher(folder / "teacher", **changes)
    convert(folder / "teacher", [1, 2] if layers is None else layers, folder / "h", kind=kind)
    return disturbed(folder / "h")


@stock
@pytest.mark.parametrize("shape", SHAPES)
def test_the_stock_class_computes_the_same(tmp_path: Path, cli: Runner, shape: str) -> None:
    changes, (expand, heads, size) = SHAPES[shape]
    source = make_hybrid(tmp_path, **changes)
    found = json.loads(cli("export", source, "--format", "granite", "-o", tmp_path / "out", "--json"))
    ours = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(theirs).__name__ == "GraniteMoeHybridForCausalLM"
    assert worst(theirs(IDS).logits, ours(IDS).logits) <= 1e-4
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["mamba_expand"], config["mamba_n_heads"], config["mamba_d_head"]) == (expand, heads, size)
    assert config["mamba_n_groups"] == heads
    assert config["layer_types"] == ["attention", "mamba", "mamba", "attention"]
    batch = make_tokenizer()(["1 and 1?", "a longer prompt", "x"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    made = [m.generate(**batch, max_new_tokens=12, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*made)
    verdict = found["verified"]
    assert verdict["difference"] <= 1e-4 * verdict["largest_logit"]
    assert verdict["equal"] == verdict["tokens"] > 60
    card = (tmp_path / "out/README.md").read_text()
    assert f"largest difference of a logit {verdict['difference']:.1e}" in card
    assert "**Use transformers 5.23 or newer**" in card
    assert not list((tmp_path / "out").glob("*.py"))
    usable = heads * size == expand * changes.get("hidden_size", 32) and "wide" not in shape and "padded" not in shape
    assert ("vllm serve" in card) is usable
    assert ("Not for vLLM" in card) is not usable


@stock
@pytest.mark.parametrize("layers", [[0], [3], [0, 1, 2]])
def test_layouts_at_the_ends(tmp_path: Path, cli: Runner, layers: list[int]) -> None:
    source = make_hybrid(tmp_path, layers)
    cli("export", source, "--format", "granite", "-o", tmp_path / "out")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (source, tmp_path / "out"))
    assert worst(theirs(IDS).logits, ours(IDS).logits) <= 1e-4


@stock
def test_biases_of_queries_keys_and_values(tmp_path: Path, cli: Runner) -> None:
    """Qwen2's kind of attention: three biases, the class's fourth is zero."""
    model = hybrid("ama", "mamba2", vocab_size=260, attention_bias=True)
    with torch.no_grad():
        for layer in (0, 2):
            for projection in "qkv":
                getattr(model.model.layers[layer].self_attn, f"{projection}_proj").bias.normal_()
            model.model.layers[layer].self_attn.o_proj.bias.zero_()
    model.save_pretrained(tmp_path / "h")
    make_tokenizer().save_pretrained(tmp_path / "h")
    cli("export", tmp_path / "h", "--format", "granite", "-o", tmp_path / "out", "--no-verify")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert worst(theirs(IDS).logits, model(IDS).logits) <= 1e-4
    assert json.loads((tmp_path / "out/config.json").read_text())["attention_bias"] is True


def test_storage_types_and_shards(tmp_path: Path, cli: Runner) -> None:
    source = make_hybrid(tmp_path)
    (file,) = source.glob("*.safetensors")
    keep = ("A_log", "D", "dt_bias")
    save_file(
        {n: t if n.endswith(keep) else t.to(torch.bfloat16) for n, t in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    cli("export", source, "--format", "granite", "-o", tmp_path / "out", "--no-verify")
    (out,) = (tmp_path / "out").glob("*.safetensors")
    for name, tensor in load_file(out).items():
        assert tensor.dtype == (torch.float32 if name.endswith(keep) else torch.bfloat16), name


@pytest.mark.parametrize("form", ["granite", "gguf"])
def test_what_cannot_be_exact_is_refused_by_name(tmp_path: Path, cli: Runner, form: str) -> None:
    def refused(source: Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        text = cli.fails("export", source, "--format", form, "-o", tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == before
        return text

    source = make_hybrid(tmp_path)
    config = json.loads((source / "config.json").read_text())
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)

    convert(tmp_path / "teacher", [1], tmp_path / "one", kind="mamba")
    text = refused(tmp_path / "one")
    assert "mixers of kind 'mamba', which no stock class has" in text
    assert "use --format hf" in text
    convert(tmp_path / "teacher", [], tmp_path / "none")
    assert "has no Mamba layer" in refused(tmp_path / "none")
    assert "is not a hybrid" in refused(tmp_path / "teacher")
    convert(tmp_path / "teacher", [0, 1, 2, 3], tmp_path / "all")
    assert "has no attention layer" in refused(tmp_path / "all")

    norm = "model.layers.0.self_attn.q_norm.weight"
    (source / "model.safetensors.index.json").unlink()
    file.rename(source / "model.safetensors")
    save_file(tensors | {norm: torch.ones(8)}, source / "model.safetensors", metadata={"format": "pt"})
    assert f"{norm} has no place in a llama model" in refused(source)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    def with_config(**changes: object) -> Path:
        (source / "config.json").write_text(json.dumps(config | changes))
        return source

    windows = ["sliding_attention", "linear_attention", "linear_attention", "full_attention"]
    assert "layer 0 of" in refused(with_config(sliding_window=8, layer_types=windows))
    assert "activation 'gelu'" in refused(with_config(hidden_act="gelu"))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "RoPE of type 'dynamic'" in refused(with_config(rope_parameters=rope))
    with_config()
    (source / "tokenizer.json").rename(source / "aside.json")
    if form == "gguf":
        assert "has no tokenizer.json" in refused(source)


def test_settings_are_checked(tmp_path: Path, cli: Runner) -> None:
    source = make_hybrid(tmp_path)
    assert "--format onnx is unknown; use hf, granite, gguf" in cli.fails("export", source, "--format", "onnx")
    assert "--outtype does not apply to --format granite" in cli.fails(
        "export", source, "--format", "granite", "--outtype", "f32"
    )
    assert "--outtype q4 is unknown" in cli.fails("export", source, "--format", "gguf", "--outtype", "q4")


@stock
def test_a_result_that_differs_never_appears(tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    source, real = make_hybrid(tmp_path), FORMATS["granite"].write

    def spoiled(*arguments: object) -> Path:
        made = real(*arguments)
        (file,) = arguments[2].glob("*.safetensors")
        tensors = load_file(file)
        tensors["model.layers.1.mamba.D"] += 0.01
        save_file(tensors, file, metadata={"format": "pt"})
        return made

    monkeypatch.setattr(FORMATS["granite"], "write", spoiled)
    before = sorted(tmp_path.rglob("*"))
    assert "not exported" in cli.fails("export", source, "--format", "granite", "-o", tmp_path / "out", code=1)
    assert sorted(tmp_path.rglob("*")) == before
    cli("export", source, "--format", "granite", "-o", tmp_path / "out", "--no-verify")
    assert "not requested" in (tmp_path / "out/README.md").read_text()


def test_an_older_transformers_is_not_asked(tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "5.17.0" if name == "transformers" else real(name))
    text = cli("export", make_hybrid(tmp_path), "--format", "granite", "-o", tmp_path / "out")
    assert "not verified: transformers 5.17.0 computes another function; 5.23 or newer is required" in text
    assert "transformers 5.17.0 computes another function" in (tmp_path / "out/README.md").read_text()


def test_heads_of_zeros_change_nothing(tmp_path: Path) -> None:
    """The law behind the padding, on our own class: a mixer with more heads, the new ones zero, is
    the same function."""
    from hybridize.export.formats.granite import Embedding

    small = hybrid("m", "mamba2")
    shape = {"kind": "mamba2", "d_inner": 64, "d_state": 8, "d_conv": 4}
    embedding = Embedding(small.config, head=8, inner=32, expand=2)
    wide = HybridForCausalLM(type(small.config).from_dict(small.config.to_dict() | {"mixer": shape})).eval()
    state = {
        name: embedding.pad(name.split(".mixer.")[1], value) if ".mixer." in name else value
        for name, value in small.state_dict().items()
    }
    wide.load_state_dict(state)
    ids = IDS.clamp(max=63)
    assert worst(wide(ids).logits, small(ids).logits) <= 1e-6
