"""Which learning rates hold: one hybrid of a teacher, trained from the same start at several rates, a line of JSON a run.

python docs/experiments/rates.py TEACHER TRACES HELDOUT.jsonl OUT --indices 1-6,17-19 --runs 1e-3:1e-4 3e-4:3e-5:200

A run is LR_MIXER:LR, or LR_MIXER:LR:WARMUP_STEPS. With --keep its result stays in OUT/LR_MIXER-LR,
for `hybridize eval`. Loss on assistant tokens, embeddings and output
head frozen. Printed of each: held-out reverse KL at the end and along the way, the largest mean of
the training loss over 20 steps after its smallest (a rising loss), and seconds. All runs share one
process, because the Mamba-2 kernels spend 100 seconds on tuning themselves when they are first used.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.data.corpus import open_corpus
from hybridize.distillation.distill import distill
from hybridize.distillation.run_dir import RunDir
from hybridize.distillation.settings import DistillSettings
from hybridize.inputs import calibration_for, open_encoder
from hybridize.parsing import parse_indices
from hybridize.runtime.device import pick_compute
from hybridize.runtime.loading import quiet_transformers
from hybridize.surgery.replace import MixerSettings, plan, replace
from hybridize.surgery.teacher import read_teacher

SPAN = 20  # steps whose mean loss is looked at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "traces", "heldout", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--indices", required=True)
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--mixer", default="mamba2")
    parser.add_argument("--tokens", type=int, default=8_000_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="Keep the results.")
    parser.add_argument("--cpu", action="store_true", help="Small and slow, to try the script.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    quiet_transformers()
    device, dtype = pick_compute("cpu" if args.cpu else "auto", "auto", training=True)
    source, start = CheckpointReader(args.teacher), args.out / "start"
    corpus = open_corpus(str(args.traces), str(args.heldout), open_encoder(source, "assistant", None, False))
    surgery = plan(read_teacher(source), parse_indices(args.indices), MixerSettings(args.mixer))
    fit = calibration_for(
        str(args.traces), source, args.mixer, parts=None, tokens=32768, device=device.type, seed=args.seed, chat_template=None,
        trust_remote_code=False,
    )  # fmt: skip
    replace(
        source, str(args.teacher), surgery, start, donor=source, init_from="checkpoint", seed=args.seed, overwrite=True,
        settings={"layers": surgery.layers}, calibration=fit,
    )  # fmt: skip
    for run in args.runs:
        mixer, rest, *warmup = run.split(":")
        settings = DistillSettings(
            tokens=args.tokens, batch_size=args.batch_size, micro_batch_size=args.micro_batch_size, seq_len=args.seq_len,
            lr_mixer=float(mixer), lr=float(rest), warmup_steps=int(warmup[0]) if warmup else 50, train="body", save_every=0,
            eval_every=60, compile=not args.cpu, cuda_graph=not args.cpu, seed=args.seed,
        )  # fmt: skip
        record = {
            "run": run,
            "tokens": args.tokens,
            **trained(source, start, corpus, settings, args.out / run.replace(":", "-"), device, dtype),
        }
        if not args.keep:
            shutil.rmtree(args.out / run.replace(":", "-"))
        print(json.dumps(record), flush=True)
        with (args.out / "rates.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def trained(
    source: CheckpointReader, start: Path, corpus: Any, settings: DistillSettings, end: Path, device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """What one run comes to; its result is written to `end`."""
    losses: list[float] = []
    curve: dict[int, float] = {}
    began, first = time.perf_counter(), 0.0

    def report(event: dict[str, Any]) -> None:
        nonlocal first
        if event["kind"] == "step":
            losses.append(event["loss"])
            first = event["first_step_seconds"]
        elif event["kind"] == "eval":
            curve[event["step"]] = round(event["reverse_kl"], 4)
            curve["agreement"] = round(event["agreement"], 4)  # type: ignore[index]

    distill(
        CheckpointReader(start), str(start), source, corpus, settings, end, device=device, dtype=dtype, overwrite=True,
        run=RunDir(end, {}), report=report,
    )  # fmt: skip
    gc.collect()
    torch.cuda.empty_cache()
    means = torch.tensor(losses).unfold(0, SPAN, 1).mean(1) if len(losses) >= SPAN else torch.tensor(losses)
    low = int(means.argmin())
    rise = float(means[low:].max() / means[low])
    seconds = time.perf_counter() - began
    return {
        "held_out": curve, "best_loss": round(float(means.min()), 4), "last_loss": round(float(means[-1]), 4),
        "rise": round(rise, 3), "seconds": round(seconds - first, 1), "first_step": round(first, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
