"""Which mixer, calibrated how, in which layers: 15 of SmolLM2-135M's 30, the same tokens, one line
of JSON a run.

python docs/experiments/mixers.py TEACHER TRACES HELDOUT.txt GENERAL.txt MASKED.jsonl OUT --runs
mamba:plain mamba2:all ...

A run is KIND:PARTS, PARTS being plain, all, or some of z+conv+decay+scale+out; @NAME=VALUE,...
after it sets constants of hybridize.surgery.calibrate, @name=value settings of the distillation
(lr_mixer, lr), @align=SHARE spends that share of the tokens on --stage align first. Every run is
made with every choice of layers, NAME=INDICES or NAME=SCORES.json. The protocol is that of
smollm2.sh; all runs share one process, because the Mamba-2 kernels spend 100 seconds on tuning
themselves when they are first used.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.checkpoint.scores import read_scores
from hybridize.data.corpus import Corpus, open_corpus
from hybridize.data.encode import Encoder
from hybridize.data.sample import sample_windows
from hybridize.distillation.distill import distill
from hybridize.distillation.fidelity import fidelity
from hybridize.distillation.run_dir import RunDir
from hybridize.distillation.settings import DistillSettings
from hybridize.parsing import parse_indices
from hybridize.runtime.device import pick_compute
from hybridize.runtime.loading import load_model, load_tokenizer, quiet_transformers
from hybridize.surgery import calibrate as constants
from hybridize.surgery.mixers import kind_of
from hybridize.surgery.replace import Calibration, MixerSettings, plan, replace
from hybridize.surgery.select import lowest
from hybridize.surgery.teacher import read_teacher

TEMPLATE = Path(__file__).with_name("chatml.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "traces", "heldout", "general", "masked", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--layers", nargs="+", default=["kl-mixer=3-10,12,22,25-29"])
    parser.add_argument("--count", type=int, default=15, help="Layers taken of a score file.")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="0: measure the starts, train nothing.")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--eval-every", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--keep", action="store_true", help="Keep every run's checkpoints.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    quiet_transformers()
    torch._dynamo.config.recompile_limit = 1000  # every run's student brings its own graphs
    device, dtype = pick_compute("auto", "auto", training=True)
    tokenizer, template = load_tokenizer(args.teacher), TEMPLATE.read_text()
    encoders = {mask: Encoder(tokenizer, mask, template) for mask in ("none", "assistant")}
    settings = DistillSettings(
        tokens=args.tokens or 1, batch_size=args.batch_size, micro_batch_size=args.micro_batch_size, seq_len=args.seq_len,
        mask="none", train="body", warmup_steps=args.warmup_steps, eval_every=args.eval_every,
        eval_windows=args.windows, save_every=0, seed=args.seed, compile=args.compile,
        cuda_graph=args.cuda_graph,
    )  # fmt: skip
    corpus = open_corpus(str(args.traces), str(args.heldout), encoders["none"])
    if not args.eval_every:  # the ends are measured here
        corpus = dataclasses.replace(corpus, heldout=corpus.heldout.part(0, 0))
    windows = sample_windows(corpus.rows, encoders["none"], args.calibration_tokens, args.seed)
    texts = {}
    for name, mask in (("heldout", "none"), ("general", "none"), ("masked", "assistant")):
        path = str(getattr(args, name))
        texts[name] = [
            b.to(device)
            for b in open_corpus(path, path, encoders[mask]).held_out(settings.eval_windows, settings.seq_len, settings.micro)
        ]
    source = CheckpointReader(args.teacher)
    teacher = load_model(args.teacher, device, dtype)

    def measure(path: Path) -> dict[str, dict[str, float]]:
        student = load_model(path, device, dtype)
        found = {name: vars(fidelity(student, teacher, text, dtype)) for name, text in texts.items()}
        return {name: {key: round(value, 5) for key, value in figures.items()} for name, figures in found.items()}

    for run, choice in itertools.product(args.runs, args.layers):
        name, _, where = choice.partition("=")
        scored = where.endswith(".json")
        layers = lowest(read_teacher(source), read_scores(Path(where)), args.count) if scored else parse_indices(where)
        record = {"run": run, "choice": name, "layers": layers, "tokens": args.tokens, "seed": args.seed}
        record |= one(run, name, layers, args, source, corpus, settings, windows, device, dtype, measure)
        print(json.dumps(record), flush=True)
        with (args.out / "mixers.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def one(
    run: str, choice: str, layers: list[int], args: Any, source: CheckpointReader, corpus: Corpus, settings: DistillSettings,
    windows: torch.Tensor, device: torch.device, dtype: torch.dtype, measure: Any,
) -> dict[str, Any]:  # fmt: skip
    what, _, changes = run.partition("@")
    kind, _, parts = what.partition(":")
    chosen = frozenset(kind_of("mamba2").parts if parts == "all" else () if parts == "plain" else parts.split("+"))
    assert chosen <= set(kind_of("mamba2").parts), run
    given = {name: float(value) for name, value in (pair.split("=") for pair in changes.split(",") if pair)}
    changed = {name: value for name, value in given.items() if name.isupper()}
    share = given.pop("align", 0.0)
    settings = dataclasses.replace(settings, **{name: value for name, value in given.items() if name not in changed})
    before = {name: getattr(constants, name) for name in changed}
    vars(constants).update(changed)
    name = run.replace(":", "-").replace("+", ".").replace("@", "_").replace("=", "").replace(",", "_")
    name = f"{name}-{choice}"
    start, end = args.out / name, args.out / f"{name}-kd"
    fit = Calibration(windows, chosen, device, args.traces.name) if chosen else None
    began = time.perf_counter()
    replace(
        source, str(args.teacher), plan(read_teacher(source), layers, MixerSettings(kind)), start, donor=source,
        init_from="checkpoint", seed=args.seed, overwrite=True, settings={"layers": layers}, calibration=fit,
    )  # fmt: skip
    vars(constants).update(before)
    replaced = time.perf_counter()
    found: dict[str, Any] = {"replace_seconds": round(replaced - began, 1), "start": measure(start)}
    if not args.tokens:
        return found
    if share:
        aligned, tokens = args.out / f"{name}-aligned", int(args.tokens * share)
        first = dataclasses.replace(settings, stage="align", tokens=tokens, cuda_graph=False, compile=False)
        spent = time.perf_counter()
        distill(
            CheckpointReader(start), str(start), source, corpus, first, aligned, device=device, dtype=dtype, overwrite=True,
            run=RunDir(aligned, {}), report=lambda event: None,
        )  # fmt: skip
        shutil.rmtree(start)
        aligned.rename(start)
        found |= {"align_seconds": round(time.perf_counter() - spent, 1), "aligned": measure(start)}
        settings = dataclasses.replace(settings, tokens=args.tokens - tokens)
    speeds: list[tuple[float, float]] = []

    def report(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            speeds.append((event["tokens_per_second"], event["first_step_seconds"]))
        elif event["kind"] == "eval":
            print(f"{run} step {event['step']}: reverse KL {event['reverse_kl']:.4f}", flush=True)

    distill(
        CheckpointReader(start), str(start), source, corpus, settings, end, device=device, dtype=dtype, overwrite=True,
        log_every=4, run=RunDir(end, {}), report=report,
    )  # fmt: skip
    gc.collect()
    torch.cuda.empty_cache()
    found |= {"tokens_per_second": round(speeds[-1][0]), "first_step_seconds": round(speeds[-1][1], 1)}
    found["end"] = measure(end)
    if not args.keep:
        shutil.rmtree(start)
        shutil.rmtree(end)
    return found


if __name__ == "__main__":
    main()
