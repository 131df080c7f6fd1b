"""The `granite` format: a Mamba-2 hybrid as GraniteMoeHybridForCausalLM, a class of stock
transformers and vLLM.

A Llama-shaped model is a special case of that class: no experts, all multipliers 1 (except for a
Granite teacher, which has its own), attention scale and RoPE explicit. Only the width of the mixers
may not fit, since the class requires an integer multiple of the hidden size. It is padded with
heads of zeros: the output of such a head is zero after its own norm group, so the function does not
change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridize.checkpoint.manifest import Manifest
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.checkpoint.writer import CheckpointWriter
from hybridize.errors import InputError, setting
from hybridize.export.ask import answers
from hybridize.export.formats.base import Format, check_hybrid, format_of
from hybridize.export.verify import BOUND, NEW_TOKENS, Reference, Verdict, judge, transformers_name
from hybridize.modeling import MIXER_LAYER, HybridConfig, hybrid_config
from hybridize.runtime.loading import load_model
from hybridize.surgery.families import FAMILIES

OLDEST = (5, 23)  # older versions of transformers compute another function if n_groups > 1
ENDS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
ATTENTION = tuple(f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias"))
MIXER = tuple(
    f"mixer.{name}"
    for name in ("A_log", "D", "conv1d.bias", "conv1d.weight", "dt_bias", "in_proj.weight", "norm.weight", "out_proj.weight")
)


@dataclass(frozen=True)
class Embedding:
    """How a hybrid maps to the stock class. head: channels per mixer head. inner: the hybrid's
    d_inner; `width` = expand * hidden is the class's d_inner, to which it is padded."""

    config: HybridConfig
    head: int
    inner: int
    expand: int

    @property
    def width(self) -> int:
        return self.expand * int(self.config.hidden_size)

    @property
    def heads(self) -> int:
        """Number of heads, and of groups, of a mixer after padding."""
        return self.width // self.head

    @property
    def attention_head(self) -> int:
        """Head size of the attention."""
        explicit = getattr(self.config, "head_dim", None)
        return int(explicit or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def explicit_head(self) -> bool:
        """Whether the attention's head size is not hidden / heads, so that the config must state
        it."""
        return bool(self.attention_head * self.config.num_attention_heads != self.config.hidden_size)

    @property
    def multipliers(self) -> dict[str, float]:
        """The class's four multipliers: a Granite teacher's own, neutral values for other
        teachers."""
        plain = {"attention": self.attention_head**-0.5, "embedding": 1.0, "residual": 1.0}
        found = {f"{key}_multiplier": float(getattr(self.config, f"{key}_multiplier", value)) for key, value in plain.items()}
        return found | {"logits_scaling": float(getattr(self.config, "logits_scaling", 1.0))}

    def pad(self, parameter: str, value: Tensor) -> Tensor:
        """A mixer's parameter, such as in_proj.weight, with heads of zeros appended to each of its
        blocks."""
        wide, each = (self.inner, self.width), (self.inner // self.head, self.heads)
        if parameter == "out_proj.weight":
            return F.pad(value, (0, self.width - self.inner))
        blocks = {"in_proj.weight": [wide] * 4 + [each], "conv1d.weight": [wide] * 3, "conv1d.bias": [wide] * 3}
        parts = blocks.get(parameter, [wide] if parameter == "norm.weight" else [each])
        rows = value.split([before for before, _ in parts])
        filled = [F.pad(r, (0, 0) * (r.ndim - 1) + (0, b - a)) for r, (a, b) in zip(rows, parts, strict=True)]
        return torch.cat(filled)


def _instead(source: CheckpointReader, name: str, form: str) -> str:
    """The end of a refusal of `form`: advises hf if hf can represent the checkpoint."""
    text = f"{setting('form')} {form} cannot represent it exactly"
    try:
        format_of("hf").check(source, name)
    except InputError:
        return text
    return f"{text}; use {setting('form')} hf"


def embed(source: CheckpointReader, name: str, form: str, expand: int | None = None) -> Embedding:
    """Maps a hybrid to the stock class. InputError, with the reason and a format that works, if the
    class cannot represent the model exactly. form: name of the requested format. expand: required
    ratio of mixer width to hidden size; by default the smallest that fits."""
    check_hybrid(source, name)
    instead = _instead(source, name, form)
    config = hybrid_config(source.config)
    if not config.mixer_layers:
        raise InputError(f"{name} has no Mamba layer; run replace first")
    if not FAMILIES[config.base_model_type].stock_block:
        raise InputError(
            f"{name} comes from a {config.base_model_type!r} model, whose layers no stock hybrid class has; {instead}"
        )
    kind = config.mixer["kind"]  # type: ignore[index]
    if kind != "mamba2":
        raise InputError(f"{name} has mixers of kind {kind!r}, which no stock class has; {instead}")
    for layer, what in enumerate(config.layer_types):
        if what not in (MIXER_LAYER, "full_attention"):
            raise InputError(f"layer {layer} of {name} is {what}: {instead}")
    if "full_attention" not in config.layer_types:
        raise InputError(f"{name} has no attention layer, whose cache stock runtimes need to count positions; {instead}")
    if config.hidden_act != "silu":
        raise InputError(f"{name} has MLPs with the activation {config.hidden_act!r}; {instead}")
    rope = config.rope_parameters.get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise InputError(f"{name} has RoPE of type {rope!r}, whose frequencies depend on the sequence length; {instead}")
    known = {*ENDS} | {
        f"model.layers.{i}.{part}"
        for i, what in enumerate(config.layer_types)
        for part in (*NORMS, *MLP, *(MIXER if what == MIXER_LAYER else ATTENTION))
    }
    for tensor in source.names:
        if tensor not in known and not tensor.endswith("rotary_emb.inv_freq"):
            raise InputError(f"{tensor} of {name} has no slot in GraniteMoeHybridForCausalLM: {instead}")
    head, inner, hidden = config.mixer["d_state"], config.mixer["d_inner"], config.hidden_size  # type: ignore[index]
    least = -(-inner // hidden)
    fits = [e for e in range(least, least + head + 1) if e * hidden % head == 0]
    if expand is not None:
        fits = [expand] if expand * hidden >= inner and expand * hidden % head == 0 else []
    if not fits:
        wanted = "an integer" if expand is None else str(expand)
        instead = instead.replace("hf", "granite") if expand is not None else instead
        raise InputError(f"{name}: {inner} mixer channels in heads of {head} do not fit {wanted} x {hidden}; {instead}")
    return Embedding(config, head, inner, fits[0])


def granite_config(embedding: Embedding, raw: dict[str, Any], biased: bool) -> dict[str, Any]:
    """config.json of the stock class. raw: the hybrid's config.json. biased: whether the attention
    has biases."""
    config, mixer = embedding.config, embedding.config.mixer
    assert mixer is not None
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id",
        "eos_token_id", "tie_word_embeddings", "rope_parameters",
    )  # fmt: skip
    made: dict[str, Any] = {"architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid"}
    made |= {key: getattr(config, key) for key in same}
    made |= {key: raw[key] for key in ("dtype", "torch_dtype") if key in raw}
    if embedding.explicit_head:
        made["head_dim"] = embedding.attention_head
    return made | {
        "shared_intermediate_size": config.intermediate_size, "num_local_experts": 0, "num_experts_per_tok": 0,
        "attention_bias": biased, **embedding.multipliers, "position_embedding_type": "rope",
        "layer_types": ["mamba" if kind == MIXER_LAYER else "attention" for kind in config.layer_types],
        "mamba_n_heads": embedding.heads, "mamba_n_groups": embedding.heads, "mamba_d_head": embedding.head,
        "mamba_d_state": embedding.head, "mamba_d_conv": mixer["d_conv"], "mamba_expand": embedding.expand,
        "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_proj_bias": False,
    }  # fmt: skip


def granite_tensors(source: CheckpointReader, embedding: Embedding, biased: bool) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and value of every tensor of the stock class, one at a time."""
    for name in ENDS:
        if name in source and not (name == "lm_head.weight" and embedding.config.tie_word_embeddings):
            yield name, source.tensor(name)
    for layer, kind in enumerate(embedding.config.layer_types):
        base = f"model.layers.{layer}."
        for name in NORMS:
            yield base + name, source.tensor(base + name)
        gate, up, down = (source.tensor(base + name) for name in MLP)
        yield f"{base}shared_mlp.input_linear.weight", torch.cat([gate, up])
        yield f"{base}shared_mlp.output_linear.weight", down
        if kind == MIXER_LAYER:
            for name in MIXER:
                parameter = name.removeprefix("mixer.")
                yield f"{base}mamba.{parameter}", embedding.pad(parameter, source.tensor(base + name))
            continue
        for name in ATTENTION:
            if base + name in source:
                yield base + name, source.tensor(base + name)
            elif biased and name.endswith("bias"):  # the class has either all four biases or none
                weight = source.tensor(base + name.replace("bias", "weight"))
                yield base + name, weight.new_zeros(len(weight))


VLLM = "    vllm serve THIS_DIRECTORY\n"
USE = (
    """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")
```

"""
    + VLLM
    + """
Compared in float32; with dtype=bfloat16 transformers also casts A_log, D and dt_bias, which
hybridize keeps in float32.

A GraniteMoeHybridForCausalLM, which needs no code of its own. **Use transformers 5.23 or newer**:
older versions load the same files without a warning and compute another function (they normalise
over all channels; this model has one group per head)."""
)

NOT_VLLM = "Not for vLLM (0.32 and older), which ignores head_dim and assumes head size = hidden size / heads.\n"


class GraniteFormat(Format):
    """Export for stock transformers and vLLM."""

    name = "granite"

    def check(self, source: CheckpointReader, name: str) -> Embedding:
        """See Format.check."""
        return embed(source, name, self.name)

    def write(
        self, source: CheckpointReader, plan: Embedding, path: Path, name: str, lineage: Manifest, outtype: str | None
    ) -> Path:
        """See Format.write. Writes sharded weights, config, tokenizer and chat template."""
        biased = any(".self_attn." in tensor and tensor.endswith(".bias") for tensor in source.names)
        writer = CheckpointWriter(path)
        for tensor_name, tensor in granite_tensors(source, plan, biased):
            writer.add(tensor_name, tensor)
        writer.close(granite_config(plan, source.config, biased), lineage, carry_from=source.path)
        return path

    def use(self, plan: Embedding, made: Path) -> str:
        """See Format.use."""
        return USE.replace(VLLM, NOT_VLLM) if plan.explicit_head else USE

    def missing(self) -> str | None:
        """See Format.missing."""
        version = metadata.version("transformers")
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            return f"transformers {version} computes another function; {'.'.join(map(str, OLDEST))} or newer is required"
        return None

    def ask(self, made: Path, wanted: Reference, device: torch.device, outtype: str | None) -> Verdict:
        """See Format.ask. Runs the stock class that config.json names, in this process."""
        model: Any = load_model(made, device, torch.float32)
        logits, tokens = answers(model, wanted.prompts, wanted.sequences, NEW_TOKENS)
        return judge(transformers_name(type(model).__name__), wanted, logits, tokens, BOUND, exact=True)
