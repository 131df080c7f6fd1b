"""Replaces attention layers of a checkpoint by mixers, streaming from one directory into another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hybridize.checkpoint.manifest import descend
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.checkpoint.writer import AtomicDirectory, CheckpointWriter
from hybridize.errors import InputError
from hybridize.modeling import MIXER_LAYER
from hybridize.surgery.mapping import Target, build, mixer_shape, plan_layer
from hybridize.surgery.teacher import Teacher, hybrid_config


@dataclass(frozen=True)
class MixerSettings:
    """Shape of new mixers. None: as the checkpoint's other mixers have it, else the default (state 16, kernel 4, rank D/16)."""

    d_state: int | None = None
    d_conv: int | None = None
    dt_rank: int | None = None
    expand: str | None = None


@dataclass(frozen=True)
class Surgery:
    """A plan: which layers become mixers, of which shape, and what each new tensor is made of."""

    layers: list[int]
    mixer: dict[str, Any] | None
    targets: list[Target]


def plan(teacher: Teacher, layers: list[int], settings: MixerSettings) -> Surgery:
    """Raises InputError when the settings contradict the mixers that are there, or do not fit the teacher."""
    asked = {key: value for key, value in asdict(settings).items() if value is not None}
    if teacher.mixer is not None:
        for key, value in asked.items():
            if teacher.mixer[key] != value:
                flag = key.replace("_", "-")
                raise InputError(f"--{flag} {value}: the checkpoint's mixers have {teacher.mixer[key]}, and all must agree")
        mixer: dict[str, Any] | None = teacher.mixer
    else:
        defaults: dict[str, Any] = {"d_state": min(16, teacher.head_dim), "d_conv": 4, "dt_rank": None, "expand": "head"}
        mixer = mixer_shape(teacher, **(defaults | asked)) if layers else None
    targets = [target for layer in layers for target in plan_layer(teacher, mixer, layer)] if mixer else []
    return Surgery(layers, mixer, targets)


def hybrid_json(raw: dict[str, Any], surgery: Surgery) -> dict[str, Any]:
    """The result's config.json: the source's keys, and the layout in its one place."""
    before = hybrid_config(raw)
    kinds = [MIXER_LAYER if i in surgery.layers else kind for i, kind in enumerate(before.layer_types)]
    config = {key: value for key, value in raw.items() if key != "auto_map"}
    return config | {
        "model_type": "hybridize", "architectures": ["HybridForCausalLM"], "base_model_type": before.base_model_type,
        "layer_types": kinds, "mixer": surgery.mixer,
    }  # fmt: skip


def hybrid_tensors(
    source: CheckpointReader, surgery: Surgery, donor: CheckpointReader, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the result: untouched ones as they are, mixers built from `donor`'s attention weights."""
    gone = tuple(f"model.layers.{layer}.self_attn." for layer in surgery.layers)
    for name in source.names:
        if not name.startswith(gone):
            yield name, source.tensor(name)
    layers = {target.name.split(".mixer.")[0] for target in surgery.targets}
    dtypes = {layer: source.tensor(f"{layer}.self_attn.q_proj.weight").dtype for layer in layers}
    for target in surgery.targets:
        yield target.name, build(target, donor.tensor, dtypes[target.name.split(".mixer.")[0]], seed)


def replace(
    source: CheckpointReader,
    name: str,
    surgery: Surgery,
    output: Path,
    *,
    donor: CheckpointReader,
    init_from: str,
    seed: int,
    overwrite: bool,
    settings: dict[str, Any],
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Writes the hybrid to `output`, atomically. `name`: what the user called the source, for the manifest."""
    manifest = descend(source, name, output, "replace", settings, seed)
    for layer in surgery.layers:
        manifest.layers[layer] = {"origin": "mil", "from": init_from}
    with AtomicDirectory(output, overwrite) as path:
        writer = CheckpointWriter(path)
        for tensor_name, tensor in hybrid_tensors(source, surgery, donor, seed):
            writer.add(tensor_name, tensor)
            progress(tensor_name)
        writer.close(hybrid_json(source.config, surgery), manifest, carry_from=source.path)
