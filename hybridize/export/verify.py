"""Compares an exported model with its checkpoint, in the runtime that will serve it and before the
export appears under its name.

The reference is the checkpoint itself in float32: greedy tokens after a few prompts, and the logits
at every position.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybridize.errors import WorkError, first_line
from hybridize.export.ask import plain_greedy
from hybridize.runtime.loading import load_model

PROMPTS = (
    "Question: Tom has 17 apples and gives 5 of them to Ann. How many are left?\nAnswer:",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "It was a bright cold day in April, and the clocks were striking thirteen. In 1984 he wrote that down, twice; why?",
)
NEW_TOKENS = 32
PATIENCE = 1800.0  # seconds until an external runtime times out
BOUND = 1e-4  # relative to the largest logit, since rounding errors grow with the values


@dataclass(frozen=True)
class Reference:
    """Output of the checkpoint. For each prompt i: prompts [P_i] token ids, sequences [P_i + G_i]
    with the greedy continuation, logits [P_i + G_i, V] at every position of the sequence."""

    prompts: list[list[int]]
    sequences: list[list[int]]
    logits: list[Tensor]


@dataclass(frozen=True)
class Verdict:
    """Result of a comparison: the largest absolute logit difference, the largest reference logit,
    and how many of the greedy tokens are equal.

    ties: prompts whose continuations diverge at a tie, where the reference's two best logits are
    closer than the rounding error. exact: whether all greedy tokens up to a tie had to be equal.
    """

    runtime: str
    difference: float
    largest_logit: float
    equal: int
    tokens: int
    ties: int
    exact: bool

    def sentence(self) -> str:
        text = (
            f"{self.runtime}: largest difference of a logit {self.difference:.1e} (largest logit {self.largest_logit:.1f}), "
            f"{self.equal} of {self.tokens} greedy tokens equal"
        )
        return text + (f", {self.ties} prompts diverged at a tie" if self.ties else "")


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


class RuntimeCrash(WorkError):
    """An external runtime crashed, timed out or gave no readable answer, so nothing is known about
    what it computes."""


def ask_process(module: str, request: dict[str, Any], runtime: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Runs one of our modules that drives an external runtime in a separate process; returns the
    tensors of its answer and their metadata.

    request: sent to the module as JSON. WorkError if the module reports an error, RuntimeCrash if
    it crashes, times out or writes no readable answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.safetensors"
        message = json.dumps(request | {"answer": str(answer), "new_tokens": NEW_TOKENS})
        environment = {**os.environ, "HF_MODULES_CACHE": folder}
        try:
            done = subprocess.run(
                [sys.executable, "-m", module], env=environment, input=message, capture_output=True, text=True, check=False,
                timeout=PATIENCE, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RuntimeCrash(f"{runtime} gave no answer in {PATIENCE:.0f} s on this CPU ({_cpu()})") from error
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            raise RuntimeCrash(f"{runtime} died of {name} on this CPU ({_cpu()})")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise WorkError(f"the export does not load in {runtime} ({last}); not exported")
        try:
            with safe_open(answer, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise RuntimeCrash(f"{runtime} ended without a readable answer ({first_line(error)})") from error


def version_of(package: str) -> str:
    """The version of an installed package, or a phrase that says it is unknown."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def parts_of(found: dict[str, Tensor], count: int) -> tuple[list[Tensor], list[list[int]]]:
    """Splits the tensors of an answer into logits and greedy tokens, one of each per prompt."""
    return [found[f"logits.{i}"] for i in range(count)], [found[f"made.{i}"].tolist() for i in range(count)]


def _cpu() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def transformers_name(kind: str) -> str:
    """The name of transformers in a verdict. kind: the model class that was loaded."""
    return f"transformers {metadata.version('transformers')} ({kind})"


def judge(runtime: str, wanted: Reference, logits: list[Tensor], made: list[list[int]], share: float, exact: bool) -> Verdict:
    """Compares a runtime's logits and greedy tokens (`made`) with the reference.

    WorkError if a logit differs by more than `share` of the largest one, or, with `exact`, if a
    greedy token differs. A continuation may diverge from the reference only at a tie, where the
    logits of the two tokens are closer than twice that bound.
    """
    scale = max(float(part.abs().max()) for part in wanted.logits)
    if not all(bool(torch.isfinite(part).all()) for part in logits):
        raise WorkError(f"{runtime} computes logits that are not finite; not exported")
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
            raise WorkError(f"{runtime} continues differently than the checkpoint ({other}, not {right[same]}); not exported")
        ties += exact and tie
    if not difference <= bound:
        raise WorkError(f"{runtime} computes logits that differ by {difference:.1e}, more than {bound:.1e}; not exported")
    return Verdict(runtime, difference, scale, equal, tokens, ties, exact)
