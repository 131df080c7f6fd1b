"""Summary of a checkpoint from its config, manifest and score files: layout, parameter counts,
memory in decoding, lineage.

No weights are read, so of a hub id only the JSON files are downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridize.checkpoint.json_files import read_json
from hybridize.checkpoint.manifest import read_manifest
from hybridize.checkpoint.reader import resolve_checkpoint
from hybridize.checkpoint.scores import read_scores, score_files
from hybridize.errors import InputError
from hybridize.generation.cache import attention_bytes, sequence_bytes
from hybridize.modeling import MIXER_LAYER, hybrid_config
from hybridize.surgery.teacher import empty_model

LONG = 32768  # tokens


@dataclass(frozen=True)
class Anatomy:
    """Layers, parameter counts and decoding memory of a model.

    kinds: one per layer, as in the config. parameters: by part; `layers` counts all layers. state:
    bytes per sequence that do not depend on its length; kv: bytes per token; at_long: both for a
    sequence of LONG tokens, sliding windows included; teacher_at_long: the same if every layer
    were attention, of the family's default kind where the original kind is unknown.
    """

    kinds: list[str]
    mixer: dict[str, Any] | None
    parameters: dict[str, int]
    dtype: str
    state: int
    kv: int
    at_long: int
    teacher_at_long: int


def anatomy(raw: dict[str, Any], where: str) -> Anatomy:
    """The figures for a model. raw: config.json of the directory `where`. InputError if the family
    is unknown or the config is not valid for it."""
    model = empty_model(raw, where)
    config = model.config
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    layers, mixers = model.model.layers, [model.model.layers[i].self_attn for i in config.mixer_layers]
    head = 0 if config.tie_word_embeddings else count(model.lm_head)
    parameters = {
        "total": count(model.model) + head, "embeddings": count(model.model.embed_tokens), "output": head,
        "layers": count(layers), "mixers": sum(map(count, mixers)),
    }  # fmt: skip
    stored = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = getattr(torch, stored, torch.float32)
    kept, state = sequence_bytes(model, LONG, dtype)
    own = hybrid_config({k: v for k, v in raw.items() if k not in ("layer_types", "mixer")}).layer_types
    kinds = [old if kind == MIXER_LAYER else kind for kind, old in zip(config.layer_types, own, strict=True)]
    before = sum(attention_bytes(config, kind, LONG, dtype) for kind in kinds)
    growing = [kind for kind in config.layer_types if kind not in ("sliding_attention", MIXER_LAYER)]
    kv = sum(attention_bytes(config, kind, 1, dtype) for kind in growing)
    return Anatomy(list(config.layer_types), config.mixer, parameters, stored, state, kv, state + kept, before)


def lineage(path: Path) -> list[dict[str, Any]]:
    """The steps from the root to this checkpoint, oldest first, as far as the parents still exist."""
    steps: list[dict[str, Any]] = []
    seen = set()
    while (here := path.resolve()) not in seen:
        seen.add(here)
        found = read_manifest(path)
        if found is None:
            steps.append({"checkpoint": str(here), "command": None})
            break
        settings = found.get("settings")
        steps.append({
            "checkpoint": str(here), "command": found.get("command"), "tokens": found["tokens"],
            "settings": settings if isinstance(settings, dict) else {}, "version": found.get("version"),
        })  # fmt: skip
        parent = str(found["parent"].get("path", "")) if isinstance(found.get("parent"), dict) else ""
        if not (path / parent).is_dir() or not parent:
            steps.append({"checkpoint": parent or "unknown", "command": None, "missing": bool(parent)})
            break
        path = path / parent
    return steps[::-1]


def rankings(path: Path, name: str) -> list[dict[str, Any]]:
    """The content of each score file of the checkpoint, or the error if it cannot be read."""
    found: list[dict[str, Any]] = []
    for file in score_files(path, name):
        kind = file.stem
        try:
            scores = read_scores(file)
        except InputError as error:
            found.append({"file": str(file), "kind": kind, "error": str(error)})
            continue
        found.append({
            "file": str(file), "kind": scores.kind, "metric": scores.metric, "mixer": scores.mixer, "ranking": scores.ranking(),
            "seconds": scores.seconds,
        })  # fmt: skip
    return found


def config_of(name: str, revision: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The checkpoint's directory and config; of a hub id only the JSON files are fetched.
    InputError if the checkpoint does not exist."""
    path = resolve_checkpoint(name, revision, files=["*.json"])
    return path, read_json(path / "config.json")
