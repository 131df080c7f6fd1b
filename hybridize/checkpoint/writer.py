"""Writes a checkpoint directory: streamed shard by shard into a hidden sibling, then put in place with one rename."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hybridize.checkpoint.manifest import MANIFEST, Manifest
from hybridize.checkpoint.reader import INDEX
from hybridize.errors import InputError, WorkError

SHARD_BYTES = 2 * 10**9
CARRIED = (  # what makes a directory usable beside its weights: tokenizer, template, generation settings
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "chat_template*", "generation_config.json",
)  # fmt: skip
_LOCK = ".lock"


OURS = ("config.json", MANIFEST, "model.safetensors", INDEX)  # one of these makes a directory a checkpoint


def check_output(output: Path, overwrite: bool, *sources: Path, replaceable: tuple[str, ...] = ()) -> None:
    """InputError when `output` is there already (without `overwrite`), is or holds one of the inputs, or cannot be made.

    Even with `overwrite` only an empty directory or a checkpoint (or one with a `replaceable` file) is ever replaced.
    """
    whole = output.resolve()
    for source in sources:
        if whole == source.resolve() or whole in source.resolve().parents:
            raise InputError(f"{output} is or holds the input {source}; a step never writes over what it reads")
    if whole == Path.cwd():
        raise InputError(f"{output} is the current directory; name a directory in it")
    if (output.exists() or output.is_symlink()) and not overwrite:
        raise InputError(f"{output} exists; give another -o or --overwrite")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; the output is a directory")
    if output.is_dir() and any(output.iterdir()) and not any((output / name).exists() for name in (*OURS, *replaceable)):
        raise InputError(f"{output} is a directory but no checkpoint; --overwrite does not replace it")
    check_writable(output)


def check_writable(output: Path) -> None:
    """InputError when `output` cannot be made where it is to be."""
    nearest = next(parent for parent in output.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{output} cannot be written: no write permission in {nearest}")


class AtomicDirectory:
    """A directory that appears under its name only when the `with` block ends well; else nothing is left of it.

    Leftovers of killed runs for the same name are removed at the start: whoever still works holds a lock.
    """

    def __init__(self, output: Path, overwrite: bool = False) -> None:
        self.output, self.overwrite = output.absolute(), overwrite

    def __enter__(self) -> Path:
        parent = self.output.parent
        parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self.output.name}.tmp-"
        for stale in parent.glob(f"{prefix}*"):
            with contextlib.suppress(OSError), (stale / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self._lock = (self.path / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                (self.path / _LOCK).unlink()
                _settle(self.path)
                self._place()
        finally:
            self._lock.close()
            shutil.rmtree(self.path, ignore_errors=True)

    def _place(self) -> None:
        if self.overwrite and self.output.exists():
            _exchange(self.path, self.output)  # what was there is now in the temporary directory, which goes
        else:
            try:
                os.rename(self.path, self.output)  # fails on a directory that someone else has filled meanwhile
            except OSError as error:
                raise WorkError(f"{self.output} appeared while this command ran; nothing was replaced") from error
        _sync(self.output.parent)


class CheckpointWriter:
    """Streams tensors into shards of at most 2 GB; `close` adds index, manifest and, last, config.json.

    `path` is the directory of an `AtomicDirectory`. Memory is one shard.
    """

    def __init__(self, path: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.path, self.shard_bytes = path, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._pointers: set[int] = set()
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self.shard_bytes:
            self._flush()
        plain = tensor.detach().cpu().contiguous()
        if plain.data_ptr() in self._pointers:  # tied weights stored twice: safetensors wants each to own its memory
            plain = plain.clone()
        self._pointers.add(plain.data_ptr())
        self._pending[name] = plain
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        save_file(self._pending, self.path / f"shard-{len(self._shards) + 1}", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._bytes, self._pointers = {}, 0, set()

    def close(self, config: dict[str, Any], manifest: Manifest, carry_from: Path | None) -> None:
        self._flush()
        count, weight_map = len(self._shards), {}
        for number, names in enumerate(self._shards, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            os.rename(self.path / f"shard-{number}", self.path / file)
            weight_map.update(dict.fromkeys(names, file))
        write_json(self.path / INDEX, {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))})
        if carry_from is not None:
            for source in carried_files(carry_from):
                shutil.copyfile(source, self.path / source.name)
        write_json(self.path / MANIFEST, manifest.to_json())
        write_json(self.path / "config.json", config)


def carried_files(source: Path) -> list[Path]:
    """Tokenizer, chat template and generation files of a checkpoint directory."""
    return sorted({file for pattern in CARRIED for file in source.glob(pattern) if file.is_file()})


def write_json(path: Path, value: Any) -> None:
    path.write_text(_as_json(value), encoding="utf-8")


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json_atomic(path: Path, value: Any) -> None:
    """The file as a whole or not at all, synced; its directory is made if need be."""
    write_text_atomic(path, _as_json(value))


def write_text_atomic(path: Path, text: str) -> None:
    """Likewise."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Likewise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    os.close(handle)
    try:
        Path(name).write_bytes(data)
        _own_mode(Path(name))
        _sync(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Gives every file the umask's mode (safetensors and mkdtemp are stricter) and syncs them, then the directories."""
    for item in sorted(path.rglob("*"), reverse=True):
        _own_mode(item)
        _sync(item)
    _own_mode(path)
    _sync(path)


def _own_mode(path: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two directories in one step (Linux renameat2); elsewhere by way of a third name."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        rename = None
    at_cwd, exchange = -100, 2
    if rename is not None and rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return
    aside = one.with_name(one.name + "-old")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)
