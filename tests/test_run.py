"""Recipes: what is done is not done again, what has changed is, and a gate stops the rest."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hybridize.commands import app
from hybridize.commands import run as run_command
from hybridize.commands.shared import output
from typer.testing import CliRunner

from hybridize.checkpoint.atomic import write_json_atomic
from hybridize.errors import InputError
from hybridize.recipe import BEGUN, DONE, NEW, STALE, Ledger, Step, read_recipe
from tests.conftest import Runner, interrupt_after, make_place

RECIPE = """
steps:
  - name: half
    run: replace teacher --indices 1,2 -o h2
  - name: train
    run: hybridize distill h2 --steps 2 --batch-size 2 --seq-len 32 -o h2-kd   # back to the teacher
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_place(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run in this process, which is faster; one test starts them as users do."""

    def process(launched: list[str], environment: dict[str, str], *_: object) -> int:
        with monkeypatch.context() as patched:
            patched.setenv(output.RESULT, environment[output.RESULT])
            return int(CliRunner().invoke(app, launched[launched.index("hybridize") + 1 :]).exit_code)

    monkeypatch.setattr(run_command, "_process", process)


def skipped(cli: Runner, *more: str) -> list[bool]:
    return [step["skipped"] for step in json.loads(cli("run", "r.yaml", "--json", *more))["steps"]]


def test_a_chain_runs_once_and_again_where_something_has_changed(place: Path, inside: None, cli: Runner) -> None:
    assert skipped(cli) == [False, False]
    first = json.loads(Path("h2-kd/hybridize.json").read_text())
    assert skipped(cli) == [True, True]
    Path("h2-kd/model-00001-of-00001.safetensors").touch()  # times do not decide
    assert skipped(cli) == [True, True]
    Path("r.yaml").write_text(RECIPE.replace("--steps 2", "--steps 3"))
    assert skipped(cli) == [True, False]
    assert json.loads(Path("h2-kd/hybridize.json").read_text())["tokens"] == first["tokens"] * 3 // 2
    shutil.rmtree("h2-kd")
    assert skipped(cli) == [True, False]
    Path("r.yaml").write_text(RECIPE.replace("--indices 1,2", "--indices 1,3").replace("--steps 2", "--steps 3"))
    assert skipped(cli) == [False, False]  # the second one's input is another now
    assert "step 'half' wrote it" in damaged(cli, "h2/README.md", "mine")


def damaged(cli: Runner, file: str, text: str) -> str:
    """What is said of an output that somebody has changed, and that would have to be written again."""
    Path(file).write_text(text)
    Path("r.yaml").write_text(RECIPE)
    return cli.fails("run", "r.yaml").replace('"', "'")


def test_an_interrupted_step_goes_on(place: Path, inside: None, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridize.distillation.optimize import Optimization

    Path("r.yaml").write_text(RECIPE.replace("--steps 2", "--steps 6 --save-every 2"))
    step = read_recipe(Path("r.yaml"))[1]
    with monkeypatch.context() as patched:
        patched.setattr(Optimization, "update", interrupt_after(4))
        assert "was interrupted; run the same command again" in cli.fails("run", "r.yaml", code=130)
    assert Path("h2-kd.run").is_dir()
    assert Ledger(Path("r.yaml")).state(step, run_command._inputs(step, parsed(step))) == BEGUN
    assert skipped(cli) == [True, False]
    assert [json.loads(line)["step"] for line in Path("h2-kd/metrics.jsonl").read_text().splitlines()] == [*range(1, 7)]


def parsed(step: Step) -> dict[str, Any]:
    return run_command._parsed(Path("r.yaml"), step)


def test_a_gate_stops_the_rest(place: Path, inside: None, cli: Runner) -> None:
    from tests.test_cli import write_tasks

    write_tasks(place / "tasks")
    gate = "eval h2 --tasks tiny_choice --include-path tasks --baseline teacher --max-drop"
    Path("r.yaml").write_text(
        f"steps:\n- name: half\n  run: replace teacher --indices 0-3 -o h2\n- name: gate\n  run: {gate} -0.9\n"
        "- name: after\n  run: export h2 --format hf -o out --no-verify\n"
    )
    code = cli.fails("run", "r.yaml", code=3)
    assert "the gate of step 'gate' is not met; later steps are not run" in code
    assert not Path("out").exists()
    assert "failed with exit code 2" in failing(cli, "replace nowhere --layers 1", 2)
    assert "failed with exit code 1" in failing(cli, "eval teacher --tasks tiny_exact --include-path tasks -o x", 1)


def failing(cli: Runner, line: str, code: int) -> str:
    task = Path("tasks/exact.yaml")
    task.write_text(task.read_text().replace("custom_dataset", "custom_dataset_") if code == 1 else task.read_text())
    Path("f.yaml").write_text(f"steps:\n- name: one\n  run: {line}\n")
    return cli.fails("run", "f.yaml", code=code)


def test_every_command_says_what_it_has_written(place: Path, inside: None, cli: Runner) -> None:
    from tests.test_cli import write_tasks

    write_tasks(place / "tasks")
    lines = {
        "demo other": ["other/tasks", "other/teacher"],
        "score-loo teacher --metric kl --windows 2 --seq-len 32": ["teacher/scores/loo.json"],
        "score-mmr teacher --steps 1 --batch-size 1 --seq-len 32": ["teacher/scores/mmr.json"],
        "replace teacher --layers 2 -o h2": ["h2"],
        "generate h2 --prompts traces.jsonl --limit 1 --max-new-tokens 2 -o answers.jsonl": ["answers.jsonl"],
        "eval h2 --tasks tiny_choice --include-path tasks": ["h2/eval/results.json"],
        "eval h2 --fidelity traces.jsonl --windows 1 --seq-len 32": ["h2/eval/fidelity.json"],
        "bench teacher h2 --contexts 8 --batches 1 --steps 1 --repeats 1": ["bench/bench.json"],
        "report h2": ["report/index.html"],
        "export h2 --format hf --no-verify": ["h2-hf"],
        "inspect h2": [],
    }
    steps = "".join(f"- {{name: '{number}', run: {line}}}\n" for number, line in enumerate(lines))
    Path("r.yaml").write_text(f"steps:\n{steps}")
    cli("run", "r.yaml")
    known = json.loads(Path("r.steps.json").read_text())["steps"]
    assert [sorted(known[str(number)]["done"]["outputs"]) for number in range(len(lines))] == list(lines.values())
    assert skipped(cli) == [True] * (len(lines) - 1) + [False]


def test_all_flags_are_checked_before_the_first_step(place: Path, cli: Runner) -> None:
    for bad, said in {
        RECIPE.replace("--steps 2", "--stpes 2"): "step 'train': No such option: --stpes",
        RECIPE.replace("distill h2", "destill h2"): "step 'train' runs 'destill', which is not a command",
        RECIPE.replace("distill h2", "run r.yaml"): "step 'train' runs 'run', which is not a command for recipes",
        RECIPE.replace("name: train", "name: half"): "two steps have the name 'half'",
        RECIPE.replace("    run: rep", "    do: rep"): "step 1 has the unknown key 'do'",
        RECIPE.replace("    run: replace teacher --indices 1,2 -o h2\n", ""): "step 1 has no 'run'",
        RECIPE.replace("--indices 1,2", "--indices '1,2"): "step 1: No closing quotation",
        "steps: 3": "is not a recipe",
        "- 3": "is not a recipe",
        "steps: [3]": "step 1 is 3; it must have the keys `name` and `run`",
        "steps:\n  - {name: a, run: 3}": "step 1: run is 3, which YAML does not read as text",
        "steps:\n  - {name: a, run: hybridize}": "step 1 has nothing to run",
        "steps:\n  - {name: a, run: verify teacher, run: inspect teacher}": "duplicate key 'run'",
        "steps:\n  - {name: a, run: replace --help}": "has --help, which does nothing in a recipe",
        ": : :": "is not valid YAML",
    }.items():
        Path("r.yaml").write_text(bad)
        assert said in cli.fails("run", "r.yaml")
    assert "cannot be read" in cli.fails("run", "nothing.yaml")
    assert not Path("h2").exists()
    Path("r.yaml").write_text(RECIPE.replace("run: replace", "launch: no-such-program --x\n    run: replace"))
    assert "'no-such-program' cannot be started: No such file" in cli.fails("run", "r.yaml")
    Path("r.yaml").write_text("steps:\n  - {name: a, run: replace teacher}\n")
    assert "say which layers" in cli.fails("run", "r.yaml", "--dry-run")
    assert read_recipe(Path("r.yaml")) == [Step("a", "replace", ("teacher",))]
    Path("r.yaml").write_text("steps:\n  - {name: a, run: 'replace teacher -o h#2'}\n")
    assert read_recipe(Path("r.yaml"))[0].arguments == ("teacher", "-o", "h#2")


def test_a_dry_run_plans_checkpoints_that_are_not_there(place: Path, cli: Runner) -> None:
    """The plan of a chain is that of the checkpoints themselves, once they are there."""
    more = "  - {name: more, run: replace h2-kd --layers 3 -o h3}\n  - {name: again, run: distill h3 --steps 2 -o h3-kd}\n"
    Path("r.yaml").write_text(RECIPE + more)
    before = sorted(Path(".").rglob("*"))
    told = json.loads(cli("run", "r.yaml", "--dry-run", "--json"))["steps"]
    assert sorted(Path(".").rglob("*")) == before
    assert [step["state"] for step in told] == [NEW] * 4
    cli("replace", "teacher", "--indices", "1,2", "-o", "h2")
    cli("replace", "h2", "--indices", "0", "-o", "h3")
    for step, command in ((told[1], "h2 --steps 2 --batch-size 2 --seq-len 32"), (told[3], "h3 --steps 2")):
        real = json.loads(cli("distill", *command.split(), "--dry-run", "--json"))
        assert step["plan"]["gib"] == real["gib"]
        assert step["plan"]["flops"] == real["flops"]
    text = cli("run", "r.yaml", "--dry-run")
    assert "[2/4] train (to do): hybridize distill h2 --steps 2" in text
    assert "at the peak" in text
    Path("r.yaml").write_text("steps:\n  - {name: again, run: distill nowhere --steps 2}\n")
    assert "nowhere does not exist, and no earlier step writes it" in cli.fails("run", "r.yaml", "--dry-run")


def test_states(tmp_path: Path) -> None:
    recipe, read, written = tmp_path / "r.yaml", tmp_path / "in", tmp_path / "out"
    step, other = Step("a", "replace", ("x",)), Step("a", "replace", ("y",))
    read.write_text("1")
    written.mkdir()
    (written / "file").write_text("made")
    ledger = Ledger(recipe)
    assert (ledger.state(step, [read]), ledger.left(step)) == (NEW, ("", []))
    ledger.begin(step, [read])
    assert (ledger.state(step, [read]), ledger.state(other, [read])) == (BEGUN, STALE)
    ledger.refuse(step)
    assert Ledger(recipe).state(step, [read]) == NEW
    ledger.begin(step, [read])
    assert ledger.end(step, [read], [written])
    (written / "scores").mkdir()
    (written / "scores/loo.json").write_text("another step's")
    (written / "x.steps.json").write_text("a ledger")
    again = Ledger(recipe)
    assert (again.state(step, [read]), again.state(other, [read]), again.state(step, [])) == (DONE, STALE, STALE)
    assert again.left(step) == (step.line, [written])
    read.write_text("2")
    assert again.state(step, [read]) == STALE
    read.write_text("1")
    assert again.state(step, [read]) == DONE
    again.begin(other, [read])  # what is there is still known while it is made anew
    assert (again.state(other, [read]), again.left(step)) == (BEGUN, (step.line, [written]))
    again.refuse(other)
    (written / "file").write_text("changed")
    with pytest.raises(InputError, match="has changed since step 'a' wrote it"):
        again.state(step, [read])
    assert again.left(step) == (step.line, [])
    shutil.rmtree(written)
    assert again.state(step, [read]) == STALE
    again.begin(step, [read])
    read.write_text("2")  # while it ran
    assert not again.end(step, [read], [])
    read.write_text("1")
    assert again.state(step, [read]) == NEW  # nothing was written: there is nothing to be found done
    for damaged in ({"format": 2}, {"format": 1, "steps": {"a": {"done": {}}}, "files": {}}, {"format": 1, "steps": {"a": 3}}):
        write_json_atomic(ledger.path, damaged)
        with pytest.raises(InputError, match="is not a ledger of format 1"):
            Ledger(recipe)


def test_nothing_of_others_is_replaced(place: Path, inside: None, cli: Runner) -> None:
    """Neither at the first refusal nor at the next, nor where a step is sent to another place."""
    shutil.copytree("teacher", "h2")
    Path("h2/mine").write_text("mine")
    for _ in range(3):
        assert "step 'half' failed with exit code 2" in cli.fails("run", "r.yaml")
    assert Path("h2/mine").read_text() == "mine"
    Path("r.yaml").write_text(RECIPE.replace("-o h2\n", "-o other\n").replace("distill h2", "distill other"))
    assert skipped(cli) == [False, False]
    Path("r.yaml").write_text(RECIPE)
    for _ in range(2):
        assert "step 'half' failed with exit code 2" in cli.fails("run", "r.yaml")
    assert Path("h2/mine").read_text() == "mine"
    one = "steps:\n  - {name: rank, run: score-loo teacher --metric kl --windows 2 --seq-len 32}\n"
    Path("r.yaml").write_text(one)
    assert skipped(cli) == [False]
    Path("r.yaml").write_text(one.replace("--windows 2", "--windows 3"))  # the same place by default
    assert skipped(cli) == [False]
    assert json.loads(Path("teacher/scores/loo.json").read_text())["settings"]["windows"] == 3


def test_a_signal_reaches_the_step_which_saves_what_it_has(place: Path, cli: Runner) -> None:
    """SIGTERM to `hybridize run` alone, as a scheduler sends it."""
    Path("r.yaml").write_text(RECIPE.replace("--steps 2", "--steps 100000 --save-every 0"))
    cli("replace", "teacher", "--indices", "1,2", "-o", "h2")
    Path("r.yaml").write_text("steps:\n" + Path("r.yaml").read_text().split("h2\n", 1)[1])
    program = subprocess.Popen([sys.executable, "-m", "hybridize", "run", "r.yaml"], stderr=subprocess.PIPE, text=True)
    waited = time.monotonic()
    while not Path("h2-kd.run/metrics.jsonl").exists() and time.monotonic() - waited < 120:
        time.sleep(0.1)
    assert "another process is running r.yaml" in cli.fails("run", "r.yaml")
    program.send_signal(signal.SIGTERM)
    said = program.communicate(timeout=120)[1]
    assert program.returncode == 130, said
    assert "step 'train' was interrupted; run the same command again to continue" in said
    assert list(Path("h2-kd.run").glob("step-*/.metadata")), said


def test_processes_of_a_launcher(place: Path, cli: Runner) -> None:
    for line, count in {
        "": 1, "srun": 1, "torchrun --nproc-per-node 8 --no-python": 8, "torchrun --nproc_per_node=4 --nnodes 2 --no-python": 8,
        "torchrun --nnodes=1:3 --nproc-per-node=2": 6,
    }.items():  # fmt: skip
        assert run_command._ranks(tuple(line.split())) == count
    Path("r.yaml").write_text(RECIPE.replace("name: train", "name: train\n    launch: torchrun --nproc-per-node 2 --no-python"))
    assert "on each of 2 ranks" in cli("run", "r.yaml", "--dry-run")


def test_a_gate_under_a_launcher_that_knows_only_failure(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def process(launched: list[str], environment: dict[str, str], *_: object) -> int:
        Path(environment[output.RESULT]).write_text(json.dumps({"results": "x", "passed": launched[-1] == "h2"}))
        return 1

    monkeypatch.setattr(run_command, "_process", process)
    Path("r.yaml").write_text("steps:\n  - {name: gate, launch: torchrun, run: eval teacher --tasks recall}\n")
    assert "the gate of step 'gate' is not met" in cli.fails("run", "r.yaml", code=3)


def test_what_a_step_reads(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("teacher/scores").mkdir()
    Path("more.jsonl").write_text("{}")
    Path("away.jsonl").write_text("{}")
    Path("out").mkdir()
    monkeypatch.setenv("HYBRIDIZE_DATA", "away.jsonl")
    line = ("teacher", "--steps", "1", "--data", "traces.jsonl=.7,more.jsonl=.3", "-o", "out")
    found = set(map(str, run_command._inputs(one := Step("a", "distill", line), parsed(one))))
    assert found == {"teacher", "traces.jsonl", "more.jsonl", "away.jsonl"}
    found = set(map(str, run_command._inputs(one := Step("a", "replace", ("teacher", "--layers", "2")), parsed(one))))
    assert found == {"teacher", "teacher/scores", "traces.jsonl", "away.jsonl"}
    Path("teacher/eval").mkdir()
    Path("teacher/eval/results.json").write_text("{}")
    found = set(map(str, run_command._inputs(one := Step("a", "report", ("teacher",)), parsed(one))))
    assert found == {"teacher", "teacher/eval/results.json"}


def test_a_hybrids_teacher_is_read_too(place: Path, cli: Runner) -> None:
    cli("replace", "teacher", "--indices", "1", "-o", "h1")
    one = Step("a", "distill", ("h1", "--steps", "1"))
    assert {str(path) for path in run_command._inputs(one, parsed(one))} == {"h1", "teacher", "traces.jsonl"}
