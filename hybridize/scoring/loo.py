"""Leave-one-out: scores a layer by what the model loses without it (Apriel-H1, 2511.02651, section
3).

The loss is either the drop of an lm-eval task's metric, or the rise of the KL from the teacher on
text. One sweep covers all layers.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridize.checkpoint.scores import LayerScore
from hybridize.data.packing import Batch
from hybridize.distillation.losses import divergence
from hybridize.errors import InputError, WorkError, setting
from hybridize.evaluation.figures import document_scores, figures_of, main_figure
from hybridize.evaluation.harness import (
    EvalSettings,
    check_choices,
    evaluate,
    margins,
    open_tasks,
    repeatable,
    task_names,
)
from hybridize.inputs import check_weights, warn_of_length, windows_beside_teacher
from hybridize.modeling import HybridForCausalLM
from hybridize.notes import Notes
from hybridize.runtime.device import ran_on
from hybridize.runtime.forward import CHUNK_TOKENS, autocast, before_output, hidden_states, token_logits
from hybridize.runtime.loading import load_model, load_tokenizer
from hybridize.scoring.scorer import Progress, Scorer, attention_layers
from hybridize.scoring.settings import LooSettings
from hybridize.scoring.setup import Ranking, Setup
from hybridize.scoring.sweep import Instead, Node, portions, sweep, tree
from hybridize.scoring.uncertainty import rank_uncertainty, scored

ABLATIONS: dict[str, Instead] = {
    "block": lambda _, layer, hidden, kwargs: hidden,
    "mixer": lambda _, layer, hidden, kwargs: _without_attention(layer)(hidden),
}
UNCERTAIN = 0.5  # median rank uncertainty, as a share of all ranks, above which the user is warned
STATE_BYTES = 1 << 30  # for hidden states of all variants on a CPU; on a GPU a quarter of its free memory
Question = tuple[Sequence[int], Sequence[int]]  # tokens to read, and tokens that the last positions should predict
Answer = tuple[float, bool]  # log-probability, and whether each token was the most likely one


class _Zero(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


def _without_attention(layer: Any) -> Any:
    """Returns a copy of the layer whose attention outputs zeros; norms and factors around it stay."""
    other = copy.copy(layer)
    other._modules = {**layer._modules, "self_attn": _Zero()}
    return other


@torch.no_grad()
def answers(
    model: HybridForCausalLM, requests: Sequence[Question], what: str, rows: int, progress: Progress = lambda *_: None
) -> list[list[Answer]]:
    """Returns the answers, a list per variant with one answer per request: of the unmodified model,
    then without each attention layer in turn. WorkError if a log-likelihood is not finite.

    what: see ABLATIONS; rows: largest number of texts in a batch.
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
        for leaf, states in sweep(model, nodes, layers, ABLATIONS[what]).items():
            for row, text in enumerate(leaf.texts):
                read, count = texts[text]
                end = len(read) - leaf.offset
                logs = F.log_softmax(model.logits(states[:, row, end - count : end]).float(), -1)
                for number in asked[read]:
                    target = torch.tensor(requests[number][1], device=device)
                    last = logs[:, count - len(target) :]
                    sums = last.gather(2, target.view(1, -1, 1).expand(len(last), -1, 1)).sum((1, 2)).tolist()
                    greedy = (last.argmax(2) == target).all(1).tolist()
                    for variant, answer in enumerate(zip(sums, greedy, strict=True)):
                        if not math.isfinite(answer[0]):
                            which = "the model" if variant == 0 else f"the model without layer {layers[variant - 1]}"
                            raise WorkError(f"{which}: a log-likelihood is {answer[0]}; try {setting('dtype')} float32")
                        found[variant][number] = answer
                done += 1
            progress(done, len(texts))
    return found


