"""Reads a checkpoint directory lazily: its config, and single tensors through memory maps.
Independent of model classes."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybridize.checkpoint.json_files import read_json
from hybridize.errors import InputError, first_line

Fingerprint = tuple[str, str, tuple[int, ...], str]  # name, dtype, shape, sha256 of the bytes
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MOST_NAME = 255  # bytes that file systems allow
NOT_HASHED = ("transformers_version", "_name_or_path")
CARRIED = (  # files that a usable checkpoint needs besides its weights: tokenizer, template, generation settings
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "chat_template*", "additional_chat_templates/*.jinja", "generation_config.json",
)  # fmt: skip
ADAPTER = "adapter_config.json"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def resolve_checkpoint(name: str, revision: str | None = None, files: Sequence[str] = _HUB_FILES, network: bool = True) -> Path:
    """The directory that `name` refers to: a path if it starts with . or /, else an existing
    directory, else a hub id.

    files: patterns of the files to fetch for a hub id. network: False searches only the hub's cache
    on this disk, for names that no user has typed. InputError if there is no such checkpoint.
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
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files), local_files_only=not network))
    except Exception as error:  # the hub raises its own errors, httpx's and OSError, all for an unavailable checkpoint
        if not network:
            raise InputError(f"{name} is neither a local directory nor in the hub's cache") from error
        raise InputError(
            f"{name} is not a local directory, and could not be fetched from the hub: {first_line(error)}"
        ) from error


def carried_files(source: Path) -> list[Path]:
    """Tokenizer, chat template and generation files of a checkpoint directory. InputError if one is
    a link out of it."""
    found = sorted({file for pattern in CARRIED for file in source.glob(pattern) if file.is_file()})
    for file in found:
        check_inside(source, file)
    return found


