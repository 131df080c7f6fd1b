"""Loads the held-out word problems from the directory of the tasks, wherever it was copied to."""

from pathlib import Path
from typing import Any

import datasets


def load(**_: Any) -> dict[str, datasets.Dataset]:
    rows = datasets.Dataset.from_json(str(Path(__file__).with_name("heldout.jsonl")))
    return {"test": rows}


def question(doc: dict[str, Any]) -> str:
    return f"<|user|>{doc['messages'][0]['content']}<|end|><|assistant|>"


def question_and_work(doc: dict[str, Any]) -> str:
    return question(doc) + doc["prefix"]


def rotated(doc: dict[str, Any]) -> list[str]:
    """The choices, rotated by an amount that depends on the answer, so that no position is
    favoured."""
    shift = int(doc["answer"]) % len(doc["choices"])
    return doc["choices"][-shift:] + doc["choices"][:-shift] if shift else doc["choices"]


def right(doc: dict[str, Any]) -> int:
    return int(doc["answer"]) % len(doc["choices"])
