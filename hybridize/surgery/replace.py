"""Replaces attention layers of a checkpoint by mixers, streaming tensors from one directory to
another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint.atomic import AtomicDirectory
from hybridize.checkpoint.manifest import descend
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.checkpoint.writer import CheckpointWriter
from hybridize.errors import InputError, WorkError, setting
from hybridize.modeling import CARRIED_KEYS, MIXER_LAYER, HybridConfig, hybrid_config
from hybridize.surgery.mapping import Target, build, stored
from hybridize.surgery.mixers import DEFAULT_MIXER, KINDS, MixerKind, kind_of
from hybridize.surgery.observe import Observer
from hybridize.surgery.teacher import Teacher


@dataclass(frozen=True)
class MixerSettings:
    """Kind and shape of new mixers. None: the value of the checkpoint's other mixers, or else the
    default (see MixerKind.shape)."""

    kind: str | None = None
    d_state: int | None = None
    d_conv: int | None = None
    dt_rank: int | None = None
    expand: str | None = None


@dataclass(frozen=True)
class Calibration:
    """Calibration settings. ids [W, T]: the text's tokens; parts: which parts of new mixers to set;
    device: where to run; data: the text's name."""

    ids: Tensor
    parts: frozenset[str]
    device: torch.device
    data: str

    def settings(self) -> dict[str, Any]:
        """Returns the settings for the manifest. `hash` is that of the token ids, so it does not
        depend on file or template."""
        digest = hashlib.sha256(self.ids.cpu().numpy().tobytes()).hexdigest()
        known = {part: None for kind in KINDS.values() for part in kind.parts}  # in the order in which calibration sets them
        parts = [part for part in known if part in self.parts]
        return {
            "data": self.data, "tokens": self.ids.numel(), "hash": digest, "device": self.device.type, "parts": parts,
        }  # fmt: skip


@dataclass(frozen=True)
class Surgery:
    """A plan: which layers become mixers, the mixers' config, and the new tensors by layer."""

    layers: list[int]
    mixer: dict[str, Any] | None
    targets: dict[int, list[Target]]

    @property
    def kind(self) -> MixerKind:
        """The kind of the new mixers; only valid if there are some."""
        assert self.mixer is not None
        return kind_of(self.mixer["kind"])


def plan(teacher: Teacher, layers: list[int], settings: MixerSettings) -> Surgery:
    """Returns the plan for converting `layers`. Raises InputError if the settings contradict the
    checkpoint's other mixers or do not fit the teacher."""
    layers = sorted(layers)
    given = {key: value for key, value in asdict(settings).items() if value is not None}
    if teacher.mixer is not None:
        for key, value in given.items():
            if teacher.mixer.get(key) != value:
                flag = setting("mixer" if key == "kind" else key)
                has = teacher.mixer.get(key, "none")
                raise InputError(f"{flag} {value}: the checkpoint's mixers have {has}, and all mixers must agree")
        mixer: dict[str, Any] | None = teacher.mixer
        carried = {key: teacher.mixer[key] for key in CARRIED_KEYS if teacher.mixer.get(key)}
        if carried != teacher.carried and layers:
            ours, theirs = carried or "no biases and norms", teacher.carried or "none"
            raise InputError(f"the checkpoint's mixers have {ours}, but its attention has {theirs}")
    else:
        kind = given.pop("kind", DEFAULT_MIXER)
        mixer = kind_of(kind).shape(teacher, given) if layers else None
    if mixer is None:
        return Surgery(layers, None, {})
    made = kind_of(mixer["kind"])
    return Surgery(layers, mixer, {layer: made.targets(teacher, mixer, layer) for layer in layers})


def hybrid_json(raw: dict[str, Any], surgery: Surgery) -> dict[str, Any]:
    """Returns the result's config.json: the source's keys with the new layout."""
    before = hybrid_config(raw)
    kinds = [MIXER_LAYER if i in surgery.layers else kind for i, kind in enumerate(before.layer_types)]
    config = {key: value for key, value in raw.items() if key != "auto_map"}
    return config | {
        "model_type": "hybridize", "architectures": ["HybridForCausalLM"], "base_model_type": before.base_model_type,
        "layer_types": kinds, "mixer": surgery.mixer,
    }  # fmt: skip


