"""Many prompts through one decoder: a row is taken up by the next prompt as soon as its sequence has ended."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from hybridize.modeling import HybridForCausalLM

from .cache import sequence_bytes
from .decoder import Decoder
from .sampling import Sampler, SamplingSettings

STRIDE = 16  # steps between two looks at what has been written
SHARE = 0.9  # of a GPU's free memory, for caches


@dataclass(frozen=True)
class Wanted:
    """ids: the prompt; seed: of this answer alone; key: whatever it is called by."""

    key: tuple[int, int]
    ids: list[int]
    seed: int


@dataclass(frozen=True)
class Written:
    """ids: the answer without the end token; ended: whether there was one, and not `new` tokens without any."""

    key: tuple[int, int]
    ids: list[int]
    ended: bool


def seed_of(seed: int, key: tuple[int, int]) -> int:
    """Of one answer, the same whatever else is asked."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7], "big")


def rows_that_fit(model: HybridForCausalLM, length: int, most: int) -> int:
    """At most `most` sequences of `length` tokens, and no more than the GPU's free memory holds."""
    if model.device.type != "cuda":
        return most
    room = torch.cuda.mem_get_info(model.device)[0] * SHARE
    return max(1, min(most, int(room // (sum(sequence_bytes(model, length, model.dtype)) + 24 * model.config.vocab_size))))


def write(
    model: HybridForCausalLM, wanted: Iterable[Wanted], longest: int, new: int, ends: set[int], settings: SamplingSettings,
    rows: int, watch: Callable[[tuple[int, int], list[int]], None] = lambda *_: None,
) -> Iterator[Written]:  # fmt: skip
    """Answers as they are finished, in no order. longest: of the prompts, in tokens; rows: sequences side by side; watch: told
    of every answer's tokens so far, now and then.
    """
    sampler = Sampler(settings, rows, new, model.device)
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
        for _ in range(min(STRIDE, new)):
            decoder.step()
        lengths, history = decoder.cache.lengths.tolist(), decoder.history.cpu()
        for row, one in list(running.items()):
            begin = len(one.ids)
            made = history[row, begin : min(lengths[row] + 1, begin + new)].tolist()
            end = next((at for at, token in enumerate(made) if token in ends), None)
            watch(one.key, made[:end])
            if end is not None or len(made) == new:
                yield Written(one.key, made[:end], end is not None)
                del running[row]
