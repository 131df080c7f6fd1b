"""Leave-one-out: what the model loses when one layer is taken away (Apriel-H1, 2511.02651, section 3).

Either the drop of a task's metric through lm-eval, or the rise of the KL to the teacher on text. One sweep tries all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridize.checkpoint.scores import LayerScore
from hybridize.distillation.losses import divergence
from hybridize.distillation.measure import hidden_states, token_logits
from hybridize.distillation.packing import Batch
from hybridize.errors import InputError, WorkError
from hybridize.evaluation.harness import EvalSettings, document_scores, evaluate, main_metric, margins, repeatable
from hybridize.modeling import HybridForCausalLM
from hybridize.scoring.interface import attention_layers
from hybridize.scoring.sweep import ABLATIONS, Node, portions, sweep, tree

METRICS = ("accuracy", "margin", "kl")
LOGIT_BYTES = 256 << 20  # float32 logits at once
STATE_BYTES = 1 << 30  # hidden states of all variants at once on a CPU; a GPU spends a quarter of what it has left

Request = tuple[Sequence[int], Sequence[int]]  # what the model reads, and what its last positions should predict
Answer = tuple[float, bool]  # log-probability of that, and whether each token was the most likely one
Progress = Callable[[int, int], None]  # told how many of how many texts are done


@dataclass(frozen=True)
class LooSettings:
    """metric `accuracy` (the tasks' own figure), `margin` (log-probability of the right answer minus the best wrong one) or
    `kl` (nats a token, forward KL from the teacher); ablate the whole `block` or the `mixer` alone."""

    metric: str = "accuracy"
    ablate: str = "block"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"--metric {self.metric} is unknown; use {', '.join(METRICS)}")
        if self.ablate not in ABLATIONS:
            raise InputError(f"--ablate {self.ablate} is unknown; use {' or '.join(ABLATIONS)}")


@torch.no_grad()
def answers(
    model: HybridForCausalLM, requests: Sequence[Request], what: str, rows: int, progress: Progress = lambda *_: None
) -> list[list[Answer]]:
    """Every request's answer: of the untouched model, then without each attention layer in turn.

    what: see sweep; rows: texts side by side.
    """
    layers, device = attention_layers(model), model.lm_head.weight.device
    needed: dict[tuple[int, ...], int] = {}
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, (read, wanted) in enumerate(requests):
        key = tuple(read)
        needed[key] = max(needed.get(key, 0), len(wanted))
        asked.setdefault(key, []).append(number)
    texts, found = list(needed.items()), [[(0.0, False)] * len(requests) for _ in range(len(layers) + 1)]
    done = 0
    for nodes in portions(tree(texts, rows, device), _room(model, len(layers) + 1)):
        for leaf, states in sweep(model, nodes, layers, what).items():
            for row, text in enumerate(leaf.texts):
                read, count = texts[text]
                end = len(read) - leaf.offset
                logs = F.log_softmax(model.lm_head(states[:, row, end - count : end]).float(), -1)
                for number in asked[read]:
                    wanted = torch.tensor(requests[number][1], device=device)
                    last = logs[:, count - len(wanted) :]
                    sums = last.gather(2, wanted.view(1, -1, 1).expand(len(last), -1, 1)).sum((1, 2)).tolist()
                    greedy = (last.argmax(2) == wanted).all(1).tolist()
                    for variant, answer in enumerate(zip(sums, greedy, strict=True)):
                        found[variant][number] = answer
                done += 1
            progress(done, len(texts))
    return found


def _room(model: HybridForCausalLM, variants: int) -> int:
    """How many tokens' hidden states fit, of all variants."""
    weight = model.lm_head.weight
    room = torch.cuda.mem_get_info(weight.device)[0] // 4 if weight.is_cuda else STATE_BYTES
    return max(1, room // (variants * weight.shape[1] * weight.element_size()))


def loo_tasks(
    model: HybridForCausalLM,
    tokenizer: Any,
    settings: LooSettings,
    tasks: EvalSettings,
    manager: Any,
    progress: Progress = lambda *_: None,
) -> list[LayerScore]:
    """Score = mean drop over all documents of all tasks, each task weighing the same; stderr from the paired differences.

    InputError for tasks that ask for more than log-likelihoods.
    """
    layers, known, variant = attention_layers(model), {}, 0

    def answer(requests: Sequence[Request]) -> list[Answer]:
        keys = [(tuple(read), tuple(wanted)) for read, wanted in requests]
        if not known:
            table = answers(model, requests, settings.ablate, tasks.batch_size, progress)
            known.update({key: [row[number] for row in table] for number, key in enumerate(keys)})
        return [known[key][variant] for key in keys]

    again, drops = repeatable(manager), []
    for variant in range(len(layers) + 1):  # noqa: B007 (`answer` reads it)
        drops.append(_per_document(model, tokenizer, settings, tasks, again, answer))
    scores = []
    for layer, after in zip(layers, drops[1:], strict=True):
        means, variances = [], []
        for task, base in drops[0].items():
            drop = torch.tensor([base[doc] - after[task][doc] for doc in base], dtype=torch.float64)
            means.append(drop.mean())
            variances.append(drop.var() / len(drop) if len(drop) > 1 else torch.tensor(float("nan"), dtype=torch.float64))
        score, error = float(sum(means) / len(means)), float(sum(variances).sqrt() / len(variances))  # type: ignore[union-attr]
        if not math.isfinite(score):
            raise WorkError(f"layer {layer}: the score is {score}; try --dtype float32")
        scores.append(LayerScore(layer, score, None if math.isnan(error) else error))
    return scores


def _per_document(
    model: Any, tokenizer: Any, settings: LooSettings, tasks: EvalSettings, manager: Any, answer: Any
) -> dict[str, dict[int, float]]:
    found = evaluate(model, tokenizer, tasks, manager, answer)
    scores = {}
    for task, samples in found["samples"].items():
        key, _ = main_metric(found["results"][task])
        rows = margins(samples) if settings.metric == "margin" else document_scores(samples, key)
        sign = -1.0 if found["higher_is_better"].get(task, {}).get(key.split(",")[0]) is False else 1.0
        scores[task] = {row["doc"]: sign * row["score"] for row in rows}
        if not rows:
            raise InputError(f"task {task} gives no score per document, so no layer can be ranked by it")
    return scores


@torch.no_grad()
def loo_kl(
    model: HybridForCausalLM,
    teacher: Any,
    settings: LooSettings,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    progress: Progress = lambda *_: None,
) -> list[LayerScore]:
    """Score = rise of the forward KL from `teacher` on the kept tokens of `batches`; stderr over batches.

    teacher: another model, or None where it is `model` untouched.
    """
    layers, sums, tokens = attention_layers(model), [], []
    for number, batch in enumerate(batches, start=1):
        node = Node(batch.ids, positions=batch.positions)
        with torch.autocast(batch.ids.device.type, dtype, enabled=dtype != torch.float32):
            states = sweep(model, [node], layers, settings.ablate)[node].flatten(1, 2)[:, batch.keep.flatten()]
        theirs = states[0] if teacher is None else hidden_states(teacher, batch, dtype).flatten(0, 1)[batch.keep.flatten()]
        sums.append(torch.stack([_forward_kl(model, ours, teacher or model, theirs, dtype) for ours in states]))
        tokens.append(states.shape[1])
        progress(number, len(batches))
    found, count = torch.stack(sums), torch.tensor(tokens, dtype=torch.float64)
    rises, scores = found[:, 1:] - found[:, :1], []
    for layer, rise in zip(layers, rises.unbind(1), strict=True):
        score, each = float(rise.sum() / count.sum()), rise / count
        if not math.isfinite(score):
            raise WorkError(f"layer {layer}: the KL is {score}; try --dtype float32")
        scores.append(LayerScore(layer, score, float(each.std() / len(each) ** 0.5) if len(each) > 1 else None))
    return scores


def _forward_kl(model: Any, ours: Tensor, teacher: Any, theirs: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over tokens, float64 on the CPU; ours, theirs [n, D]."""
    total = torch.zeros((), dtype=torch.float64)
    rows = max(1, LOGIT_BYTES // (8 * model.lm_head.weight.shape[0]))
    for q, p in zip(ours.split(rows), theirs.split(rows), strict=True):
        logs = (F.log_softmax(token_logits(m, h, dtype), -1) for m, h in ((model, q), (teacher, p)))
        total += divergence("forward-kl", *logs).double().sum().cpu()
    return total
