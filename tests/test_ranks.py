"""Two processes on gloo against one: the same losses, gradients and weights; states that any number
of ranks goes on from."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from hybridize.distillation.loop import Training
from hybridize.distillation.run_dir import RunDir
from hybridize.errors import InputError, WorkError
from hybridize.runtime.distributed import DistributedContext, join, leave, small, whole
from tests.conftest import Runner, hybrid, make_teacher, worst
from tests.test_training import batch, settings

multiprocessing.set_forkserver_preload(["tests.test_ranks"])  # ranks are forks of a process that has imported everything


def work(rank: int, size: int, port: int, path: Path, stop_at: int | None, resume: bool, options: dict[str, Any]) -> None:
    """One rank's run; the first one keeps the weights at the end and what kind of tensor each
    parameter is."""
    if size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        torch.set_num_threads(1)
    ranks, device = join(torch.device(options.pop("device", "cpu")))
    dtype, kind = options.pop("dtype", torch.float32), options.pop("kind", "mamba")
    given = {key: value for key, value in options.items() if key != "break"}
    plan = settings(**{"save_every": 2, "eval_every": 3, "keep_last": 9, **given})
    student = hybrid("mam", kind, seed=1, tie_word_embeddings=options.get("train") == "mixers").to(device)
    teacher = hybrid("aaa", seed=2).to("cpu" if options.get("offload_teacher") else device)
    home = RunDir(path / "out", {"a": 1}, ranks, plan.keep_last)
    home.start(resume)

    def batches():
        for n in range(100):
            if stop_at is not None and rank == 0 and n == stop_at - (size > 1):
                if size == 1:  # itself: what a handler raises is lost where it happens to run inside a destructor
                    raise KeyboardInterrupt
                signal.raise_signal(signal.SIGINT)  # several stop after a step that they agree on
            yield batch(n)

    training = Training(student, teacher, [batch(999)], plan, home, device=device, dtype=dtype, ranks=ranks)
    inside: set[tuple[str, str]] = set()

    def look(mixer: torch.nn.Module, _: Any) -> None:
        inside.update((name, str(mixer.get_parameter(name).dtype)) for name in ("A_log", "D", "dt_bias", "in_proj.weight"))

    for name, module in student.named_modules():
        if name.endswith(".mixer"):
            module.register_forward_pre_hook(look)
    if options.get("break"):
        options["break"](training, rank)
    try:
        training.go(batches(), resume)
    except KeyboardInterrupt:
        assert stop_at is not None
    except WorkError as error:
        (path / f"said-{rank}").write_text(str(error))
        if "out of GPU memory" in str(error):  # the other rank waits for this one for ever
            raise
    weights = {name: whole(p.detach()) for name, p in student.named_parameters()}
    kinds = {name: (type(p).__name__, str(p.dtype)) for name, p in student.named_parameters()}
    if ranks.main:
        torch.save(
            {"weights": {name: w.cpu() for name, w in weights.items()}, "kinds": kinds, "inside": inside}, path / "end.pt"
        )
    ranks.wait()
    leave()


def go(size: int, path: Path, stop_at: int | None = None, resume: bool = False, **options: Any) -> dict[str, Any]:
    path.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if size == 1:
        work(0, 1, port, path, stop_at, resume, dict(options))
    else:
        mp.start_processes(work, (size, port, path, stop_at, resume, options), nprocs=size, start_method="forkserver")
    lines = [json.loads(line) for line in (path / "out.run/metrics.jsonl").open()]
    measures = [json.loads(line) for line in (path / "out.run/eval.jsonl").open()]
    return {**torch.load(path / "end.pt"), "losses": lines, "measures": measures}


def equal(one: dict[str, Any], two: dict[str, Any], bound: float) -> None:
    """All losses and measures, and the norm of the first gradient; what comes later is a gradient
    at weights that have drifted by rounding, as the weights at the end have."""
    losses, norms = (
        [torch.tensor([line[key] for line in found["losses"]]) for found in (one, two)] for key in ("loss", "grad_norm")
    )
    assert worst(losses[1], losses[0]) <= bound
    assert worst(norms[1][0], norms[0][0]) <= bound
    assert worst(norms[1], norms[0]) <= 10 * bound
    assert worst(*(torch.tensor([m["reverse_kl"] for m in found["measures"]]) for found in (two, one))) <= bound
    for name, value in one["weights"].items():
        assert worst(two["weights"][name], value) <= 10 * bound, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train": "mixers", "micro_batch_size": 1, "gradient_checkpointing": True},
        {"shard": False},
        {"offload_teacher": True},
    ],
)
def test_two_ranks_equal_one(tmp_path: Path, options: dict[str, Any]) -> None:
    one, two = go(1, tmp_path / "one", **options), go(2, tmp_path / "two", **options)
    equal(one, two, 1e-5)
    kinds, sharded = two["kinds"], options.get("shard", True)
    assert {kinds[n] for n in small(hybrid("mam"))} == {("Parameter", "torch.float32")}
    for name in ("model.layers.0.mixer.in_proj.weight", "model.embed_tokens.weight"):
        assert kinds[name][0] == ("DTensor" if sharded else "Parameter")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("options", [{}, {"shard": False}, {"shard": False, "cuda_graph": True}, {"compile": True}])
def test_two_gpus_equal_one(tmp_path: Path, options: dict[str, Any]) -> None:
    """NCCL, the kernels, graphs captured beside a process group."""
    common = {"device": "cuda", "kind": "mamba2"}
    alone = {key: value for key, value in options.items() if key != "cuda_graph"}
    equal(go(1, tmp_path / "one", **common, **alone), go(2, tmp_path / "two", **common, **options), 1e-4)


HUNGRY = """
import os, torch
from hybridize.distillation import step

