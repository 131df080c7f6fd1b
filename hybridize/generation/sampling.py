"""Sampling of the next token with transformers' options. It runs inside a captured step, so it
never synchronises with the host.

Every sequence has its own random numbers, drawn in advance, so that its tokens do not depend on its
row or on other sequences.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridize.errors import InputError, setting


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling settings. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"{setting('temperature')} {self.temperature} must not be negative")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise InputError(
                f"{setting('top_k')} must be >= 0, {setting('top_p')} above 0 and at most 1, {setting('min_p')} from 0 to 1"
            )


def distribution(logits: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """Returns probabilities [B, K] in descending order and their token ids [B, K], for logits [B,
    V] and a temperature above 0.

    In transformers' order: temperature; the K most likely tokens; the fewest whose mass reaches
    top_p (Holtzman et al., 1904.09751); those with at least min_p of the highest probability
    (2407.01082). The most likely token is always kept.
    """
    scaled = logits.float() / settings.temperature
    count = min(settings.top_k or scaled.shape[-1], scaled.shape[-1])
    values, ids = scaled.topk(count, -1) if count < scaled.shape[-1] else scaled.sort(-1, descending=True)
    probabilities = values.softmax(-1)
    if settings.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # the mass of more likely tokens
        values = values.masked_fill(before >= settings.top_p, -torch.inf)
        probabilities = values.softmax(-1)
    if settings.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < settings.min_p * probabilities[..., :1], 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, ids


@dataclass(frozen=True)
class Rules:
    """Rules that make tokens less likely or impossible, named as in transformers; they apply to
    sampling and to greedy decoding.

    suppress, begin_suppress (for an answer's first token only), banned: token ids. min_length
    (which counts the prompt) and min_new (which does not): until they are reached, no token of
    `ends` is possible.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    min_length: int = 0
    min_new: int = 0
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.repetition_penalty > 0:
            raise InputError(f"repetition_penalty {self.repetition_penalty} must be above 0")

    @property
    def idle(self) -> bool:
        """Whether the rules change nothing."""
        return self == Rules(ends=self.ends)


def ruled(logits: Tensor, history: Tensor, lengths: Tensor, starts: Tensor, rules: Rules) -> Tensor:
    """Returns logits [B, V] with `rules` applied, in float32. The first lengths[b] tokens of
    history [B, L] are row b's tokens so far, the first starts[b] of them its prompt. Does not
    synchronise with the host, so a CUDA graph can capture it."""
    scores = logits.float()
    if rules.repetition_penalty != 1:  # Keskar et al., 1909.05858, section 4.1
        used = torch.arange(history.shape[1], device=history.device) < lengths.unsqueeze(1)
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, torch.where(used, history, history[:, :1]), True)
        less = torch.where(scores < 0, scores * rules.repetition_penalty, scores / rules.repetition_penalty)
        scores = torch.where(seen, less, scores)
    if rules.no_repeat_ngram:
        scores = scores.masked_fill(_repeating(history, lengths, rules.no_repeat_ngram, scores.shape[1]), -torch.inf)
    scores = _without(scores, rules.banned)
    early = (lengths < rules.min_length) | (lengths - starts < rules.min_new)
    scores = _without(scores, rules.ends, early)
    scores = _without(scores, rules.suppress)
    return _without(scores, rules.begin_suppress, lengths == starts)


def _repeating(history: Tensor, lengths: Tensor, size: int, vocabulary: int) -> Tensor:
    """Returns [B, V] bool, True for tokens that would repeat an n-gram of `size` tokens."""
    if size > history.shape[1]:
        return torch.zeros(len(history), vocabulary, dtype=torch.bool, device=history.device)
    runs = history.unfold(1, size, 1)  # [B, L - size + 1, size]
    last = (lengths.unsqueeze(1) - torch.arange(size - 1, 0, -1, device=history.device)).clamp(min=0)
    same = (runs[..., :-1] == history.gather(1, last).unsqueeze(1)).all(-1)
    inside = torch.arange(size, size + runs.shape[1], device=history.device) <= lengths.unsqueeze(1)
    counts = torch.zeros(len(history), vocabulary, device=history.device)
    return counts.scatter_add_(1, runs[..., -1], (same & inside).float()) > 0


def _without(scores: Tensor, tokens: tuple[int, ...], rows: Tensor | None = None) -> Tensor:
    """Returns scores [B, V] with these tokens at -inf, in all rows or in those of the mask `rows`
    [B]."""
    if not tokens:
        return scores
    mask = _token_mask(tokens, scores.shape[1], scores.device)
    return scores.masked_fill(mask if rows is None else mask & rows.unsqueeze(1), -torch.inf)


@functools.lru_cache(maxsize=32)  # cached before a capture, during which copies from the host are not allowed
def _token_mask(tokens: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor:
    mask = torch.zeros(vocabulary, dtype=torch.bool)
    mask[[token for token in tokens if 0 <= token < vocabulary]] = True
    return mask.to(device)


class Sampler:
    """A `pick` for Decoder with `rows` sequences of at most `new` new tokens each."""

    def __init__(
        self, settings: SamplingSettings, rows: int, new: int, device: torch.device, rules: Rules | None = None
    ) -> None:
        self.settings, self.rules = settings, rules or Rules()
        self.starts = torch.zeros(rows, dtype=torch.long, device=device)
        self.drawn = torch.zeros(rows, new, device=device)
        self.broken = torch.zeros(rows, dtype=torch.bool, device=device)  # a logit was NaN or infinite

    def begin(self, row: int, prompt: int, seed: int) -> None:
        """Starts a new sequence in this row, with a prompt of `prompt` tokens and random numbers
        from `seed`."""
        self.starts[row] = prompt
        self.broken[row] = False
        if self.settings.temperature > 0:
            self.drawn[row] = torch.rand(self.drawn.shape[1], generator=torch.Generator().manual_seed(seed)).to(
                self.drawn.device
            )

    def __call__(self, logits: Tensor, lengths: Tensor, history: Tensor) -> Tensor:
        self.broken |= ~(logits < torch.inf).all(-1)  # also false for NaN; -inf is valid, some models exclude tokens by it
        if not self.rules.idle:
            logits = ruled(logits, history, lengths, self.starts, self.rules)
        if self.settings.temperature == 0:
            return logits.argmax(-1)
        probabilities, ids = distribution(logits, self.settings)
        at = (lengths - self.starts).clamp(0, self.drawn.shape[1] - 1).unsqueeze(1)
        sums = probabilities.cumsum(-1)
        found = torch.searchsorted(sums, self.drawn.gather(1, at) * sums[:, -1:], right=True)
        last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding must not select beyond it
        return ids.gather(1, torch.minimum(found, last))[:, 0]
