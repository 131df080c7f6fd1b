"""LOO in one sweep against one stock lm-eval run a layer, same questions, same batch size, start-up
left out on both sides.

python -m tests.benchmarks.score_loo MODEL --tasks mmlu_astronomy,mmlu_business_ethics --num-fewshot
5 --limit 40

The separate runs are timed on --sample layers, whose answers are compared with the sweep's; the
rest take as long. Run it where lm-eval finds its data.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.evaluation.harness import EvalSettings, evaluate, open_tasks, repeatable, task_names
from hybridize.runtime.device import DTYPES, pick_device
from hybridize.runtime.loading import load_hybrid, load_model, load_tokenizer, quiet_transformers
from hybridize.scoring import loo
from hybridize.scoring.loo import answers, loo_tasks
from hybridize.scoring.scorer import attention_layers
from hybridize.scoring.settings import LooSettings
from hybridize.scoring.sweep import layer_passes, tree


def silenced(model: Any, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Zeroes what a block adds to the residual stream; returns what is to be put back."""
    block = model.model.layers[layer]
    saved = [(w, w.detach().clone()) for w in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight)]
    with torch.no_grad():
        for weight, _ in saved:
            weight.zero_()
    return saved


def answered(found: dict[str, Any]) -> dict[tuple[str, int], list[float]]:
    """Log-likelihood of each choice, by task and document."""
    return {
        (task, sample["doc_id"]): [float(value[0]) for value in sample["filtered_resps"]]
        for task, samples in found["samples"].items()
        for sample in samples
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sample", type=int, nargs="+", default=[0, 15], help="Layers of the separate runs.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--include-path")
    args = parser.parse_args()
    quiet_transformers()
    device, dtype, source = pick_device(args.device), DTYPES[args.dtype], CheckpointReader(args.model)
    tokenizer = load_tokenizer(args.model)
    settings = EvalSettings(
        task_names(args.tasks), args.num_fewshot, args.limit, args.batch_size, include_path=args.include_path
    )
    tasks = repeatable(open_tasks(settings))
    asked: list[Any] = []

    def listen(requests: Any) -> list[tuple[float, bool]]:
        asked.extend(requests)
        return [(0.0, False)] * len(requests)

    ours, stock = load_hybrid(source, device, dtype), load_model(args.model, device, dtype)
    evaluate(ours, tokenizer, settings, tasks, listen)  # loads the data, and says what will be asked
    layers = attention_layers(ours)

    texts = {tuple(read): 1 for read, _ in asked}
    nodes = dict.fromkeys(node for leaf in tree(list(texts.items()), args.batch_size, device) for node in leaf.path)
    swept, apart = layer_passes(ours, layers)
    shared, whole = sum(node.ids.numel() for node in nodes), sum(map(len, texts))
    print(f"{len(asked)} requests, {len(texts)} texts of {whole} tokens, {shared} in the tree, padding included")
    floor = whole * apart / shared / swept
    print(f"floor, layers times tokens: {whole * apart:.3g} apart, {shared * swept:.3g} in the sweep, ratio {floor:.1f}")

    times = []
    table: dict[int, Any] = {}
    for layer in args.sample:
        saved = silenced(stock, layer)
        began = time.perf_counter()
        table[layer] = answered(evaluate(stock, tokenizer, settings, tasks))
        times.append(time.perf_counter() - began)
        print(f"separate run without layer {layer}: {times[-1]:.1f} s", flush=True)
        with torch.no_grad():
            for weight, before in saved:
                weight.copy_(before)
    began = time.perf_counter()
    found = answers(ours, asked, "block", args.batch_size)
    loo.answers = lambda *_: found  # type: ignore[assignment]
    scores = loo_tasks(ours, tokenizer, LooSettings("margin"), settings, tasks)["margin"]
    spent = time.perf_counter() - began
    runs = len(layers) + 1
    separate = statistics.median(times) * runs
    print(f"sweep with its metrics: {spent:.1f} s; {runs} separate runs: {separate:.0f} s; ratio {separate / spent:.1f}")
    print("lowest margins lost:", [s.layer for s in sorted(scores, key=lambda s: s.score)[:10]])

    differences, same = [], 0
    keys = [(tuple(read), tuple(wanted)) for read, wanted in asked]
    for layer, stock_answers in table.items():
        variant = dict(zip(keys, found[1 + layers.index(layer)], strict=True))
        told = functools.partial(lambda known, requests: [known[tuple(r), tuple(w)] for r, w in requests], variant)
        mine = answered(evaluate(ours, tokenizer, settings, tasks, told))
        for key, values in stock_answers.items():
            differences.append(max(abs(a - b) for a, b in zip(values, mine[key], strict=True)))
            same += values.index(max(values)) == mine[key].index(max(mine[key]))
    print(f"log-likelihoods differ by at most {max(differences):.2e}; same answer chosen in {same} of {len(differences)}")


if __name__ == "__main__":
    main()
