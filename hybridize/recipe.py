"""A chain of commands in a file, and which of its steps are done, judged by the contents of their
inputs and outputs.

    steps:
      - name: half
        run: replace teacher --layers 15 -o h15
      - name: train
        run: distill h15 --tokens 1000000000 -o h15-kd
        launch: torchrun --nproc-per-node 8 --no-python

A step is done if the same command has succeeded before and its inputs and outputs are unchanged
since. A ledger next to the recipe records this. The module is independent of the commands.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.checkpoint.atomic import write_json_atomic
from hybridize.checkpoint.json_files import load_yaml, read_json
from hybridize.errors import InputError, first_line

FORMAT = 1
KEYS = ("name", "run", "launch")
DONE, NEW, BEGUN, STALE = "done", "to do", "unfinished", "outdated"
LEDGER = ".steps.json"


@dataclass(frozen=True)
class Step:
    """One step. command: its name, for example `replace`; arguments: those of the command; launch:
    words before `hybridize`, for example of torchrun, possibly none."""

    name: str
    command: str
    arguments: tuple[str, ...]
    launch: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        return shlex.join([*self.launch, "hybridize", self.command, *self.arguments])


def read_recipe(path: Path) -> list[Step]:
    """The steps of a YAML file. InputError naming the file if it is not a recipe."""
    import yaml

    try:
        found = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is not valid YAML: {first_line(error)}") from error
    listed = found.get("steps") if isinstance(found, dict) else None
    if not isinstance(listed, list) or not listed or set(found) != {"steps"}:
        raise InputError(f"{path} is not a recipe: it must have the key `steps`, a list, and no other")
    steps = [_step(path, number, entry) for number, entry in enumerate(listed, 1)]
    names = [step.name for step in steps]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: two steps have the name {name!r}")
    return steps


def _step(path: Path, number: int, entry: Any) -> Step:
    where = f"{path}: step {number}"
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r}; it must have the keys `name` and `run`")
    for key, value in entry.items():
        if not isinstance(value, str):
            raise InputError(f"{where}: {key} is {value!r}, which YAML does not read as text; put it in quotes")
    unknown, lacking = sorted(set(entry) - set(KEYS)), [key for key in KEYS[:2] if not entry.get(key, "").strip()]
    if unknown or lacking:
        raise InputError(f"{where} has the unknown key {unknown[0]!r}" if unknown else f"{where} has no {lacking[0]!r}")
    try:
        words, launch = shlex.split(entry["run"]), shlex.split(entry.get("launch", ""))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    words = words[1:] if words[:1] == ["hybridize"] else words
    if not words:
        raise InputError(f"{where} has nothing to run")
    return Step(entry["name"].strip(), words[0], tuple(words[1:]), tuple(launch))


class Ledger:
    """The record of a recipe's steps: STEM.steps.json next to it, written after each change.

    For each step: `done`, its line, inputs and outputs when it last succeeded, and `begun`, line
    and inputs if it was started since. Inputs and outputs are paths with content hashes.
    """

    def __init__(self, recipe: Path) -> None:
        self.path = recipe.with_name(f"{recipe.stem}{LEDGER}")
        self.steps: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            found = read_json(self.path)
            if found.get("format") != FORMAT or not _is_whole(found):
                raise InputError(f"{self.path} is not a ledger of format {FORMAT}; remove it to run all steps again")
            self.steps, self.files = found["steps"], found["files"]

    def state(self, step: Step, inputs: Iterable[Path]) -> str:
        """One of DONE, NEW, BEGUN and STALE; see the module. InputError if an output has changed
        since the step wrote it and the step is to run again, since the change would be lost."""
        known, now = self.steps.get(step.name, {}), {"line": step.line, "inputs": self.contents(inputs)}
        begun, done = known.get("begun"), known.get("done")
        if begun == now:  # it may have finished without a record of it: the command itself finds out
            return BEGUN
        if done is None or not done["outputs"]:  # a step without outputs (doctor, verify) always runs
            return NEW if begun is None else STALE
        there = self.contents(Path(path) for path in done["outputs"])
        if {key: done[key] for key in now} == now and there == done["outputs"]:
            return DONE
        for path, content in there.items():
            if content is not None and content != done["outputs"][path]:
                raise InputError(
                    f"{path} has changed since step {step.name!r} wrote it, and would be overwritten; move it away, or remove "
                    f"the step from {self.path}"
                )
        return STALE

    def left(self, step: Step) -> tuple[str, list[Path]]:
        """The line of a step's last success, and those of its outputs that are unchanged since."""
        done = self.steps.get(step.name, {}).get("done")
        if done is None:
            return "", []
        there = self.contents(Path(path) for path in done["outputs"])
        return done["line"], [Path(path) for path, content in there.items() if content == done["outputs"][path]]

    def begin(self, step: Step, inputs: Iterable[Path]) -> None:
        known = self.steps.setdefault(step.name, {})
        known["begun"] = {"line": step.line, "inputs": self.contents(inputs)}
        self.save()

    def refuse(self, step: Step) -> None:
        """Deletes the record that the step was started, if its command refused to start."""
        self.steps[step.name].pop("begun", None)
        self.save()

    def end(self, step: Step, inputs: Iterable[Path], outputs: Iterable[Path]) -> bool:
        """Records the step's outputs, and its inputs as they were at the start. Returns whether the
        inputs are still the same."""
        begun = self.steps[step.name].pop("begun")
        self.steps[step.name]["done"] = {**begun, "outputs": self.contents(outputs)}
        self.save()
        now = self.contents(inputs)
        return all(now.get(path) == content for path, content in begun["inputs"].items())

    def save(self) -> None:
        write_json_atomic(self.path, {"format": FORMAT, "steps": self.steps, "files": self.files})

    def contents(self, paths: Iterable[Path]) -> dict[str, str | None]:
        """Path -> content hash, None if nothing is there. For a directory only the files directly
        in it count: its subdirectories (scores, eval, states) belong to other steps."""
        return {str(path): self._content(path) for path in sorted(set(paths))}

    def _content(self, path: Path) -> str | None:
        if path.is_file():
            return self._file(path)
        if not path.is_dir():
            return None
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.endswith(LEDGER))
        return hashlib.sha256(json.dumps([(file.name, self._file(file)) for file in files]).encode()).hexdigest()

    def _file(self, path: Path) -> str:
        """sha256 of a file; not computed again while size, modification time and inode are the
        same."""
        stat, key = path.stat(), str(path.resolve())
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        if self.files.get(key, {}).get("mark") != mark:
            with path.open("rb") as opened:
                self.files[key] = {"mark": mark, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
        return str(self.files[key]["sha256"])


def _is_whole(found: dict[str, Any]) -> bool:
    """Whether a ledger has all keys that are used, with values of the right types."""
    steps, files = found.get("steps"), found.get("files")
    if not isinstance(steps, dict) or not isinstance(files, dict):
        return False
    parts = [(part, key) for known in steps.values() if isinstance(known, dict) for key, part in known.items()]
    wanted = {"begun": {"line": str, "inputs": dict}, "done": {"line": str, "inputs": dict, "outputs": dict}}
    return (
        all(isinstance(known, dict) for known in steps.values())
        and all(isinstance(known, dict) and isinstance(known.get("sha256"), str) for known in files.values())
        and all(
            key in wanted and isinstance(part, dict) and all(isinstance(part.get(k), kind) for k, kind in wanted[key].items())
            for part, key in parts
        )
    )
