"""The output file of answers: lines are appended to FILE.part as they come; FILE is written, in
order, once all are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.checkpoint.atomic import write_json_atomic, write_lines_atomic
from hybridize.checkpoint.journal import Journal, part_of
from hybridize.checkpoint.writer import check_writable
from hybridize.data.encode import Encoder, decoded
from hybridize.data.forms import CONTEXT, Conversation, Pair, read_question
from hybridize.errors import InputError, first_line, setting
from hybridize.generation.results import compare
from hybridize.generation.writing import Written


def trace_of(encoder: Encoder, row: dict[str, Any], where: str, answer: Written) -> dict[str, Any]:
    """Returns the training line for `row`: its question and the answer's text.

    Encoding the line gives back the ids of prompt and answer. If the text alone does not determine
    them, as with templates that remove reasoning or tokenizers with several encodings of the same
    text, the ids are stored in `token_ids`. where: the row's location, for errors.
    """
    text = decoded(encoder.tokenizer, answer.ids)
    line = question_of(encoder, row, where)
    if "messages" in line:
        line["messages"] = [*line["messages"], {"role": "assistant", "content": text}]
    else:
        line["response"] = text
    line |= {"tokens": len(answer.ids) if text else 0, "finish": "stop" if answer.ended else "length"}
    if answer.ids and not _gives_back(encoder, line, where, answer.ids):
        line["token_ids"] = answer.ids
    return line


def answer_of(line: dict[str, Any]) -> str:
    """Returns the text of a line's answer."""
    return line["messages"][-1]["content"] if "messages" in line else line["response"]  # type: ignore[no-any-return]


def question_of(encoder: Encoder, row: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the part of a line that precedes the answer. Raises InputError if it cannot be
    written as JSON."""
    question = read_question(row, where)
    if isinstance(question, Pair) and encoder.template:
        question = question.as_chat().question
    if isinstance(question, Conversation) or encoder.template:
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question.messages  # type: ignore[union-attr]
        line = {"messages": messages} | {key: row[key] for key in CONTEXT if row.get(key)}
    else:
        line = {"prompt": question if isinstance(question, str) else question.before}
    try:
        json.dumps(line, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} cannot be written with its answer: {first_line(error)}") from error
    return line


def _gives_back(encoder: Encoder, line: dict[str, Any], where: str, ids: list[int]) -> bool:
    """Returns whether encoding the text alone gives the same ids as with `token_ids`."""
    try:
        return encoder.read(line, where).ids == encoder.read(line | {"token_ids": ids}, where).ids
    except InputError:  # the template rejects the answer
        return False


@dataclass(frozen=True)
class Outcome:
    """The answers of a finished run. kept: those written, as training data; wrong: those with
    another result than the known one; counts: of all of them, by what became of them."""

    kept: list[dict[str, Any]]
    wrong: list[dict[str, Any]]
    counts: dict[str, int]


class Traces:
    """The answers of a run, by row and sample. settings: everything that determines the answers;
    only a run with the same settings can be resumed. Raises InputError if the output or an
    unfinished run is in the way."""

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
        self.path, self.settings = path, settings
        if path.is_dir():
            raise InputError(f"{path} is a directory; {setting('output')} must be a file")
        part = part_of(path)
        if path.exists() and not overwrite and not (resume and part.exists()):  # both: killed just before the end
            raise InputError(f"{path} exists; give another {setting('output')} or {setting('overwrite')}")
        check_writable(path)
        self.journal = Journal(part, settings, resume, overwrite)
        try:
            self.lines = {(int(line["row"]), int(line["sample"])): line for line in self.journal.lines}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.journal.path} is not an unfinished run of generate; {setting('overwrite')} starts over"
            ) from error

    def add(self, key: tuple[int, int], line: dict[str, Any]) -> None:
        """Stores the line of the answer with key (row, sample) and appends it to the journal."""
        self.lines[key] = {**line, "row": key[0], "sample": key[1]}
        self.journal.put(self.lines[key])

    def finish(self, known: Mapping[int, str], names: Mapping[str, Any]) -> Outcome:
        """Writes the file, in the order of the prompts, and returns what is in it.

        Empty answers are not written, since they have nothing to train on. Answers with another
        result than the known one of their row, or cut before it, go to FILE.rejected instead. known:
        results by row; the answers to these rows get the key `correct`, unless the results cannot be
        compared. Beside FILE appears FILE.provenance.json, with the settings of the run and `names`.
        """
        found = self._sorted(known)
        write_lines_atomic(self.path, found.kept)
        rejected = self.path.with_name(f"{self.path.name}.rejected")
        if found.wrong:
            write_lines_atomic(rejected, found.wrong)
        else:  # of the file that this one replaces
            rejected.unlink(missing_ok=True)
        write_json_atomic(self.path.with_name(f"{self.path.name}.provenance.json"), {**names, **self.settings, **found.counts})
        self.journal.remove()
        return found

    def _sorted(self, known: Mapping[int, str]) -> Outcome:
        """Marks the answers to rows with a known result, and sorts all of them."""
        lines = [self.lines[key] for key in sorted(self.lines)]
        checked = [line for line in lines if line["row"] in known]
        same = compare([(known[line["row"]], answer_of(line)) for line in checked])
        for line, correct in zip(checked, same, strict=True):
            if correct is not None:
                line["correct"] = correct and line["finish"] != "length"
        kept = [line for line in lines if line["tokens"] and line.get("correct") is not False]
        wrong = [line for line in lines if line.get("correct") is False]
        counts = {
            "answers": len(lines), "written": len(kept), "wrong": len(wrong),
            "correct": sum(line.get("correct") is True for line in lines),
            "cut": sum(line["finish"] == "length" for line in lines), "empty": sum(not line["tokens"] for line in lines),
        }  # fmt: skip
        return Outcome(kept, wrong, counts)
