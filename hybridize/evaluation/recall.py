"""Long-context recall tasks, generated from a seed at lengths counted in the checkpoint's own
tokens, without a download.

A hybrid may keep its perplexity and still lose information from far back in its context. The kinds
follow needle-in-a-haystack tests and RULER (2404.06654, section 3). The texts are original: the
sentences of filler.txt in a different order for each document.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hybridize.errors import InputError, setting

GROUP = "recall"
LENGTHS = (1024, 4096)
DOCUMENTS = 50  # per kind and length
ANSWER = 48  # most tokens of an answer
ROOM = 96  # tokens reserved for the text of a chat template
SHORTEST = 512
CHAIN = 3  # variables with the same value
PLACES = (
    "Oslo", "Lima", "Cairo", "Quito", "Delhi", "Turin", "Perth", "Lagos", "Basel", "Kyoto", "Sofia", "Riga", "Dakar", "Minsk",
    "Seoul", "Tunis", "Bern", "Hanoi", "Porto", "Accra", "Leeds", "Malmo", "Nancy", "Osaka",
)  # fmt: skip
UNTIL = {"variables": ["\n\n\n"]}  # a list may span several lines
Document = dict[str, str]
Sentences = list[str]


def _number(draw: random.Random) -> str:
    return str(draw.randint(10_000, 99_999))


def _needle(draw: random.Random, _: int, count: int = 1) -> tuple[Sentences, str, str, str]:
    """Returns the sentences to hide, the question, the beginning of its answer, and the answer."""
    places = draw.sample(PLACES, count)
    numbers = [_number(draw) for _ in places]
    hidden = [f"The magic number of {place} is {number}." for place, number in zip(places, numbers, strict=True)]
    asked = draw.randrange(count)
    begin = f"The magic number of {places[asked]} is"
    return hidden, f"What is the magic number of {places[asked]}, as the text says?", begin, numbers[asked]


def _lookup(draw: random.Random, length: int) -> tuple[Sentences, str, str, str]:
    """A list of keys and values, which replaces the filler. Returns the same as `_needle`."""
    keys = [f"{draw.choice('bcdfghjk')}{draw.choice('aeiou')}{draw.randint(100, 999)}" for _ in range(length // 8)]
    pairs = {key: _number(draw) for key in keys}
    asked = draw.choice(list(pairs))
    lines = [f"{key}: {value};" for key, value in pairs.items()]
    return lines, f"Which value stands at {asked} in the list?", f"{asked}:", pairs[asked]


def _variables(draw: random.Random, _: int) -> tuple[Sentences, str, str, str]:
    """A value passed from variable to variable, as in RULER's variable tracking with one chain; the
    question is which variables have it. Returns the same as `_needle`."""
    names = [f"{letter}{draw.randint(1, 9)}" for letter in draw.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", CHAIN)]
    value = _number(draw)
    hidden = [f"VAR {names[0]} = {value}.", *(f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(names))]
    question = f"Find all variables that are assigned the value {value} in the text above, directly or by way of another."
    return hidden, question, f"The variables with the value {value} are", " ".join(names)


def _copy(draw: random.Random, _: int) -> tuple[Sentences, str, str, str]:
    code = " ".join(str(draw.randint(10, 99)) for _ in range(8))
    return [f"The code of the vault is: {code}."], "Repeat the code of the vault.", "The code of the vault is:", code


KINDS: dict[str, Callable[[random.Random, int], tuple[Sentences, str, str, str]]] = {
    "needle": _needle, "needles": functools.partial(_needle, count=8), "lookup": _lookup, "variables": _variables,
    "copy": _copy,
}  # fmt: skip


def parse_lengths(text: str | None) -> tuple[int, ...]:
    """`1024,4096` -> (1024, 4096). InputError for text that is not a list of lengths."""
    if text is None:
        return LENGTHS
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise InputError(
            f"{setting('recall_lengths')} {text} must be numbers of tokens separated by commas, such as 1024,4096,16384"
        ) from error
    if found[0] < SHORTEST:
        raise InputError(f"{setting('recall_lengths')} {text}: each length must be at least {SHORTEST} tokens")
    return found


def make_document(tokenizer: Any, kind: str, length: int, seed: int, number: int) -> Document:
    """Returns one document of at most `length` tokens, including ANSWER and ROOM: its `text`,
    `answer`, and `prefix`, the beginning of the answer."""
    draw = random.Random(f"{seed} {kind} {length} {number}")
    hidden, question, prefix, answer = KINDS[kind](draw, length)
    sizes = _sizes(tokenizer)
    budget = length - ROOM - ANSWER - sum(_size(tokenizer, part) for part in (question, prefix))
    if kind == "lookup":
        asked = next(part for part in hidden if part.startswith(prefix))
        kept, used = [asked], _size(tokenizer, asked)
        for part in hidden:
            if part is not asked and used + (size := _size(tokenizer, part)) <= budget:
                kept.append(part)
                used += size
        draw.shuffle(kept)
        body = kept
    else:
        budget -= sum(_size(tokenizer, part) for part in hidden)
        order, body, used = list(sizes), list[str](), 0
        while True:
            draw.shuffle(order)
            fits = [part for part in order if (used := used + sizes[part]) <= budget]
            body += fits
            if len(fits) < len(order):
                break
        places = sorted(draw.randint(0, len(body)) for _ in hidden)
        for place, part in reversed(list(zip(places, hidden, strict=True))):
            body.insert(place, part)
    return {"text": " ".join(body) + f"\n\n{question}", "prefix": prefix, "answer": answer}


def _size(tokenizer: Any, text: str) -> int:
    """Returns an upper bound of a sentence's tokens within a text, counted with a space before it."""
    return len(tokenizer(f" {text}", add_special_tokens=False)["input_ids"])