def hungry(holds=1, passes=0):
    \"\"\"The second rank's memory holds so many sequences, after so many passes.\"\"\"
    real, seen = step.hidden_states, []

    def forward(model, part, dtype):
        seen.append(1)
        if len(part.ids) > holds and len(seen) > passes and os.environ["RANK"] == "1":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(model, part, dtype)

    step.hidden_states = forward
"""


def hungry(*_: Any, **how: int) -> None:
    names: dict[str, Any] = {}
    exec(HUNGRY, names)
    names["hungry"](**how)


def starving(*_: Any) -> None:
    hungry(holds=0, passes=8)  # two models, two steps, two micro-batches of one sequence


def test_ranks_halve_the_micro_batch_together(tmp_path: Path) -> None:
    options = {"steps": 2, "eval_every": 0}
    both = go(2, tmp_path / "two", **options, shard=False, **{"break": hungry})
    equal(go(1, tmp_path / "one", **options), both, 1e-5)
    assert json.loads((tmp_path / "two/out.run/micro-batch.json").read_text()) == {"2 ranks": 1}


def test_ranks_end_together_where_not_one_sequence_fits(tmp_path: Path) -> None:
    """With the last finished step saved."""
    options = {"eval_every": 0, "save_every": 0, "micro_batch_size": 1, "shard": False, "break": starving}
    with pytest.raises(mp.ProcessRaisedException, match="out of GPU memory with one sequence at once on one of the ranks"):
        go(2, tmp_path / "two", **options)
    assert RunDir(tmp_path / "two/out", {}).steps() == [2]


def test_torchrun_starts_a_run_again_with_what_fits(tmp_path: Path, traces: Path, teacher: Path, cli: Runner) -> None:
    """DistributedContext with a part of the weights meet in every layer: where one runs out of
    memory none can go on. A restarted group finds the store of the one that died."""
    (tmp_path / "run.py").write_text(f"{HUNGRY}\nhungry()\nfrom hybridize.commands import main\nmain()\n")
    plan = [
        "distill",
        str(teacher),
        "--loss",
        "ce",
        "--data",
        str(traces),
        "--steps",
        "2",
        "--batch-size",
        "8",
        "--seq-len",
        "48",
    ]
    cli(*plan, "-o", tmp_path / "one", "--json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    program = [*torchrun, str(tmp_path / "run.py"), *plan, "-o", str(tmp_path / "two"), "--json", "--resume"]
    calm = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(program, capture_output=True, text=True, timeout=200, env=calm, check=False)
    assert ran.returncode == 0, ran.stderr
    for many, fewer in ((4, 2), (2, 1)):
        said = f"out of GPU memory with {many} sequences at once; --resume continues from the last saved state with {fewer}"
        assert said in ran.stderr
    assert "1 sequences at once, as before the run was interrupted" in ran.stderr
    assert json.loads(ran.stdout)["last"]["loss"] == pytest.approx(json.loads(cli.stdout)["last"]["loss"], rel=1e-5)


def test_bfloat16_sharding_leaves_decays_and_steps_in_float32(tmp_path: Path) -> None:
    """Read inside the forward pass, where FSDP has cast what it gathered."""
    found = go(2, tmp_path / "two", steps=1, dtype=torch.bfloat16)
    small = {(name, "torch.float32") for name in ("A_log", "D", "dt_bias")}
    assert found["inside"] - {("in_proj.weight", "torch.float32")} == small | {("in_proj.weight", "torch.bfloat16")}


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """And with weights that are whole where they were split, or split where they were whole."""
    whole_run = go(1, tmp_path / "whole")
    for number, (before, after) in enumerate((((2, True), (1, True)), ((1, True), (2, False)), ((2, False), (2, True)))):
        path = tmp_path / f"from{number}"
        go(before[0], path, stop_at=3, shard=before[1])
        assert RunDir(path / "out", {}).steps()[-1] == 3
        found = go(after[0], path, resume=True, shard=after[1])
        assert [line["step"] for line in found["losses"]] == [1, 2, 3, 4, 5, 6]
        for name, value in whole_run["weights"].items():
            assert worst(found["weights"][name], value) <= 1e-4, name


def overflow(training: Training, rank: int) -> None:
    """From the third step on, layer 1 overflows on the second rank's rows alone, in its second
    micro-batch."""
    seen = []

    def hook(module: torch.nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return output * torch.inf if rank == 1 and module.training and len(seen) in (6, 8) else output

    training.student.model.layers[1].mlp.register_forward_hook(hook)


@pytest.mark.parametrize("tolerated", [0, 1])
def test_ranks_agree_on_what_is_not_finite(tmp_path: Path, tolerated: int) -> None:
    """All say the same and end with the same state, or all skip the same step."""
    options = {"micro_batch_size": 1, "eval_every": 0, "skip_bad_batches": tolerated, "break": overflow}
    found = go(2, tmp_path / "two", **options)
    if tolerated:
        assert [line["step"] for line in found["losses"] if line.get("skipped")] == [3]
        assert len(found["losses"]) == 6
        return
    said = [(tmp_path / f"two/said-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "step 3: the loss is" in said[0]
    assert RunDir(tmp_path / "two/out", {}).steps()[-1] == 2


def test_ranks_agree_on_when_to_save(tmp_path: Path) -> None:
    """The second rank's clock is an hour ahead; what is saved is what the first one's says, whole."""
    go(2, tmp_path / "two", save_every=0, save_minutes=1.0, **{"break": hurry})
    assert RunDir(tmp_path / "two/out", {}).steps() == []


def hurry(_: Training, rank: int) -> None:
    from types import SimpleNamespace

    from hybridize.distillation import loop as training

    if rank == 1:
        ahead = iter(range(0, 10**9, 3600))
        training.time = SimpleNamespace(monotonic=lambda: next(ahead), perf_counter=time.perf_counter)


def test_torchrun_on_the_command_line(tmp_path: Path, traces: Path, cli: Runner) -> None:
    """One checkpoint, one voice, the numbers of a run without torchrun; tied weights, as small
    models have them."""
    teacher = make_teacher(tmp_path / "teacher", tie_word_embeddings=True)
    cli("replace", teacher, "--indices", "1,2", "--no-calibrate", "-o", tmp_path / "h2")
    common = ["distill", str(tmp_path / "h2"), "--data", str(traces), "--steps", "2", "--batch-size", "2", "--seq-len", "48"]
    cli(*common, "-o", tmp_path / "one", "--json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]

    def told(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = [*torchrun, "hybridize.commands", *common, *arguments]
        calm = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(program, capture_output=True, text=True, timeout=300, env=calm, check=False)

    ran = told("-o", str(tmp_path / "two"), "--json")
    assert ran.returncode == 0, ran.stderr
    one, two = json.loads(cli.stdout), json.loads(ran.stdout)
    assert two["last"]["loss"] == pytest.approx(one["last"]["loss"], rel=1e-5)
    assert json.loads((tmp_path / "two/hybridize.json").read_text())["settings"]["ranks"] == 2
    assert not (tmp_path / "two.run").exists()
    a, b = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("one", "two"))
    assert all(worst(b[name], a[name]) <= 1e-4 for name in a)
    odd = told("--batch-size", "3", "-o", str(tmp_path / "odd"))
    assert "--batch-size 3 cannot be split evenly over 2 processes" in odd.stderr
    assert odd.returncode != 0


def test_rows_are_shared_evenly_or_not_at_all() -> None:
    assert [DistributedContext(rank, 4).share(8, "batch_size") for rank in range(4)] == [
        slice(0, 2),
        slice(2, 4),
        slice(4, 6),
        slice(6, 8),
    ]
    with pytest.raises(InputError, match="batch_size 6 cannot be split evenly over 4 processes"):
        DistributedContext(0, 4).share(6, "batch_size")
