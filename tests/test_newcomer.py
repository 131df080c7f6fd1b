"""What a newcomer meets: early refusals, plans for the machine at hand, scores of an ancestor, a
state made a checkpoint."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hybridize.commands.shared.strip import draw_strip

from hybridize.checkpoint.manifest import ancestors
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.compat import TRIED
from hybridize.distillation import fitting, watch
from hybridize.distillation.plan import kept_bytes, micro_that_fits, plain_bytes, plan
from hybridize.distillation.settings import DistillSettings
from hybridize.errors import InputError
from hybridize.runtime import device as runtime
from hybridize.scoring import mmr_memory
from hybridize.surgery.teacher import empty_model
from tests.conftest import SHAPES, Runner, hybrid, hybrid_config, interrupt_after, make_place

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_place(tmp_path, ("replace", "--indices", "1,2", "-o", "h2"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Refused before torch is imported, let alone a weight is read

WITHOUT_TORCH = (
    "import sys\nfor name in ('torch', 'transformers', 'lm_eval'):\n    sys.modules[name] = None\n"
    "from hybridize.commands import app\napp(sys.argv[1:])\n"
)


def refused_without_torch(*command: object) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, command)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2, (done.stdout, done.stderr)
    return done.stderr


def test_an_unfinished_run_is_refused_at_once(place: Path) -> None:
    for output in ("h2-kd", "scores.json"):
        Path(f"{output}.run").mkdir()
    decisive = DistillSettings(steps=4).with_rates(576).decisive()
    Path("h2-kd.run/settings.json").write_text(json.dumps(decisive))
    Path("scores.json.run/settings.json").write_text(json.dumps({"settings": {"steps": 100, "lr_mixer": 1e-3}}))
    for part in ("traces.jsonl.part", "out/answers.part.jsonl"):
        Path(part).parent.mkdir(exist_ok=True)
        Path(part).write_text('{"settings": {}}\n{"key": 1}\n')
    assert "continue it with --resume" in refused_without_torch("distill", "h2", "--steps", 4)
    assert "--resume: steps was 4, now it is 5" in refused_without_torch("distill", "h2", "--steps", 5, "--resume")
    assert "--resume: lr was 0.0001, now it is 0.1" in refused_without_torch(
        "distill", "h2", "--steps", 4, "--lr", 0.1, "--resume"
    )
    assert "continue it with --resume" in refused_without_torch("score-mmr", "teacher", "-o", "scores.json")
    assert "--resume: steps was 100, now it is 7" in refused_without_torch(
        "score-mmr", "teacher", "-o", "scores.json", "--steps", 7, "--resume"
    )
    assert "continue it with --resume" in refused_without_torch("generate", "h2", "--prompts", "traces.jsonl")
    assert "continue it with --resume" in refused_without_torch("eval", "h2", "--tasks", "recall", "-o", "out")
    assert "h2 has no scores" in refused_without_torch("replace", "h2", "--layers", 3)
    assert "--stop-now requires --resume" in refused_without_torch("distill", "h2", "--steps", 4, "--stop-now")


# Scores of an ancestor


def test_scores_of_an_ancestor_choose_among_what_is_left(place: Path, cli: Runner) -> None:
    cli("score-loo", "teacher", "--metric", "kl", "--windows", 8, "--seq-len", 32)
    ranking = json.loads(cli.stdout and Path("teacher/scores/loo.json").read_text())["layers"]
    order = [entry["layer"] for entry in sorted(ranking, key=lambda entry: (entry["score"], entry["layer"]))]
    assert "--scores teacher/scores/loo.json uses the scores of teacher" in cli.fails("replace", "h2", "--layers", 3)
    found = json.loads(cli("replace", "h2", "--layers", 3, "--scores", "teacher/scores/loo.json", "-o", "h3", "--json"))
    assert found["converted"] == [next(layer for layer in order if layer not in (1, 2))]
    assert "warning: teacher/scores/loo.json was measured on teacher, which h2 was made from" in cli.stderr
    cli("replace", "h3", "--layers", 4, "--scores", "teacher/scores/loo.json", "-o", "h4")  # two steps down
    assert "which h3 was made from" in cli.stderr
    lacking = json.loads(Path("teacher/scores/loo.json").read_text())
    lacking["layers"] = [entry for entry in lacking["layers"] if entry["layer"] != found["converted"][0]]
    Path("lacking.json").write_text(json.dumps(lacking))
    assert "do not cover exactly the attention layers" in cli.fails("replace", "h2", "--layers", 3, "--scores", "lacking.json")
    odd = json.loads(Path("teacher/scores/loo.json").read_text())
    odd["layers"].append({"layer": 9, "score": 1.0})
    Path("odd.json").write_text(json.dumps(odd))
    assert "do not cover exactly" in cli.fails("replace", "h2", "--layers", 3, "--scores", "odd.json")


def test_ancestors_are_known_as_far_as_they_are_there(place: Path, cli: Runner) -> None:
    cli("replace", "h2", "--indices", "0", "-o", "h3")
    hashes = {name: CheckpointReader(Path(name)).hash for name in ("teacher", "h2")}
    assert ancestors(Path("teacher")) == {}
    assert list(ancestors(Path("h3")).items()) == [(hashes["h2"], "h2"), (hashes["teacher"], "teacher")]
    shutil.rmtree("h2")
    assert list(ancestors(Path("h3"))) == [hashes["h2"], hashes["teacher"]]


# A saved state as a checkpoint


def test_a_saved_state_becomes_a_checkpoint_and_the_run_goes_on(
    place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridize.distillation.optimize import Optimization

    run = ("distill", "h2", "--steps", 6, "--batch-size", 2, "--seq-len", 32, "--save-every", 2, "--eval-windows", 2)
    cli(*run, "-o", "whole")
    cli(*run[:2], "--steps", 4, *run[4:], "-o", "four", "--schedule", "wsd")
    with monkeypatch.context() as patched:
        patched.setattr(Optimization, "update", interrupt_after(5))
        cli(*run, code=130)
    assert "or with --resume --stop-now for a checkpoint of it" in cli.stderr
    saved = max(int(path.name.removeprefix("step-")) for path in Path("h2-kd.run").glob("step-*"))
    assert "no saved state" in stateless(cli, run)
    found = json.loads(cli(*run, "--resume", "--stop-now", "--json"))
    assert found["steps"] == saved
    manifest = json.loads(Path("h2-kd/hybridize.json").read_text())
    assert manifest["settings"]["stopped_after"] == saved
    assert manifest["tokens"] == saved * 2 * 32
    assert CheckpointReader(Path("h2-kd")).hash != CheckpointReader(Path("whole")).hash
    assert Path("h2-kd.run").is_dir()
    assert "exists and belongs to another run" in cli.fails(*run, "--resume")
    cli(*run, "--resume", "--overwrite")
    assert CheckpointReader(Path("h2-kd")).hash == CheckpointReader(Path("whole")).hash
    assert not Path("h2-kd.run").exists()


def test_a_loss_that_rises_is_said_with_what_to_try(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridize.distillation.loop import Training

    values = iter([1.0] * 20 + [2.0] * 90)
    monkeypatch.setattr(Training, "_gradient", lambda *_: (next(values), 1.0))
    cli("distill", "h2", "--steps", 90, "--batch-size", 1, "--seq-len", 32, "--eval-windows", 1, "--save-every", 0)
    assert cli.stderr.count("the loss is rising, from 1.0000 to ") == 1
    assert "try --lr-mixer 0.0003 --lr 3e-05" in cli.stderr


def stateless(cli: Runner, run: tuple[object, ...]) -> str:
    shutil.copytree("h2-kd.run", "other.run")
    for state in Path("other.run").glob("step-*"):
        shutil.rmtree(state)
    return cli.fails(*run, "-o", "other", "--resume", "--stop-now")


# Plans


@pytest.mark.parametrize("kind", ["attention", *SHAPES])
def test_a_cpu_keeps_what_autograd_says(kind: str) -> None:
    """Every storage that a float32 layer saves but for weights, rotary tables and masks: of
    attention to the byte, of mixers within a tenth."""
    sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "intermediate_size": 160}
    shapes = {"mamba": {"dt_rank": 4, "expand": "head", "d_state": 4}, "mamba2": {"d_state": 16}}
    mixer = "mamba2" if kind == "attention" else kind
    changes = {**sizes, "mixer": {"kind": mixer, "d_inner": 64, "d_conv": 4, **shapes[mixer]}}
    config, model, length = hybrid_config("ma", mixer, **changes), hybrid("ma", mixer, **changes).train(), 128
    hidden = torch.randn(1, length, 64, requires_grad=True)
    told = model.model.layer_inputs(hidden, None, torch.arange(length).unsqueeze(0), packed=False)
    name, index = ("full_attention", 1) if kind == "attention" else ("linear_attention", 0)
    apart = {p.untyped_storage().data_ptr() for p in model.parameters()}
    apart |= {t.untyped_storage().data_ptr() for t in told["full_attention"]["position_embeddings"]}
    kept, alive = {}, []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in apart:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.model.layers[index](hidden, **told[name])
    assert plain_bytes(config, name) * length == pytest.approx(sum(kept.values()), rel=0 if kind == "attention" else 0.1)
    assert kept_bytes(config, name, length, torch.float32, "cpu") == plain_bytes(config, name)


def test_sequences_at_once_are_those_that_fit() -> None:
    student, teacher = hybrid("mam"), hybrid("aaa")
    settings = DistillSettings(steps=1, batch_size=12, seq_len=64)

    def total(micro: int) -> float:
        given = DistillSettings(steps=1, batch_size=12, seq_len=64, micro_batch_size=micro)
        return plan(student, teacher, given, 1, torch.float32, "cpu").total

    for room, wanted in ((total(12), 12), (total(12) - 1, 6), (total(6) - 1, 4), (total(3) + 1, 3), (1.0, 1)):
        assert micro_that_fits(student, teacher, settings, 1, torch.float32, "cpu", room) == (wanted, total(wanted))
    assert micro_that_fits(student, teacher, settings, 4, torch.float32, "cpu", total(3))[0] == 3


def _set_free(monkeypatch: pytest.MonkeyPatch, free: Callable[[torch.device], float]) -> None:
    """What planning finds free."""
    for planner in (fitting, mmr_memory):
        monkeypatch.setattr(planner, "free_memory", free)


def test_distill_says_how_many_sequences_it_takes_at_once(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ("distill", "h2", "--steps", 2, "--batch-size", 4, "--seq-len", 64, "--eval-windows", 1)
    cli(*run, "-o", "whole")
    assert "2 steps of 4 x 64 tokens, 4 sequences at once, on cpu" in cli.stderr
    assert "--micro-batch-size" not in cli.stderr
    student = empty_model(json.loads(Path("h2/config.json").read_text()), "h2")
    teacher = empty_model(json.loads(Path("teacher/config.json").read_text()), "teacher")
    given = DistillSettings(steps=2, batch_size=4, seq_len=64, micro_batch_size=2)
    wanted = plan(student, teacher, given, 1, torch.float32, "cpu").total
    _set_free(monkeypatch, lambda _: wanted / 0.9 + 1)
    cli(*run, "-o", "halves")
    assert "2 of 4 sequences at once (--micro-batch-size): the plan takes 0.8 GiB, 0.9 are free" in cli.stderr
    settings = json.loads(Path("halves/hybridize.json").read_text())["settings"]
    assert settings["micro_batch_size"] == 2
    _set_free(monkeypatch, lambda _: 1000)
    cli(*run, "-o", "little")
    assert "it may run out of memory; a smaller --batch-size" in cli.stderr
    found = json.loads(cli(*run, "-o", "planned", "--dry-run", "--json"))
    assert found["micro_batch_size"] == 1


def test_a_run_goes_on_with_as_many_sequences_whatever_memory_is_free(
    place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridize.distillation.optimize import Optimization

    run = ("distill", "h2", "--steps", 3, "--batch-size", 4, "--seq-len", 64, "--eval-windows", 1)
    room, ample = "1 ranks", runtime.free_memory(CPU)
    for first, then in ((1000, ample), (ample, 1000)):
        _set_free(monkeypatch, lambda _, first=first: first)
        with monkeypatch.context() as patched:
            patched.setattr(Optimization, "update", interrupt_after(1))
            cli(*run, "--overwrite", code=130)
        before = json.loads(Path("h2-kd.run/micro-batch.json").read_text())[room]
        assert before == (1 if first == 1000 else 4)
        _set_free(monkeypatch, lambda _, then=then: then)
        cli(*run, "--resume", "--overwrite")
        assert f"{before} sequences at once, as before the run was interrupted" in cli.stderr


def test_mmr_stays_within_its_memory(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ("score-mmr", "teacher", "--steps", 2, "--batch-size", 8, "--seq-len", 256, "--no-calibrate")
    cli(*run, "-o", "all.json")
    assert "memory: training the candidates in parallel takes 0.8 GiB by the plan\n" in cli.stderr
    planned = json.loads(cli(*run, "--dry-run", "--json"))["gib"]
    fixed = sum(size for name, size in planned.items() if name != "activations")
    most = (fixed + planned["activations"] / 2) / 0.9
    cli(*run, "-o", "groups.json", "--max-memory", most)
    assert "by the plan, more than 90% of 0.9 GiB: they train in groups\n" in cli.stderr
    assert "candidates train in 2 groups" in cli.stderr or "candidates train in 3 groups" in cli.stderr
    scores = [
        [entry["score"] for entry in json.loads(Path(name).read_text())["layers"]] for name in ("all.json", "groups.json")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    _set_free(monkeypatch, lambda _: int(fixed * 2**30))
    cli(*run, "-o", "little.json")
    assert "90% of 0.6 GiB, 80% of what is free (--max-memory): they train one at a time and may still run out" in cli.stderr
    assert "must be a positive number of GiB" in cli.fails(*run, "-o", "none.json", "--max-memory", 0)
    every = json.loads(cli(*run, "--train", "all", "--dry-run", "--json", "--max-memory", 100))
    assert every["max_gib"] == 100
    assert "one at a time" in cli(*run, "--train", "all", "--dry-run")


def test_free_memory_heeds_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    monkeypatch.setattr(runtime, "CGROUP", tmp_path)
    assert runtime.free_memory(CPU) == 10_000
    for name, text in (("memory.max", "5000"), ("memory.current", "3000"), ("memory.stat", "anon 2500\ninactive_file 400\n")):
        (tmp_path / name).write_text(text)
    assert runtime.free_memory(CPU) == 2400
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert runtime.free_memory(CPU) == 1200
    (tmp_path / "memory.max").write_text("max\n")
    assert runtime.free_memory(CPU) == 5000


@pytest.mark.gpu
def test_a_gpu_gives_no_more_than_it_may() -> None:
    device = torch.device("cuda")
    held = torch.cuda.memory_reserved() / 2**30
    try:
        runtime.limit_memory(device, held + 0.5)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(1 << 30, dtype=torch.uint8, device=device)
    finally:
        runtime.limit_memory(device, 1000)
    assert torch.empty(1 << 30, dtype=torch.uint8, device=device).is_cuda


def test_speed_is_expected_by_size_and_device() -> None:
    peak = 989e12
    shares = [watch.expected_flops(torch.device("cuda"), hidden)[0] / peak for hidden in (100, 576, 896, 3072, 8192)]
    assert shares == pytest.approx([0.19, 0.19, 0.29, 0.42, 0.42])
    between = watch.expected_flops(torch.device("cuda"), 2048)[0] / peak
    assert 0.29 < between < 0.42
    speed, said = watch.expected_flops(CPU, 576)
    assert speed > 1e8
    assert "50% of the" in said


# The rest


def test_one_strip_for_all(place: Path, cli: Runner) -> None:
    assert draw_strip(["full_attention", "linear_attention", "sliding_attention"], [0]) == (
        "NMw   (N new Mamba, M Mamba, w sliding-window attention)"
    )
    assert "aMMa   (M Mamba, a attention)" in cli("inspect", "h2")
    assert "NMMa   (N new Mamba, M Mamba, a attention)" in cli("replace", "h2", "--indices", "0", "-o", "h3")


def test_versions(cli: Runner) -> None:
    said = cli("--version")
    assert said.startswith("hybridize 0.")
    assert f"torch {torch.__version__}" in said
    findings = {finding["name"]: finding for finding in json.loads(cli("doctor", "--device", "cpu", "--json"))["findings"]}
    assert findings["hybridize"]["detail"] in said
    assert "tests have passed on" not in findings["transformers"]["detail"]


def test_a_version_that_no_test_has_seen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridize import doctor

    oldest, newest = TRIED["transformers"]
    assert doctor._tried("transformers", oldest) == doctor._tried("transformers", newest) == doctor._tried("torch", "99") == ""
    for other in ("5.16.9", "99.0"):
        assert doctor._tried("transformers", other) == f" (tested with {oldest} to {newest})"


def test_a_file_that_was_written_again_is_not_hashed(place: Path) -> None:
    reader = CheckpointReader(Path("h2"))
    file = next(Path("h2").glob("*.safetensors"))
    shutil.copyfile(file, "copy")
    os.replace("copy", file)
    with pytest.raises(InputError, match="has been written again since it was opened"):
        assert reader.hash


def test_reaching_into_libraries_has_its_place() -> None:
    """Modules below transformers and lm_eval are imported by compat alone, and in modeling/ by
    stock.py."""
    allowed = {"hybridize/modeling/stock.py", "hybridize/compat/transformers.py", "hybridize/compat/lm_eval.py"}
    reached = set()
    for file in sorted([*ROOT.glob("hybridize/**/*.py"), *ROOT.glob("commands/*.py")]):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith(("transformers.", "lm_eval")):
                    reached.add(file.relative_to(ROOT).as_posix())
    assert reached == allowed
