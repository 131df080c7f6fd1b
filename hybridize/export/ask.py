"""Runs a model on disk in transformers.

The `hf` format runs `python -m hybridize.export.ask` with JSON on stdin to compare an export with
its checkpoint. This module imports nothing from hybridize, whose registered classes would replace
the code beside the weights.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig


def plain_greedy(model: Any, new_tokens: int) -> GenerationConfig:
    """Settings for plain greedy decoding. Penalties and beams of the checkpoint's
    generation_config.json are left out."""
    own = model.generation_config
    pad = own.pad_token_id if own.pad_token_id is not None else 0
    return GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=own.eos_token_id, pad_token_id=pad)


@torch.no_grad()
def answers(
    model: Any, prompts: list[list[int]], sequences: list[list[int]], new_tokens: int
) -> tuple[list[Tensor], list[list[int]]]:
    """Returns the logits [T, V] of each sequence, computed one at a time, and the greedy tokens
    after each prompt, computed in one left-padded batch."""
    device = model.device
    logits = [model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in sequences]
    width, config = max(map(len, prompts)), plain_greedy(model, new_tokens)
    ids = torch.full((len(prompts), width), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    model.generation_config = config
    made = model.generate(ids.to(device), attention_mask=mask.to(device))
    return logits, [row[width:].tolist() for row in made]


def main() -> None:
    request = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, trust_remote_code=True, local_files_only=True
    )
    logits, made = answers(model.to(request["device"]).eval(), request["prompts"], request["sequences"], request["new_tokens"])
    found = {f"logits.{i}": part.contiguous() for i, part in enumerate(logits)}
    found |= {f"made.{i}": torch.tensor(part) for i, part in enumerate(made)}
    save_file(found, request["answer"], metadata={"class": type(model).__name__, "module": type(model).__module__})


if __name__ == "__main__":
    main()