@functools.lru_cache(maxsize=4)
def _sizes(tokenizer: Any) -> dict[str, int]:
    """Returns the filler's sentences and their sizes in tokens."""
    return {line: _size(tokenizer, line) for line in Path(__file__).with_name("filler.txt").read_text().splitlines()}


def judge(document: Document, answers: Sequence[str]) -> dict[str, float]:
    """Scores the first answer: 1 if its first numbers are the expected ones in order, or if the
    first variables that it names are exactly the expected ones in any order, else 0."""
    wanted = document["answer"].split()
    if wanted[0].isdecimal():
        numbers = re.findall(r"\d+", answers[0])
        return {"recall": float(numbers[: len(wanted)] == wanted)}
    named = list(dict.fromkeys(re.findall(r"\b[A-Z]\d\b", answers[0])))
    return {"recall": float(set(named[: len(wanted)]) == set(wanted))}


def recall_group(tokenizer: Any, lengths: Sequence[int], seed: int) -> Any:
    """Returns lm-eval's group `recall`: a group per length with a task per kind."""
    from datasets import Dataset

    from hybridize.compat.lm_eval import AggMetricConfig, ConfigurableTask, Group

    aggregate = [AggMetricConfig(metric="recall", aggregation="mean", weight_by_size=True, filter_list="none")]
    whole = Group(GROUP, aggregate_metric_list=aggregate)
    for length in lengths:
        part = Group(f"{GROUP}_{length}", aggregate_metric_list=aggregate)
        for kind in KINDS:

            def load(kind: str = kind, length: int = length, **_: Any) -> dict[str, Any]:
                rows = [make_document(tokenizer, kind, length, seed, number) for number in range(DOCUMENTS)]
                return {"test": Dataset.from_list(rows)}

            part.add(
                ConfigurableTask(
                    config={
                        "task": f"{GROUP}_{kind}_{length}", "custom_dataset": load, "test_split": "test",
                        "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
                        "gen_prefix": "{{prefix}}", "process_results": judge, "metadata": {"version": 1.0},
                        "generation_kwargs": {"until": UNTIL.get(kind, ["\n"]), "do_sample": False, "max_gen_toks": ANSWER},
                        "metric_list": [{"metric": "recall", "aggregation": "mean", "higher_is_better": True}],
                    }
                )
            )  # fmt: skip
        whole.add(part)
    return whole


def kind_and_length(task: str) -> tuple[str, int] | None:
    """`recall_needle_1024` -> ("needle", 1024); None for tasks outside the group."""
    parts = re.fullmatch(rf"{GROUP}_([a-z]+)_(\d+)", task)
    return None if parts is None else (parts[1], int(parts[2]))


def by_length(tasks: dict[str, dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Returns the recall by length and kind from the tasks of a results.json."""
    found: dict[int, dict[str, float]] = {}
    for name, task in tasks.items():
        if parts := kind_and_length(name):
            found.setdefault(parts[1], {})[parts[0]] = float(task["value"])
    return dict(sorted(found.items()))
