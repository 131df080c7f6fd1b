"""Checks of output files and of the number of processes."""

from __future__ import annotations

from pathlib import Path


def result_file(target: Path, name: str, replaceable: bool, what: str = "results go") -> Path:
    """Path of the file `name` in the folder `target`. InputError if it cannot or must not be
    written.

    replaceable: whether it may exist. what: subject and verb of the message for a target that is a
    file.
    """
    from hybridize.checkpoint.writer import check_writable
    from hybridize.errors import InputError, setting

    path = target / name
    if path.exists() and not replaceable:
        raise InputError(f"{path} exists; give another {setting('output')} or {setting('overwrite')}")
    if target.is_file():
        raise InputError(f"{target} is a file; {what} into a directory")
    check_writable(path)
    return path


def refuse_ranks(command: str) -> None:
    """InputError under torchrun, for a command that runs in a single process."""
    from hybridize.errors import InputError
    from hybridize.runtime.distributed import world_size

    if world_size() > 1:
        raise InputError(f"{command} runs in a single process and does not support torchrun")