def _room(model: HybridForCausalLM, variants: int) -> int:
    """Returns the number of tokens whose hidden states fit into memory for all variants."""
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
) -> dict[str, list[LayerScore]]:
    """Returns scores by the requested metric; for accuracy also by the margin if the tasks have
    one, since it comes at no cost.

    Score = mean drop over all documents, with equal weights for tasks. manager: see `repeatable`,
    with tasks that `check_choices` accepts.
    """
    layers, variant = attention_layers(model), 0
    known: dict[Any, list[Answer]] = {}

    def answer(requests: Sequence[Question]) -> list[Answer]:
        keys = [(tuple(read), tuple(wanted)) for read, wanted in requests]
        if not known:
            table = answers(model, requests, settings.ablate, int(tasks.batch_size), progress)
            known.update({key: [row[number] for row in table] for number, key in enumerate(keys)})
        return [known[key][variant] for key in keys]

    def nothing(requests: Sequence[Question]) -> list[Answer]:
        return [(-1.0, False)] * len(requests)

    _per_document(
        evaluate(model, tokenizer, tasks, manager, nothing), settings.metric
    )  # fails early if there will be no scores
    found = []
    for variant in range(len(layers) + 1):  # noqa: B007 (`answer` reads it)
        found.append(evaluate(model, tokenizer, tasks, manager, answer))
    scores = {settings.metric: _drops(layers, found, settings.metric)}
    if settings.metric == "accuracy":
        with contextlib.suppress(InputError):
            scores["margin"] = _drops(layers, found, "margin")
    return scores


def _drops(layers: Sequence[int], found: Sequence[dict[str, Any]], metric: str) -> list[LayerScore]:
    """Returns the scores by drops of `metric`. found: lm-eval's results, the unmodified model's
    first."""
    before, *after = [_per_document(result, metric) for result in found]
    measured = []
    for task, base in before.items():
        drops = [[base[doc] - other[task][doc] for doc in base] for other in after]
        measured.append((torch.tensor(drops, dtype=torch.float64).t(), torch.ones(len(base), dtype=torch.float64)))
    return _finite(scored(layers, measured))


def _finite(scores: list[LayerScore]) -> list[LayerScore]:
    for score in scores:
        if not math.isfinite(score.score):
            raise WorkError(f"layer {score.layer}: the score is {score.score}; try {setting('dtype')} float32")
    return scores


def _per_document(found: dict[str, Any], metric: str) -> dict[str, dict[int, float]]:
    scores = {}
    for task, samples in found["samples"].items():
        key = main_figure(figures_of(found, task))
        rows = margins(samples) if metric == "margin" else document_scores(samples, key)
        worse = found["higher_is_better"].get(task, {}).get(key.split(",")[0]) is False and metric != "margin"
        scores[task] = {row["doc"]: -row["score"] if worse else row["score"] for row in rows}
        if not rows:
            raise InputError(f"task {task} has no scores per document, so it cannot rank layers")
    return scores


def loo_kl(
    model: HybridForCausalLM,
    teacher: Any,
    settings: LooSettings,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    progress: Progress = lambda *_: None,
) -> list[LayerScore]:
    """Score = rise of the forward KL from `teacher` on the tokens in the loss masks of `batches`.
    Uncertainty is estimated by resampling batches.

    teacher: another model, or None for the unmodified `model`.
    """
    return kl_changes(model, teacher, attention_layers(model), ABLATIONS[settings.ablate], batches, dtype, progress=progress)


@torch.no_grad()
def kl_changes(
    model: HybridForCausalLM,
    teacher: Any,
    layers: Sequence[int],
    instead: Instead,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    *,
    kinds: Sequence[str] = (),
    sign: float = 1.0,
    progress: Progress = lambda *_: None,
) -> list[LayerScore]:
    """Score = sign * (rise of the forward KL from `teacher` due to each change). teacher: None for
    the unmodified `model`; instead, kinds: see sweep."""
    sums, tokens = [], []
    for number, batch in enumerate(batches, start=1):
        node, kept = Node(batch.ids, positions=batch.positions), batch.loss_mask.flatten()
        with autocast(batch.ids.device, dtype):
            states = before_output(model, sweep(model, [node], layers, instead, kinds)[node].flatten(1, 2)[:, kept])
        theirs = states[0] if teacher is None else hidden_states(teacher, batch, dtype).flatten(0, 1)[kept]
        sums.append(_forward_kls(model, states, teacher or model, theirs, dtype))
        tokens.append(states.shape[1])
        progress(number, len(batches))
    found = torch.stack(sums)
    changes = sign * (found[:, 1:] - found[:, :1])
    return _finite(scored(layers, [(changes, torch.tensor(tokens, dtype=torch.float64))]))


