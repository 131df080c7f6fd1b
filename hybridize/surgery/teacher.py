"""The teacher contract: what surgery must know of a checkpoint, read from its config and tensors,
or a refusal by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybridize.checkpoint.experts import locate, stored_shape
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.errors import InputError, first_line
from hybridize.modeling import MIXER_LAYER, HybridConfig, HybridForCausalLM, HybridModel, hybrid_config
from hybridize.runtime.loading import without_storage
from hybridize.surgery.families import FAMILIES, FamilySpec

FLOATS = ("F32", "BF16", "F16", "F64")
MOST = {  # beyond what any model has, and far from what would fill memory to look at
    "num_hidden_layers": 1000, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "vocab_size": 1 << 26,
    "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14, "head_dim": 1 << 14, "max_position_embeddings": 1 << 30,
    "num_experts": 1 << 14, "num_local_experts": 1 << 14,
}  # fmt: skip
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Teacher:
    """Attention geometry of a checkpoint, hybrid or not. layer_types and mixer as in its (hybrid)
    config.

    tensors: what an attention layer's `self_attn` has, name to shape. scale: the attention scale
    times head_dim^1/2, 1 in most families. norm_bc: the normalisation of queries and keys as a
    mixer's config has it, None where there is none.
    """

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    mixer: dict[str, Any] | None
    tensors: dict[str, tuple[int, ...]]
    scale: float
    norm_bc: dict[str, Any] | None
    eps: float

    @property
    def carried(self) -> dict[str, Any]:
        """What a mixer's config says of biases and norms."""
        found: dict[str, Any] = {}
        if any(name.endswith(".bias") and not name.startswith("o_proj") for name in self.tensors):
            found["in_bias"] = True
        if "o_proj.bias" in self.tensors:
            found["out_bias"] = True
        if self.norm_bc is not None:
            found["norm_bc"] = self.norm_bc
        return found

    @property
    def spec(self) -> FamilySpec:
        return FAMILIES[self.family]

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def attention_layers(self) -> list[int]:
        return [i for i, kind in enumerate(self.layer_types) if kind != MIXER_LAYER]

    @property
    def mixer_layers(self) -> list[int]:
        return [i for i, kind in enumerate(self.layer_types) if kind == MIXER_LAYER]


def family_of(config: dict[str, Any], where: str) -> str:
    """The supported family of a config; InputError naming what it is instead."""
    kind = str(config.get("model_type"))
    family = str(config.get("base_model_type")) if kind == HybridConfig.model_type else kind
    if family not in FAMILIES:
        raise InputError(f"{where} is a {family!r} model; supported families: {', '.join(FAMILIES)}")
    classes = config.get("architectures") or ["ForCausalLM"]
    if not isinstance(classes, list):
        raise InputError(f"{where}: architectures is {classes!r}, not a list of classes")
    if not any(str(name).endswith("ForCausalLM") for name in classes):
        raise InputError(f"{where} is no causal language model but {classes[0]}")
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        if config.get(key) not in (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"):
            raise InputError(f"{where}: {key} is {config[key]!r}; a checkpoint does not choose what code runs")
    for key, most in MOST.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 0 < value <= most):
            raise InputError(f"{where}/config.json: {key} is {value!r}, not a whole number from 1 to {most}")
    if config.get("quantization_config"):
        raise InputError(f"{where} is quantised; surgery needs the plain weights (dequantise it first)")
    return family


def check_whole(reader: CheckpointReader) -> None:
    """InputError naming the file and the tensor unless the weights are those of a model of this
    config: none missing, which transformers would draw at random, none left over, each of the right
    shape and of a type to compute with."""
    where, family = reader.path / "config.json", family_of(reader.config, str(reader.path))
    there = {int(layer[1]) for name in reader.names if (layer := _LAYER.match(name))}
    count = reader.config.get("num_hidden_layers", len(there))
    if there != set(range(len(there))) or len(there) != count:
        raise InputError(f"{where} says {count} layers, the weights have {len(there)}")
    model = empty_model(reader.config, str(reader.path))
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, shape in wanted.items():
        found = stored_shape(reader, name)
        if found is None and not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            raise InputError(f"{reader.path} has no tensor {name}, which a {family} model of its config.json has")
        if found is not None and found != shape:
            raise InputError(f"{reader.path}: {name} has shape {found}, the config says {shape}")
    for name in reader.names:
        if _LAYER.match(name) and locate(name)[0] not in wanted and not name.endswith("rotary_emb.inv_freq"):
            raise InputError(f"{reader.file(name)}: {name} has no place in a {family} model of {where}")
        if locate(name)[0] in wanted and reader.dtype(name) not in FLOATS:
            raise InputError(f"{reader.file(name)}: {name} is of type {reader.dtype(name)}; weights are {', '.join(FLOATS)}")


