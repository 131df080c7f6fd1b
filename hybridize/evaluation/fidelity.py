"""Fidelity of a hybrid to its teacher without a benchmark: divergences, agreement and perplexities
on text, also by position, and how many tokens of greedy generations agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.data.packing import Batch
from hybridize.distillation.fidelity import token_measures

EDGES = (0, 128, 512, 2048, 8192, 32768)  # first positions of the buckets


def measure(student: nn.Module, teacher: nn.Module, batches: Sequence[Batch], dtype: torch.dtype) -> dict[str, Any]:
    """Returns means over all tokens of the loss masks, KLs in nats at temperature 1, and under
    `positions` the same by position within the document.

    batches: on the models' device. `stderr` is that of reverse_kl, over windows.
    """
    found, places, windows = [], [], []
    for batch in batches:
        values = token_measures(student, teacher, batch, dtype)
        at = torch.arange(batch.ids.shape[1]).expand(len(batch.ids), -1) if batch.positions is None else batch.positions.cpu()
        kept = batch.loss_mask.cpu()
        found.append(values)
        places.append(at[kept])
        windows += [part.mean() for part in values[0].split(kept.sum(1).tolist()) if len(part)]
    values, place = torch.cat(found, 1), torch.cat(places)
    spread = float(torch.stack(windows).std() / len(windows) ** 0.5) if len(windows) > 1 else None
    buckets = []
    for begin, end in zip(EDGES, [*EDGES[1:], None], strict=True):
        inside = (place >= begin) & (place < end if end is not None else True)
        if bool(inside.any()):
            buckets.append({"from": begin, "to": end, **_means(values[:, inside])})
    return {**_means(values), "stderr": spread, "windows": len(windows), "positions": buckets}


def _means(values: Tensor) -> dict[str, Any]:
    reverse, forward, agreement, ours, theirs = values.mean(1).tolist()
    return {
        "reverse_kl": reverse, "forward_kl": forward, "agreement": agreement,
        "perplexity": float(torch.tensor(ours).exp()), "teacher_perplexity": float(torch.tensor(theirs).exp()),
        "tokens": values.shape[1],
    }  # fmt: skip


@torch.no_grad()
def greedy_agreement(student: Any, teacher: Any, prompts: Tensor, count: int, rows: int) -> dict[str, Any]:
    """Both models continue prompts [W, P] greedily for `count` tokens. Returns statistics of the
    number of tokens before the first difference. rows: prompts per batch."""
    lengths: list[int] = []
    for part in prompts.split(rows):
        kwargs: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        made = [
            model.generate(part, attention_mask=torch.ones_like(part), **kwargs)[:, part.shape[1] :]
            for model in (student, teacher)
        ]
        lengths += (made[0] == made[1]).long().cumprod(1).sum(1).tolist()
    same = torch.tensor(lengths, dtype=torch.float64)
    return {
        "prompts": len(lengths), "prompt_tokens": prompts.shape[1], "new_tokens": count, "mean": float(same.mean()),
        "median": float(same.median()), "all_the_same": float((same == count).double().mean()),
    }  # fmt: skip
