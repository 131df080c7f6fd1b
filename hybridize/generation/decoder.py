"""One step of decoding for many sequences: a captured CUDA graph where that can be, the same calls
one by one elsewhere.

Teachers and hybrids go through the same code, so that what is compared is the model. Knows nothing
of text.
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

# logits [B, V], how many tokens each row has [B], and those tokens [B, L] -> the next token of
# each, [B]
Pick = Callable[[Tensor, Tensor, Tensor], Tensor]


def greedy(logits: Tensor, *_: Tensor) -> Tensor:
    return logits.argmax(-1)


def can_capture(model: HybridForCausalLM) -> bool:
    """Whether a step can be a CUDA graph."""
    return model.device.type == "cuda" and not has_experts(model)


def looks_at_the_longest(config: HybridConfig) -> bool:
    """Whether the model's rotary tables depend on the longest sequence, so that none can be decoded
    beside another."""
    told = getattr(config, "rope_parameters", None) or {}
    kinds = [told, *(part for part in told.values() if isinstance(part, dict))]
    return any(part.get("rope_type") in ("dynamic", "longrope") for part in kinds)


def check_decodable(config: HybridConfig) -> None:
    """InputError for a model that no Decoder takes."""
    if looks_at_the_longest(config):
        raise InputError("a model whose RoPE is dynamic or longrope cannot be decoded side by side")


class Decoder:
    """`rows` sequences of up to `length` tokens, each at its own place. All on the model's device.

    history [rows, length + 1]: the tokens so far, then a place for what full rows go on to write;
    `cache.lengths` [rows] of them have been read by the model, and the one after those is next.
    pick is captured too and must not look at the host.
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
        """Reads prompts ids [len(rows), T] of one length into these rows and picks their first
        tokens. Gives the logits."""
        length = ids.shape[1]
        if length >= self.length:
            raise ValueError(f"a prompt of {length} tokens leaves no room in {self.length}")
        read = new_cache(self.model.config)
        logits = self.model(ids, cache=read, use_cache=True, logits_to_keep=1).logits[:, -1]
        self.cache.take(rows, read, length)
        index = torch.tensor(rows, device=ids.device)
        self.history[index, :length] = ids
        self.history[index, length] = self.pick_rows(logits, index)
        return logits

    def pick_rows(self, logits: Tensor, index: Tensor) -> Tensor:
        """`pick` for some rows alone: it is told of all."""
        every = logits.new_zeros(self.rows, logits.shape[1])
        every[index] = logits
        return self.pick(every, self.cache.lengths, self.history)[index]

    def step(self) -> None:
        """Every row reads its newest token and picks the one after it. A full row writes beside its
        tokens."""
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
            told: dict[str, Any] = {"attention_mask": self._masks, "position_ids": at, "counts": cache.lengths + 1}
            hidden = self.model.model(self.history.gather(1, at), cache=cache, use_cache=True, **told).last_hidden_state
        finally:
            config._attn_implementation = before
        logits = self.model.logits(hidden)[:, 0]
        cache.lengths.add_(1).clamp_(max=self.length)
        picked = self.pick(logits, cache.lengths, self.history)
        self.history.scatter_(1, cache.lengths.unsqueeze(1), picked.unsqueeze(1))
        return logits
