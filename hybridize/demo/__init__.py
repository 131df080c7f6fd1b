"""The embedded teacher: a small Llama that reasons in steps, with the traces to distill on and the tasks to measure it by."""

from __future__ import annotations

import shutil
from pathlib import Path

from hybridize.checkpoint.writer import AtomicDirectory, check_output

TEACHER, TASKS = (Path(__file__).parent / name for name in ("teacher", "tasks"))


def write_demo(folder: Path, overwrite: bool = False) -> tuple[Path, Path]:
    """Copies both to FOLDER/teacher and FOLDER/tasks. InputError when one is there already and not `overwrite`."""
    targets = [(TEACHER, folder / "teacher"), (TASKS, folder / "tasks")]
    for _, target in targets:
        check_output(target, overwrite, replaceable=("wordproblems.py",))
    for source, target in targets:
        with AtomicDirectory(target, overwrite) as path:
            for file in sorted(source.iterdir()):
                if file.is_file():
                    shutil.copyfile(file, path / file.name)
    return targets[0][1], targets[1][1]