def empty_model(raw: dict[str, Any], where: str) -> HybridForCausalLM:
    """The model of a config, without storage. InputError where the config is none of its family."""
    family = family_of(raw, where)
    try:
        return without_storage(lambda: HybridForCausalLM(hybrid_config(raw)))
    except Exception as error:  # config classes raise their own kinds for a bad value, layers whatever comes of it
        raise InputError(f"{where}/config.json is not a valid {family} config: {first_line(error)}") from error


def read_teacher(reader: CheckpointReader) -> Teacher:
    """Of a checkpoint that `check_whole` has passed; loads no weight.

    Raises InputError naming the family, or the tensor, that cannot be converted.
    """
    where, raw = str(reader.path), reader.config
    family = family_of(raw, where)
    try:
        config, attention = hybrid_config(raw), _attention(raw)
    except Exception as error:  # config classes raise their own kinds for a bad value
        raise InputError(f"{where}/config.json is not a valid {family} config: {first_line(error)}") from error
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        raise InputError(f"{where} has RoPE of type longrope, which is not supported: it changes cached keys beyond a length")
    if not attention.is_causal:
        raise InputError(f"{where}: bidirectional attention is not supported")
    head, tensors = attention.head_dim, {name: tuple(value.shape) for name, value in attention.state_dict().items()}
    norm, scale = None, attention.scaling * head**0.5
    if "q_norm.weight" in tensors:
        over = "head" if tensors["q_norm.weight"] == (head,) else "all"
        norm = {"over": over, "offset": FAMILIES[family].norm_offset}
    teacher = Teacher(
        family, config.hidden_size, config.num_attention_heads, config.num_key_value_heads, head, tuple(config.layer_types),
        config.mixer, tensors, scale if abs(scale - 1) > 1e-9 else 1.0, norm,  # a scale of 1 must leave every bit alone
        config.rms_norm_eps,
    )  # fmt: skip
    known = (*(f".self_attn.{short}" for short in tensors), "rotary_emb.inv_freq")
    for name in reader.names:
        if ".self_attn." in name and not name.endswith(known):
            raise InputError(f"{where}: {name} has no place in a mixer; models with it cannot be converted")
    return teacher


def _attention(raw: dict[str, Any]) -> Any:
    """One attention layer's self_attn as the family's own class builds it, without storage."""
    one = {**raw, "num_hidden_layers": 1, "layer_types": ["full_attention"], "mixer": None}
    with torch.device("meta"):
        return HybridModel(hybrid_config(one)).layers[0].self_attn


def check_vocabularies(student: CheckpointReader, teacher: CheckpointReader) -> None:
    """InputError unless both models speak of the same tokens."""
    ours, theirs = student.config.get("vocab_size"), teacher.config.get("vocab_size")
    if ours != theirs:
        raise InputError(f"{student.path} has a vocabulary of {ours}, its teacher {teacher.path} of {theirs}")
    ours, theirs = (getattr(hybrid_config(r.config), "final_logit_softcapping", None) for r in (student, teacher))
    if ours != theirs:
        raise InputError(f"{student.path} caps its logits at {ours}, its teacher {teacher.path} at {theirs}: they must agree")


def check_donor(donor: CheckpointReader, teacher: Teacher, layers: Sequence[int]) -> None:
    """InputError unless `donor` has the attention of `teacher` in all layers that are to start from
    it."""
    theirs = read_teacher(donor)
    shapes = [(t.hidden, t.heads, t.kv_heads, t.head_dim) for t in (teacher, theirs)]
    if shapes[0] != shapes[1]:
        raise InputError(f"{donor.path} has another attention shape than the checkpoint")
    attention = [(t.tensors, t.scale, t.norm_bc, t.eps) for t in (teacher, theirs)]
    if attention[0] != attention[1]:
        raise InputError(
            f"{donor.path} has another attention than the checkpoint: other biases, norms, tensors or another scale"
        )
    lacking = [layer for layer in layers if layer not in theirs.attention_layers]
    if lacking:
        raise InputError(f"{donor.path} has no attention in layer {lacking[0]} to start from")
