"""Are our figures and answers those of plain transformers on the same text? In float32 on the CPU.

    python docs/experiments/plain.py TEACHER TEXT.txt PROMPTS.jsonl [--windows 2] [--seq-len 400] [--count 6] [--new 48]

Prints the perplexity of `eval --fidelity` beside that of transformers, with and without what the
tokenizer adds by itself, and how many of `generate`'s greedy answers are those of model.generate on
the same prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "hybridize.commands", *map(str, words), "--device", "cpu", "--quiet"], check=True)


@torch.no_grad()
def perplexity(model: Any, ids: list[int], windows: int, length: int) -> float:
    """Over `windows` windows of `length` predictions each, one after the other."""
    rows = torch.tensor([ids[at * length : (at + 1) * length + 1] for at in range(windows)])
    logs = torch.stack([model(row[None, :-1]).logits[0].log_softmax(-1) for row in rows])
    return float((-logs.gather(2, rows[:, 1:, None])).mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("prompts", type=Path)
    for name, value in (("windows", 2), ("seq-len", 400), ("count", 6), ("new", 48)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.teacher)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        sized = ("--windows", args.windows, "--seq-len", args.seq_len)
        run("eval", args.teacher, "--fidelity", args.text, "--teacher", args.teacher, *sized, "-o", out)
        ours = json.loads((out / "fidelity.json").read_text())["perplexity"]
        text = args.text.read_text(encoding="utf-8")
        for name, added in (("as its tokenizer has it", True), ("without what that adds", False)):
            found = perplexity(model, tokenizer(text, add_special_tokens=added)["input_ids"], args.windows, args.seq_len)
            print(f"perplexity: eval --fidelity {ours:.6f}, transformers {name} {found:.6f}, ratio - 1 {ours / found - 1:+.1e}")
        limit = ("--max-new-tokens", args.new, "--limit", args.count)
        run("generate", args.teacher, "--prompts", args.prompts, *limit, "--temperature", 0, "-o", out / "t.jsonl")
        answers = {row["row"]: row for row in map(json.loads, (out / "t.jsonl").read_text().splitlines())}
    same = 0
    for at, row in enumerate(map(json.loads, args.prompts.read_text().splitlines()[: args.count])):
        question = row["messages"][:1] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        if tokenizer.chat_template:
            given = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        else:
            given = tokenizer(question[0]["content"], return_tensors="pt")
        made = model.generate(**given, max_new_tokens=args.new, do_sample=False)[0, given["input_ids"].shape[1] :]
        answer = answers.get(at, {"messages": [{"content": ""}], "response": ""})
        said = answer["messages"][-1]["content"] if "messages" in answer else answer["response"]
        same += said == tokenizer.decode(made, skip_special_tokens=True)
    print(f"answers: {same} of {args.count} are those of model.generate")


if __name__ == "__main__":
    main()
