"""MMR side by side against one candidate after the other: same loss, same kernels, same batches.
Random weights.

python -m tests.benchmarks.score_mmr --shape smollm2                 # 8 x 512, all layers, mixers
only The loop is timed on --sample candidates; the bound is what sharing can save in FLOPs of
weights (attention's scores left out).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hybridize.modeling import HybridConfig, HybridForCausalLM, converted_layer
from hybridize.runtime.packed_attention import use_packed_attention
from hybridize.scoring.candidates import Candidates
from hybridize.scoring.mmr import alone
from hybridize.scoring.settings import MmrSettings
from tests.benchmarks.distill import SHAPES, models, random_batch


def flops(student: Any, layers: list[int], train: str) -> tuple[float, float]:
    """A token's FLOPs in one step of all candidates: (one after the other, side by side)."""
    count = len(student.model.layers)
    layer = sum(p.numel() for p in student.model.layers[0].parameters())
    head = student.lm_head.weight.numel()
    teacher = 2 * (count * layer + head)
    loop = shared = 0.0
    for index in layers:
        above = count - index  # the candidate's own layer and those above it
        forward, backward = 2 * (above * layer + head), 2 * (above * layer + head)
        loop += teacher + 2 * index * layer + forward + (backward if train == "mixers" else 4 * (count * layer + head))
        shared += forward + backward
    return loop, shared + teacher + 2 * max(layers) * layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--mixer", choices=["mamba", "mamba2"], default="mamba2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--sample", type=int, nargs="+", help="Layers that the loop is timed on [default: three, evenly].")
    parser.add_argument("--loops", nargs="+", choices=["mixers", "all"], default=["mixers", "all"])
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    hybrid, teacher = models(args.shape, args.mixer, device, dtype)
    mixer = hybrid.config.mixer
    kinds = ["full_attention"] * hybrid.config.num_hidden_layers
    config = HybridConfig(**{**SHAPES[args.shape], "base_model_type": "llama", "mixer": None, "layer_types": kinds})
    del hybrid
    with torch.device(device):
        student = HybridForCausalLM(config).eval()
    if device.type == "cuda":  # both sides attend by the same kernel
        use_packed_attention(student)
        use_packed_attention(teacher)
    layers = list(range(len(kinds)))
    sample = args.sample or [len(kinds) * part // 6 for part in (1, 3, 5)]

    def start(layer: int) -> dict[str, torch.Tensor]:
        config.mixer = mixer
        made: Any = converted_layer(type(student.model.layers[layer]), config, layer)
        config.mixer = None
        return made.mixer.state_dict()

    def settings(train: str, steps: int) -> MmrSettings:
        return MmrSettings(steps=steps, batch_size=args.rows, seq_len=args.length, train=train)

    batches = [random_batch(args.rows, args.length, config.vocab_size, args.documents, device) for _ in range(args.steps)]
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", f"torch {torch.__version__}")
    print(f"{args.shape}, {args.mixer}, {args.rows} x {args.length}, {len(layers)} candidates, {dtype}")

    loops: dict[str, float] = {}
    for train in args.loops:
        each = []
        for layer in [sample[0], *sample]:  # the first tunes kernels
            began: list[float] = []

            def told(began: list[float] = began) -> Iterator[Any]:
                for number, batch in enumerate(batches):
                    if number == 1:  # copying the student and the first step are no part of the loop's pace
                        wait()
                        began.append(time.perf_counter())
                    yield batch

            alone(student, teacher, mixer, layer, start(layer), told(), settings(train, args.steps), dtype)
            wait()
            each.append((time.perf_counter() - began[0]) * 1e3 / (args.steps - 1))
            gc.collect()
        loops[train] = statistics.mean(each[1:])
        parts = ", ".join(f"{t:.1f}" for t in each[1:])
        print(f"loop that trains {train}: {loops[train]:.1f} ms a step and candidate ({parts})", flush=True)

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    side = Candidates(
        student, teacher, mixer, [(layer, start(layer)) for layer in layers], settings("mixers", args.steps).as_distill(), dtype
    )
    times = []
    for batch in batches:
        wait()
        began_at = time.perf_counter()
        side.step(batch)
        wait()
        times.append((time.perf_counter() - began_at) * 1e3 / len(layers))
    ours = statistics.median(times[2:])
    print(f"side by side, {len(side.groups)} groups: {ours:.1f} ms a step and candidate")
    if device.type == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    for train, loop in loops.items():
        apart, shared = flops(student, layers, train)
        print(f"against the loop that trains {train}: {loop / ours:.2f} times as fast, bound in FLOPs {apart / shared:.2f}")


if __name__ == "__main__":
    main()
