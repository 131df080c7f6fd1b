"""hybridize generate"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridize import __version__
from hybridize.checkpoint.journal import check_journal, part_of
from hybridize.errors import InputError, WorkError

from .shared import options as opt
from .shared.files import refuse_ranks
from .shared.flags import expanded
from .shared.output import LINES, Output, guarded
from .shared.speaking import OFTEN, Sampling, Speaker, growing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from hybridize.data.encode import Encoder
    from hybridize.generation.traces import Traces

TRACES = Path("traces.jsonl")
FEW = 0.05  # correct answers per wrong one, below which something is likely amiss with the results


@guarded
@expanded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    prompt: Annotated[str | None, typer.Argument(help="A single prompt; its answer is printed.")] = None,
    *,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="jsonl, parquet or hub id with `messages` or `prompt` in each row.")
    ] = None,
    sampling: Sampling,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers per prompt.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Maximum number of sequences decoded at once.")] = 64,
    correct: Annotated[
        bool, typer.Option("--correct", help="Leave out answers with another result than the row's own answer.")
    ] = False,
    limit: opt.Limit = None,
    output: opt.Output = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    machine: opt.Machine,
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    speech: opt.Speech,
) -> None:
    """Reads a checkpoint and prompts; writes traces.jsonl (or -o): the prompts with the model's
    answers, as training data.

    With a single prompt on the command line the answer is printed and nothing is written. An answer
    depends only on its prompt and the seed; --resume continues an interrupted run.
    """
    out = speech.output()
    _check_arguments(prompt, prompts, output or TRACES, resume, overwrite, correct)
    from hybridize.data.forms import check_prompt
    from hybridize.data.rows import read_rows
    from hybridize.runtime.device import pick_compute
    from hybridize.runtime.loading import quiet_transformers

    refuse_ranks("generate")
    quiet_transformers()
    speaker = Speaker(checkpoint, revision, sampling, machine.trust_remote_code, out)
    where, compute = pick_compute(machine.device, machine.dtype)
    if samples > 1 and speaker.generation.sampling.temperature == 0:
        raise InputError("--samples above 1 requires --temperature above 0, otherwise all answers are the same")
    rows: Any = [{"prompt": prompt}] if prompts is None else read_rows(prompts, limit, "prompts", check_prompt)
    where_of = rows.where if prompts is not None else lambda _: "the prompt"
    read = _read(speaker.encoder, rows, where_of)
    _warn_of_room(out, speaker, read, sampling.max_new_tokens)
    keys = [(row, sample) for row in range(len(rows)) for sample in range(samples)]
    answering = Answering(out, speaker, read, sampling.max_new_tokens, batch_size, seed, where, compute)
    if prompts is None:
        streams = not speech.as_json and not speech.quiet and samples == 1
        _answer(out, answering, prompt, keys, streams)
    else:
        known = _known_results(rows, where_of, prompts) if correct else {}
        results = hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest() if correct else None
        names = {
            "command": "generate", "version": __version__, "model": checkpoint, "source": prompts, "limit": limit,
            "known_results": results,
        }  # fmt: skip
        _write_traces(out, answering, keys, rows, where_of, output or TRACES, samples, resume, overwrite, known, names)


def _warn_of_room(out: Output, speaker: Speaker, read: list[list[int]], new: int) -> None:
    """Warns if prompt and answer together exceed the model's maximum context length."""
    longest = max(map(len, read))
    if speaker.room is not None and longest + new > speaker.room:
        out.warn(f"{longest} prompt tokens and {new} new ones exceed the model's context length of {speaker.room}")


@dataclass
class Answering:
    """Prompts and settings for a model. read: token ids by prompt. new: maximum length of an
    answer."""

    out: Output
    speaker: Speaker
    read: list[list[int]]
    new: int
    batch: int
    seed: int
    where: torch.device
    compute: torch.dtype

    def answers(self, keys: Sequence[tuple[int, int]], stop: Callable[..., bool], stride: int | None = None) -> Iterator[Any]:
        """Yields answers as they finish. keys: (prompt number, sample). stop: see `write`. stride:
        tokens between calls of `stop`."""
        from hybridize.generation.writing import STRIDE, Wanted, rows_that_fit, seed_of, write

        LINES.doing("loading the model")
        model, generation = self.speaker.load(self.where, self.compute), self.speaker.generation
        longest = max(map(len, self.read))
        side = rows_that_fit(model, longest + self.new, min(self.batch, len(keys)))
        if side < min(self.batch, len(keys)):
            self.out.note(f"{side} sequences at once, since no more fit into memory")
        LINES.doing("reading the prompts")
        wanted = (Wanted(key, self.read[key[0]], seed_of(self.seed, key)) for key in keys)
        return write(
            model, wanted, longest, self.new, generation.ends, generation.sampling, side, generation.rules, stop,
            stride or STRIDE,
        )  # fmt: skip


def _answer(out: Output, answering: Answering, prompt: str | None, keys: list[tuple[int, int]], streams: bool) -> None:
    """Prints the answers to the single prompt. streams: print its only answer as it is
    generated."""
    from hybridize.data.encode import decoded

    tokenizer, answers = answering.speaker.encoder.tokenizer, list[dict[str, Any]]()

    def add(text: str) -> None:
        LINES.silent = True  # the text itself shows progress from here on
        LINES.end()
        print(text, end="", flush=True)

    stop: Callable[..., bool] = growing(tokenizer, add) if streams else lambda *_: False
    for answer in answering.answers(keys, stop, OFTEN if streams else None):
        if answer.broken:
            raise WorkError("the prompt: a logit of the answer is not finite; try --dtype float32")
        finish = "stop" if answer.ended else "length"
        answers.append({"text": decoded(tokenizer, answer.ids), "finish": finish, "tokens": len(answer.ids)})
    out.result({"prompt": prompt, "answers": answers}, lambda: _say(answers))
    if any(answer["finish"] == "length" for answer in answers):
        out.note(f"cut at {answering.new} tokens; raise --max-new-tokens")