def check_rules(source: CheckpointReader, surgery: Surgery) -> HybridConfig:
    """Returns the config of the result. Raises InputError unless the rules of the mixer kind make
    exactly the parameters of its class."""
    config = HybridConfig.from_dict(hybrid_json(source.config, surgery))
    for layer in surgery.layers[:1]:
        surgery.kind.check_targets(config, layer, surgery.targets[layer])
    return config


def starting_values(
    source: CheckpointReader,
    surgery: Surgery,
    donor: CheckpointReader,
    seed: int,
    calibration: Calibration | None,
    together: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yields (layer, {name: parameter of its new mixer}) for each layer of the plan, in order.

    together: calibrate each mixer on top of the mixers below it; otherwise as if it were the only
    one. Raises WorkError if a parameter is not finite.
    """
    config = check_rules(source, surgery)
    if calibration is not None:
        observer = Observer(source, donor, calibration.ids, calibration.device)
    for place, layer in enumerate(surgery.layers, 1):
        if calibration is not None:
            progress(f"calibrating layer {layer}, {place} of {len(surgery.layers)}")
        draw = surgery.kind.mixer.initial
        values = {target.parameter: build(target, donor.tensor, seed, draw) for target in surgery.targets[layer]}
        if calibration is not None:
            mixer = surgery.kind.calibrate(config, layer, values, observer.see(layer), calibration.parts)
            observer.convert(mixer if together else None)
            values = {name: value.cpu() for name, value in mixer.state_dict().items()}
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                source.check_weights()  # raises an error that names the tensor if a source is the cause
                donor.check_weights()
                raise WorkError(
                    f"layer {layer}: {name} is not finite, but all weights are; use {setting('calibrate', False)} or other text"
                )
        yield layer, values


def hybrid_tensors(
    source: CheckpointReader, surgery: Surgery, donor: CheckpointReader, seed: int, calibration: Calibration | None,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Yields (name, tensor) for all tensors of the result: unchanged ones, then those of mixers,
    built from `donor`'s attention weights."""
    gone = tuple(f"model.layers.{layer}.self_attn." for layer in surgery.layers)
    for name in source.names:
        if not name.startswith(gone):
            yield name, source.tensor(name)
    for layer, values in starting_values(source, surgery, donor, seed, calibration, progress=progress):
        dtype = source.tensor(f"model.layers.{layer}.self_attn.o_proj.weight").dtype
        for target in surgery.targets[layer]:
            yield target.name, stored(target, values[target.parameter], dtype)


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
    calibration: Calibration | None = None,
    progress: Callable[[str], None] = lambda _: None,
    check: Callable[[Path], None] = lambda _: None,
) -> None:
    """Writes the hybrid to `output`, atomically.

    name: the source as the user named it, for the manifest. init_from: the donor as the manifest
    records it. check: called with the finished directory before it becomes the output; raises an
    exception to reject it.
    """
    settings = settings | {"calibration": None if calibration is None else calibration.settings()}
    origin = "mil" if calibration is None else "calibrated"
    with AtomicDirectory(output, overwrite) as path:
        writer = CheckpointWriter(path)
        for tensor_name, tensor in hybrid_tensors(source, surgery, donor, seed, calibration, progress):
            writer.add(tensor_name, tensor, source if tensor_name in source else None)
            progress(f"writing {tensor_name}")
        progress("hashing the source's weights")
        writer.wait()  # the parent's hash reuses the hashes of tensors computed while writing
        manifest = descend(source, name, output, "replace", settings, seed)
        for layer in surgery.layers:
            manifest.layers[layer] = {"origin": origin, "from": init_from}
        writer.close(hybrid_json(source.config, surgery), manifest, carry_from=source.path)
        check(path)
