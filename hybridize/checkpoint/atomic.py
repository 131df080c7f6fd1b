"""Writes files and directories atomically: under a temporary name with a lock, synced to disk, then
renamed."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from hybridize.errors import InputError, WorkError, first_line


class AtomicDirectory:
    """A directory that gets its final name when the `with` block succeeds, and is removed
    otherwise.

    Leftovers of killed runs for the same name are removed at the start; running ones hold a lock.
    WorkError if another command has created or replaced the output in the meantime.
    """

    def __init__(self, output: Path, overwrite: bool = False) -> None:
        self.output, self.overwrite = output.resolve(), overwrite  # a link stays, and its target is replaced

    def __enter__(self) -> Path:
        parent = self.output.parent
        parent.mkdir(parents=True, exist_ok=True)
        self._before = _identity(self.output)
        prefix = f".{self.output.name}.tmp-"
        _clear(parent, prefix)
        self._lock = -1
        while self._lock < 0:  # another process may remove the directory before it is locked
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._lock = _locked(self.path, own=True)
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                _settle(self.path)
                self._place()
            elif isinstance(error, OSError | SafetensorError):  # usually a full disk
                raise WorkError(f"{self.output} could not be written: {first_line(error)}") from error
        finally:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)

    def _place(self) -> None:
        if _identity(self.output) != self._before:
            raise WorkError(f"{self.output} was created by another command while this one ran; nothing was replaced")
        if self.overwrite and self.output.exists():
            _exchange(self.path, self.output)  # the old content is removed with the temporary directory
        else:
            try:
                os.rename(self.path, self.output)  # fails if another process has filled the directory meanwhile
            except OSError as error:
                raise WorkError(f"{self.output} appeared while this command ran; nothing was replaced") from error
        _sync(self.output.parent)


def _identity(path: Path | int) -> tuple[int, int] | None:
    """Device and inode, which change when another file or directory takes the name; None if there
    is nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _clear(parent: Path, prefix: str) -> None:
    """Removes the files and directories with the prefix that no process has locked."""
    for stale in parent.glob(f"{glob.escape(prefix)}*"):
        lock = _locked(stale)
        if lock >= 0:
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)
            os.close(lock)


def _locked(path: Path, own: bool = False) -> int:
    """A descriptor that holds the lock of a file or directory, -1 if it is gone or in use.

    Some network file systems have no such locks: then a path that this process has just created
    (`own`) counts as locked, any other as in use.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return -1
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        known = True
    except BlockingIOError:
        known = False
    except OSError:
        known = own
    if known and _identity(path) == _identity(handle):
        return handle
    os.close(handle)
    return -1


def hold(path: Path) -> int:
    """Locks a directory that one process writes into, until the returned descriptor is closed.
    InputError if another process has the lock."""
    handle = _locked(path, own=True)
    if handle < 0:
        raise InputError(f"{path} is being written by another process")
    return handle


def write_json(path: Path, value: Any) -> None:
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: Any) -> str:
    """A value in the format of all JSON files of this project."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def clear_leftovers(path: Path) -> None:
    """Removes temporary files that killed writers of a path have left; writing it again does so,
    too."""
    _clear(path.parent, f".{path.name}.tmp-")


def write_json_atomic(path: Path, value: Any) -> None:
    """Writes a JSON file atomically and synced; creates its directory if needed."""
    write_text_atomic(path, json_text(value))


def write_lines_atomic(path: Path, records: Iterable[Any], default: Callable[[Any], Any] | None = None) -> None:
    """Writes records as lines of JSON, atomically and synced. default: as in json.dumps."""
    lines = (json.dumps(record, ensure_ascii=False, default=default) for record in records)
    write_text_atomic(path, "".join(f"{line}\n" for line in lines))


def write_text_atomic(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically and synced; creates its directory if needed."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Writes a file atomically and synced; creates its directory if needed. WorkError on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.tmp-"
    _clear(path.parent, prefix)
    handle, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)
    try:
        with contextlib.suppress(OSError):  # without locks no process removes the file either
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path(name).write_bytes(data)
        _own_mode(Path(name))
        _sync(Path(name))
        os.replace(name, path)
    except OSError as error:
        raise WorkError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        os.close(handle)
        Path(name).unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Gives all files and directories the umask's mode (safetensors and mkdtemp set stricter ones)
    and syncs them."""
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
    """Swaps two directories atomically (Linux renameat2), elsewhere in three renames."""
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
