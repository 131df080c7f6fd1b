"""Device, compute type, memory limits, determinism, compiled layers and CUDA graphs."""

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
CGROUP = Path("/sys/fs/cgroup")  # Linux cgroup v2, as seen inside a container
WARM_UP = 3  # runs before a capture: kernels are compiled and autotuned, and the allocator has its blocks
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Returns the device called `name`; `auto` is CUDA if available, else the CPU. Raises
    InputError if the device does not exist."""
    # Autotuning the Mamba-2 kernels takes 100 s at first use; Triton's cache keeps the result, so
    # it happens once per machine.
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
    """Makes torch use deterministic operations only; an operation that has no deterministic form
    raises an error. Must be called before the first use of CUDA.

    mamba-ssm and causal-conv1d follow torch's setting too, except Mamba-1's scan.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at initialisation
    torch.use_deterministic_algorithms(True)


def pick_dtype(name: str, device: torch.device, training: bool = False) -> torch.dtype:
    """Returns the compute type called `name`; `auto` is bfloat16 on CUDA, else float32. Raises
    InputError for unknown names and, in `training`, for float16, whose gradients underflow."""
    if training and name == "float16":
        raise InputError(f"{setting('dtype')} float16 loses small gradients; train with bfloat16 or float32")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"{setting('dtype')} {name} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_compute(device: str, dtype: str, training: bool = False) -> tuple[torch.device, torch.dtype]:
    """Returns the device and the compute type; see pick_device and pick_dtype."""
    where = pick_device(device)
    return where, pick_dtype(dtype, where, training)


def planned_on(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Returns the device and the compute type that a dry run plans for: as for training, except
    that a requested GPU need not exist on this machine."""
    missing_gpu = device.partition(":")[0] == "cuda" and not torch.cuda.is_available()
    where = torch.device("cuda") if missing_gpu else pick_device(device)
    return where, pick_dtype(dtype, where, training=True)


def free_memory(device: torch.device) -> int:
    """Returns the bytes of a device that this process can still allocate. On a CPU this includes
    reclaimable cache, respects the container's limit, and is divided equally among the torchrun
    processes on this machine."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    free, processes = int(psutil.virtual_memory().available), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such files, or `max`: no limit is set
        pass
    return free // processes


def limit_memory(device: torch.device, gib: float) -> None:
    """Limits this process to `gib` GiB of a GPU's memory: beyond that, cached memory is freed
    first, then allocation fails. Has no effect on a CPU."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), index)


def note_tuning(device: torch.device, mixer: dict[str, Any] | None, notes: Notes) -> None:
    """Notes that the first step may take minutes, if the mixer's kernels autotune. mixer: the
    config's entry."""
    if mixer is not None and mixer_class(mixer).tunes and backend_for(device) == "kernel":
        notes.note(
            "the first run on a machine takes minutes to start: the mixer's kernels are autotuned, and the result is cached"
        )


def is_here(device: torch.device) -> bool:
    """Returns whether this machine has such a device."""
    return device.type != "cuda" or torch.cuda.is_available()


def ran_on(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Returns the device, compute type and backend, as result files record them."""
    return {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "engine": backend_for(device)}


def keep_compiled_apart() -> None:
    """Gives each CPU capability and number of threads its own cache of compiled code. Must be
    called before anything is compiled.

    torch keeps one cache for all. Code compiled for wide vectors and then reused under a narrower
    setting silently gave a loss of 67 instead of 122, and the other way round it aborts (torch
    2.13; `ATEN_CPU_CAPABILITY=avx2` after `avx512`, and before).
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    usual = default_cache_dir()
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", usual) == usual:  # torch has set its own default there by now
        kind = f"{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}".replace(" ", "-").lower()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{usual}_{kind}"


def compile_layers(model: Any) -> None:
    """Compiles each decoder layer in place: one graph per kind of layer, so 60 layers compile as
    fast as 3.

    The scans are not traced and still call their own kernels.
    """
    keep_compiled_apart()
    # All layers run through one wrapper of transformers, whose graphs (kinds x masks x training)
    # would soon exceed the limit of 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in model.base_model.layers:
        layer.compile()


def captured(run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """Captures `run` as a CUDA graph; returns the graph and the result of `run`, which each replay
    overwrites. The tensors that `run` reads must live as long as the graph."""
    side_stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side_stream.wait_stream(current)
    with torch.cuda.stream(side_stream):
        for _ in range(WARM_UP):
            run()
    current.wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = run()
    return graph, value
