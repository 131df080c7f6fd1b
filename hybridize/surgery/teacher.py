"""Describes a teacher for surgery, from its config and tensors, and refuses those that cannot be
converted."""

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
MOST = {  # more than any model has, but few enough to build the model without storage
    "num_hidden_layers": 1000, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "vocab_size": 1 << 26,
    "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14, "head_dim": 1 << 14, "max_position_embeddings": 1 << 30,
    "num_experts": 1 << 14, "num_local_experts": 1 << 14,
}  # fmt: skip
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Teacher:
    """Attention geometry of a checkpoint, hybrid or not. layer_types and mixer are those of its
    (hybrid) config.

    tensors: the parameters of a layer's `self_attn`, name -> shape. scale: the attention scale
    times head_dim^1/2, 1 in most families. norm_bc: the normalisation of queries and keys in the
    format of a mixer's config, or None.
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
        """The entries of a mixer's config for biases and norms (see CARRIED_KEYS)."""
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
    """Returns the supported family of a config. Raises InputError if the family is not supported,
    or if the config is not that of a plain causal language model."""
    kind = str(config.get("model_type"))
    family = str(config.get("base_model_type")) if kind == HybridConfig.model_type else kind
    if family not in FAMILIES:
        raise InputError(f"{where} is a {family!r} model; supported families: {', '.join(FAMILIES)}")
    classes = config.get("architectures") or ["ForCausalLM"]
    if not isinstance(classes, list):
        raise InputError(f"{where}: architectures is {classes!r}, not a list of classes")
    if not any(str(name).endswith("ForCausalLM") for name in classes):
        raise InputError(f"{where} is not a causal language model but {classes[0]}")
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        if config.get(key) not in (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"):
            raise InputError(f"{where}: {key} is {config[key]!r}; a checkpoint must not select code to run")
    for key, most in MOST.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 0 < value <= most):
            raise InputError(f"{where}/config.json: {key} is {value!r}, not a whole number from 1 to {most}")
    if config.get("quantization_config"):
        raise InputError(f"{where} is quantised; dequantise it first, since surgery needs the plain weights")
    return family


def check_whole(reader: CheckpointReader) -> None:
    """Raises InputError, naming the file and the tensor, unless the weights fit the config: no
    tensor missing, which transformers would initialise at random, none left over, each of the right
    shape and of a floating-point dtype."""
    where, family = reader.path / "config.json", family_of(reader.config, str(reader.path))
    there = {int(layer[1]) for name in reader.names if (layer := _LAYER.match(name))}
    count = reader.config.get("num_hidden_layers", len(there))
    if there != set(range(len(there))) or len(there) != count:
        raise InputError(f"{where} says {count} layers, but the weights have {len(there)}")
    model = empty_model(reader.config, str(reader.path))
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, shape in wanted.items():
        found = stored_shape(reader, name)
        if found is None and not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            raise InputError(f"{reader.path} has no tensor {name}, which a {family} model with its config.json needs")
        if found is not None and found != shape:
            raise InputError(f"{reader.path}: {name} has shape {found}, but the config says {shape}")
    for name in reader.names:
        if _LAYER.match(name) and locate(name)[0] not in wanted and not name.endswith("rotary_emb.inv_freq"):
            raise InputError(f"{reader.file(name)}: {name} has no place in a {family} model with {where}")
        if locate(name)[0] in wanted and reader.dtype(name) not in FLOATS:
            raise InputError(
                f"{reader.file(name)}: {name} is of type {reader.dtype(name)}; weights must be {', '.join(FLOATS)}"
            )


def empty_model(raw: dict[str, Any], where: str) -> HybridForCausalLM:
    """Returns the model of a config, with its weights on the meta device. Raises InputError if the
    config is not valid for its family."""
    family = family_of(raw, where)
    try:
        return without_storage(lambda: HybridForCausalLM(hybrid_config(raw)))
    except Exception as error:  # bad values raise many types of exceptions in config classes and layers
        raise InputError(f"{where}/config.json is not a valid {family} config: {first_line(error)}") from error


