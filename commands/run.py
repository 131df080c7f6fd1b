"""hybridize run"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridize.errors import InputError

from . import options as opt
from .output import EXIT_GATE, EXIT_INPUT, EXIT_INTERRUPTED, LINES, RESULT, Output, guarded

if TYPE_CHECKING:
    from hybridize.recipe import Ledger, Step

STDERR = 2  # the file descriptor: what a step prints is no result of ours
RESULTS = (
    "output",
    "scores",
    "results",
    "fidelity",
    "report",
    "bench",
    "teacher",
    "tasks",
)  # what commands call what they have written
NOT_READ = ("output", "junit", "push_to_hub")  # parameters that name what is written


@guarded
def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file of steps, each a name and a command.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print each step's command, its state and its plan; do nothing.")
    ] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Reads a recipe; runs its steps in order, but for those that are done: same command, same inputs, outputs still there.

    Contents decide, not times. A step that was interrupted goes on where it can. A gate that is not met (exit 3) ends the run,
    as does any failure. What is done stands in RECIPE's .steps.json.
    """
    out = Output(as_json, quiet)
    from hybridize.recipe import DONE, Ledger, read_recipe

    steps = read_recipe(recipe)
    parsed = {step.name: _parsed(recipe, step) for step in steps}  # a wrong flag in the last step is said before the first runs
    ledger = Ledger(recipe)
    if dry_run:
        _dry_run(out, steps, parsed, ledger)
        return
    done: list[dict[str, Any]] = []
    for number, step in enumerate(steps, 1):
        where = f"[{number}/{len(steps)}] {step.name}"
        LINES.doing(f"{where}: looking at what is there")
        state = ledger.state(step, _inputs(parsed[step.name]))
        if state == DONE:
            out.note(f"{where}: done before")
        else:
            out.note(f"{where}: {step.line}")
            _run(out, step, parsed[step.name], ledger, state)
        done.append({"name": step.name, "skipped": state == DONE})
    out.result({"recipe": str(recipe), "steps": done}, lambda: print(f"{recipe}: all {len(steps)} steps are done"))


def _parsed(recipe: Path, step: Step) -> dict[str, Any]:
    """The step's parameters with their defaults. InputError for a command or a flag that there is not."""
    from . import app

    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if step.command not in commands or step.command in ("run", "chat"):
        raise InputError(f"{recipe}: step {step.name!r} runs {step.command!r}, which is no command for a recipe")
    try:
        context = commands[step.command].make_context(step.command, list(step.arguments))
    except Exception as error:  # of click's own kinds, which Typer keeps to itself
        raise InputError(f"{recipe}: step {step.name!r}: {error}") from error
    return dict(context.params)


def _inputs(params: dict[str, Any]) -> list[Path]:
    """Files and folders that a step reads: what its parameters name and is there, and what is looked for where they are
    omitted. Of a checkpoint that layers are chosen in, also its scores."""
    found = [path for name, value in params.items() if name not in NOT_READ for path in _paths(value)]
    if {"data", "calibrate"} & set(params):
        found += [path for text in (os.environ.get("HYBRIDIZE_DATA", ""), "traces.jsonl") for path in _paths(text)]
    if "layers" in params:
        found += [scores for path in found if (scores := path / "scores").is_dir()]
    return found


def _paths(value: Any) -> Iterator[Path]:
    """What of a parameter's value is a path here: one, or several with shares, as in `a.jsonl=.7,b.jsonl`."""
    for one in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(one, str | Path) or not str(one):
            continue
        texts = {str(one), *re.split(r"[,=]", str(one))}
        yield from (Path(text) for text in sorted(texts) if text and len(text) < 4096 and os.path.lexists(text))


def _run(out: Output, step: Step, params: dict[str, Any], ledger: Ledger, state: str) -> None:
    """Runs one step in a process of its own and notes what it read and wrote. Ends the command where the step fails."""
    from hybridize.recipe import BEGUN, STALE

    more = ["--quiet"] if out.quiet and "quiet" in params and not params["quiet"] else []
    if state == BEGUN and "resume" in params and not params["resume"]:
        more.append("--resume")
    if state in (BEGUN, STALE) and "overwrite" in params and not params["overwrite"]:
        more.append("--overwrite")  # what is there is this step's own: the ledger has looked
    ledger.begin(step, _inputs(params))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "result.json"
        launched = [*step.launch, *_program(step), step.command, *step.arguments, *more]
        LINES.silent = True  # the step speaks for itself
        try:
            code = subprocess.run(
                launched, env={**os.environ, RESULT: str(told)}, check=False, stdout=STDERR if out.as_json else None
            ).returncode
        except FileNotFoundError as error:
            raise InputError(f"step {step.name!r}: there is no program {launched[0]!r}") from error
        LINES.silent = out.quiet
        if code:
            _failed(step, code)
        result = json.loads(told.read_text(encoding="utf-8")) if told.exists() else {}
    written = [Path(result[key]) for key in RESULTS if isinstance(result.get(key), str)]
    ledger.end(step, _inputs(params), written)
    out.note(f"{step.name}: {time.monotonic() - began:,.0f} s")


def _program(step: Step) -> list[str]:
    """This very program; under a launcher, which starts it on every rank, by name."""
    return ["hybridize"] if step.launch else [sys.executable, "-m", "hybridize"]


def _failed(step: Step, code: int) -> None:
    """Ends the command with the step's own exit code."""
    if code == EXIT_GATE:
        LINES.say(f"error: the gate of step {step.name!r} is not met; no later step is run")
    elif code == EXIT_INTERRUPTED:
        LINES.say(f"error: step {step.name!r} was interrupted; the same command goes on with it")
    elif code < 0:
        LINES.say(f"error: step {step.name!r} was killed by signal {-code}; the same command goes on with it")
        raise typer.Exit(1)
    else:
        LINES.say(f"error: step {step.name!r} failed with exit code {code}")
    raise typer.Exit(code if code in (EXIT_GATE, EXIT_INTERRUPTED, EXIT_INPUT) else 1)


def _dry_run(out: Output, steps: list[Step], parsed: dict[str, dict[str, Any]], ledger: Ledger) -> None:
    """Each step's line and state, and for those that train their plan, also of checkpoints that are not there yet."""
    from hybridize.recipe import DONE

    from .planning import Planned

    planned, told, upstream = Planned(out), list[dict[str, Any]](), True
    for number, step in enumerate(steps, 1):
        state = ledger.state(step, _inputs(parsed[step.name]))
        if state == DONE and not upstream:
            state = "to be done again"  # something before it will be
        upstream = upstream and state == DONE
        if not out.as_json and not out.quiet:
            print(f"[{number}/{len(steps)}] {step.name} ({state}): {step.line}")
        plan = None if state == DONE else planned.of(step.command, parsed[step.name])
        planned.follow(step.command, parsed[step.name])
        told.append({"name": step.name, "line": step.line, "state": state, "plan": plan})
    out.result({"steps": told})
