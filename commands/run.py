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

STDERR = 2  # file descriptor: with --json the output of steps goes there
# keys under which commands report the paths that they have written
RESULTS = ("output", "scores", "results", "fidelity", "report", "bench", "teacher", "tasks")
MEASURED = ("results.json", "baseline.json", "fidelity.json", "bench.json", "metrics.jsonl", "eval.jsonl", "hybridize.json")
PLACING = ("checkpoint", "checkpoints", "layers", "indices", "form", "folder")  # parameters that determine the default output
NOT_READ = ("output", "junit", "push_to_hub", "folder")  # parameters that name outputs


@guarded
@expanded
def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file of steps, each with a name and a command.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print each step's command, its state and its plan; do nothing.")
    ] = False,
    *,
    speech: opt.Speech,
) -> None:
    """Reads a recipe; runs its steps in order, except those already done: same command, same
    inputs, outputs still present.

    Inputs and outputs are compared by content, not by time. An interrupted step is continued if
    possible. A failed gate (exit 3) ends the run, as does any other failure. The steps done are
    recorded in RECIPE's .steps.json.
    """
    out = speech.output()
    from hybridize.recipe import DONE, Ledger, read_recipe

    steps = read_recipe(recipe)
    parsed = {step.name: _parsed(recipe, step) for step in steps}  # reports a wrong flag before any step runs
    if dry_run:
        _dry_run(out, steps, parsed, Ledger(recipe))
        return
    done: list[dict[str, Any]] = []
    with _alone(recipe) as lock:
        ledger = Ledger(recipe)
        for number, step in enumerate(steps, 1):
            where = f"[{number}/{len(steps)}] {step.name}"
            LINES.doing(f"{where}: checking inputs and outputs")
            inputs = _inputs(step, parsed[step.name])
            state = ledger.state(step, inputs)
            if state == DONE:
                out.note(f"{where}: already done")
            else:
                out.note(f"{where}: {step.line}")
                ledger.begin(step, inputs)
                _run(out, recipe, step, parsed[step.name], ledger, state, lock)
            done.append({"name": step.name, "skipped": state == DONE})
        ledger.save()  # keeps the file hashes, so that the next run need not read the files
    out.result({"recipe": str(recipe), "steps": done}, lambda: print(f"{recipe}: all {len(steps)} steps are done"))


@contextlib.contextmanager
def _alone(recipe: Path) -> Iterator[int]:
    """Locks the recipe; yields the lock as a file descriptor. InputError if another process runs
    the same recipe, such as a step whose `run` was killed."""
    with recipe.open("rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another process is running {recipe}") from error
        yield held.fileno()


def _parsed(recipe: Path, step: Step) -> dict[str, Any]:
    """The step's parameters, including defaults. InputError for an unknown command or flag."""
    from . import app

    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if step.command not in commands or step.command in ("run", "chat"):
        raise InputError(f"{recipe}: step {step.name!r} runs {step.command!r}, which is not a command for recipes")
    if "--help" in step.arguments:
        raise InputError(f"{recipe}: step {step.name!r} has --help, which does nothing in a recipe")
    try:
        context = commands[step.command].make_context(step.command, list(step.arguments))
    except Exception as error:  # click's exceptions, which are private in Typer
        raise InputError(f"{recipe}: step {step.name!r}: {error}") from error
    return dict(context.params)


def _inputs(step: Step, params: dict[str, Any]) -> list[Path]:
    """Files and folders that a step reads: existing paths in its parameters, the default data, and
    the teacher of a checkpoint. If layers are chosen by scores, also the score files; for `report`,
    all measurements below its folders."""
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
    """The existing paths in a parameter's value, which is one path or a list with shares such as
    `a.jsonl=.7,b.jsonl`."""
    for one in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(one, str | Path) or not str(one):
            continue
        texts = {str(one), *re.split(r"[,=]", str(one))}
        yield from (Path(text) for text in sorted(texts) if text and len(text) < 4096 and os.path.lexists(text))