def read_teacher(reader: CheckpointReader) -> Teacher:
    """Returns the teacher of a checkpoint that has passed `check_whole`; loads no weights.

    Raises InputError, naming the family or the tensor, if it cannot be converted.
    """
    where, raw = str(reader.path), reader.config
    family = family_of(raw, where)
    try:
        config, attention = hybrid_config(raw), _attention(raw)
    except Exception as error:  # bad values raise many types of exceptions in config classes
        raise InputError(f"{where}/config.json is not a valid {family} config: {first_line(error)}") from error
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        raise InputError(
            f"{where} has RoPE of type longrope, which is not supported: it changes cached keys beyond some length"
        )
    if not attention.is_causal:
        raise InputError(f"{where}: bidirectional attention is not supported")
    head, tensors = attention.head_dim, {name: tuple(value.shape) for name, value in attention.state_dict().items()}
    norm, scale = None, attention.scaling * head**0.5
    if "q_norm.weight" in tensors:
        over = "head" if tensors["q_norm.weight"] == (head,) else "all"
        norm = {"over": over, "offset": FAMILIES[family].norm_offset}
    teacher = Teacher(
        family, config.hidden_size, config.num_attention_heads, config.num_key_value_heads, head, tuple(config.layer_types),
        config.mixer, tensors, scale if abs(scale - 1) > 1e-9 else 1.0, norm,  # exactly 1 keeps weights bit-identical
        config.rms_norm_eps,
    )  # fmt: skip
    known = (*(f".self_attn.{short}" for short in tensors), "rotary_emb.inv_freq")
    for name in reader.names:
        if ".self_attn." in name and not name.endswith(known):
            raise InputError(f"{where}: {name} has no place in a mixer; the model cannot be converted")
    return teacher


def _attention(raw: dict[str, Any]) -> Any:
    """Returns one layer's self_attn, built by the family's own class on the meta device."""
    one = {**raw, "num_hidden_layers": 1, "layer_types": ["full_attention"], "mixer": None}
    with torch.device("meta"):
        return HybridModel(hybrid_config(one)).layers[0].self_attn


def check_vocabularies(student: CheckpointReader, teacher: CheckpointReader) -> None:
    """Raises InputError unless both models have the same vocabulary size and the same soft cap on
    their logits."""
    ours, theirs = student.config.get("vocab_size"), teacher.config.get("vocab_size")
    if ours != theirs:
        raise InputError(f"{student.path} has a vocabulary of {ours}, but its teacher {teacher.path} has one of {theirs}")
    ours, theirs = (getattr(hybrid_config(r.config), "final_logit_softcapping", None) for r in (student, teacher))
    if ours != theirs:
        raise InputError(
            f"{student.path} caps its logits at {ours}, but its teacher {teacher.path} at {theirs}; they must agree"
        )


def check_donor(donor: CheckpointReader, teacher: Teacher, layers: Sequence[int]) -> None:
    """Raises InputError unless `donor` has the same kind of attention as `teacher`, and has it in
    all `layers` that are to start from it."""
    theirs = read_teacher(donor)
    shapes = [(t.hidden, t.heads, t.kv_heads, t.head_dim) for t in (teacher, theirs)]
    if shapes[0] != shapes[1]:
        raise InputError(f"{donor.path} has another attention shape than the checkpoint")
    attention = [(t.tensors, t.scale, t.norm_bc, t.eps) for t in (teacher, theirs)]
    if attention[0] != attention[1]:
        raise InputError(f"{donor.path} has another attention than the checkpoint: its biases, norms, tensors or scale differ")
    missing = [layer for layer in layers if layer not in theirs.attention_layers]
    if missing:
        raise InputError(f"{donor.path} has no attention in layer {missing[0]} to start from")
