"""Continuous batching: generates answers to many prompts with one decoder, whose rows are reused as
soon as a sequence ends."""

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

STRIDE = 16  # steps between checks for finished answers
SHARE = 0.9  # of a GPU's free memory is used for caches
SAMPLING = 64  # bytes per row and vocabulary entry: logits, their order, probabilities and sums


@dataclass(frozen=True)
class Wanted:
    """A requested answer. ids: the prompt; seed: for this answer only; key: identifies it, as in
    Written."""

    key: tuple[int, int]
    ids: list[int]
    seed: int


@dataclass(frozen=True)
class Written:
    """A finished answer. ids: its tokens without the end token; ended: whether such a token or
    `stop` ended it, rather than the length; broken: a logit was NaN or infinite, so its tokens are
    meaningless."""

    key: tuple[int, int]
    ids: list[int]
    ended: bool
    broken: bool = False


def seed_of(seed: int, key: object) -> int:
    """Returns the seed of the answer `key`, independent of all other answers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7], "big")


def rows_that_fit(model: HybridForCausalLM, length: int, most: int) -> int:
    """Returns how many sequences of `length` tokens fit into the GPU's free memory, at least 1 and
    at most `most`."""
    if model.device.type != "cuda":
        return most
    gc.collect()
    torch.cuda.empty_cache()  # memory of the last decoder counts as used until then
    room = torch.cuda.mem_get_info(model.device)[0] * SHARE
    return max(
        1, min(most, int(room // (sum(sequence_bytes(model, length, model.dtype)) + SAMPLING * model.config.vocab_size)))
    )


def write(
    model: HybridForCausalLM, wanted: Iterable[Wanted], longest: int, new: int, ends: Set[int], settings: SamplingSettings,
    rows: int, rules: Rules | None = None, stop: Callable[[tuple[int, int], list[int]], bool] = lambda *_: False,
    stride: int = STRIDE,
) -> Iterator[Written]:  # fmt: skip
    """Yields answers as they finish, in no particular order.

    longest: the longest prompt, in tokens; new: the most new tokens; ends: tokens that end an
    answer; rows: sequences decoded in parallel; stop: called every `stride` steps with the key and
    the tokens so far of each answer, returns True to end it.
    """
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
