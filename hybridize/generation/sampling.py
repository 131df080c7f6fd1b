"""Which token comes next, with transformers' options, without a look at the host: it runs inside a captured step.

Every sequence has random numbers of its own, drawn beforehand, so what it says does not depend on its neighbours or its row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridize.errors import InputError


@dataclass(frozen=True)
class SamplingSettings:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave everything in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"--temperature {self.temperature} must not be negative")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise InputError("--top-k is at least 0, --top-p above 0 and at most 1, --min-p from 0 to 1")


def distribution(logits: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """logits [B, V] -> probabilities [B, K], falling, and whose they are [B, K]; for a temperature above 0.

    In transformers' order: temperature, the K most likely, the fewest whose mass reaches top_p (Holtzman et al., 1904.09751),
    those of at least min_p of the first one's probability (2407.01082); the first always stays.
    """
    scaled = logits.float() / settings.temperature
    count = min(settings.top_k or scaled.shape[-1], scaled.shape[-1])
    values, ids = scaled.topk(count, -1) if count < scaled.shape[-1] else scaled.sort(-1, descending=True)
    probabilities = values.softmax(-1)
    if settings.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # the mass of the more likely ones
        values = values.masked_fill(before >= settings.top_p, -torch.inf)
        probabilities = values.softmax(-1)
    if settings.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < settings.min_p * probabilities[..., :1], 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, ids


class Sampler:
    """A decoder's `pick` for `rows` sequences that write at most `new` tokens each."""

    def __init__(self, settings: SamplingSettings, rows: int, new: int, device: torch.device) -> None:
        self.settings = settings
        self.starts = torch.zeros(rows, dtype=torch.long, device=device)
        self.drawn = torch.zeros(rows, new, device=device)

    def begin(self, row: int, prompt: int, seed: int) -> None:
        """This row's next sequence begins: a prompt of so many tokens, and whatever follows from the seed."""
        self.starts[row] = prompt
        if self.settings.temperature > 0:
            self.drawn[row] = torch.rand(self.drawn.shape[1], generator=torch.Generator().manual_seed(seed)).to(
                self.drawn.device
            )

    def __call__(self, logits: Tensor, lengths: Tensor) -> Tensor:
        if self.settings.temperature == 0:
            return logits.argmax(-1)
        probabilities, ids = distribution(logits, self.settings)
        at = (lengths - self.starts).clamp(0, self.drawn.shape[1] - 1).unsqueeze(1)
        sums = probabilities.cumsum(-1)
        found = torch.searchsorted(sums, self.drawn.gather(1, at) * sums[:, -1:], right=True)
        last = (probabilities > 0).sum(-1, keepdim=True) - 1  # where rounding would go beyond it
        return ids.gather(1, torch.minimum(found, last))[:, 0]
