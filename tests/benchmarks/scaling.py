"""Distillation on several GPUs against one of them: the training loop itself on random weights and
the same rows a GPU.

torchrun --nproc-per-node 2 -m tests.benchmarks.scaling --shape smollm2 --ways
whole+compile+cuda_graph sharded+compile torchrun --nproc-per-node 2 -m tests.benchmarks.scaling
--shape llama-3b --ways sharded+compile --rows 8 --micro 2

A way is `whole` (--no-shard) or `sharded`, with more of distill's switches after it. Each is timed
on one GPU while the others wait, and then on all; median of the steps after the first two. The plan
is --dry-run's, for a rank.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from hybridize.distillation.loop import Training
from hybridize.distillation.optimize import choose_trained
from hybridize.distillation.plan import GIB, plan
from hybridize.distillation.run_dir import RunDir
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.watch import model_flops
from hybridize.runtime.distributed import DistributedContext, join, leave
from tests.benchmarks.distill import SHAPES, models, random_batch


def timed(
    shape: str, settings: DistillSettings, ranks: DistributedContext, device: torch.device, documents: int
) -> tuple[float, float, float, float]:
    """Median ms of a step and the spread, peak GiB of this rank, MFU of all ranks together at 989
    TFLOP/s each."""
    dtype = torch.bfloat16
    student, teacher = models(shape, "mamba2", device, dtype)
    choose_trained(student, settings)  # what is frozen takes no gradient
    flops, vocabulary = model_flops(student, teacher), student.config.vocab_size
    torch.manual_seed(0)
    batch = random_batch(settings.batch_size, settings.seq_len, vocabulary, documents, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as home:
        run = RunDir(Path(home) / "out", {}, ranks)
        run.start(False)
        training = Training(student, teacher, [], settings, run, device=device, dtype=dtype, ranks=ranks)
        training.go(itertools.repeat(batch))
        seconds = ranks.first([record["seconds"] for record in run.read("metrics")])
    each = [1e3 * (b - a) for a, b in itertools.pairwise(seconds)][1:]
    ms = statistics.median(each)
    peak = 0.0
    if device.type == "cuda":  # what a graph holds counts as reserved only
        peak = (torch.cuda.max_memory_reserved if settings.cuda_graph else torch.cuda.max_memory_allocated)() / GIB
    mfu = flops * settings.batch_size * settings.seq_len / ms / 1e-3 / (989e12 * ranks.size)
    return ms, max(each) - min(each), peak, mfu


def cleared(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--ways", nargs="+", default=["whole+compile+cuda_graph", "sharded+compile"])
    parser.add_argument("--train", default="body")
    for flag, default, what in (
        ("--rows", 16, "Sequences a step and GPU."),
        ("--micro", 8, "Of them at once."),
        ("--length", 2048, "Tokens of each."),
        ("--documents", 1, "Packed into each."),
        ("--steps", 8, "Timed and untimed ones."),
    ):
        parser.add_argument(flag, type=int, default=default, help=what)
    args = parser.parse_args()
    ranks, device = join(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def say(text: str) -> None:
        if ranks.main:
            print(text, flush=True)

    say(
        f"{args.shape}, {args.rows} x {args.length} a GPU, micro-batch {args.micro}, train {args.train}, "
        f"{args.documents} documents a row, torch {torch.__version__}"
    )
    for way in args.ways:
        how, *switches = way.split("+")
        assert how in ("whole", "sharded"), way
        settings = DistillSettings(
            steps=args.steps, batch_size=args.rows, micro_batch_size=args.micro, seq_len=args.length, train=args.train,
            eval_every=0, save_every=0, shard=how == "sharded", **dict.fromkeys(switches, True),
        )  # fmt: skip
        alone = 0.0
        for crew in (DistributedContext(), ranks):
            ranks.wait()
            cleared(device)
            told = replace(settings, batch_size=args.rows * crew.size)
            if crew.size > 1 or ranks.main:
                ms, spread, peak, mfu = timed(args.shape, told, crew, device, args.documents)
                speed = told.batch_size * told.seq_len / ms
                alone = alone if crew.size > 1 else speed
                gain = f", {speed / alone:.2f} times one" if ranks.main and crew.size > 1 else ""
                say(
                    f"{way:32} {crew.size} GPU: {ms:8.1f} ms (spread {spread:.1f}), {speed:7.1f} k tokens/s, MFU {mfu:.1%}, "
                    f"peak {peak:.2f} GiB{gain}"
                )
        with torch.device("meta"):
            student, teacher = models(args.shape, "mamba2", torch.device("meta"), torch.bfloat16)
        planned = plan(student, teacher, replace(settings, batch_size=args.rows * ranks.size), ranks.size, torch.bfloat16)
        say(f"{'':32} planned for each of {ranks.size}: {planned.total / GIB:.2f} GiB")
    say(json.dumps({"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}))
    leave()


if __name__ == "__main__":
    main()
