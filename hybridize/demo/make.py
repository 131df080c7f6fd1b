"""Makes the embedded teacher: `python -m hybridize.demo.make OUT` (a GPU; about 4 minutes on an
H100).

Trains a tokenizer and a small Llama on generated word problems, checks it on held-out ones, and
writes what ships in the package: OUT/teacher, the bf16 checkpoint with tokenizer and traces to
distill on, and OUT/tasks/heldout.jsonl. Everything follows from the seeds below; only the GPU's
rounding is not reproducible.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybridize.demo.problems import Problem, make_problem, make_problems

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELDOUT_SEED, TRACES_SEED, TRAIN_SEED = 1, 2, 3
HELDOUT, TRACES = 400, 4000


def make_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 384 entries with one token per digit, so that any text
    round-trips and numbers stay legible."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=[PAD, USER, ASSISTANT, END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT],
        model_max_length=1024, clean_up_tokenization_spaces=False, padding_side="left",
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(tokenizer: PreTrainedTokenizerFast, hidden: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=8,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip


def render(problem: Problem) -> tuple[str, str]:
    """The prompt and the answer of a problem, as in the chat template."""
    return f"{USER}{problem.question}{END}{ASSISTANT}", f"{problem.solution}{END}"


class Batches(IterableDataset):
    """Endless batches of newly generated, packed problems: (ids, labels), each [rows, length];
    labels are -100 outside solutions.

    exclude: the held-out questions. Each loader worker has its own seed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, exclude: set[str], rows: int, length: int) -> None:
        self.tokenizer, self.exclude, self.rows, self.length = tokenizer, exclude, rows, length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker, size = get_worker_info(), self.rows * self.length
        rng = random.Random(TRAIN_SEED + 1000 * (worker.id if worker else 0))
        ids: list[int] = []
        labels: list[int] = []
        while True:
            problems = [p for p in (make_problem(rng) for _ in range(256)) if p.question not in self.exclude]
            prompts = self.tokenizer([render(p)[0] for p in problems], add_special_tokens=False)["input_ids"]
            answers = self.tokenizer([render(p)[1] for p in problems], add_special_tokens=False)["input_ids"]
            for prompt, answer in zip(prompts, answers, strict=True):
                ids += prompt + answer
                labels += [-100] * len(prompt) + answer
            while len(ids) >= size:
                yield torch.tensor(ids[:size]).view(self.rows, -1), torch.tensor(labels[:size]).view(self.rows, -1)
                del ids[:size], labels[:size]


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> float:
    """The share of problems whose greedy answer ends with the right number."""
    right = 0
    for start in range(0, len(problems), 100):
        part = problems[start : start + 100]
        prompts = tokenizer([render(p)[0] for p in part], return_tensors="pt", padding=True, add_special_tokens=False)
        prompts = {key: prompts[key].to(model.device) for key in ("input_ids", "attention_mask")}
        out = model.generate(**prompts, max_new_tokens=120, do_sample=False)
        texts = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.endswith(f"The answer is {p.answer}.") for text, p in zip(texts, part, strict=True))
    return right / len(problems)


def drop_attention(model: LlamaForCausalLM, most: float) -> None:
    """Drops attention outputs in training: each sequence loses each layer's attention with a
    probability that is drawn between 0 and `most` for the sequence.

    Large models have attention layers that they hardly need; a small one learns them only with this
    (LayerDrop, arXiv 1909.11556, on attention alone). Without it all eight layers are essential and
    none can be converted.
    """

    rates: list[torch.Tensor] = []  # one draw per sequence, shared by the layers of one forward

    def hook(module: torch.nn.Module, _: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if not module.training:
            return output
        kept = torch.rand(len(output[0]), 1, 1, device=output[0].device) >= most * rates[0]
        return (output[0] * kept, *output[1:])

    def draw(module: torch.nn.Module, args: object, kwargs: dict) -> None:
        ids = kwargs["input_ids"]
        rates[:] = [torch.rand(len(ids), 1, 1, device=ids.device)]

    model.register_forward_pre_hook(draw, with_kwargs=True)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(hook)


def train(model: LlamaForCausalLM, data: Iterator, steps: int, lr: float, log: Path) -> None:
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=model.device.type == "cuda")
    started = time.time()
    with log.open("w") as lines:
        for step in range(steps):
            rate = lr * min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids, labels = (part.to(model.device) for part in next(data))
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 100 == 0 or step == steps - 1:
                record = {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.time() - started, 1)}
                lines.write(json.dumps(record) + "\n")
                print(record, flush=True)


def write_rows(path: Path, problems: list[Problem], extra: bool) -> None:
    with path.open("w") as out:
        for problem in problems:
            row: dict[str, object] = {"messages": problem.messages()}
            if extra:
                prefix, choices = problem.last_step()
                row |= {"answer": str(problem.answer), "prefix": prefix, "choices": choices}
            out.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded teacher.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--drop", type=float, default=0.12)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, tasks = args.out / "teacher", args.out / "tasks"
    for folder in (teacher, tasks):
        folder.mkdir(parents=True, exist_ok=True)
    heldout = make_problems(HELDOUT, HELDOUT_SEED)
    exclude = {p.question for p in heldout}
    traces = make_problems(TRACES, TRACES_SEED, exclude=frozenset(exclude))
    tokenizer = make_tokenizer(["".join(render(p)) for p in traces])
    tokenizer.save_pretrained(teacher)
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config(tokenizer, args.hidden, args.heads, args.kv_heads)).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}", flush=True)
    data = Batches(tokenizer, exclude, args.rows, args.length)
    loader = DataLoader(data, batch_size=None, num_workers=args.workers)
    drop_attention(model, args.drop)
    train(model, iter(loader), args.steps, args.lr, teacher / "training.jsonl")
    model = model.to(torch.bfloat16).eval()
    score = exact_match(model, tokenizer, heldout)
    print(f"exact match on {len(heldout)} held-out problems: {score:.3f}", flush=True)
    with (teacher / "training.jsonl").open("a") as log:
        log.write(json.dumps({"exact_match": score, "heldout_problems": HELDOUT}) + "\n")
    model.save_pretrained(teacher)
    write_rows(teacher / "traces.jsonl", traces, extra=False)
    write_rows(tasks / "heldout.jsonl", heldout, extra=True)


if __name__ == "__main__":
    main()