def _run(out: Output, recipe: Path, step: Step, params: dict[str, Any], ledger: Ledger, state: str, lock: int) -> None:
    """Runs one step in a process of its own and records what it read and wrote. Ends the command if
    the step fails."""
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
        file = Path(folder) / "result.json"
        launched = [*step.launch, *_program(step), step.command, *more, *step.arguments]
        LINES.silent = True  # the step has its own output
        try:
            code = _process(launched, {**os.environ, RESULT: str(file)}, STDERR if out.as_json else None, lock)
        except OSError as error:
            ledger.refuse(step)
            raise InputError(f"step {step.name!r}: {launched[0]!r} cannot be started: {error.strerror}") from error
        result = read_json(file) if file.exists() else {}
    if code:
        if code == EXIT_INPUT:
            ledger.refuse(step)
        _failed(step, EXIT_GATE if code == 1 and result.get("passed") is False else code)  # torchrun itself always exits with 1
    LINES.wake(out.quiet, f"{step.name}: recording its outputs")
    written = [Path(result[key]) for key in RESULTS if isinstance(result.get(key), str)]
    if not ledger.end(step, _inputs(step, params), written):
        out.warn(f"inputs of step {step.name!r} changed while it ran; the next run repeats it")
    out.note(f"{step.name}: {time.monotonic() - began:,.0f} s")


def _same_place(recipe: Path, step: Step, line: str, params: dict[str, Any]) -> bool:
    """Whether a step has the same output as with its earlier command `line`: the same -o, or the
    same default."""
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
    """Runs a command and returns its exit code. The first two interrupts are passed on to it, so
    that it can save its state; the third one kills it. The process inherits the recipe's lock."""
    import subprocess

    interrupts = 0
    # a process group of its own, so that a terminal's Ctrl-C reaches it only through this process;
    # such a group cannot read from the terminal
    options = {"stdin": subprocess.DEVNULL, "stdout": stdout, "process_group": 0, "pass_fds": [lock]}
    with subprocess.Popen(command, env=environment, **options) as process:  # type: ignore[call-overload]
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt as error:
                interrupts += 1
                process.send_signal(error.args[0] if error.args else signal.SIGINT)
                if interrupts > 2:
                    os.killpg(process.pid, signal.SIGKILL)


def _program(step: Step) -> list[str]:
    """Command line of this program; by name under a launcher such as torchrun."""
    return ["hybridize"] if step.launch else [sys.executable, "-m", "hybridize"]


def _failed(step: Step, code: int) -> None:
    """Ends the command with the step's own exit code."""
    if code == EXIT_GATE:
        LINES.say(f"error: the gate of step {step.name!r} is not met; later steps are not run")
    elif code == EXIT_INTERRUPTED:
        LINES.say(f"error: step {step.name!r} was interrupted; run the same command again to continue")
    elif code < 0:
        LINES.say(f"error: step {step.name!r} was killed by signal {-code}; run the same command again to continue")
        raise typer.Exit(1)
    else:
        LINES.say(f"error: step {step.name!r} failed with exit code {code}")
    raise typer.Exit(code if code in (EXIT_GATE, EXIT_INTERRUPTED, EXIT_INPUT) else 1)


def _dry_run(out: Output, steps: list[Step], parsed: dict[str, dict[str, Any]], ledger: Ledger) -> None:
    """Shows each step's command and state, and the plan of training steps, also for checkpoints
    that do not exist yet."""
    from hybridize.recipe import DONE

    from .shared.planning import Planned

    planned, shown_steps, upstream = Planned(out), list[dict[str, Any]](), True
    for number, step in enumerate(steps, 1):
        state = ledger.state(step, _inputs(step, parsed[step.name]))
        shown = f"{state}, unless an earlier step changes its inputs" if state == DONE and not upstream else state
        upstream = upstream and state == DONE
        if not out.as_json and not out.quiet:
            print(f"[{number}/{len(steps)}] {step.name} ({shown}): {step.line}")
        plan = None if state == DONE else planned.of(step.command, parsed[step.name], _ranks(step.launch))
        planned.follow(step.command, parsed[step.name])
        shown_steps.append({"name": step.name, "line": step.line, "state": state, "plan": plan})
    out.result({"steps": shown_steps})


def _ranks(launch: tuple[str, ...]) -> int:
    """Number of processes that a launcher such as torchrun starts."""
    text = " ".join(launch)
    counts = [re.search(rf"--{name}[ =](?:\d+:)?(\d+)", text.replace("_", "-")) for name in ("nproc-per-node", "nnodes")]
    return math.prod(int(found[1]) for found in counts if found)
