"""The figures of --fidelity and of score-loo --metric kl are those of plain transformers on the
same text, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Runner, make_tokenizer
from tests.families import FAMILY, make_family

LENGTH, WINDOWS = 48, 2
TEXTS = [f"The {n}th of {3 * n} things, and what became of it: {'ab' * n}." for n in range(6)]


def make_home(path: Path, name: str) -> Path:
    """A teacher of the family, with a tokenizer that puts a <bos> before every text."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": AddedToken("<bos>", special=True)})
    mark = ("<bos>", tokenizer.convert_tokens_to_ids("<bos>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[mark])
    make_family(path, name, vocab_size=len(tokenizer), max_position_embeddings=256)
    tokenizer.save_pretrained(path)
    (path / "traces.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def windows_of(tokenizer: Any) -> torch.Tensor:
    """[WINDOWS, LENGTH + 1]: each document as the tokenizer has it, with an end token, one after
    the other."""
    stream = [token for text in TEXTS for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert stream[0] == tokenizer.bos_token_id
    return torch.tensor([stream[at * LENGTH : (at + 1) * LENGTH + 1] for at in range(WINDOWS)])


@torch.no_grad()
def logs(model: Any, windows: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(model(windows[:, :-1]).logits.double(), -1)


@pytest.mark.parametrize("name", FAMILY)
def test_figures_are_those_of_plain_transformers(name: str, tmp_path: Path, cli: Runner) -> None:
    home = make_home(tmp_path / "teacher", name)
    sized = ("--mask", "none", "--windows", WINDOWS, "--seq-len", LENGTH, "--device", "cpu", "--dtype", "float32")
    cli("eval", home, "--fidelity", home / "traces.jsonl", *sized, "-o", tmp_path / "out")
    cli("score-loo", home, "--metric", "kl", "--data", home / "traces.jsonl", *sized, "-o", tmp_path / "loo.json")
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, attn_implementation="eager").eval()
    windows = windows_of(AutoTokenizer.from_pretrained(home))
    before = logs(model, windows)
    perplexity = float((-before.gather(2, windows[:, 1:, None])).mean().exp())
    found = json.loads((tmp_path / "out/fidelity.json").read_text())
    assert found["tokens"] == WINDOWS * LENGTH
    for key in ("perplexity", "teacher_perplexity"):
        assert found[key] == pytest.approx(perplexity, rel=1e-4)
    scores = {entry["layer"]: entry["score"] for entry in json.loads((tmp_path / "loo.json").read_text())["layers"]}
    assert len(scores) == len(model.model.layers)
    for layer, score in scores.items():
        handle = model.model.layers[layer].register_forward_hook(lambda _, given, out: given[0])
        after = logs(model, windows)
        handle.remove()
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        assert score == pytest.approx(kl, rel=1e-4)
