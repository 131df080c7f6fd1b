"""Reads files of rows, whose format is detected from their content: JSON lines, a JSON list,
parquet or plain text, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from hybridize.errors import InputError, first_line

KNOWN = (".jsonl", ".json", ".parquet", ".txt", ".gz", ".zst", ".bz2", ".xz")
_SPOOL = 64 << 20  # bytes; a larger unpacked file is kept on disk
_NAMED = {  # formats that are not supported, by their first bytes
    codecs.BOM_UTF32_LE: "UTF-32 text; save it as UTF-8", codecs.BOM_UTF32_BE: "UTF-32 text; save it as UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16 text; save it as UTF-8", codecs.BOM_UTF16_BE: "UTF-16 text; save it as UTF-8",
    b"PK\x03\x04": "a zip archive (or a spreadsheet); unpack it first", b"ARROW1": "an Arrow file; save it as parquet",
    b"\x89HDF": "an HDF5 file; save it as parquet", b"SQLite format 3": "a database; save it as parquet",
}  # fmt: skip


@runtime_checkable
class Labelled(Protocol):
    """Rows that name themselves, as file:line for example."""

    def where(self, index: int) -> str: ...


def open_rows(path: Path) -> tuple[Sequence[Any], str]:
    """The rows of a file, and the word before a row's number in its name ("" for lines).

    Supported are JSON lines (blank lines do not count), a JSON list of objects, parquet, and text,
    which is one `text` row; each plain or compressed by gzip, bzip2, xz or zstd (parquet only
    plain); with or without a byte order mark. InputError naming the format of another file.
    """
    with path.open("rb") as file:
        head = file.read(16)
    unpack = _unpacker(path, head)
    inner = path.with_suffix("") if unpack else path
    source = _spooled(path, unpack) if unpack else path.open("rb")
    source.seek(0)
    head = source.read(4096)
    source.seek(0)
    for magic, what in _NAMED.items():
        if head.startswith(magic):
            raise InputError(f"{path} is {what}")
    if head.startswith(b"PAR1") or inner.suffix == ".parquet":
        return Table(_parquet(path, source if unpack else None)), "row "
    if inner.suffix == ".txt":
        text = _text(path, source.read())
        if "\0" in text:
            raise InputError(f"{path} has NUL characters, as UTF-16 without a byte order mark does; save it as UTF-8")
        return [{"text": text}] if text.strip() else [], ""
    listed = _listed(path, source, head)
    return (listed, "row ") if listed is not None else (Lines(path, source, None if unpack else path), "")


def _unpacker(path: Path, head: bytes) -> Callable[[Any], Any] | None:
    """The function that opens a compressed file for reading, None for an uncompressed one."""
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            from compression.zstd import ZstdFile  # type: ignore[import-not-found, unused-ignore]  # from Python 3.14 on

            return ZstdFile  # type: ignore[no-any-return, unused-ignore]
        except ImportError:
            pass
        try:
            import zstandard
        except ImportError as error:
            raise InputError(f"{path} is compressed with zstd: unpack it first (zstd -d), or pip install zstandard") from error
        return lambda file: zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    for magic, opened in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open)):
        if head.startswith(magic):
            return opened
    return None


def _spooled(path: Path, unpack: Callable[[Any], Any]) -> IO[bytes]:
    """The unpacked content, in a temporary file. InputError if it cannot be unpacked."""
    target: Any = tempfile.SpooledTemporaryFile(_SPOOL)  # noqa: SIM115  (the caller gets it)
    try:
        with path.open("rb") as packed, unpack(packed) as plain:
            shutil.copyfileobj(plain, target, 1 << 20)
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise InputError(f"{path} cannot be unpacked: {first_line(error)}") from error
    except Exception as error:  # zstandard raises its own
        if type(error).__name__ != "ZstdError":
            raise
        raise InputError(f"{path} cannot be unpacked: {first_line(error)}") from error
    return target  # type: ignore[no-any-return]


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def _parquet(path: Path, unpacked: IO[bytes] | None) -> Any:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    if unpacked is not None:
        raise InputError(f"{path} is a compressed parquet file; unpack it first")
    try:
        return Dataset.from_parquet(str(path))
    except Exception as error:  # datasets wraps what pyarrow raises
        raise InputError(f"{path} is not a readable parquet file: {first_line(error)}") from error


def _listed(path: Path, source: IO[bytes], head: bytes) -> list[Any] | None:
    """The rows of a file that is one JSON list of objects; None for a file of JSON lines."""
    opening = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if opening not in (b"[", b"{"):
        return None
    first = source.readline().removeprefix(codecs.BOM_UTF8)
    source.seek(0)
    try:
        value = json.loads(first)
        if opening == b"{" or not all(isinstance(part, dict) for part in value):
            return None
    except ValueError:  # the value continues in the next line, or is not JSON
        if opening == b"{" and first.strip() != b"{":
            return None
    except RecursionError:
        return None
    content = _text(path, source.read())
    source.seek(0)
    try:
        value = json.loads(content)
    except RecursionError:
        return None
    except ValueError as error:
        if first.strip() not in (b"[", b"{"):
            return None  # a broken line, whose number the reader of lines will report
        raise InputError(f"{path} is not JSON: {error}") from error
    if isinstance(value, dict):
        raise InputError(
            f"{path} is one JSON object over several lines; rows must be one object per line, or a list of objects"
        )
    return value if isinstance(value, list) else None


class Table(Sequence[Any]):
    """The rows of an Arrow table, without keys whose value is null: typed columns give every object
    all keys of the column."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return _pruned(self._rows[index])


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(part) for key, part in value.items() if part is not None}
    return [_pruned(part) for part in value] if isinstance(value, list) else value


class Lines(Sequence[Any]):
    """The lines of a JSON-lines file that are not blank, each read from disk on access; 24 bytes of
    memory per line.

    watched: None for a temporary file; otherwise it is an InputError if the file changes while in
    use.
    """

    def __init__(self, path: Path, source: Any, watched: Path | None) -> None:
        self.path, self._file, self._watched = path, source, watched is not None
        if isinstance(source, tempfile.SpooledTemporaryFile):
            source.rollover()  # a real file, for pread
        self._begins, self._ends, self._numbers = array("q"), array("q"), array("q")
        self._before = self._state()
        at = 0
        for number, line in enumerate(self._file, start=1):
            marked = number == 1 and line.startswith(codecs.BOM_UTF8)
            begin = at + len(codecs.BOM_UTF8) if marked else at
            at += len(line)
            if line.removeprefix(codecs.BOM_UTF8 if marked else b"").strip():
                self._begins.append(begin)
                self._ends.append(at)
                self._numbers.append(number)

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def __len__(self) -> int:
        return len(self._ends)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._numbers[index]}"

    def __getitem__(self, index: Any) -> Any:
        begin, end = self._begins[index], self._ends[index]
        line = os.pread(self._file.fileno(), end - begin, begin)  # thread-safe: uses no shared file position
        if self._watched and self._state() != self._before:
            raise InputError(f"{self.path} has changed while it was in use")
        try:
            return json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where(index)} is not UTF-8 text: {error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.where(index)} is not JSON: {error}") from error
