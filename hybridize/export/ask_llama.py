"""Runs a GGUF file in llama.cpp, in a separate process, so that a crash does not affect the caller.

The `gguf` format runs `python -m hybridize.export.ask_llama` with JSON on stdin to compare an
export with its checkpoint: llama-cpp-python on the CPU with a float32 cache, one prompt at a time.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import llama_cpp
import numpy
import torch
from safetensors.torch import save_file


def main() -> None:
    request = json.load(sys.stdin)
    silent = llama_cpp.llama_log_callback(lambda *_: None)  # the reference keeps the callback alive while llama.cpp may call it
    llama_cpp.llama_log_set(silent, None)
    found: dict[str, torch.Tensor] = {}
    for i, (text, prompt, sequence) in enumerate(zip(request["texts"], request["prompts"], request["sequences"], strict=True)):
        room = max(len(sequence), len(prompt) + request["new_tokens"]) + 1
        f32 = llama_cpp.GGML_TYPE_F32
        options: dict[str, Any] = {"n_ctx": room, "n_batch": room, "logits_all": True, "type_k": f32, "type_v": f32}
        model = llama_cpp.Llama(request["model"], **options, verbose=False)
        found[f"tokens.{i}"] = torch.tensor(model.tokenize(text.encode(), special=True))
        model.eval(sequence)
        found[f"logits.{i}"] = torch.from_numpy(numpy.array(model.scores[: len(sequence)]))
        model.reset()
        model = llama_cpp.Llama(request["model"], **options, verbose=False)
        model.eval(prompt)
        new: list[int] = []
        for _ in range(len(sequence) - len(prompt)):
            new.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(new[-1:])
        found[f"made.{i}"] = torch.tensor(new)
    save_file(found, request["answer"])


if __name__ == "__main__":
    main()
