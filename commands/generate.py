"""hybridize generate"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridize.errors import InputError, WorkError

from . import options as opt
from .models import open_checkpoint, open_encoder, refuse_ranks
from .output import Output, guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hybridize.distillation.encode import Encoder
    from hybridize.generation.traces import Traces


@guarded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    prompt: Annotated[str | None, typer.Argument(help="One prompt, whose answer is printed.")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="jsonl, parquet or hub id with `messages` or `prompt` in each row.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")] = 1024,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy [default: as generation_config.json says, else 0].")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Only the k most likely tokens [default: as above].")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Only the most likely up to this mass [default: as above].")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Only those of this share of the likeliest's probability [default: as above]."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers to each prompt.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences side by side, at most.")] = 64,
    chat_template: opt.ChatTemplate = None,
    limit: opt.Limit = None,
    output: opt.Output = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    seed: opt.Seed = 0,
    trust_remote_code: opt.TrustRemoteCode = False,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Reads a checkpoint and prompts; writes traces.jsonl (or -o): the prompts with the model's answers, to be distilled on.

    With one prompt on the command line the answer is printed and nothing is written. Each answer depends on its prompt and the
    seed alone; an interrupted run goes on with --resume.
    """
    out = Output(as_json, quiet)
    from hybridize.distillation.encode import decoded
    from hybridize.distillation.forms import check_prompt
    from hybridize.distillation.rows import read_rows
    from hybridize.generation.decoder import check_decodable
    from hybridize.generation.settings import FILE, read_generation
    from hybridize.generation.traces import Traces, trace_of
    from hybridize.generation.writing import Wanted, rows_that_fit, seed_of, write
    from hybridize.runtime import load_hybrid, pick_compute, quiet_transformers, ran_on
    from hybridize.surgery.teacher import hybrid_config

    refuse_ranks("generate")
    if (prompt is None) == (prompts is None):
        raise InputError("say what to answer: either one prompt, or --prompts FILE")
    source = open_checkpoint(checkpoint, revision)
    check_decodable(hybrid_config(source.config))
    where, compute = pick_compute(device, dtype)
    quiet_transformers()
    encoder = open_encoder(source, "assistant", chat_template, trust_remote_code)
    tokenizer = encoder.tokenizer
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    generation = read_generation(source.path, source.config, tokenizer, asked)
    _check_followed(source.path / FILE, generation.others)
    settings = generation.sampling
    if samples > 1 and settings.temperature == 0:
        raise InputError("--samples needs answers that differ: --temperature above 0")
    rows: Any = [{"prompt": prompt}] if prompts is None else read_rows(prompts, limit, "--prompts", check_prompt)
    where_of = rows.where if prompts is not None else lambda _: "the prompt"
    read = _read(encoder, rows, where_of)
    longest = max(map(len, read))
    room = source.config.get("max_position_embeddings")
    if room is not None and longest + max_new_tokens > room:
        out.warn(
            f"{longest} tokens of prompt and {max_new_tokens} new ones are more than the {room} the checkpoint was made for"
        )

    keys = [(row, sample) for row in range(len(rows)) for sample in range(samples)]
    traces = None
    if prompts is not None:
        decisive = {
            "checkpoint": source.hash, "prompts": hashlib.sha256(repr(read).encode()).hexdigest(), "seed": seed,
            "ends": sorted(generation.ends), "rules": json.loads(json.dumps(asdict(generation.rules))), **vars(settings),
            "max_new_tokens": max_new_tokens, "samples": samples, "chat_template": encoder.template, **ran_on(where, compute),
        }  # fmt: skip
        traces = Traces(output or Path("traces.jsonl"), decisive, resume, overwrite)
        keys = [key for key in keys if key not in traces.lines]
    started, done, made, answers = time.monotonic(), 0, 0, list[dict[str, Any]]()
    if keys:
        model = load_hybrid(source, where, compute)
        side = rows_that_fit(model, longest + max_new_tokens, min(batch_size, len(keys)))
        if side < min(batch_size, len(keys)):
            out.note(f"{side} sequences side by side, since no more fit into memory")
        wanted = (Wanted(key, read[key[0]], seed_of(seed, key)) for key in keys)
        said: dict[tuple[int, int], str] = {}

        def show(key: tuple[int, int], ids: list[int]) -> bool:
            if traces is None and not as_json and not quiet and samples == 1:
                text = decoded(tokenizer, ids).rstrip("\ufffd")  # half a character
                print(text[len(said.get(key, "")) :], end="", flush=True)
                said[key] = text
            return False

        answered = write(model, wanted, longest, max_new_tokens, generation.ends, settings, side, generation.rules, show)
        for answer in answered:
            if answer.broken:
                raise WorkError(f"{where_of(answer.key[0])}: a logit of the answer is not finite; try --dtype float32")
            done, made = done + 1, made + len(answer.ids)
            if traces is None:
                text, finish = decoded(tokenizer, answer.ids), "stop" if answer.ended else "length"
                answers.append({"text": text, "finish": finish, "tokens": len(answer.ids)})
                continue
            place = answer.key[0]
            traces.add(answer.key, trace_of(encoder, rows[place], where_of(place), answer))
            pace = made / (time.monotonic() - started)
            out.progress(f"{done} of {len(keys)} answers, {pace:,.0f} tokens/s", last=done == len(keys))
    if traces is None:
        out.result({"prompt": prompt, "answers": answers}, lambda: _say(answers))
        if any(answer["finish"] == "length" for answer in answers):
            out.note(f"cut at {max_new_tokens} tokens; --max-new-tokens")
    else:
        _finish(out, traces, max_new_tokens, started)


def _check_followed(file: Path, others: dict[str, Any]) -> None:
    for name, value in others.items():
        raise InputError(f"{file} has {name} = {value!r}, which generate does not follow; take it out")


def _finish(out: Output, traces: Traces, max_new_tokens: int, started: float) -> None:
    """Writes all answers and says what became of them."""
    lines = traces.finish()
    cut, nothing = sum(line["finish"] == "length" for line in lines), sum(not line["tokens"] for line in lines)
    if cut:
        out.warn(f"{cut} of {len(lines)} answers were cut at {max_new_tokens} tokens; --max-new-tokens")
    if nothing:
        out.warn(f"{nothing} answers were empty and are left out")
    summary = {
        "output": str(traces.path), "answers": len(lines) - nothing, "cut": cut, "empty": nothing,
        "tokens": sum(line["tokens"] for line in lines), "seconds": round(time.monotonic() - started, 2),
    }  # fmt: skip
    out.result(summary, lambda: print(f"{traces.path}: {summary['answers']} answers, {summary['tokens']} tokens"))


def _read(encoder: Encoder, rows: Sequence[dict[str, Any]], where_of: Callable[[int], str]) -> list[list[int]]:
    """Each row's prompt in tokens; InputError naming the first without any, or that cannot be written with an answer."""
    from hybridize.generation.traces import question_of

    read = [encoder.prompt(row, where_of(i)) for i, row in enumerate(rows)]
    for i, ids in enumerate(read):
        if not ids:
            raise InputError(f"{where_of(i)} has no token")
        question_of(encoder, rows[i], where_of(i))
    return read


def _say(answers: list[dict[str, Any]]) -> None:
    """One answer has been printed while it was written."""
    print("" if len(answers) == 1 else "\n\n".join(answer["text"] for answer in answers))
