"""Opening what a command line names: checkpoints, their teachers, data and chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridize.checkpoint.reader import CheckpointReader


def open_checkpoint(name: str, revision: str | None = None) -> CheckpointReader:
    """A checkpoint of a supported family; InputError says what is wrong with it."""
    from hybridize.checkpoint.reader import CheckpointReader, resolve_checkpoint
    from hybridize.surgery.teacher import family_of

    reader = CheckpointReader(resolve_checkpoint(name, revision))
    family_of(reader.config, str(reader.path))
    return reader


def teacher_of(source: CheckpointReader, name: str, teacher: str | None) -> CheckpointReader:
    """--teacher, else the manifest's root, else the checkpoint itself where it is no hybrid."""
    from hybridize.checkpoint.manifest import root_of
    from hybridize.errors import InputError

    if teacher is not None:
        return open_checkpoint(teacher)
    root = root_of(source.path)
    if root is not None:
        try:
            return open_checkpoint(root)
        except InputError as error:
            raise InputError(f"the teacher of {name} cannot be opened ({error}); say where it is with --teacher") from error
    if source.config.get("model_type") == "hybridize":
        raise InputError(f"{name} does not say which teacher it comes from; give --teacher")
    return source


def data_for(data: str | None, teacher: CheckpointReader | None) -> str:
    from hybridize.distillation.rows import find_data

    return find_data(data, None if teacher is None else teacher.path)


def template_text(path: Path | None) -> str | None:
    from hybridize.errors import InputError

    if path is None:
        return None
    if not path.is_file():
        raise InputError(f"--chat-template {path} does not exist")
    return path.read_text(encoding="utf-8")
