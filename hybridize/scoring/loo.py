"""Leave-one-out: what the model loses when one layer is taken away (Apriel-H1, 2511.02651, section 3).

Either the drop of a task's metric through lm-eval, or the rise of the KL to the untouched model on text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from hybridize.checkpoint.scores import LayerScore
from hybridize.distillation.measure import fidelity_per_batch
from hybridize.distillation.packing import Batch
from hybridize.errors import InputError, WorkError
from hybridize.evaluation.harness import EvalSettings, document_scores, evaluate, main_metric, margins
from hybridize.scoring.interface import Progress, ablated, attention_layers

METRICS = ("accuracy", "margin", "kl")
ABLATIONS = ("block", "mixer")


@dataclass(frozen=True)
class LooSettings:
    """metric `accuracy` (the tasks' own figure), `margin` (log-probability of the right answer minus the best wrong one) or
    `kl` (nats a token, forward KL from the untouched model); ablate the whole `block` or the `mixer` alone."""

    metric: str = "accuracy"
    ablate: str = "block"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"--metric {self.metric} is unknown; use {', '.join(METRICS)}")
        if self.ablate not in ABLATIONS:
            raise InputError(f"--ablate {self.ablate} is unknown; use {' or '.join(ABLATIONS)}")


def loo_tasks(
    model: Any, tokenizer: Any, settings: LooSettings, tasks: EvalSettings, manager: Any, progress: Progress = lambda *_: None
) -> list[LayerScore]:
    """Score = mean drop over all documents of all tasks, each task weighing the same; stderr from the paired differences."""
    before = _per_document(model, tokenizer, settings, tasks, manager)
    scores = []
    for layer in attention_layers(model):
        with ablated(model, layer, settings.ablate):
            after = _per_document(model, tokenizer, settings, tasks, manager)
        means, variances = [], []
        for task, base in before.items():
            drop = torch.tensor([base[doc] - after[task][doc] for doc in base], dtype=torch.float64)
            means.append(drop.mean())
            variances.append(drop.var() / len(drop) if len(drop) > 1 else torch.tensor(float("nan"), dtype=torch.float64))
        score, error = float(sum(means) / len(means)), float(sum(variances).sqrt() / len(variances))  # type: ignore[union-attr]
        if not math.isfinite(score):
            raise WorkError(f"layer {layer}: the score is {score}; try --dtype float32")
        scores.append(LayerScore(layer, score, None if math.isnan(error) else error))
        progress(layer, score)
    return scores


def _per_document(
    model: Any, tokenizer: Any, settings: LooSettings, tasks: EvalSettings, manager: Any
) -> dict[str, dict[int, float]]:
    found = evaluate(model, tokenizer, tasks, manager)
    scores = {}
    for task, samples in found["samples"].items():
        key, _ = main_metric(found["results"][task])
        rows = margins(samples) if settings.metric == "margin" else document_scores(samples, key)
        sign = -1.0 if found["higher_is_better"].get(task, {}).get(key.split(",")[0]) is False else 1.0
        scores[task] = {row["doc"]: sign * row["score"] for row in rows}
        if not rows:
            raise InputError(f"task {task} gives no score per document, so no layer can be ranked by it")
    return scores


def loo_kl(
    model: Any,
    teacher: Any,
    settings: LooSettings,
    batches: list[Batch],
    dtype: torch.dtype,
    progress: Progress = lambda *_: None,
) -> list[LayerScore]:
    """Score = rise of the forward KL from `teacher` on the kept tokens of `batches`; stderr over batches."""
    base = fidelity_per_batch(model, teacher, batches, dtype)
    scores = []
    for layer in attention_layers(model):
        with ablated(model, layer, settings.ablate):
            found = fidelity_per_batch(model, teacher, batches, dtype)
        rise, tokens = found[:, 1] - base[:, 1], found[:, 4]
        score = float(rise.sum() / tokens.sum())
        if not math.isfinite(score):
            raise WorkError(f"layer {layer}: the KL is {score}; try --dtype float32")
        each = rise / tokens
        scores.append(LayerScore(layer, score, float(each.std() / len(each) ** 0.5) if len(each) > 1 else None))
        progress(layer, score)
    return scores