def carry(source: Path, target: Path) -> None:
    """Copies the `carried_files` of `source` to the same relative paths in `target`."""
    for file in carried_files(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def _check_marks(folder: Path) -> None:
    """InputError naming a file that begins with a byte order mark, on which transformers fails or
    which it reads as text."""
    for file in sorted({*folder.glob("*.json"), *carried_files(folder)}):
        with file.open("rb") as opened:
            if opened.read(3) == codecs.BOM_UTF8:
                raise InputError(
                    f"{file} begins with a byte order mark, which transformers cannot read; save it as UTF-8 without one"
                )


def check_inside(folder: Path, file: Path) -> None:
    """InputError if a file of a checkpoint is a link out of its directory: its target would be
    read, and copied, as part of the checkpoint.

    The hub's cache links into its own store, which counts as inside.
    """
    home, real = folder.resolve(), file.resolve()
    store = home.parent.parent if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--") else home
    if home not in real.parents and store not in real.parents:
        raise InputError(f"{file} is a link out of its directory, to {real}; replace it by a copy, or give that directory")


class CheckpointReader:
    """A safetensors checkpoint: `config`, tensor names, shapes and types are read at once, tensors
    on request.

    The same weights are read as in transformers: if there are both a single file and an index with
    shards, the single file. sharded: whether the index is used. InputError naming the file if the
    directory is incomplete (no config, a missing or damaged shard).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / ADAPTER).exists():
            raise InputError(
                f"{path} is a LoRA adapter ({ADAPTER}), not a model: merge it into its base model first (merge_and_unload of "
                "peft) and give the merged checkpoint"
            )
        check_inside(path, path / "config.json")
        _check_marks(path)
        self.config = read_json(path / "config.json")
        if self.config.get("transformers_weights") is not None:
            raise InputError(
                f"{path / 'config.json'} names its own weights file (transformers_weights); only {SINGLE} or {INDEX} is read"
            )
        self.sharded = not (path / SINGLE).exists()
        self._files = self._locate()
        self._marks = {shard: _mark(path / shard) for shard in self.files}
        self._prints: dict[str, Fingerprint] = {}

    def _locate(self) -> dict[str, tuple[str, Any]]:
        if self.sharded and (self.path / INDEX).exists():
            weights = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weights, dict) or not weights:
                raise InputError(f"{self.path / INDEX} has no weight_map")
            shards = sorted(set(map(str, weights.values())))
            outside = [s for s in shards if Path(s).name != s or len(s) > MOST_NAME or "\0" in s]
            if outside:
                raise InputError(f"{self.path / INDEX} names {outside[0]!r}, which is not a file of this directory")
        elif not self.sharded:
            weights, shards = None, [SINGLE]
        else:
            pickled = "; pickled weights (*.bin) are not read" if list(self.path.glob("*.bin")) else ""
            raise InputError(f"{self.path} has no {SINGLE} and no {INDEX}{pickled}")
        files: dict[str, tuple[str, Any]] = {}
        for shard in shards:
            if not (self.path / shard).exists():
                raise InputError(f"{self.path / shard} is missing, though the index names it; is the checkpoint complete?")
            check_inside(self.path, self.path / shard)
            try:
                handle = safe_open(self.path / shard, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(f"{self.path / shard} is not a readable safetensors file: {error}") from error
            for name in handle.keys():  # noqa: SIM118  (safe_open is not a mapping)
                if name in files:
                    raise InputError(f"tensor {name} is in more than one file of {self.path}")
                files[name] = shard, handle
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

    def dtype(self, name: str) -> str:
        """The type as safetensors names it: F32, BF16, I8 ..."""
        return str(self._slice(name).get_dtype())

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise InputError(f"{self.path} has no tensor {name}")
        return self._files[name][1].get_slice(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor, backed by the file where possible."""
        if name not in self._files:
            raise InputError(f"{self.path} has no tensor {name}")
        return self._files[name][1].get_tensor(name)  # type: ignore[no-any-return]

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.path / self._files[name][0]

    @property
    def files(self) -> list[str]:
        """Names of the weight files."""
        return sorted({shard for shard, _ in self._files.values()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self.tensor(name)

    @cached_property
    def hash(self) -> str:
        """The content hash (docs/concepts/architecture.md) of weights and config, independent of
        the sharding. Reads every byte once, except of tensors that `take_print` has read."""
        for shard in self.files:
            missing = [name for name in self.names if self._files[name][0] == shard and name not in self._prints]
            if missing:
                self._take_prints(shard, missing)
        return content_hash(list(self._prints.values()), self.config)

    def check_weights(self) -> None:
        """Reads every weight once. InputError naming the first that is not finite."""
        _ = self.hash  # checks each tensor

    def _take_prints(self, shard: str, names: list[str]) -> None:
        """Takes the fingerprints of tensors in a shard, through a separate memory map so that its
        pages are freed. InputError if the file was replaced since it was opened."""
        path = self.path / shard
        with safe_open(path, framework="pt") as handle, ThreadPoolExecutor(2) as pool:  # sha256 releases the interpreter lock
            if _mark(path) != self._marks[shard]:
                raise InputError(f"{path} has been written again since it was opened")
            prints = pool.map(lambda name: fingerprint(name, handle.get_tensor(name), str(path)), names)
            self._prints.update(zip(names, prints, strict=True))

    def take_print(self, name: str) -> Fingerprint:
        """The fingerprint of one tensor, kept for `hash`. InputError if the tensor is not finite."""
        if name not in self._prints:
            self._prints[name] = fingerprint(name, self.tensor(name), str(self.file(name)))
        return self._prints[name]

    def same_bits(self, name: str, other: CheckpointReader) -> bool:
        """Whether both checkpoints have the tensor with the same type, shape and bytes."""
        return self.take_print(name) == other.take_print(name)


def _mark(file: Path) -> tuple[int, int, int]:
    """Inode, size and modification time, by which an unchanged file is recognised."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def fingerprint(name: str, tensor: Tensor, where: str | None = None) -> Fingerprint:
    """Name, dtype, shape and sha256 of a tensor. where: if given, a tensor with NaN or infinity is
    an InputError that names this place."""
    content = _bytes(tensor)
    if where is not None and tensor.is_floating_point() and not _finite(content, tensor.dtype):
        raise InputError(f"{where}: tensor {name} holds values that are not finite")
    digest = hashlib.sha256(content.numpy())  # type: ignore[arg-type]
    return name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), digest.hexdigest()


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN and -0 included."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _finite(content: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite. content: the bytes of a floating-point tensor of type `dtype`.

    In an IEEE type the bits of NaN and infinity without the sign, read as an integer, are at least
    those of infinity. Comparing integers is ten times faster than converting the values.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(dtype.itemsize)
    if whole is None:  # eight-bit types, most of which have no infinity
        return bool(torch.isfinite(content.view(dtype).float()).all())
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(whole))
    return all(
        int((part & torch.iinfo(whole).max).amax()) < infinity for part in content.view(whole).split(1 << 20) if len(part)
    )


def content_hash(parts: list[Fingerprint], config: dict[str, Any]) -> str:
    """sha256 of all fingerprints, sorted, and of the config without the keys NOT_HASHED."""
    digest = hashlib.sha256()
    for name, dtype, shape, body in sorted(parts):
        digest.update(f"{name} {dtype} {list(shape)} {body}\n".encode())
    kept = {key: value for key, value in config.items() if key not in NOT_HASHED}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()
