"""Decoding of many sequences step by step, as a captured CUDA graph where possible.

Teachers and hybrids use the same code, so that comparisons measure the model. Independent of text
and tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint.experts import has_experts
from hybridize.errors import InputError
from hybridize.modeling import HybridConfig, HybridForCausalLM, new_cache
from hybridize.runtime.device import captured

from .attention import NAME
from .cache import DecodeCache

# logits [B, V], the number of tokens of each row [B], and those tokens [B, L] -> the next token of
# each row [B]
Pick = Callable[[Tensor, Tensor, Tensor], Tensor]


def greedy(logits: Tensor, *_: Tensor) -> Tensor:
    """Returns the most likely token of each row [B] for logits [B, V]."""
    return logits.argmax(-1)


def can_capture(model: HybridForCausalLM) -> bool:
    """Returns whether a step can be captured as a CUDA graph."""
    return model.device.type == "cuda" and not has_experts(model)


def looks_at_the_longest(config: HybridConfig) -> bool:
    """Returns whether the model's rotary tables depend on the longest sequence in the batch, so
    that sequences of different length cannot be decoded together."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return any(part.get("rope_type") in ("dynamic", "longrope") for part in kinds)


def check_decodable(config: HybridConfig) -> None:
    """Raises InputError for a model that Decoder does not support."""
    if looks_at_the_longest(config):
        raise InputError("a model whose RoPE is dynamic or longrope cannot be decoded in batches")


class Decoder:
    """Decodes `rows` sequences of up to `length` tokens, each at its own position, on the model's
    device.

    history [rows, length + 1]: the tokens so far, and one more column that full rows write to.
    `cache.lengths` [rows]: how many of them the model has read; the token after those is the next
    input. pick is captured, too, and must not synchronise with the host. capture: whether to use a
    CUDA graph; by default where possible.
    """

    def __init__(
        self, model: HybridForCausalLM, rows: int, length: int, pick: Pick = greedy, capture: bool | None = None
    ) -> None:
        check_decodable(model.config)
        self.model, self.rows, self.length, self.pick = model, rows, length, pick
        self.cache = DecodeCache(model, rows, length, model.dtype)
        self.history = torch.zeros(rows, length + 1, dtype=torch.long, device=model.device)
        self._masks = dict.fromkeys(set(model.config.layer_types) | {"full_attention"})
        self._graph: torch.cuda.CUDAGraph | None = None
        if can_capture(model) if capture is None else capture:
            self._graph, _ = captured(self._step)
            self.cache.lengths.zero_()

    @torch.no_grad()
    def prefill(self, rows: Sequence[int], ids: Tensor) -> Tensor:
        """Reads prompts ids [len(rows), T] of equal length into these rows and picks their first
        tokens. Returns the logits [len(rows), V]."""
        length = ids.shape[1]
        if length >= self.length:
            raise ValueError(f"a prompt of {length} tokens leaves no room for an answer in {self.length} tokens")
        cache = new_cache(self.model.config)
        logits = self.model(ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        self.cache.take(rows, cache, length)
        index = torch.tensor(rows, device=ids.device)
        self.history[index, :length] = ids
        self.history[index, length] = self.pick_rows(logits, index)
        return logits

    def pick_rows(self, logits: Tensor, index: Tensor) -> Tensor:
        """Returns the picks for the rows `index` [n] with logits [n, V]; `pick` always gets all
        rows."""
        every = logits.new_zeros(self.rows, logits.shape[1])
        every[index] = logits
        return self.pick(every, self.cache.lengths, self.history)[index]

    def step(self) -> None:
        """Runs the model on the newest token of every row and picks the next. A full row keeps
        writing to the extra column of history."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    @torch.no_grad()
    def _step(self) -> Tensor:
        cache, config = self.cache, self.model.config
        at = cache.lengths.unsqueeze(1)
        cache.begin_step()
        before, config._attn_implementation = config._attn_implementation, NAME
        try:
            kwargs: dict[str, Any] = {"attention_mask": self._masks, "position_ids": at, "counts": cache.lengths + 1}
            hidden = self.model.model(self.history.gather(1, at), cache=cache, use_cache=True, **kwargs).last_hidden_state
        finally:
            config._attn_implementation = before
        logits = self.model.logits(hidden)[:, 0]
        cache.lengths.add_(1).clamp_(max=self.length)
        picked = self.pick(logits, cache.lengths, self.history)
        self.history.scatter_(1, cache.lengths.unsqueeze(1), picked.unsqueeze(1))
        return logits
