"""Whether generated answers come to the known results of their questions (rejection sampling of
training traces). The comparison of mathematical results is math-verify's."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from decimal import Decimal
from multiprocessing import get_context
from typing import Any

from hybridize.data.forms import Conversation, Pair, read_form
from hybridize.errors import InputError, setting

PART = 64  # answers per process at least: starting one takes seconds
SHORT = 100  # characters; a longer `answer` is a solution
# GSM8K's mark, before a number at the end of a solution
MARKED = re.compile(r"####[ \t]*([-+$\\\d(][^\n]*)\s*$")
RESULT = re.compile(r"^[ \t]*####[ \t]*([-+$\\\d(][^\n]*)$", re.MULTILINE)
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")  # of prose, not a LaTeX command or a product of variables
FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,2}")


def known_result(row: dict[str, Any], where: str) -> str | None:
    r"""Returns the text that holds the result of the row's question, or None if it has none.

    That is a number or a short text under `answer`. Otherwise it is the row's own solution, if its
    result is marked by \boxed or, on the last line, by ####: the last assistant message or response
    (see read_form), or the text under `answer` or `solution`.
    """
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    if isinstance(answer, str) and answer.strip() and len(answer) <= SHORT and "\n" not in answer.strip():
        return answer.strip()
    texts = [_own_answer(row, where), *(row[key] for key in ("answer", "solution") if isinstance(row.get(key), str))]
    return next((text for text in texts if "\\boxed" in text or MARKED.search(text)), None)


def _own_answer(row: dict[str, Any], where: str) -> str:
    """The text of the row's last answer, empty if it has none."""
    try:
        form, _ = read_form(row, where)
    except InputError:  # a question alone
        return ""
    if isinstance(form, Pair):
        return form.response
    if not isinstance(form, Conversation) or form.messages[-1]["role"] != "assistant":
        return ""
    content = form.messages[-1].get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def check_available() -> None:
    """Raises InputError unless math-verify is installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError(f"{setting('correct')} compares results with math-verify; install it: pip install 'hybridize[math]'")


def compare(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """Returns, for each (known result, answer), whether the answer has that result; None if the
    first is no number or formula that can be compared, such as a letter of a multiple choice or a
    time of day. Runs in several processes if there are many."""
    processes = min(os.cpu_count() or 1, len(pairs) // PART)
    if processes < 2:
        return [_same(pair) for pair in pairs]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(pool.map(_same, pairs, chunksize=PART // 4))


def _same(pair: tuple[str, str]) -> bool | None:
    from math_verify import parse, verify  # type: ignore[import-not-found, import-untyped, unused-ignore]

    known, answer = (_end(text) for text in pair)
    if FLOAT.fullmatch(known):
        known = format(Decimal(known), "f")
    if "\\boxed" not in known:
        if not re.search(r"[\\\d]", known) or re.search(r"\d:\d", known):
            return None
        if "$" not in known and not WORD.search(known):
            known = f"${known}$"
    wanted = parse(known)
    return bool(verify(wanted, parse(answer))) if wanted else None


def _end(text: str) -> str:
    """The result after ####, or all of the text: the working before it may contain other results."""
    marked = RESULT.findall(text)
    return marked[-1].strip() if marked and "\\boxed" not in text else text
