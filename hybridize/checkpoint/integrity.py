"""Integrity of checkpoints: writes hashes of all bytes to the manifest and checks files against
them.

Besides lineage the manifest has: `weights`, name -> dtype, shape, sha256 of the bytes, and `kept`
if the tensor is the parent's, unchanged; `files`, name -> sha256, for a safetensors file of its
header only, since the tensors cover the rest; `hash`, the content hash; and `seal`, the sha256 of
the manifest without the seal.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hybridize.checkpoint.atomic import json_text, write_json
from hybridize.checkpoint.json_files import read_json
from hybridize.checkpoint.manifest import MANIFEST, read_manifest
from hybridize.checkpoint.reader import (
    CARRIED,
    CheckpointReader,
    Fingerprint,
    check_inside,
    content_hash,
    fingerprint,
    same_bytes,
)
from hybridize.errors import InputError, setting

SAFETENSORS, TEMPLATES = ".safetensors", "additional_chat_templates/*.jinja"
MOST_HEADER = 100 << 20  # bytes; the limit of safetensors itself
CODE = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "adapter_*", "processor_config.json", "preprocessor_config.json")
CHUNK = 1 << 24
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verified:
    """Result of an integrity check: the numbers of tensors, of their bytes and of files checked.
    kept: the number of tensors compared with the parent, None without `deep`. damage: one sentence
    per difference."""

    tensors: int
    bytes: int
    files: int
    kept: int | None
    damage: list[str]


def seal(path: Path, manifest: dict[str, Any], prints: Collection[Fingerprint], kept: Collection[str] = ()) -> None:
    """Writes the manifest with the hashes of everything in the directory.

    prints: fingerprints of all tensors, none if they are not in safetensors files; kept: names of
    the tensors taken from the parent.
    """
    weights = {
        name: {"dtype": dtype, "shape": list(shape), "sha256": body} | ({"kept": True} if name in kept else {})
        for name, dtype, shape, body in sorted(prints)
    }
    content = content_hash(list(prints), read_json(path / "config.json")) if prints else None
    _write(path, manifest | {"hash": content, "weights": weights})


def seal_again(path: Path) -> None:
    """Renews the hashes of files after some were added to a directory with a manifest."""
    found = read_json(path / MANIFEST)
    _write(path, {"hash": None, "weights": {}} | {key: value for key, value in found.items() if key not in ("files", "seal")})


def _write(path: Path, manifest: dict[str, Any]) -> None:
    held = sorted(file for file in (*path.iterdir(), *path.glob(TEMPLATES)) if file.is_file() and file.name != MANIFEST)
    files = {file.relative_to(path).as_posix(): _file_hash(file) for file in held}
    whole = manifest | {"files": files}
    write_json(path / MANIFEST, whole | {"seal": _digest(whole)})


def verify(path: Path, deep: bool = False, progress: Progress = lambda *_: None) -> Verified:
    """Checks the integrity of a checkpoint or export by reading every byte. deep: also compares the
    tensors that were to stay unchanged with the parent's.

    InputError if the manifest is missing or has no hashes, or with `deep` if the parent is gone.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise InputError(f"{path} has no {MANIFEST}: only the output of hybridize can be checked")
    weights, files = manifest.get("weights"), manifest.get("files")
    if not isinstance(weights, dict) or not isinstance(files, dict) or "seal" not in manifest:
        raise InputError(f"{path / MANIFEST} has no hashes: it is damaged, or from an older version of hybridize")
    parent = _parent(path, manifest) if deep else None
    damage = [] if _sealed(path, manifest) else [f"{path / MANIFEST} has changed since it was written"]
    damage += _changed(path, files)
    if not weights:
        return Verified(0, 0, len(files), None if parent is None else 0, damage)
    try:
        reader = CheckpointReader(path)
    except InputError as error:
        return Verified(0, 0, len(files), None, [*damage, str(error)])
    damage += [f"{path}: tensor {name} is missing" for name in sorted(set(weights) - set(reader.names))]
    damage += [
        f"{reader.file(name)}: tensor {name} is not in the manifest" for name in sorted(set(reader.names) - set(weights))
    ]
    names = sorted(set(weights) & set(reader.names))

    def check(name: str) -> tuple[int, list[str]]:
        tensor, expected = reader.tensor(name), weights[name]
        _, dtype, shape, body = fingerprint(name, tensor)
        found = {"dtype": dtype, "shape": list(shape), "sha256": body}
        wrong = not isinstance(expected, dict) or any(expected.get(key) != value for key, value in found.items())
        return tensor.numel() * tensor.element_size(), (
            [f"{reader.file(name)}: tensor {name} has changed since it was written"] if wrong else []
        )

    size = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # sha256 releases the interpreter lock
        for done, (read, differences) in enumerate(pool.map(check, names), start=1):
            size, damage = size + read, damage + differences
            progress(done, len(names))
    kept = [name for name in names if parent is not None and isinstance(weights[name], dict) and weights[name].get("kept")]
    for name in kept:
        assert parent is not None
        if name not in parent or not same_bytes(reader.tensor(name), parent.tensor(name)):
            damage.append(f"{reader.file(name)}: tensor {name} differs from its parent {parent.path}")
    return Verified(len(names), size, len(files), None if parent is None else len(kept), damage)


def _parent(path: Path, manifest: dict[str, Any]) -> CheckpointReader:
    where = manifest["parent"]["path"]
    if not (path / where).is_dir():
        raise InputError(f"{path}: its parent {where} is not on this disk, but {setting('deep')} needs it")
    return CheckpointReader(path / where)


def _changed(path: Path, files: dict[str, Any]) -> list[str]:
    """Sentences about files that differ, are missing, or would be read with the checkpoint without
    being in the manifest."""
    found = []
    for name, expected in sorted(files.items()):
        file = path / name
        if Path(name).name != name and not (PurePosixPath(name).match(TEMPLATES) and len(PurePosixPath(name).parts) == 2):
            found.append(f"{path / MANIFEST} names {name!r}, which is not a file of this directory")
            continue
        if not file.is_file():
            found.append(f"{file} is missing")
            continue
        try:
            check_inside(path, file)
        except InputError as error:
            found.append(str(error))
            continue
        if _file_hash(file) != expected:
            found.append(f"{file} has changed since it was written")
    unlisted = {
        file
        for pattern in (*CARRIED, *CODE, f"*{SAFETENSORS}")
        for file in path.glob(pattern)
        if file.relative_to(path).as_posix() not in files
    }
    return found + [f"{file} is not in the manifest" for file in sorted(unlisted)]


def _sealed(path: Path, manifest: dict[str, Any]) -> bool:
    """Whether the manifest file is byte for byte what `_write` makes of its content, and its seal
    is correct."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    try:
        return manifest["seal"] == _digest(rest) and (path / MANIFEST).read_text(encoding="utf-8") == json_text(manifest)
    except ValueError:  # NaN
        return False


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json_text(manifest).encode()).hexdigest()


def _file_hash(file: Path) -> str:
    """sha256 of a file, or of a safetensors file's header including the length before it."""
    digest = hashlib.sha256()
    with file.open("rb") as read:
        if file.suffix == SAFETENSORS:
            length = read.read(8)
            digest.update(length + read.read(min(int.from_bytes(length, "little"), MOST_HEADER)))
        else:
            while part := read.read(CHUNK):
                digest.update(part)
    return digest.hexdigest()
