"""A checkpoint at a glance, from its config, manifest and scores alone: layout, parameters, memory
in decoding, lineage.

No weight is read, so a hub id costs its JSON files.
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
    """kinds: one a layer, as in the config. parameters: by part; `layers` counts all layers. state:
    bytes that a sequence keeps whatever its length; kv: bytes a token; at_long: both together after
    LONG tokens, windows counted; teacher_at_long: what it would be if every layer were attention,
    as the family's default has it where nobody knows."""

    kinds: list[str]
    mixer: dict[str, Any] | None
    parameters: dict[str, int]
    dtype: str
    state: int
    kv: int
    at_long: int
    teacher_at_long: int


def anatomy(raw: dict[str, Any], where: str) -> Anatomy:
    """raw: config.json of the directory `where`. InputError where it is none of its family."""
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
    """From the root to this checkpoint: what each step made, as far as its parents are still there."""
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
    """Every score file of the checkpoint, or why it cannot be read."""
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
    """The checkpoint's directory and config; of a hub id only its JSON files are fetched.
    InputError if there is none."""
    path = resolve_checkpoint(name, revision, files=["*.json"])
    return path, read_json(path / "config.json")
