"""Times checkpoints: prefill, decoding steps by context and batch, and whole generations.

Every checkpoint, teacher or hybrid, runs as HybridForCausalLM through the same decoding step
(hybridize/generation), captured as a CUDA graph where possible. The time of a step does not depend
on the token values, so no prompt is read before a step is timed.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybridize.errors import InputError, setting
from hybridize.generation.cache import sequence_bytes
from hybridize.generation.decoder import Decoder, can_capture
from hybridize.modeling import FLOAT32, HybridConfig, HybridForCausalLM, new_cache
from hybridize.runtime.loading import without_storage

AT_ONCE = 8192  # tokens in one forward pass of a prefill, unless one prompt is longer
POINTS = 6  # context lengths at which the steps of a whole generation are timed
SHARE = 0.97  # usable share of the memory, for weights, caches and the reserve
RESERVE = {"cuda": 5 << 29}  # bytes for a prefill and the kernels' own buffers


@dataclass(frozen=True)
class BenchSettings:
    """contexts, batches: the grid. generations: pairs of (prompt, new) tokens, each timed with the
    largest batch that fits. steps: decoding steps per timing. repeats: timings, whose median is
    reported. InputError if a number is below 1."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    generations: tuple[tuple[int, int], ...] = ()
    steps: int = 16
    repeats: int = 5

    def __post_init__(self) -> None:
        sizes = [*self.contexts, *self.batches, self.steps, self.repeats, *(n for pair in self.generations for n in pair)]
        if min(sizes, default=0) < 1:
            raise InputError(f"contexts, batches, generations, {setting('steps')} and {setting('repeats')} must be at least 1")


def bandwidth(device: torch.device) -> float:
    """Memory bandwidth in bytes per second, reads plus writes: the best of six large copies."""
    size = (1 << 30) if device.type == "cuda" else (1 << 26)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(_timed(lambda: target.copy_(source), device) for _ in range(6))


def step_bytes(model: HybridForCausalLM, batch: int, context: int) -> int:
    """Least number of bytes that a step moves: every weight once, the KV cache of each sequence
    once, its recurrent states in and out.

    Embeddings count only if they are tied to the output weights, since otherwise only the batch's
    rows are read. All experts count.
    """
    weights = weight_bytes(model)
    if not model.config.tie_word_embeddings:
        table = model.model.embed_tokens.weight
        weights -= table.numel() * table.element_size()
    kv, state = sequence_bytes(model, context, model.dtype)
    return weights + batch * (kv + 2 * state)


def weight_bytes(model: torch.nn.Module) -> int:
    """Size of all parameters in bytes."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def random_hybrid(config: HybridConfig, device: torch.device, dtype: torch.dtype) -> HybridForCausalLM:
    """A model with random weights for timing, created directly on `device`."""
    model = without_storage(lambda: HybridForCausalLM(config))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            kind = torch.float32 if name in FLOAT32 else dtype
            made = torch.empty(parameter.shape, dtype=kind, device=device)
            made = made.fill_(0.5) if parameter.ndim == 1 else made.normal_(0, 0.02)
            setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
    model.tie_weights()
    return model.to(device).eval()


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    """Runs `work` and returns the seconds that it took, GPU work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def _step_seconds(decoder: Decoder, context: int, steps: int) -> float:
    """Mean seconds per step of `steps` decoding steps after `context` tokens in every sequence."""

    def run() -> None:
        for _ in range(steps):
            decoder.step()

    decoder.cache.lengths.fill_(context)
    return _timed(run, decoder.model.device) / steps


@torch.no_grad()
def _prefill(model: HybridForCausalLM, rows: int, length: int) -> None:
    """One prefill of `rows` prompts of `length` tokens."""
    ids = torch.zeros(rows, length, dtype=torch.long, device=model.device)
    model(ids, cache=new_cache(model.config), use_cache=True, logits_to_keep=1)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _median(times: Sequence[float]) -> dict[str, float]:
    """Median and extremes in milliseconds of times in seconds."""
    return {"ms": statistics.median(times) * 1e3, "least_ms": min(times) * 1e3, "most_ms": max(times) * 1e3}


