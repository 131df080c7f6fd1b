"""The embedded teacher: a small Llama that reasons in steps, with traces for distillation and tasks
for evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path

from hybridize.checkpoint.atomic import AtomicDirectory
from hybridize.checkpoint.writer import check_output

TEACHER, TASKS = (Path(__file__).parent / name for name in ("teacher", "tasks"))


def write_demo(folder: Path, overwrite: bool = False) -> tuple[Path, Path]:
    """Copies the teacher and the tasks to FOLDER/teacher and FOLDER/tasks, whose paths it returns.
    InputError if one exists without `overwrite`, except for a complete copy from an interrupted
    run."""
    targets = [(TEACHER, folder / "teacher"), (TASKS, folder / "tasks")]
    missing = [(source, target) for source, target in targets if overwrite or not _same(source, target)] or targets
    for _, target in missing:
        check_output(target, overwrite, replaceable=("wordproblems.py",))
    for source, target in missing:
        with AtomicDirectory(target, overwrite) as path:
            for file in sorted(source.iterdir()):
                if file.is_file():
                    shutil.copyfile(file, path / file.name)
    return targets[0][1], targets[1][1]


def _same(source: Path, target: Path) -> bool:
    ours = {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    return target.is_dir() and ours == {file.name: file.read_bytes() for file in target.iterdir() if file.is_file()}
