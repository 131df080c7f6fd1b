"""The `gguf` format: a Mamba-2 hybrid for llama.cpp, as its architecture `granitehybrid`, written
with the `gguf` package.

Differences from the `granite` format: mixers are padded to twice the hidden size, which llama.cpp
requires; q and k are permuted for interleaved RoPE; `rope.scaling.finetuned` enables RoPE; a layer
with 0 KV heads is recurrent; ssm_a is -exp(A_log).
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from hybridize.checkpoint.atomic import write_json
from hybridize.checkpoint.manifest import MANIFEST, Manifest
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.errors import InputError, WorkError, setting
from hybridize.export.formats.base import Format
from hybridize.export.formats.granite import MIXER, Embedding, embed
from hybridize.export.verify import BOUND, PROMPTS, Reference, Verdict, ask_process, judge, parts_of, version_of
from hybridize.modeling import MIXER_LAYER
from hybridize.runtime.loading import load_tokenizer

# Largest allowed logit difference, relative to the largest logit. The bounds of f16 and q8_0 only
# catch a wrong model; they are too loose to judge rounding.
BOUNDS = {"f32": BOUND, "f16": 2e-2, "q8_0": 0.5}
EXPAND = 2
QUANT_BLOCK = 32
STATIC_ROPE = ("default", "linear", "llama3")  # fixed frequencies and no attention scaling
# llama.cpp's names of pre-tokenizers, by the pattern in tokenizer.json
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d", "mixer.norm": "ssm_norm", "mixer.out_proj": "ssm_out", "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d", "mixer.dt_bias": "ssm_dt.bias",
}  # fmt: skip


def read_vocabulary(source: CheckpointReader, name: str) -> dict[str, Any]:
    """Reads tokenizer.json and adds llama.cpp's name of its pre-tokenizer as `pre`. InputError if
    it is not a byte-level BPE with a pre-tokenizer that llama.cpp knows."""
    path = source.path / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{name} has no tokenizer.json, which the gguf format needs; use {setting('form')} granite")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        pre = _splitter(found)
        ids = [*found["model"]["vocab"].values(), *(added["id"] for added in found.get("added_tokens", []))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a tokenizer: {error}") from error
    if pre is None:
        raise InputError(
            f"{name}: tokenizer.json is not a byte-level BPE with the pre-tokenizer of GPT-2, SmolLM, Llama 3 or Qwen 2, "
            f"which {setting('form')} gguf requires; use {setting('form')} granite"
        )
    if max(ids) >= source.config["vocab_size"]:
        raise InputError(
            f"{name}: tokenizer.json has token id {max(ids)}, but the vocabulary size is {source.config['vocab_size']}"
        )
    return found | {"pre": pre}


def _splitter(found: dict[str, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer in a tokenizer.json, or None if normaliser, splitting
    or merging differ in any detail."""
    splitter = found["pre_tokenizer"] or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    kinds, last = [step.get("type") for step in steps], steps[-1]
    normalizer = (found.get("normalizer") or {}).get("type")
    if found["model"]["type"] != "BPE" or last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    pre = None
    if last.get("use_regex", True):
        if kinds == ["ByteLevel"]:
            pre = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            pre = "smollm"
    elif kinds == ["Split", "ByteLevel"] and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
        pre = PATTERNS.get(str(steps[0].get("pattern", {}).get("Regex")))
    if normalizer is not None and not (normalizer == "NFC" and pre == "qwen2"):  # llama.cpp does no NFC itself
        return None
    return pre


