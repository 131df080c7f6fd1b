"""Does the exported model compute what the checkpoint computes? Asked of the runtime that is to serve it, before the export
appears under its name.

The reference is the checkpoint itself in float32: greedy tokens after a few prompts, and the logits at every position.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hybridize.errors import WorkError
from hybridize.export.ask import answers, plain_greedy
from hybridize.runtime import load_model

PROMPTS = (
    "Question: Tom has 17 apples and gives 5 of them to Ann. How many are left?\nAnswer:",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "It was a bright cold day in April, and the clocks were striking thirteen. In 1984 he wrote that down, twice; why?",
)
NEW_TOKENS = 32
BOUND = 1e-4  # of the largest logit: rounding grows with the numbers rounded
BOUNDS = {"f32": BOUND, "f16": 2e-2, "q8_0": 0.5}  # the last two are there to catch another model, not to judge rounding


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
    model.generation_config = plain_greedy(model, NEW_TOKENS)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    sequences, logits = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids))
        sequences.append(whole[0].tolist())
        logits.append(model(whole).logits[0].float().cpu())
    return Reference(prompts, sequences, logits)


def ask_transformers(path: Path, wanted: Reference, device: torch.device) -> Verdict:
    """The stock class that config.json names, in this process."""
    model: Any = load_model(path, device, torch.float32)
    logits, made = answers(model, wanted.prompts, wanted.sequences, NEW_TOKENS)
    return judge(_transformers(type(model).__name__), wanted, logits, made, BOUND, exact=True)


def ask_own_code(path: Path, wanted: Reference, device: torch.device) -> Verdict:
    """The code beside the weights, in a process that has not imported ours."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.safetensors"
        told = {
            "model": str(path), "answer": str(answer), "prompts": wanted.prompts, "sequences": wanted.sequences,
            "new_tokens": NEW_TOKENS, "device": str(device),
        }  # fmt: skip
        command = [sys.executable, "-m", "hybridize.export.ask"]
        environment = {**os.environ, "HF_MODULES_CACHE": folder}
        done = subprocess.run(
            command, env=environment, input=json.dumps(told), capture_output=True, text=True, check=False
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise WorkError(f"the exported directory does not load in transformers ({last}); not exported")
        with safe_open(answer, "pt") as file:
            kind, module = file.metadata()["class"], file.metadata()["module"]
            parts = range(len(wanted.prompts))
            logits = [file.get_tensor(f"logits.{i}") for i in parts]
            made = [file.get_tensor(f"made.{i}").tolist() for i in parts]
    assert module.startswith("transformers_modules"), module
    return judge(_transformers(kind), wanted, logits, made, BOUND, exact=True)


def _transformers(kind: str) -> str:
    return f"transformers {metadata.version('transformers')} ({kind})"


def ask_llama_cpp(file: Path, wanted: Reference, outtype: str) -> Verdict:
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
    name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
    return judge(name, wanted, logits, made, BOUNDS[outtype], exact=outtype == "f32")


@functools.cache  # keeps hold of the callback as long as llama.cpp may call it
def _silence_llama_cpp() -> Any:
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(callback, None)
    return callback


def judge(runtime: str, wanted: Reference, logits: list[Tensor], made: list[list[int]], share: float, exact: bool) -> Verdict:
    """Compares; WorkError when a logit differs by more than `share` of the largest, or `exact` and a token does.

    A continuation may part from the reference only at a tie: where the two tokens' logits are closer than twice that.
    """
    scale = max(float(part.abs().max()) for part in wanted.logits)
    if not all(bool(torch.isfinite(part).all()) for part in logits):
        raise WorkError(f"{runtime} gives logits that are not finite; not exported")
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in zip(logits, wanted.logits, strict=True))
    bound = share * max(1.0, scale)
    equal = tokens = ties = 0
    for prompt, sequence, scores, new in zip(wanted.prompts, wanted.sequences, wanted.logits, made, strict=True):
        right = sequence[len(prompt) :]
        tokens += len(right)
        same = next((i for i, token in enumerate(right) if i >= len(new) or new[i] != token), len(right))
        equal += same
        if same == len(right):
            continue
        at, other = scores[len(prompt) + same - 1], new[same] if same < len(new) else None
        tie = other is not None and abs(float(at[right[same]] - at[other])) <= 2 * bound
        if exact and not tie:
            raise WorkError(f"{runtime} goes on differently than the checkpoint ({other}, not {right[same]}); not exported")
        ties += exact and tie
    if not difference <= bound:
        raise WorkError(f"{runtime} gives logits that differ by {difference:.1e}, more than {bound:.1e}; not exported")
    return Verdict(runtime, difference, scale, equal, tokens, ties, exact)