def time_prefill(
    models: dict[str, HybridForCausalLM], length: int, most: int, settings: BenchSettings
) -> dict[str, dict[str, Any]]:
    """By model: the time to first token of a single prompt of `length` tokens, and the throughput
    in tokens per second of one pass over AT_ONCE tokens, but at most `most` prompts. The first
    round is a warm-up and does not count."""
    device = next(iter(models.values())).device
    rows = max(1, min(most, AT_ONCE // length))
    ways = {(name, count): (model, count) for name, model in models.items() for count in {1, rows}}
    found: dict[tuple[str, int], list[float]] = {key: [] for key in ways}
    for turn in range(settings.repeats + 1):
        for key, (model, count) in ways.items():
            seconds = _timed(lambda m=model, c=count: _prefill(m, c, length), device)  # type: ignore[misc]
            if turn:
                found[key].append(seconds)
    return {
        name: {"context": length, "first_token": _median(found[name, 1]), "rows": rows,
               "tokens_per_second": rows * length / statistics.median(found[name, rows])}
        for name in models
    }  # fmt: skip


def time_steps(
    models: dict[str, HybridForCausalLM], batch: int, context: int, settings: BenchSettings, speed: float
) -> dict[str, dict[str, Any]]:
    """By model: times of a decoding step of `batch` sequences after `context` tokens each, the
    models interleaved. The first round is a warm-up. speed: memory bandwidth, see `bandwidth`."""
    decoders = {name: Decoder(model, batch, context + settings.steps) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(settings.repeats + 1):
        for name, decoder in decoders.items():
            seconds = _step_seconds(decoder, context, settings.steps)
            if turn:
                times[name].append(seconds)
    found = {}
    for name, model in models.items():
        timing, moved = _median(times[name]), step_bytes(model, batch, context)
        found[name] = {
            "context": context, "batch": batch, **timing, "tokens_per_second": batch / timing["ms"] * 1e3,
            **{f"{part}_bytes": held for part, held in decoders[name].cache.bytes().items()}, "step_bytes": moved,
            "times_floor": timing["ms"] / 1e3 * speed / moved, "graph": can_capture(model),
        }  # fmt: skip
    return found


def time_generation(
    model: HybridForCausalLM, prompt: int, new: int, settings: BenchSettings, speed: float, memory: float
) -> dict[str, Any]:
    """Time and throughput of reading `prompt` tokens and generating `new` ones with the largest
    batch that fits into `memory` bytes, integrated over steps timed at POINTS context lengths.
    Batch 0 if nothing fits."""
    kv, state = sequence_bytes(model, prompt + new, model.dtype)
    each = kv + state + 8 * model.config.vocab_size
    batch = int((memory * SHARE - weight_bytes(model) - RESERVE.get(model.device.type, 0)) // each)
    if batch < 1:
        return {"prompt": prompt, "new": new, "batch": 0}
    lengths = sorted({prompt + round((new - 1) * point / (POINTS - 1)) for point in range(POINTS)})
    decoder = Decoder(model, batch, prompt + new)
    steps = min(settings.steps, new)
    points = []
    for length in lengths:
        times = []
        for _ in range(settings.repeats + 1):
            times.append(_step_seconds(decoder, max(0, min(length, prompt + new - steps)), steps))
        points.append((length, statistics.median(times[1:])))
    decoder = None  # type: ignore[assignment]
    _free(model.device)
    pairs = list(itertools.pairwise(points))
    writing = sum((b - a) * (s + t) / 2 for (a, s), (b, t) in pairs) * new / max(1, new - 1) if pairs else points[0][1] * new
    reading = batch * prompt / time_prefill({"": model}, prompt, batch, settings)[""]["tokens_per_second"]
    middle = points[len(points) // 2]
    return {
        "prompt": prompt, "new": new, "batch": batch, "prefill_seconds": reading, "decode_seconds": writing,
        "tokens_per_second": batch * new / (reading + writing), "cache_bytes": batch * (kv + state),
        "steps": [{"context": length, "ms": seconds * 1e3} for length, seconds in points],
        "times_floor": middle[1] * speed / step_bytes(model, batch, middle[0]),
    }  # fmt: skip


def bench(
    loaders: dict[str, Callable[[], HybridForCausalLM]], settings: BenchSettings, device: torch.device,
    memory: float | None = None, progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """By checkpoint: weight size, prefill by context, steps by context and batch, generations.

    Timings are interleaved if all models fit into half of the memory and no generations are
    requested; otherwise checkpoints are timed one after the other. memory: bytes [default: the
    GPU's, or 4 GiB on a CPU]. A cell that does not fit has no times.
    """
    whole = memory or (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 4 << 30)
    speed = bandwidth(device)
    _free(device)
    found: dict[str, Any] = {name: {"prefill": [], "steps": [], "generations": []} for name in loaders}
    models: dict[str, HybridForCausalLM] = {}
    groups: list[list[str]] = [[name] for name in loaders]
    if not settings.generations:
        for name, load in loaders.items():
            progress(f"loading {name}")
            models[name] = load()
            if sum(map(weight_bytes, models.values())) > whole * SHARE / 2:
                models = {}
                break
        else:
            groups = [list(loaders)]
    for group in groups:
        for name in group:
            if name not in models:
                progress(f"loading {name}")
                _free(device)
                models[name] = loaders[name]()
        _time_group({name: models.pop(name) for name in group}, found, settings, device, speed, whole, progress)
    return {"bandwidth": speed, "memory": whole, "interleaved": len(groups) == 1, "checkpoints": found}


def _time_group(
    here: dict[str, HybridForCausalLM], found: dict[str, Any], settings: BenchSettings, device: torch.device, speed: float,
    whole: float, progress: Callable[[str], None],
) -> None:  # fmt: skip
    """Times models that are in memory together and adds the results to `found`."""
    group = ", ".join(here)
    for name, model in here.items():
        found[name]["weight_bytes"] = weight_bytes(model)
    room = _room(here, whole, device)
    most = max(settings.batches, default=1)
    for context in settings.contexts:
        progress(f"prefill of {context}: {group}")
        read = {name: model for name, model in here.items() if sum(sequence_bytes(model, context, model.dtype)) <= room}
        done = _unless_full(lambda r=read, c=context: time_prefill(r, c, most, settings), device) if read else None  # type: ignore[misc]
        for name, entry in (done or {}).items():
            found[name]["prefill"].append(entry)
        for batch in settings.batches:
            progress(f"steps of {batch} at {context}: {group}")
            for name, entry in _cell(here, batch, context, settings, speed, whole, device).items():
                found[name]["steps"].append(entry)
    for prompt, new in settings.generations:
        progress(f"{prompt} in, {new} out: {group}")
        for name, model in here.items():
            timed = _unless_full(lambda m=model, p=prompt, n=new: time_generation(m, p, n, settings, speed, whole), device)  # type: ignore[misc]
            found[name]["generations"].append(timed or {"prompt": prompt, "new": new, "batch": 0})


def _room(models: dict[str, HybridForCausalLM], memory: float, device: torch.device) -> float:
    """Bytes left for caches in a cell of the grid, beside the weights of these models."""
    return memory * SHARE - sum(map(weight_bytes, models.values())) - RESERVE.get(device.type, 0) / 4


def _unless_full(work: Callable[[], Any], device: torch.device) -> Any:
    """Returns the result of `work`, or None if it runs out of memory, so that one cell does not end
    the whole benchmark."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return None
    finally:
        _free(device)


def _cell(
    models: dict[str, HybridForCausalLM], batch: int, context: int, settings: BenchSettings, speed: float, memory: float,
    device: torch.device,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Runs time_steps on the models that fit: together if all of them fit at once, otherwise
    alone."""
    wanted = {name: batch * sum(sequence_bytes(m, context + settings.steps, m.dtype)) for name, m in models.items()}
    room = _room(models, memory, device)
    fit = {name: model for name, model in models.items() if wanted[name] <= room}
    together = sum(wanted[name] for name in fit) <= room
    found: dict[str, dict[str, Any]] = {
        name: {"context": context, "batch": batch, "ms": None, "wanted_bytes": wanted[name]} for name in models
    }
    for part in [fit] if together else [{name: model} for name, model in fit.items()]:
        if part:
            timed = _unless_full(lambda p=part: time_steps(p, batch, context, settings, speed), device)  # type: ignore[misc]
            found |= timed or {}
    return found


def break_even(steps: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], batch: int) -> float | None:
    """The context from which `steps` are faster than `base` up to the longest measured context, at
    this batch size, interpolated between measured contexts. The shortest measured context if they
    are always faster; None if they are not faster at the longest."""
    times = {entry["context"]: entry["ms"] for entry in base if entry["batch"] == batch}
    gaps = sorted(
        (entry["context"], entry["ms"] - times[entry["context"]])
        for entry in steps
        if entry["batch"] == batch and entry["ms"] is not None and times.get(entry["context"]) is not None
    )
    if not gaps or gaps[-1][1] >= 0:
        return None
    at: float = gaps[-1][0]
    for (context, gap), (after, later) in reversed(list(itertools.pairwise(gaps))):
        if gap >= 0:
            return context + (after - context) * gap / (gap - later)
        at = context
    return at
