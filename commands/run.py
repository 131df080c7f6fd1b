"""hybridize run"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridize.errors import InputError

from .shared import options as opt
from .shared.flags import expanded
from .shared.output import EXIT_GATE, EXIT_INPUT, EXIT_INTERRUPTED, LINES, RESULT, Output, guarded

if TYPE_CHECKING:
    from hybridize.recipe import Ledger, Step

STDERR = 2  # the file descriptor: what a step prints is no result of ours
# what commands call what they have written
RESULTS = ("output", "scores", "results", "fidelity", "report", "bench", "teacher", "tasks")
MEASURED = ("results.json", "baseline.json", "fidelity.json", "bench.json", "metrics.jsonl", "eval.jsonl", "hybridize.json")
PLACING = ("checkpoint", "checkpoints", "layers", "indices", "form", "folder")  # what a default output follows from
NOT_READ = ("output", "junit", "push_to_hub", "folder")  # parameters that name what is written


@guarded
@expanded
def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file of steps, each a name and a command.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print each step's command, its state and its plan; do nothing.")
    ] = False,
    *,
    speech: opt.Speech,
) -> None:
    """Reads a recipe; runs its steps in order, but for those that are done: same command, same
    inputs, outputs still there.

    Contents decide, not times. A step that was interrupted goes on where it can. A gate that is not
    met (exit 3) ends the run, as does any failure. What is done stands in RECIPE's .steps.json.
    """
    out = speech.output()
    from hybridize.recipe import DONE, Ledger, read_recipe

    steps = read_recipe(recipe)
    parsed = {step.name: _parsed(recipe, step) for step in steps}  # a wrong flag in the last step is said before the first runs
    if dry_run:
        _dry_run(out, steps, parsed, Ledger(recipe))
        return
    done: list[dict[str, Any]] = []
    with _alone(recipe) as lock:
        ledger = Ledger(recipe)
        for number, step in enumerate(steps, 1):
            where = f"[{number}/{len(steps)}] {step.name}"
            LINES.doing(f"{where}: looking at what is there")
            inputs = _inputs(step, parsed[step.name])
            state = ledger.state(step, inputs)
            if state == DONE:
                out.note(f"{where}: done before")
            else:
                out.note(f"{where}: {step.line}")
                ledger.begin(step, inputs)
                _run(out, recipe, step, parsed[step.name], ledger, state, lock)
            done.append({"name": step.name, "skipped": state == DONE})
        ledger.save()  # what was read to find steps done need not be read the next time
    out.result({"recipe": str(recipe), "steps": done}, lambda: print(f"{recipe}: all {len(steps)} steps are done"))


@contextlib.contextmanager
def _alone(recipe: Path) -> Iterator[int]:
    """A lock, as a file descriptor. InputError where another process runs the same recipe, or a
    step of it whose `run` was killed."""
    with recipe.open("rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{recipe} is being run by another process") from error
        yield held.fileno()


def _parsed(recipe: Path, step: Step) -> dict[str, Any]:
    """The step's parameters with their defaults. InputError for a command or a flag that there is
    not."""
    from . import app

    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if step.command not in commands or step.command in ("run", "chat"):
        raise InputError(f"{recipe}: step {step.name!r} runs {step.command!r}, which is no command for a recipe")
    if "--help" in step.arguments:
        raise InputError(f"{recipe}: step {step.name!r} asks for --help, which is nothing to be done")
    try:
        context = commands[step.command].make_context(step.command, list(step.arguments))
    except Exception as error:  # of click's own kinds, which Typer keeps to itself
        raise InputError(f"{recipe}: step {step.name!r}: {error}") from error
    return dict(context.params)


def _inputs(step: Step, params: dict[str, Any]) -> list[Path]:
    """Files and folders that a step reads: what its parameters name and is there, what is looked
    for where they are omitted, and the teacher that a checkpoint names. Of a checkpoint that layers
    are chosen in also its scores; of what is reported on, all measurements below it."""
    found = [path for name, value in params.items() if name not in NOT_READ for path in _paths(value)]
    if {"data", "calibrate"} & set(params):
        found += [path for text in (os.environ.get("HYBRIDIZE_DATA", ""), "traces.jsonl") for path in _paths(text)]
    if "layers" in params:
        found += [scores for path in found if (scores := path / "scores").is_dir()]
    if "teacher" in params and params["teacher"] is None:
        from hybridize.checkpoint.manifest import root_of

        roots = (root_of(path) for path in _paths(params["checkpoint"]))
        found += [Path(os.path.relpath(root)) for root in roots if root is not None and Path(root).is_dir()]
    if step.command == "report":
        found += [file for path in found for name in MEASURED for file in path.rglob(name)]
    return found


def _paths(value: Any) -> Iterator[Path]:
    """What of a parameter's value is a path here: one, or several with shares, as in
    `a.jsonl=.7,b.jsonl`."""
    for one in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(one, str | Path) or not str(one):
            continue
        texts = {str(one), *re.split(r"[,=]", str(one))}
        yield from (Path(text) for text in sorted(texts) if text and len(text) < 4096 and os.path.lexists(text))


def _run(out: Output, recipe: Path, step: Step, params: dict[str, Any], ledger: Ledger, state: str, lock: int) -> None:
    """Runs one step in a process of its own and notes what it read and wrote. Ends the command
    where the step fails."""
    import tempfile

    from hybridize.checkpoint.json_files import read_json
    from hybridize.recipe import BEGUN

    more = ["--quiet"] if out.quiet and "quiet" in params and not params["quiet"] else []
    if state == BEGUN and "resume" in params and not params["resume"]:
        more.append("--resume")
    line, left = ledger.left(step)
    if left and "overwrite" in params and not params["overwrite"] and _same_place(recipe, step, line, params):
        more.append("--overwrite")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "result.json"
        launched = [*step.launch, *_program(step), step.command, *more, *step.arguments]
        LINES.silent = True  # the step speaks for itself
        try:
            code = _process(launched, {**os.environ, RESULT: str(told)}, STDERR if out.as_json else None, lock)
        except OSError as error:
            ledger.refuse(step)
            raise InputError(f"step {step.name!r}: {launched[0]!r} cannot be started: {error.strerror}") from error
        result = read_json(told) if told.exists() else {}
    if code:
        if code == EXIT_INPUT:
            ledger.refuse(step)
        _failed(step, EXIT_GATE if code == 1 and result.get("passed") is False else code)  # torchrun knows but 1
    LINES.wake(out.quiet, f"{step.name}: noting what it wrote")
    written = [Path(result[key]) for key in RESULTS if isinstance(result.get(key), str)]
    if not ledger.end(step, _inputs(step, params), written):
        out.warn(f"what step {step.name!r} reads has changed while it ran: it will be done again")
    out.note(f"{step.name}: {time.monotonic() - began:,.0f} s")


def _same_place(recipe: Path, step: Step, line: str, params: dict[str, Any]) -> bool:
    """Whether a step writes to where it wrote with an earlier `line`: to the same -o, or the same
    place by default."""
    from hybridize.recipe import Step

    if line == step.line:
        return True
    words = shlex.split(line)
    words = words[words.index("hybridize") + 1 :]
    try:
        before = _parsed(recipe, Step(step.name, words[0], tuple(words[1:])))
    except InputError:
        return False
    if words[0] != step.command:
        return False
    if before.get("output") is not None or params.get("output") is not None:
        return bool(before.get("output") == params.get("output"))
    return all(before.get(name) == params.get(name) for name in PLACING)


def _process(command: list[str], environment: dict[str, str], stdout: int | None, lock: int) -> int:
    """Runs a command to its end and returns its exit code. An interrupt is passed on, once each,
    and the command may take its time to save what it has; a third one kills it. It holds the
    recipe's lock as long as it lives."""
    import subprocess

    asked = 0
    # in a group of its own, so that a terminal's Ctrl-C comes through us alone; such a group may
    # not read from the terminal
    started = {"stdin": subprocess.DEVNULL, "stdout": stdout, "process_group": 0, "pass_fds": [lock]}
    with subprocess.Popen(command, env=environment, **started) as process:  # type: ignore[call-overload]
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt as error:
                asked += 1
                process.send_signal(error.args[0] if error.args else signal.SIGINT)
                if asked > 2:
                    os.killpg(process.pid, signal.SIGKILL)


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
    """Each step's line and state, and for those that train their plan, also of checkpoints that are
    not there yet."""
    from hybridize.recipe import DONE

    from .shared.planning import Planned

    planned, told, upstream = Planned(out), list[dict[str, Any]](), True
    for number, step in enumerate(steps, 1):
        state = ledger.state(step, _inputs(step, parsed[step.name]))
        shown = f"{state}, unless what comes before changes" if state == DONE and not upstream else state
        upstream = upstream and state == DONE
        if not out.as_json and not out.quiet:
            print(f"[{number}/{len(steps)}] {step.name} ({shown}): {step.line}")
        plan = None if state == DONE else planned.of(step.command, parsed[step.name], _ranks(step.launch))
        planned.follow(step.command, parsed[step.name])
        told.append({"name": step.name, "line": step.line, "state": state, "plan": plan})
    out.result({"steps": told})


def _ranks(launch: tuple[str, ...]) -> int:
    """How many processes a launcher such as torchrun starts."""
    text = " ".join(launch)
    counts = [re.search(rf"--{name}[ =](?:\d+:)?(\d+)", text.replace("_", "-")) for name in ("nproc-per-node", "nnodes")]
    return math.prod(int(found[1]) for found in counts if found)
