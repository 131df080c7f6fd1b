"""A chain of commands in a file, and which of its steps are done: by the contents of what they read and wrote.

    steps:
      - name: half
        run: replace teacher --layers 15 -o h15
      - name: train
        run: distill h15 --tokens 1000000000 -o h15-kd
        launch: torchrun --nproc-per-node 8 --no-python

A step is done if the same command once ended well, what it read is still the same, and what it wrote is still there as it
was. What is known of that stands in a ledger beside the recipe. Knows nothing of the commands themselves.
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
from hybridize.checkpoint.json_files import read_json
from hybridize.errors import InputError, first_line

FORMAT = 1
KEYS = ("name", "run", "launch")
DONE, NEW, BEGUN, STALE = "done", "to do", "begun", "to be done again"


@dataclass(frozen=True)
class Step:
    """command: `replace`; arguments: what follows it; launch: what goes before `hybridize`, empty for nothing."""

    name: str
    command: str
    arguments: tuple[str, ...]
    launch: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        return shlex.join([*self.launch, "hybridize", self.command, *self.arguments])


def read_recipe(path: Path) -> list[Step]:
    """The steps of a YAML file. InputError naming the file where it is none."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is not valid YAML: {first_line(error)}") from error
    listed = found.get("steps") if isinstance(found, dict) else None
    if not isinstance(listed, list) or not listed or set(found) != {"steps"}:
        raise InputError(f"{path} is no recipe: it must have `steps`, a list, and nothing else")
    steps = [_step(path, number, entry) for number, entry in enumerate(listed, 1)]
    names = [step.name for step in steps]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: two steps are called {name!r}")
    return steps


def _step(path: Path, number: int, entry: Any) -> Step:
    where = f"{path}: step {number}"
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise InputError(f"{where} must have a name and a line to run, both text")
    unknown, lacking = sorted(set(entry) - set(KEYS)), [key for key in KEYS[:2] if not entry.get(key, "").strip()]
    if unknown or lacking:
        raise InputError(f"{where} has a key {unknown[0]!r}" if unknown else f"{where} has no {lacking[0]!r}")
    try:
        words, launch = shlex.split(entry["run"], comments=True), shlex.split(entry.get("launch", ""))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    words = words[1:] if words[:1] == ["hybridize"] else words
    if not words:
        raise InputError(f"{where} has nothing to run")
    return Step(entry["name"].strip(), words[0], tuple(words[1:]), tuple(launch))


class Ledger:
    """What is known of the steps of one recipe: STEM.steps.json beside it, written after each change."""

    def __init__(self, recipe: Path) -> None:
        self.path = recipe.with_name(f"{recipe.stem}.steps.json")
        self.steps: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            found = read_json(self.path)
            if found.get("format") != FORMAT or not all(isinstance(found.get(key), dict) for key in ("steps", "files")):
                raise InputError(f"{self.path} is not a ledger of format {FORMAT}; remove it to run all steps again")
            self.steps, self.files = found["steps"], found["files"]

    def state(self, step: Step, inputs: Iterable[Path]) -> str:
        """One of DONE, NEW, BEGUN and STALE; see the module. InputError where what a step wrote was changed by somebody else,
        since it would be lost if the step ran again."""
        known, now = self.steps.get(step.name), self.contents(inputs)
        if known is None or known.get("outputs") == {}:  # what writes nothing, as doctor and verify, is there to be run
            return NEW
        written = known.get("outputs")
        same = known["line"] == step.line and known["inputs"] == now
        if written is None:
            return BEGUN if same else STALE
        there = self.contents(Path(path) for path in written)
        if same and there == written:
            return DONE
        for path, content in there.items():
            if content is not None and content != written[path]:
                raise InputError(
                    f"{path} is not as step {step.name!r} wrote it, and would be written again; move it away, or remove the "
                    f"step from {self.path}"
                )
        return STALE

    def begin(self, step: Step, inputs: Iterable[Path]) -> None:
        self.steps[step.name] = {"line": step.line, "inputs": self.contents(inputs)}
        self._write()

    def end(self, step: Step, inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
        self.steps[step.name] = {"line": step.line, "inputs": self.contents(inputs), "outputs": self.contents(outputs)}
        self._write()

    def _write(self) -> None:
        write_json_atomic(self.path, {"format": FORMAT, "steps": self.steps, "files": self.files})

    def contents(self, paths: Iterable[Path]) -> dict[str, str | None]:
        """Path -> hash of what is there, None for nothing. Of a folder its own files count: what lies in folders below it
        (scores, eval, states) is another step's."""
        return {str(path): self._content(path) for path in sorted(set(paths))}

    def _content(self, path: Path) -> str | None:
        if path.is_file():
            return self._file(path)
        if not path.is_dir():
            return None
        files = sorted(file for file in path.iterdir() if file.is_file())
        return hashlib.sha256(json.dumps([(file.name, self._file(file)) for file in files]).encode()).hexdigest()

    def _file(self, path: Path) -> str:
        """sha256 of a file; it is not read again as long as size and times are the same."""
        stat, key = path.stat(), str(path.resolve())
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        if self.files.get(key, {}).get("mark") != mark:
            with path.open("rb") as opened:
                self.files[key] = {"mark": mark, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
        return str(self.files[key]["sha256"])
