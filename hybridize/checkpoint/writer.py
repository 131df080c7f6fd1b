"""Writes a checkpoint directory: tensors shard by shard, then index, config, manifest, and the
tokenizer and other files carried over from its source."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hybridize.checkpoint.atomic import write_json
from hybridize.checkpoint.integrity import seal
from hybridize.checkpoint.manifest import MANIFEST, Manifest
from hybridize.checkpoint.reader import INDEX, CheckpointReader, Fingerprint, carry, fingerprint
from hybridize.errors import InputError, WorkError, setting

SHARD_BYTES = 2 * 10**9
OURS = ("config.json", MANIFEST, "model.safetensors", INDEX)  # one of these makes a directory a checkpoint


def check_output(output: Path, overwrite: bool, *sources: Path, replaceable: tuple[str, ...] = ()) -> None:
    """InputError if `output` exists (without `overwrite`), is or contains one of the inputs, or
    cannot be created.

    Even with `overwrite` only an empty directory, a checkpoint, or a directory with a `replaceable`
    file is replaced.
    """
    whole = output.resolve()
    for source in sources:
        if whole == source.resolve() or whole in source.resolve().parents:
            raise InputError(f"{output} is or contains the input {source}, which must not be overwritten")
    if whole == Path.cwd():
        raise InputError(f"{output} is the current directory; name a directory in it")
    if (output.exists() or output.is_symlink()) and not overwrite:
        raise InputError(f"{output} exists; give another {setting('output')} or {setting('overwrite')}")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; the output must be a directory")
    if output.is_dir() and any(output.iterdir()) and not any((output / name).exists() for name in (*OURS, *replaceable)):
        raise InputError(f"{output} is a directory but not a checkpoint; {setting('overwrite')} does not replace it")
    check_writable(output)


def check_writable(output: Path) -> None:
    """InputError if the process may not write where `output` is to be created."""
    nearest = next(parent for parent in output.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{output} cannot be written: no write permission in {nearest}")


class CheckpointWriter:
    """Streams tensors into shards of at most 2 GB; `close` adds the index, config.json and the
    manifest with hashes of everything.

    path: the directory of an `AtomicDirectory`. One shard is held in memory. WorkError if a tensor
    is not finite.
    """

    def __init__(self, path: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.path, self.shard_bytes = path, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._pointers: set[int] = set()
        self._shards: list[list[str]] = []
        self._hashing = ThreadPoolExecutor(1)  # sha256 releases the interpreter lock
        self._prints: dict[str, Future[Fingerprint]] = {}
        self._kept: set[str] = set()

    def add(self, name: str, tensor: Tensor, kept_from: CheckpointReader | None = None) -> None:
        """Adds a tensor. kept_from: the parent, if the tensor is the parent's of the same name,
        unchanged."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self.shard_bytes:
            self._flush()
        plain = tensor.detach().cpu().contiguous()
        if plain.data_ptr() in self._pointers:  # tied weights: safetensors requires separate memory for each
            plain = plain.clone()
        self._pointers.add(plain.data_ptr())
        self._pending[name] = plain
        self._bytes += size
        self._total += size
        if kept_from is None:
            self._prints[name] = self._hashing.submit(self._own_print, name, plain)
        else:  # the parent's hash needs the fingerprint too, and the tensor is in the page cache now
            self._kept.add(name)
            self._prints[name] = self._hashing.submit(kept_from.take_print, name)

    def _own_print(self, name: str, tensor: Tensor) -> Fingerprint:
        """The fingerprint of a tensor that was made here. WorkError if it is not finite, since the
        input is not to blame."""
        try:
            return fingerprint(name, tensor, str(self.path.parent))
        except InputError as error:
            raise WorkError(f"{error}") from error

    def _flush(self) -> None:
        save_file(self._pending, self.path / f"shard-{len(self._shards) + 1}", metadata={"format": "pt"})
        self.wait()  # otherwise tensors waiting for their hash would accumulate in memory
        self._shards.append(list(self._pending))
        self._pending, self._bytes, self._pointers = {}, 0, set()

    def wait(self) -> None:
        """Waits until all tensors so far have their fingerprints. WorkError if one is not finite
        that was made here, InputError if it is the parent's."""
        for found in self._prints.values():
            found.result()

    def close(self, config: dict[str, Any], manifest: Manifest, carry_from: Path | None) -> None:
        """Writes the last shard and all other files. carry_from: where to copy the tokenizer and
        other files from."""
        self._flush()
        self.wait()
        self._hashing.shutdown()
        count, weight_map = len(self._shards), {}
        for number, names in enumerate(self._shards, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            os.rename(self.path / f"shard-{number}", self.path / file)
            weight_map.update(dict.fromkeys(names, file))
        write_json(self.path / INDEX, {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))})
        if carry_from is not None:
            carry(carry_from, self.path)
        write_json(self.path / "config.json", config)
        seal(self.path, manifest.to_json(), [found.result() for found in self._prints.values()], self._kept)
