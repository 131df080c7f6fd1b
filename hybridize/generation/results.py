"""Whether generated answers come to the known results of their questions (rejection sampling of
training traces). The comparison of mathematical results is math-verify's."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from hybridize.errors import InputError, setting

MARKS = ("\\boxed", "####")  # how MATH and GSM8K mark the result at the end of a solution
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")  # of prose, not a LaTeX command or a product of variables
PART = 64  # answers per process at least: starting one takes seconds
ANSWERS = ("answer", "solution", "response", "completion", "output")  # keys of a row that hold its own answer


def known_result(row: dict[str, Any]) -> str | None:
    r"""Returns the text that holds the result of the row's question, or None if it has none.

    That is a number or text under `answer`, or, if it marks its result with \boxed or ####, the
    row's own solution: the last assistant message or the text under `solution` or `response`.
    """
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    texts = [row[key] for key in ANSWERS if isinstance(row.get(key), str)]
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = row.get(key)
        last = turns[-1] if isinstance(turns, list) and turns else None
        if isinstance(last, dict) and last.get(role) in ("assistant", "gpt") and isinstance(last.get(content), str):
            texts.append(last[content])
    marked = next((text for text in texts if any(mark in text for mark in MARKS)), None)
    return marked or (answer if isinstance(answer, str) and answer.strip() else None)


def check_available() -> None:
    """Raises InputError unless math-verify is installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError(f"{setting('correct')} compares results with math-verify; install it: pip install 'hybridize[math]'")


def compare(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """Returns, for each (known result, answer), whether the answer has that result; None if no
    result can be read from the first. Runs in several processes if there are many."""
    processes = min(os.cpu_count() or 1, len(pairs) // PART)
    if processes < 2:
        return [_same(pair) for pair in pairs]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(pool.map(_same, pairs, chunksize=PART // 4))


def _same(pair: tuple[str, str]) -> bool | None:
    from math_verify import parse, verify  # type: ignore[import-not-found, import-untyped, unused-ignore]

    known, answer = (_end(text) for text in pair)
    prose = "\\boxed" in known or "$" in known or WORD.search(known)
    wanted = parse(known if prose else f"${known}$")
    return bool(verify(wanted, parse(answer))) if wanted else None


def _end(text: str) -> str:
    """The text after ####, or all of it: the working before may contain other results."""
    return text if "\\boxed" in text else text.rsplit("####", 1)[-1].strip()
