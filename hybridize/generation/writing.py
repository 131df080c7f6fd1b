"""Many prompts through one decoder: a row is taken up by the next prompt as soon as its sequence
has ended."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass

import torch

from hybridize.modeling import HybridForCausalLM

from .cache import sequence_bytes
from .decoder import Decoder
from .sampling import Rules, Sampler, SamplingSettings

STRIDE = 16  # steps between two looks at what has been written
SHARE = 0.9  # of a GPU's free memory, for caches
SAMPLING = 64  # bytes a token of the vocabulary and row: logits, their order, probabilities and sums


@dataclass(frozen=True)
class Wanted:
    """ids: the prompt; seed: of this answer alone; key: whatever it is called by."""

    key: tuple[int, int]
    ids: list[int]
    seed: int


@dataclass(frozen=True)
class Written:
    """ids: the answer without the end token; ended: by such a token or by `stop`, not by its
    length; broken: a logit of it was not finite, and what was picked from it means nothing."""

    key: tuple[int, int]
    ids: list[int]
    ended: bool
    broken: bool = False


def seed_of(seed: int, key: object) -> int:
    """Of one answer, the same whatever else is asked."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7], "big")


def rows_that_fit(model: HybridForCausalLM, length: int, most: int) -> int:
    """At most `most` sequences of `length` tokens, and no more than the GPU's free memory holds."""
    if model.device.type != "cuda":
        return most
    gc.collect()
    torch.cuda.empty_cache()  # what the last decoder held counts as taken until then
    room = torch.cuda.mem_get_info(model.device)[0] * SHARE
    return max(
        1, min(most, int(room // (sum(sequence_bytes(model, length, model.dtype)) + SAMPLING * model.config.vocab_size)))
    )


def write(
    model: HybridForCausalLM, wanted: Iterable[Wanted], longest: int, new: int, ends: Set[int], settings: SamplingSettings,
    rows: int, rules: Rules | None = None, stop: Callable[[tuple[int, int], list[int]], bool] = lambda *_: False,
    stride: int = STRIDE,
) -> Iterator[Written]:  # fmt: skip
    """Answers as they are finished, in no order. longest: of the prompts, in tokens; rows:
    sequences side by side; stop: told of every answer's tokens so far, each `stride` steps, and
    True where there need be no more."""
    sampler = Sampler(settings, rows, new, model.device, rules)
    decoder = Decoder(model, rows, longest + new, sampler)
    waiting, running = iter(wanted), dict[int, Wanted]()
    while True:
        for row in range(rows):
            if row not in running and (coming := next(waiting, None)) is not None:
                sampler.begin(row, len(coming.ids), coming.seed)
                decoder.prefill([row], torch.tensor([coming.ids], device=model.device))
                running[row] = coming
        if not running:
            return
        for _ in range(min(stride, new)):
            decoder.step()
        lengths, history, broken = decoder.cache.lengths.tolist(), decoder.history.cpu(), sampler.broken.tolist()
        for row, one in list(running.items()):
            begin = len(one.ids)
            made = history[row, begin : min(lengths[row] + 1, begin + new)].tolist()
            end = next((at for at, token in enumerate(made) if token in ends), None)
            ended = stop(one.key, made[:end]) or end is not None
            if ended or len(made) == new or broken[row]:
                yield Written(one.key, made[:end], ended, broken[row])
                del running[row]