def _forward_kls(model: Any, variants: Tensor, teacher: Any, theirs: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the forward KL of each variant summed over tokens, [V] float64 on the CPU; variants
    [V, n, D] and theirs [n, D] are hidden states."""
    total = torch.zeros(len(variants), dtype=torch.float64, device=theirs.device)
    for begin in range(0, len(theirs), CHUNK_TOKENS):
        part = slice(begin, begin + CHUNK_TOKENS)
        log_p = F.log_softmax(token_logits(teacher, theirs[part], dtype), -1)
        for number, ours in enumerate(variants):
            log_q = F.log_softmax(token_logits(model, ours[part], dtype), -1)
            total[number] += divergence("forward-kl", log_q, log_p).double().sum()
    return total.cpu()


class LooScorer(Scorer):
    """Leave-one-out on lm-eval tasks, or on text by the KL divergence from the teacher."""

    kind = "loo"
    summary = "Rank layers by what removing each alone costs."
    settings = LooSettings

    def score(self, setup: Setup, settings: LooSettings) -> Ranking:
        """See Scorer.score."""
        found, used = (_on_text if settings.metric == "kl" else _on_tasks)(setup, settings)
        described = {"metric": settings.metric, "ablate": settings.ablate, **used, **ran_on(*setup.compute)}
        label = f"{settings.metric} lost, {settings.ablate} removed"
        return Ranking(found, settings.metric, label, {**described, "seed": setup.request.seed})


def _on_text(setup: Setup, settings: LooSettings) -> tuple[list[LayerScore], dict[str, Any]]:
    """Returns scores by KL, and the data settings for the score file."""
    request, (device, dtype), notes = setup.request, setup.compute, setup.notes
    batch_size = batch_for_spread(settings.batch_size, settings.windows)
    warn_of_length(setup.source, settings.seq_len, notes)
    origin, text, held_out = windows_beside_teacher(
        setup.source, request.checkpoint, request.teacher, request.data, setup.encoder, limit=request.limit,
        windows=settings.windows, seq_len=settings.seq_len, batch_size=batch_size, notes=notes,
    )  # fmt: skip
    check_weights(setup.source, origin, notes=notes)
    batches = [batch.to(device) for batch in held_out]
    notes.doing("loading the models")
    same = origin.path == setup.source.path
    teacher = None if same else load_model(origin.path, device, dtype, request.trust_remote_code)
    found = loo_kl(setup.student(dtype), teacher, settings, batches, dtype, setup.counted("texts"))
    return found, {"data": text, "windows": settings.windows, "seq_len": settings.seq_len, "mask": request.mask}


def batch_for_spread(batch_size: int, windows: int) -> int:
    """Returns `batch_size`, reduced so that there are at least eight batches if there are eight
    windows: the uncertainty of scores is estimated by resampling batches."""
    return max(1, min(batch_size, windows // 8))


def _on_tasks(setup: Setup, settings: LooSettings) -> tuple[list[LayerScore], dict[str, Any]]:
    """Returns scores by lm-eval tasks, and the evaluation's settings for the score file; warns if
    the ranking is uncertain."""
    request, notes = setup.request, setup.notes
    evaluation = EvalSettings(
        task_names(settings.tasks), settings.num_fewshot, request.limit, settings.batch_size, settings.apply_chat_template,
        None, settings.include_path, request.seed,
    )  # fmt: skip
    manager = repeatable(open_tasks(evaluation))
    check_choices(manager, evaluation)
    check_weights(setup.source, notes=notes)
    tokenizer = load_tokenizer(setup.source.path, request.trust_remote_code)
    notes.doing("preparing the tasks")
    progress = setup.counted("texts")
    found = loo_tasks(setup.student(setup.compute[1]), tokenizer, settings, evaluation, manager, progress)
    _warn_of_uncertainty(notes, settings.metric, found[settings.metric], found.get("margin"))
    return found[settings.metric], evaluation.to_json()


def _warn_of_uncertainty(notes: Notes, metric: str, found: list[LayerScore], margin: list[LayerScore] | None) -> None:
    """Warns if the ranking by `metric` is uncertain, and suggests another metric."""
    width = rank_uncertainty(found)
    sharper = rank_uncertainty(margin) if metric == "accuracy" and margin else None
    if width is None or width <= UNCERTAIN:
        return
    by = setting("metric")
    other = f"{by} kl on your data may do better"
    if sharper is not None and sharper < width:
        other = f"{by} margin distinguishes them better (rank uncertainty {sharper:.0%})"
    if metric == "margin" or sharper is not None:  # measured: docs/how-to/choosing-layers.md
        other += f"; on a small model the layers that {by} kl and score-mmr chose trained far better than the margin's"
    notes.warn(f"{metric} hardly distinguishes these layers: the median rank uncertainty is {width:.0%} of all ranks; {other}")
