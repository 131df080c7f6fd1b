"""Where models run and how: device, compute type, memory limits, determinism, compiled layers and
CUDA graphs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from hybridize.errors import InputError, setting
from hybridize.modeling import backend_for, mixer_class
from hybridize.notes import Notes

T = TypeVar("T")
CGROUP = Path("/sys/fs/cgroup")  # of Linux, version 2, as a container sees its own
WARM_UP = 3  # runs before a capture: kernels tune and compile themselves, the allocator settles
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. InputError when the device is not there."""
    # the Mamba-2 kernels try their configurations for 100 s at first use: kept in Triton's cache,
    # they do so once a machine
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"{setting('device')} {name} is not a device; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{setting('device')} {name}: torch {torch.__version__} sees no CUDA device on this machine")
    return device


def be_deterministic() -> None:
    """From here on every sum on CUDA is taken in one order, or the operation that cannot says so.
    Before the first use of CUDA.

    mamba-ssm and causal-conv1d look at torch's switch too, all but Mamba-1's scan.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)


def pick_dtype(name: str, device: torch.device, training: bool = False) -> torch.dtype:
    """`auto` computes in bfloat16 on CUDA and float32 elsewhere. `training` refuses float16, whose
    gradients underflow."""
    if training and name == "float16":
        raise InputError(f"{setting('dtype')} float16 loses small gradients; train with bfloat16 or float32")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"{setting('dtype')} {name} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_compute(device: str, dtype: str, training: bool = False) -> tuple[torch.device, torch.dtype]:
    """Both of the above."""
    where = pick_device(device)
    return where, pick_dtype(dtype, where, training)


def planned_on(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What a --dry-run reckons with: the device that would run, or a GPU where one is asked for
    that this machine lacks."""
    elsewhere = device.partition(":")[0] == "cuda" and not torch.cuda.is_available()
    where = torch.device("cuda") if elsewhere else pick_device(device)
    return where, pick_dtype(dtype, where, training=True)


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still have of a device: of a CPU also what the system would give
    back, within the container's limit, in equal parts for all processes of a torchrun on this
    machine."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    import psutil

    free, processes = int(psutil.virtual_memory().available), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        most, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, most - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such files, or `max`: there is no limit
        pass
    return free // processes


def limit_memory(device: torch.device, gib: float) -> None:
    """Of a GPU no more than so much from here on: what is only kept for later is given up first,
    and beyond that memory is out. A CPU knows no such limit."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), index)


def note_tuning(device: torch.device, mixer: dict[str, Any] | None, notes: Notes) -> None:
    """Why the first step may be silent for minutes, where that can be. mixer: the config's entry."""
    if mixer is not None and mixer_class(mixer).tunes and backend_for(device) == "kernel":
        notes.note("the first step ever on a machine takes minutes: the mixer's kernels try their configurations, and remember")


def is_here(device: torch.device) -> bool:
    """Whether this machine has the device that is planned for."""
    return device.type != "cuda" or torch.cuda.is_available()


def ran_on(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What a result file says about where its figures come from."""
    return {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "engine": backend_for(device)}


def keep_compiled_apart() -> None:
    """A cache of compiled code for each kind of CPU and number of threads. To be called before
    anything is compiled.

    torch keeps one for all: code for wide vectors that a narrower setting found there gave a loss
    of 67 instead of 122, without a word, and the other way round it aborts (torch 2.13;
    `ATEN_CPU_CAPABILITY=avx2` after `avx512`, and before).
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    usual = default_cache_dir()
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", usual) == usual:  # torch has noted its own choice there by now
        kind = f"{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}".replace(" ", "-").lower()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{usual}_{kind}"


def compile_layers(model: Any) -> None:
    """torch.compile for each decoder layer in place: a graph a kind of layer, so 60 layers compile
    as fast as 3.

    The scans stay calls of their own kernels.
    """
    keep_compiled_apart()
    # transformers runs all layers through one wrapper, whose graphs (kinds x masks x training)
    # would soon reach the limit of 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in model.base_model.layers:
        layer.compile()


def captured(run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """`run` as a CUDA graph, and what it returned, which each replay fills anew. What it reads must
    live as long."""
    aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            run()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = run()
    return graph, value
