"""The GGUF file, read back and run: a float64 forward written here from llama.cpp's definition of
`granitehybrid`."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM

from hybridize.export.formats.gguf import PATTERNS, interleaved
from tests.conftest import Runner, make_tokenizer, worst
from tests.test_granite import IDS, SHAPES, make_hybrid


class File:
    """Settings and float64 tensors of a GGUF file, by name."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.settings = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {t.name: t.tensor_type.name for t in reader.tensors}
        self.tensors = {
            t.name: torch.from_numpy(
                np.array(gguf.quants.dequantize(t.data, t.tensor_type)).reshape(t.shape[::-1].tolist())
            ).double()
            for t in reader.tensors
        }

    def __getitem__(self, name: str):
        return self.settings[f"granitehybrid.{name}"] if f"granitehybrid.{name}" in self.settings else self.settings[name]


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def attention(file: File, x: torch.Tensor, t: dict, heads_kv: int) -> torch.Tensor:
    """RoPE over neighbouring pairs (ggml's NORM), frequencies divided by rope_freqs; scores times
    attention.scale."""
    size, heads, length = file["attention.key_length"], file["attention.head_count"], len(x)
    theta = file["rope.freq_base"] ** -(torch.arange(0, size, 2).double() / size)
    theta = theta / file.tensors.get("rope_freqs.weight", torch.ones(size // 2))
    angle = torch.arange(length).double()[:, None] * theta
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def turned(rows: torch.Tensor, count: int) -> torch.Tensor:
        pairs = rows.view(length, count, size // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    q, k = turned(x @ t["attn_q.weight"].t(), heads), turned(x @ t["attn_k.weight"].t(), heads_kv)
    v = (x @ t["attn_v.weight"].t()).view(length, heads_kv, size)
    k, v = (r.repeat_interleave(heads // heads_kv, 1) for r in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * file["attention.scale"]
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", scores, v).flatten(1) @ t["attn_output.weight"].t()


def mixer(file: File, x: torch.Tensor, t: dict) -> torch.Tensor:
    inner, states, heads = file["ssm.inner_size"], file["ssm.state_size"], file["ssm.time_step_rank"]
    groups, taps, length = file["ssm.group_count"], file["ssm.conv_kernel"], len(x)
    z, xBC, dt = (x @ t["ssm_in.weight"].t()).split([inner, inner + 2 * groups * states, heads], -1)
    window = torch.cat([torch.zeros(taps - 1, xBC.shape[1]), xBC])
    xBC = (
        torch.stack([(window[i : i + taps].t() * t["ssm_conv1d.weight"]).sum(1) for i in range(length)]) + t["ssm_conv1d.bias"]
    )
    xs, B, C = (xBC * torch.sigmoid(xBC)).split([inner, groups * states, groups * states], -1)
    width, ys = inner // heads, []
    state = torch.zeros(heads, width, states, dtype=torch.float64)
    for i in range(length):
        step = torch.log1p(torch.exp(dt[i] + t["ssm_dt.bias"]))
        x_i, B_i, C_i = xs[i].view(heads, width), B[i].view(groups, states), C[i].view(groups, states)
        state = torch.exp(step[:, None] * t["ssm_a"])[..., None] * state + (step[:, None] * x_i)[..., None] * B_i[:, None]
        ys.append(((state * C_i[:, None]).sum(-1) + t["ssm_d"] * x_i).flatten())
    gated = (torch.stack(ys) * z * torch.sigmoid(z)).view(length, groups, -1)
    normed = rms(gated, file["attention.layer_norm_rms_epsilon"]) * t["ssm_norm.weight"]
    return normed.flatten(1) @ t["ssm_out.weight"].t()


def forward(file: File, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one sequence."""
    eps, every = file["attention.layer_norm_rms_epsilon"], file.tensors
    x = every["token_embd.weight"][ids]
    for layer, heads_kv in enumerate(file["attention.head_count_kv"]):
        t = {name.removeprefix(f"blk.{layer}."): v for name, v in every.items() if name.startswith(f"blk.{layer}.")}
        normed = rms(x, eps) * t["attn_norm.weight"]
        x = x + (attention(file, normed, t, heads_kv) if heads_kv else mixer(file, normed, t))
        normed = rms(x, eps) * t["ffn_norm.weight"]
        gate = normed @ t["ffn_gate.weight"].t()
        x = x + (gate * torch.sigmoid(gate) * (normed @ t["ffn_up.weight"].t())) @ t["ffn_down.weight"].t()
    return (rms(x, eps) * every["output_norm.weight"]) @ every.get("output.weight", every["token_embd.weight"]).t()


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_the_file_is_the_model(tmp_path: Path, cli: Runner, shape: str) -> None:
    changes, (_, _, size) = SHAPES[shape]
    source = make_hybrid(tmp_path, **changes)
    cli("export", source, "--format", "gguf", "--outtype", "f32", "-o", tmp_path / "out")
    file, hidden = File(tmp_path / "out/h-F32.gguf"), changes.get("hidden_size", 32)
    assert (file["ssm.inner_size"], file["ssm.time_step_rank"]) == (2 * hidden, 2 * hidden // size)
    assert file["attention.head_count_kv"] == [2, 0, 0, 2]
    assert file["rope.scaling.finetuned"] is True
    assert ("rope_freqs.weight" in file.tensors) is ("llama3" in shape)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for ids in IDS:
        assert worst(forward(file, ids), model(ids[None]).logits[0]) <= 1e-5


@torch.no_grad()
def test_types(tmp_path: Path, cli: Runner) -> None:
    source = make_hybrid(tmp_path, head_dim=16)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    errors = []
    for outtype in ("f32", "f16", "q8_0"):
        cli("export", source, "--format", "gguf", "--outtype", outtype, "-o", tmp_path / outtype)
        file = File(tmp_path / outtype / f"h-{outtype.upper()}.gguf")
        matrix = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}[outtype]
        assert (
            file.types["blk.0.attn_q.weight"] == file.types["blk.1.ssm_in.weight"] == file.types["token_embd.weight"] == matrix
        )
        assert file.types["blk.0.ffn_down.weight"] == ("F16" if outtype == "q8_0" else matrix)  # rows of 48 are no whole blocks
        for name in ("blk.1.ssm_conv1d.weight", "blk.1.ssm_a", "blk.1.ssm_norm.weight", "output_norm.weight"):
            assert file.types[name] == "F32"
        errors.append(worst(forward(file, IDS[0]), model(IDS[:1]).logits[0]))
    assert errors[0] <= 1e-5 < errors[1] <= 5e-3 < errors[2] <= 0.3


def test_numbers_that_half_precision_cannot_hold(tmp_path: Path, cli: Runner) -> None:
    from safetensors.torch import load_file, save_file

    source = make_hybrid(tmp_path)
    (weights,) = source.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e5
    save_file(tensors, weights, metadata={"format": "pt"})
    text = cli.fails("export", source, "--format", "gguf", "-o", tmp_path / "out", code=1)
    assert "blk.0.ffn_up.weight has values that F16 cannot hold; use --outtype f32" in text
    assert not (tmp_path / "out").exists()


def test_tokens_merges_and_template(tmp_path: Path, cli: Runner) -> None:
    source = make_hybrid(tmp_path, vocab_size=264)
    cli("export", source, "--format", "gguf", "-o", tmp_path / "out", "--no-verify")
    file, tokenizer = File(tmp_path / "out/h-F16.gguf"), make_tokenizer()
    tokens = file["tokenizer.ggml.tokens"]
    assert tokens[:260] == [tokenizer.convert_ids_to_tokens(i) for i in range(260)]
    assert tokens[260:] == [f"[PAD{i}]" for i in range(260, 264)]
    types = file["tokenizer.ggml.token_type"]
    assert types == [3] * 4 + [1] * 256 + [5] * 4
    assert (file["tokenizer.ggml.model"], file["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (file["tokenizer.ggml.eos_token_id"], file["tokenizer.ggml.padding_token_id"]) == (1, 0)
    assert file["tokenizer.ggml.add_bos_token"] is False
    assert file["tokenizer.chat_template"] == tokenizer.chat_template
    card = (tmp_path / "out/README.md").read_text()
    assert "h-F16.gguf" in card
    assert "not requested" in card


LLAMA3, QWEN2 = PATTERNS
SPLITTERS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
    None: [pre_tokenizers.Split(Regex(r"\d+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
}


@pytest.mark.parametrize("pre", SPLITTERS)
def test_splitters(tmp_path: Path, cli: Runner, pre: str | None) -> None:
    source = make_hybrid(tmp_path)
    core = Tokenizer.from_file(str(source / "tokenizer.json"))
    core.pre_tokenizer = pre_tokenizers.Sequence(SPLITTERS[pre])
    core.save(str(source / "tokenizer.json"))
    command = ("export", source, "--format", "gguf", "-o", tmp_path / "out", "--no-verify")
    if pre is None:
        assert "is not a byte-level BPE with the pre-tokenizer of GPT-2, SmolLM, Llama 3 or Qwen 2" in cli.fails(*command)
        return
    cli(*command)
    assert File(tmp_path / "out/h-F16.gguf")["tokenizer.ggml.pre"] == pre


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
NEARLY = {  # what looks like a known tokenizer and is another
    "unigram": {"model": {"type": "Unigram", "vocab": {}}},
    "digits in groups": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTES]}
    },
    "no pattern": {"pre_tokenizer": BYTES | {"use_regex": False}},
    "a space in front": {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
    "lower case": {"normalizer": {"type": "Lowercase"}},
}


@pytest.mark.parametrize("what", NEARLY)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path, cli: Runner, what: str) -> None:
    source = make_hybrid(tmp_path)
    found = json.loads((source / "tokenizer.json").read_text()) | NEARLY[what]
    (source / "tokenizer.json").write_text(json.dumps(found))
    assert "use --format granite" in cli.fails("export", source, "--format", "gguf", "-o", tmp_path / "out")


def test_a_token_that_the_model_does_not_have(tmp_path: Path, cli: Runner) -> None:
    source = make_hybrid(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(source)
    assert "has token id 260, but the vocabulary size is 260" in cli.fails(
        "export", source, "--format", "gguf", "-o", tmp_path / "out"
    )


def test_interleaving_turns_halves_into_pairs() -> None:
    """transformers pairs channel i with i + half; llama.cpp 2i with 2i + 1."""
    rows = torch.arange(16.0).view(16, 1)
    assert interleaved(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