def _write_traces(
    out: Output, answering: Answering, keys: list[tuple[int, int]], rows: Any, where_of: Callable[[int], str], path: Path,
    samples: int, resume: bool, overwrite: bool, known: dict[int, str], names: dict[str, Any],
) -> None:  # fmt: skip
    """Writes the answers to all prompts: into a journal as they finish, in the end in order to
    `path`. known, names: see Traces.finish."""
    from hybridize.generation.traces import Traces, trace_of
    from hybridize.inputs import check_weights
    from hybridize.runtime.device import ran_on

    speaker = answering.speaker
    check_weights(speaker.source, notes=out)
    decisive = {
        "checkpoint": speaker.source.hash, "prompts": hashlib.sha256(repr(answering.read).encode()).hexdigest(),
        "seed": answering.seed, "ends": sorted(speaker.generation.ends),
        "rules": json.loads(json.dumps(asdict(speaker.generation.rules))), **vars(speaker.generation.sampling),
        "max_new_tokens": answering.new, "samples": samples, "chat_template": speaker.encoder.template,
        **ran_on(answering.where, answering.compute),
    }  # fmt: skip
    traces = Traces(path, decisive, resume, overwrite)
    keys = [key for key in keys if key not in traces.lines]
    started, made = time.monotonic(), 0
    for done, answer in enumerate(answering.answers(keys, lambda *_: False) if keys else (), 1):
        place = answer.key[0]
        if answer.broken:
            raise WorkError(f"{where_of(place)}: a logit of the answer is not finite; try --dtype float32")
        made += len(answer.ids)
        traces.add(answer.key, trace_of(speaker.encoder, rows[place], where_of(place), answer))
        pace = made / (time.monotonic() - started)
        out.progress(f"{done} of {len(keys)} answers, {pace:,.0f} tokens/s", last=done == len(keys))
    _finish(out, traces, answering.new, started, known, names)


def _known_results(rows: Sequence[dict[str, Any]], where_of: Callable[[int], str], name: str) -> dict[int, str]:
    """The known results of the rows that have one, by row. InputError if there are none."""
    from hybridize.generation.results import known_result

    known = {i: result for i, row in enumerate(rows) if (result := known_result(row, where_of(i))) is not None}
    if not known:
        raise InputError(
            f"--correct: no row of {name} has a known result, that is an `answer`, or a solution with \\boxed{{}} or ####"
        )
    return known


def _check_arguments(prompt: str | None, prompts: str | None, path: Path, resume: bool, overwrite: bool, correct: bool) -> None:
    """InputError unless there is one prompt or a file of prompts, no unfinished run in the way, and
    what --correct needs."""
    from hybridize.generation.results import check_available

    if correct:
        if prompts is None:
            raise InputError("--correct requires --prompts FILE, whose rows have known results")
        check_available()
    if (prompt is None) == (prompts is None):
        raise InputError("say what to answer: either one prompt, or --prompts FILE")
    if prompts is not None:
        check_journal(part_of(path), resume, overwrite)


def _finish(
    out: Output, traces: Traces, max_new_tokens: int, started: float, known: dict[int, str], names: dict[str, Any]
) -> None:
    """Writes the file of answers and shows a summary. known, names: see Traces.finish."""
    if known:
        LINES.doing("comparing the results")
    found = traces.finish(known, names)
    counts, lines = found.counts, found.counts["answers"]
    if counts["cut"]:
        out.warn(f"{counts['cut']} of {lines} answers were cut at {max_new_tokens} tokens; raise --max-new-tokens")
    if counts["empty"]:
        out.warn(f"{counts['empty']} answers were empty and are left out")
    right, wrong = counts["correct"], counts["wrong"]
    if known:
        rest = f"{wrong} are wrong (in {traces.path}.rejected), {lines - right - wrong} could not be checked"
        (out.warn if right < FEW * wrong else out.note)(f"{right} answers are correct, {rest}")
    summary = {
        "output": str(traces.path), **{key: counts[key] for key in ("cut", "empty", "correct", "wrong")},
        "answers": counts["written"], "tokens": sum(line["tokens"] for line in found.kept),
        "seconds": round(time.monotonic() - started, 2),
    }  # fmt: skip
    out.result(summary, lambda: print(f"{traces.path}: {summary['answers']} answers, {summary['tokens']} tokens"))


def _read(encoder: Encoder, rows: Sequence[dict[str, Any]], where_of: Callable[[int], str]) -> list[list[int]]:
    """Token ids of each row's prompt. InputError, with the place, for a prompt without tokens or
    one that cannot be stored with an answer."""
    from hybridize.generation.traces import question_of

    read = [encoder.prompt(row, where_of(i)) for i, row in enumerate(rows)]
    for i, ids in enumerate(read):
        if not ids:
            raise InputError(f"{where_of(i)} has no token")
        question_of(encoder, rows[i], where_of(i))
    return read


def _say(answers: list[dict[str, Any]]) -> None:
    """Prints the answers; a single one has already been streamed."""
    print("" if len(answers) == 1 else "\n\n".join(answer["text"] for answer in answers))
