"""Reads a checkpoint directory lazily: its config, and tensor by tensor through memory maps. Knows no model classes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybridize.errors import InputError, first_line

Fingerprint = tuple[str, str, tuple[int, ...], str]  # name, dtype, shape, sha256 of the bytes
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NOT_HASHED = ("transformers_version", "_name_or_path")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def resolve_checkpoint(name: str, revision: str | None = None, files: Sequence[str] = _HUB_FILES) -> Path:
    """The directory that `name` means: a path if it starts with . or /, else an existing directory, else a hub id.

    files: patterns of what is wanted of a hub id. Raises InputError where there is none, or the hub does not have it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{name} is a file; a checkpoint is a directory with config.json and safetensors")
    if name.startswith((".", "/", "~")) or name.endswith("/") or not _HUB_ID.fullmatch(name):
        raise InputError(f"{name} does not exist; give a checkpoint directory or a Hugging Face hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the hub raises its own, httpx's and OSError, all meaning: not to be had
        raise InputError(f"{name} is no local directory, and the hub did not give it: {first_line(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError naming the file when it is missing, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


class CheckpointReader:
    """A safetensors checkpoint: `config`, tensor names, shapes and types at once; tensors when asked for.

    Raises InputError naming the file when the directory is incomplete (no config, a missing or damaged shard).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self._files = self._locate()
        self._prints: dict[str, Fingerprint] = {}

    def _locate(self) -> dict[str, Any]:
        if (self.path / INDEX).exists():
            weights = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weights, dict) or not weights:
                raise InputError(f"{self.path / INDEX} has no weight_map")
            shards = sorted(set(map(str, weights.values())))
            outside = [s for s in shards if Path(s).name != s]
            if outside:
                raise InputError(f"{self.path / INDEX} names {outside[0]!r}, which is not a file of this directory")
        elif (self.path / SINGLE).exists():
            weights, shards = None, [SINGLE]
        else:
            pickled = ", which pickle weights cannot replace" if list(self.path.glob("*.bin")) else ""
            raise InputError(f"{self.path} has no {SINGLE} and no {INDEX}{pickled}")
        files: dict[str, Any] = {}
        for shard in shards:
            if not (self.path / shard).exists():
                raise InputError(f"{self.path / shard} is missing, though the index names it; is the checkpoint complete?")
            try:
                handle = safe_open(self.path / shard, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(f"{self.path / shard} is not a readable safetensors file: {error}") from error
            for name in handle.keys():  # noqa: SIM118  (safe_open is no mapping)
                if name in files:
                    raise InputError(f"tensor {name} is in more than one file of {self.path}")
                files[name] = handle
        if weights is not None and set(weights) != set(files):
            odd = sorted(set(weights) ^ set(files))[0]
            raise InputError(f"{self.path / INDEX} and the shards disagree about tensor {odd}")
        return files

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise InputError(f"{self.path} has no tensor {name}")
        return self._files[name].get_slice(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor, backed by the file where possible."""
        if name not in self._files:
            raise InputError(f"{self.path} has no tensor {name}")
        return self._files[name].get_tensor(name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self.tensor(name)

    @cached_property
    def hash(self) -> str:
        """The content hash of DESIGN section 7: weights and config, whatever the sharding. Reads every byte once, but for
        tensors that `take_print` has had."""
        with ThreadPoolExecutor(2) as pool:  # sha256 releases the interpreter lock
            list(pool.map(self.take_print, [name for name in self.names if name not in self._prints]))
        return content_hash(list(self._prints.values()), self.config)

    def take_print(self, name: str) -> None:
        """What `hash` needs of one tensor, for who reads it anyway."""
        if name not in self._prints:
            self._prints[name] = fingerprint(name, self.tensor(name))

    def same_bits(self, name: str, other: CheckpointReader) -> bool:
        """Whether both have the tensor with the same type, shape and bytes."""
        self.take_print(name)
        other.take_print(name)
        return self._prints[name] == other._prints[name]


def fingerprint(name: str, tensor: Tensor) -> Fingerprint:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), hashlib.sha256(raw).hexdigest()  # type: ignore[arg-type]


def content_hash(parts: list[Fingerprint], config: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, dtype, shape, body in sorted(parts):
        digest.update(f"{name} {dtype} {list(shape)} {body}\n".encode())
    kept = {key: value for key, value in config.items() if key not in NOT_HASHED}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()
