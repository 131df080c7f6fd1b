"""Files and directories that are there whole or not at all: temporary names, locks, one rename,
everything synced."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from hybridize.errors import InputError, WorkError, first_line


class AtomicDirectory:
    """A directory that appears under its name only when the `with` block ends well; else nothing is
    left of it.

    Leftovers of killed runs for the same name are removed at the start: whoever still works holds a
    lock. WorkError where another command has made, or replaced, the output meanwhile.
    """

    def __init__(self, output: Path, overwrite: bool = False) -> None:
        self.output, self.overwrite = output.resolve(), overwrite  # a link keeps pointing at what it points at

    def __enter__(self) -> Path:
        parent = self.output.parent
        parent.mkdir(parents=True, exist_ok=True)
        self._before = _identity(self.output)
        prefix = f".{self.output.name}.tmp-"
        _clear(parent, prefix)
        self._lock = -1
        while self._lock < 0:  # who clears may find the directory before it is locked
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._lock = _locked(self.path, own=True)
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                _settle(self.path)
                self._place()
            elif isinstance(error, OSError | SafetensorError):  # the disk is full, as a rule
                raise WorkError(f"{self.output} could not be made: {first_line(error)}") from error
        finally:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)

    def _place(self) -> None:
        if _identity(self.output) != self._before:
            raise WorkError(f"{self.output} was made by another command while this one ran; nothing was replaced")
        if self.overwrite and self.output.exists():
            _exchange(self.path, self.output)  # what was there is now in the temporary directory, which goes
        else:
            try:
                os.rename(self.path, self.output)  # fails on a directory that someone else has filled meanwhile
            except OSError as error:
                raise WorkError(f"{self.output} appeared while this command ran; nothing was replaced") from error
        _sync(self.output.parent)


def _identity(path: Path | int) -> tuple[int, int] | None:
    """Changes when another directory or file takes the name."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _clear(parent: Path, prefix: str) -> None:
    """Removes the files and directories of killed runs: those that nobody has locked."""
    for stale in parent.glob(f"{glob.escape(prefix)}*"):
        lock = _locked(stale)
        if lock >= 0:
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)
            os.close(lock)


def _locked(path: Path, own: bool = False) -> int:
    """A descriptor that holds the lock of a file or directory, -1 where it is gone or in use.

    Some network file systems have no such locks: `own`, what was just made here, does without; of
    others nobody knows.
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
    """The lock of a directory that one process writes into, until it is closed. InputError where
    another has it."""
    handle = _locked(path, own=True)
    if handle < 0:
        raise InputError(f"{path} is being written by another process")
    return handle


def write_json(path: Path, value: Any) -> None:
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: Any) -> str:
    """As every JSON file of ours is written."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def clear_leftovers(path: Path) -> None:
    """Of killed writers of a file or directory; who writes it again does so anyway."""
    _clear(path.parent, f".{path.name}.tmp-")


def write_json_atomic(path: Path, value: Any) -> None:
    """The file as a whole or not at all, synced; its directory is made if need be."""
    write_text_atomic(path, json_text(value))


def write_text_atomic(path: Path, text: str) -> None:
    """Likewise."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Likewise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.tmp-"
    _clear(path.parent, prefix)
    handle, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)
    try:
        with contextlib.suppress(OSError):  # else nobody clears it while it is written, which takes a moment
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
    """Gives every file the umask's mode (safetensors and mkdtemp are stricter) and syncs them, then
    the directories."""
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
