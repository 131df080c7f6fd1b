"""Does the exported model compute what the checkpoint computes? Asked of the runtime that is to serve it, before the export
appears under its name.

The reference is the checkpoint itself in float32: greedy tokens after a few prompts, and the logits at every position.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.errors import WorkError
from hybridize.runtime import load_model

PROMPTS = (
    "Question: Tom has 17 apples and gives 5 of them to Ann. How many are left?\nAnswer:",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "It was a bright cold day in April, and the clocks were striking thirteen. In 1984 he wrote that down, twice; why?",
)
NEW_TOKENS = 32
BOUND = 1e-4  # of the largest logit, DESIGN section 8


@dataclass(frozen=True)
class Reference:
    """What the checkpoint does: prompts [P_i], prompt and greedy continuation [P_i + G_i], logits there [P_i + G_i, V]."""

    prompts: list[list[int]]
    sequences: list[list[int]]
    logits: list[Tensor]


@dataclass(frozen=True)
class Verdict:
    """Largest difference of a logit (absolute, and the largest logit beside it), and how many greedy tokens are equal.

    ties: prompts whose continuation parts where the reference's best two logits are closer than rounding can tell.
    """

    runtime: str
    difference: float
    largest_logit: float
    equal: int
    tokens: int
    ties: int
    exact: bool

    def sentence(self) -> str:
        told = (
            f"{self.runtime}: largest difference of a logit {self.difference:.1e} (largest logit {self.largest_logit:.1f}), "
            f"{self.equal} of {self.tokens} greedy tokens equal"
        )
        return told + (f", {self.ties} prompts parted at a tie" if self.ties else "")


def runtime_missing(form: str) -> str | None:
    """Why the runtime of a format cannot be asked on this machine, or None."""
    from hybridize.export.granite import OLDEST

    if form == "gguf":
        return None if importlib.util.find_spec("llama_cpp") else "llama-cpp-python is not installed"
    version = metadata.version("transformers")
    if form == "granite" and tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"transformers {version} computes another function; {'.'.join(map(str, OLDEST))} or newer is needed"
    return None


@torch.no_grad()
def reference(path: Path, tokenizer: Any, device: torch.device) -> Reference:
    """Greedy continuations of PROMPTS by the checkpoint at `path`, one prompt at a time."""
    model: Any = load_model(path, device, torch.float32)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    sequences, logits = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        sequences.append(whole[0].tolist())
        logits.append(model(whole).logits[0].float().cpu())
    return Reference(prompts, sequences, logits)


@torch.no_grad()
def ask_transformers(path: Path, wanted: Reference, device: torch.device, exact: bool = True) -> Verdict:
    """Logits sequence by sequence; greedy tokens of all prompts in one left-padded batch. Code beside the weights is ours."""
    model: Any = load_model(path, device, torch.float32, trust_remote_code=True)
    logits = [model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in wanted.sequences]
    width = max(map(len, wanted.prompts))
    ids = torch.zeros(len(wanted.prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(wanted.prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    made = model.generate(ids.to(device), attention_mask=mask.to(device), max_new_tokens=NEW_TOKENS, do_sample=False)
    name = f"transformers {metadata.version('transformers')} ({type(model).__name__})"
    return judge(name, wanted, logits, [row[width:].tolist() for row in made], exact)


def ask_llama_cpp(file: Path, wanted: Reference, exact: bool) -> Verdict:
    """As above through llama-cpp-python on the CPU with a float32 cache, one prompt at a time; tokens of PROMPTS as well."""
    import llama_cpp
    import numpy

    _silence_llama_cpp()
    logits, made = [], []
    for text, prompt, sequence in zip(PROMPTS, wanted.prompts, wanted.sequences, strict=True):
        f32 = llama_cpp.GGML_TYPE_F32
        room = max(len(sequence), len(prompt) + NEW_TOKENS) + 1
        told = {"n_ctx": room, "n_batch": room, "logits_all": True, "type_k": f32, "type_v": f32, "verbose": False}
        model = llama_cpp.Llama(str(file), **told)
        ours = model.tokenize(text.encode(), special=True)
        if ours != prompt:
            raise WorkError(
                f"llama.cpp splits {text!r} into other tokens ({ours[:8]} ...) than the tokenizer ({prompt[:8]} ...)"
            )
        model.eval(sequence)
        logits.append(torch.from_numpy(numpy.array(model.scores[: len(sequence)])))
        model.reset()
        model = llama_cpp.Llama(str(file), **told)
        model.eval(prompt)
        new: list[int] = []
        for _ in range(len(sequence) - len(prompt)):
            new.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(new[-1:])
        made.append(new)
    return judge(f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", wanted, logits, made, exact)


@functools.cache  # keeps hold of the callback as long as llama.cpp may call it
def _silence_llama_cpp() -> Any:
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(callback, None)
    return callback


def judge(runtime: str, wanted: Reference, logits: list[Tensor], made: list[list[int]], exact: bool) -> Verdict:
    """Compares; WorkError when `exact` and a logit or a token differs by more than rounding explains."""
    scale = max(float(part.abs().max()) for part in wanted.logits)
    pairs = list(zip(logits, wanted.logits, strict=True))
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    bound = BOUND * max(1.0, scale)
    equal = tokens = ties = 0
    for prompt, sequence, scores, new in zip(wanted.prompts, wanted.sequences, wanted.logits, made, strict=True):
        right = sequence[len(prompt) :]
        same = next((i for i, (a, b) in enumerate(zip(right, new, strict=False)) if a != b), len(right))
        equal, tokens = equal + same, tokens + len(right)
        if same < len(right):
            at = scores[len(prompt) + same - 1]
            gap = float(at[right[same]] - at[new[same]])
            ties += gap <= 2 * bound
            if exact and gap > 2 * bound:
                raise WorkError(
                    f"{runtime} goes on differently than the checkpoint ({new[same]}, not {right[same]}); not exported"
                )
    if exact and not difference <= bound:
        raise WorkError(f"{runtime} gives logits that differ by {difference:.1e}, more than {bound:.1e}; not exported")
    return Verdict(runtime, difference, scale, equal, tokens, ties, exact)