def write_gguf(source: CheckpointReader, embedding: Embedding, file: Path, name: str, outtype: str) -> None:
    """Streams the model into `file`, tensor by tensor. Matrices are stored as `outtype`, everything
    else as float32. WorkError if a value does not fit the type."""
    import gguf

    writer = gguf.GGUFWriter(file, "granitehybrid")
    _add_settings(writer, embedding, name, outtype)
    _add_tokenizer(writer, source, name)
    planned = list(_tensors(source, embedding))
    kinds = {}
    for target, shape, _ in planned:
        kinds[target] = kind = _kind(target, shape, outtype)
        quantized = kind is gguf.GGMLQuantizationType.Q8_0
        size = gguf.quant_shape_to_byte_shape(shape, kind) if quantized else shape
        count = int(torch.tensor(size).prod()) * (1 if quantized else {"F32": 4, "F16": 2}[kind.name])
        writer.add_tensor_info(target, size, _numpy_type(kind), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for target, _, make in planned:
        value = make().float()
        if not bool(torch.isfinite(value.half() if kinds[target].name == "F16" else value).all()):
            raise WorkError(f"{target} has values that {kinds[target].name} cannot hold; use {setting('outtype')} f32")
        writer.write_tensor_data(gguf.quants.quantize(value.contiguous().numpy(), kinds[target]))
    writer.close()


def _kind(target: str, shape: tuple[int, ...], outtype: str) -> Any:
    """GGML type of a tensor. A row that is not a multiple of QUANT_BLOCK cannot be q8_0: it is
    f16."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    matrix = len(shape) == 2 and target.endswith(".weight") and "ssm_conv1d" not in target and "ssm_norm" not in target
    if outtype == "f32" or not matrix:
        return kinds.F32
    return kinds.Q8_0 if outtype == "q8_0" and shape[-1] % QUANT_BLOCK == 0 else kinds.F16


def _numpy_type(kind: Any) -> Any:
    import numpy

    return numpy.dtype({"F32": "float32", "F16": "float16"}.get(kind.name, "uint8"))


def _tensors(source: CheckpointReader, embedding: Embedding) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """Yields (name, shape, function that computes the value) for every tensor of the file."""
    config = embedding.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    factors = rope_factors(embedding)
    if bool((factors != 1).any()):
        yield "rope_freqs.weight", tuple(factors.shape), lambda: factors
    for name in source.names:
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if name in NAMES:
            yield NAMES[name], source.shape(name), lambda name=name: source.tensor(name)  # type: ignore[misc]
            continue
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        assert found is not None, name
        layer, rest = found.groups()
        if rest in MIXER:
            parameter = rest.removeprefix("mixer.")
            yield _mixer_tensor(source, embedding, name, layer, parameter)
            continue
        stem, kind = rest.rsplit(".", 1)
        count = heads.get(stem.split(".")[-1])
        yield (
            f"blk.{layer}.{NAMES[stem]}.{kind}", source.shape(name),
            lambda name=name, count=count: interleaved(source.tensor(name), count) if count else source.tensor(name),  # type: ignore[misc]
        )  # fmt: skip


def _mixer_tensor(
    source: CheckpointReader, embedding: Embedding, name: str, layer: str, parameter: str
) -> tuple[str, tuple[int, ...], Callable[[], Tensor]]:
    """Name, shape and value function of a mixer's parameter, padded and in llama.cpp's layout."""
    stem, _, kind = parameter.partition(".")
    target = f"blk.{layer}.{NAMES[f'mixer.{stem}']}" + (f".{kind}" if kind else "")
    shape = tuple(embedding.pad(parameter, torch.empty(source.shape(name), device="meta")).shape)
    shapes = {"conv1d.weight": (shape[0], shape[-1]), "norm.weight": (embedding.heads, embedding.head)}
    shapes |= {"A_log": (embedding.heads, 1), "D": (embedding.heads, 1)}
    shape = shapes.get(parameter, shape)

    def make() -> Tensor:
        value = source.tensor(name).float()
        value = embedding.pad(parameter, -torch.exp(value) if parameter == "A_log" else value)
        return value.reshape(shape)

    return target, shape, make


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Permutes the rows of q or k, per head, from half-split RoPE (transformers) to interleaved
    RoPE (llama.cpp)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rope_factors(embedding: Embedding) -> Tensor:
    """[head_dim / 2]: divisor of each RoPE frequency, relative to unscaled RoPE with the same
    base."""
    config = embedding.config
    with torch.device("meta"):
        model = MODEL_MAPPING[CONFIG_MAPPING[config.base_model_type]](config)
    rotary = type(model.rotary_emb)(config)
    size = embedding.attention_head
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors = plain / rotary.inv_freq.double()
    return torch.where((factors - 1).abs() < 1e-6, torch.ones_like(factors), factors).float()


def _add_settings(writer: Any, embedding: Embedding, name: str, outtype: str) -> None:
    import gguf

    config, mixer, types = embedding.config, embedding.config.mixer, gguf.LlamaFileType
    assert mixer is not None
    writer.add_name(Path(name).name)
    writer.add_file_type({"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "q8_0": types.MOSTLY_Q8_0}[outtype])
    if outtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([0 if kind == MIXER_LAYER else config.num_key_value_heads for kind in config.layer_types])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(embedding.attention_head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_scaling_finetuned(True)
    factors = embedding.multipliers
    writer.add_attention_scale(factors["attention_multiplier"])
    writer.add_embedding_scale(factors["embedding_multiplier"])
    writer.add_residual_scale(factors["residual_multiplier"])
    writer.add_logit_scale(factors["logits_scaling"])
    writer.add_ssm_conv_kernel(mixer["d_conv"])
    writer.add_ssm_inner_size(embedding.width)
    writer.add_ssm_state_size(embedding.head)
    writer.add_ssm_time_step_rank(embedding.heads)
    writer.add_ssm_group_count(embedding.heads)


def _add_tokenizer(writer: Any, source: CheckpointReader, name: str) -> None:
    """Writes the tokens in order of their ids, the merges, the special tokens and the chat
    template."""
    import gguf

    found, tokenizer = read_vocabulary(source, name), load_tokenizer(source.path)
    size, kinds = source.config["vocab_size"], gguf.TokenType
    tokens, types = [f"[PAD{i}]" for i in range(size)], [kinds.UNUSED] * size
    for token, index in found["model"]["vocab"].items():
        tokens[index], types[index] = token, kinds.NORMAL
    for added in found.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found["model"]["merges"]]
    writer.add_token_merges(merges or [""])  # llama.cpp needs the key, gguf rejects an empty list; an empty merge has no effect
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    for kind, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    sample = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and sample[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and sample[-1] == tokenizer.eos_token_id)
    if getattr(tokenizer, "chat_template", None):
        named = tokenizer.chat_template
        writer.add_chat_template(
            named if isinstance(named, str) else [{"name": name, "template": text} for name, text in named.items()]
        )


USE = """    llama-cli -m FILE -cnv

```python
from llama_cpp import Llama
model = Llama("FILE", n_ctx=4096)
model.create_chat_completion([{"role": "user", "content": "What is 17 times 23?"}], temperature=0)
```

Architecture in llama.cpp: `granitehybrid`."""


class GgufFormat(Format):
    """Export for llama.cpp."""

    name = "gguf"
    outtypes = ("f16", "f32", "q8_0")

    def check(self, source: CheckpointReader, name: str) -> Embedding:
        """See Format.check. InputError also if the package gguf is missing."""
        embedding = embed(source, name, self.name, EXPAND)
        if importlib.util.find_spec("gguf") is None:
            raise InputError(f"{setting('form')} gguf needs the package gguf: pip install 'hybridize[gguf]'")
        rope = embedding.config.rope_parameters.get("rope_type", "default")
        if rope not in STATIC_ROPE:
            raise InputError(
                f"{name} has RoPE of type {rope!r}, which the gguf format does not support; use {setting('form')} granite"
            )
        read_vocabulary(source, name)
        return embedding

    def write(
        self, source: CheckpointReader, plan: Embedding, path: Path, name: str, lineage: Manifest, outtype: str | None
    ) -> Path:
        """See Format.write. Writes one GGUF file and the manifest."""
        assert outtype is not None
        made = path / f"{source.path.resolve().name}-{outtype.upper()}.gguf"
        write_gguf(source, plan, made, name, outtype)
        write_json(path / MANIFEST, lineage.to_json())
        return made

    def use(self, plan: Embedding, made: Path) -> str:
        """See Format.use."""
        return USE.replace("FILE", made.name)

    def missing(self) -> str | None:
        """See Format.missing."""
        return None if importlib.util.find_spec("llama_cpp") else "llama-cpp-python is not installed"

    def ask(self, made: Path, wanted: Reference, device: torch.device, outtype: str | None) -> Verdict:
        """See Format.ask. Runs llama-cpp-python and also compares the tokens of PROMPTS."""
        assert outtype is not None
        name = f"llama.cpp (llama-cpp-python {version_of('llama-cpp-python')})"
        request = {"model": str(made), "texts": PROMPTS, "prompts": wanted.prompts, "sequences": wanted.sequences}
        found, _ = ask_process("hybridize.export.ask_llama", request, name)
        for i, (text, prompt) in enumerate(zip(PROMPTS, wanted.prompts, strict=True)):
            ours = found[f"tokens.{i}"].tolist()
            if ours != prompt:
                raise WorkError(
                    f"llama.cpp tokenizes {text!r} differently ({ours[:8]} ...) than the tokenizer ({prompt[:8]} ...); "
                    "not exported"
                )
        logits, tokens = parts_of(found, len(wanted.prompts))
        return judge(name, wanted, logits, tokens, BOUNDS[outtype], exact=outtype == "f32")
