"""Run by the Python that has vLLM: `ask_vllm.py MODEL ASK.json ANSWER.json`. Greedy tokens after
each prompt, twice, the second time from the prefix cache; and the answer to a chat message, if one
is asked. Batched, with chunked prefill."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    model, ask, answer = sys.argv[1:]
    wanted = json.loads(Path(ask).read_text())
    llm = LLM(
        model, dtype="float32", enforce_eager=True, enable_prefix_caching=True, enable_chunked_prefill=True,
        max_num_batched_tokens=64, max_num_seqs=16, max_model_len=256,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=wanted["new_tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in wanted["prompts"]]
    runs = [[list(out.outputs[0].token_ids) for out in llm.generate(prompts, greedy)] for _ in range(2)]
    chat = None
    if wanted["chat"]:
        messages = [{"role": "user", "content": wanted["chat"]}]
        chat = llm.chat(messages, SamplingParams(temperature=0, max_tokens=wanted["chat_tokens"]))[0].outputs[0].text
    Path(answer).write_text(json.dumps({"runs": runs, "chat": chat}))


if __name__ == "__main__":
    main()
