"""hybridize generate"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridize.errors import InputError

from . import options as opt
from .models import open_checkpoint, refuse_ranks, template_text
from .output import Output, guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hybridize.distillation.encode import Encoder
    from hybridize.generation.sampling import SamplingSettings


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
    from hybridize.distillation.encode import Encoder, unanswered
    from hybridize.distillation.rows import check_prompt, read_rows
    from hybridize.generation.decoder import check_decodable
    from hybridize.generation.traces import Traces
    from hybridize.generation.writing import Wanted, rows_that_fit, seed_of, write
    from hybridize.runtime import load_hybrid, load_tokenizer, pick_compute, quiet_transformers, ran_on
    from hybridize.surgery.teacher import hybrid_config

    refuse_ranks("generate")
    if (prompt is None) == (prompts is None):
        raise InputError("say what to answer: either one prompt, or --prompts FILE")
    source = open_checkpoint(checkpoint, revision)
    check_decodable(hybrid_config(source.config))
    where, compute = pick_compute(device, dtype)
    quiet_transformers()
    tokenizer = load_tokenizer(source.path, trust_remote_code)
    settings, ends = _generation(source.path, tokenizer, temperature, top_k, top_p, min_p)
    if samples > 1 and settings.temperature == 0:
        raise InputError("--samples needs answers that differ: --temperature above 0")
    encoder = Encoder(tokenizer, "none", template_text(chat_template))
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
        told = {
            "checkpoint": source.hash, "prompts": hashlib.sha256(repr(read).encode()).hexdigest(), "ends": sorted(ends),
            "max_new_tokens": max_new_tokens, "seed": seed, **vars(settings), "samples": samples,
            "chat_template": encoder.template, **ran_on(where, compute),
        }  # fmt: skip
        traces = Traces(output or Path("traces.jsonl"), told, resume, overwrite)
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
                text = _text(tokenizer, ids).rstrip("\ufffd")  # half a character
                print(text[len(said.get(key, "")) :], end="", flush=True)
                said[key] = text
            return False

        for answer in write(model, wanted, longest, max_new_tokens, ends, settings, side, show):
            text, done, made = _text(tokenizer, answer.ids), done + 1, made + len(answer.ids)
            finish = "stop" if answer.ended else "length"
            if traces is None:
                answers.append({"text": text, "finish": finish, "tokens": len(answer.ids)})
                continue
            row = rows[answer.key[0]]
            chat = {"messages": [*unanswered(row), {"role": "assistant", "content": text}]}
            line = chat if encoder.template or "messages" in row else {"prompt": row["prompt"], "response": text}
            traces.add(answer.key, {**line, "tokens": len(answer.ids) if text else 0, "finish": finish})
            pace = made / (time.monotonic() - started)
            out.progress(f"{done} of {len(keys)} answers, {pace:,.0f} tokens/s", last=done == len(keys))
    if traces is None:
        out.result({"prompt": prompt, "answers": answers}, lambda: _say(answers))
        if any(answer["finish"] == "length" for answer in answers):
            out.note(f"cut at {max_new_tokens} tokens; --max-new-tokens")
        return
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
    """Each row's prompt in tokens; InputError naming the first without any."""
    read = [encoder.prompt(row, where_of(i)) for i, row in enumerate(rows)]
    for i, ids in enumerate(read):
        if not ids:
            raise InputError(f"{where_of(i)} has no token")
    return read


def _generation(
    path: Path, tokenizer: Any, temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[SamplingSettings, set[int]]:
    """Sampling as asked for, else as generation_config.json has it, and the tokens that end an answer."""
    from transformers import GenerationConfig

    from hybridize.errors import first_line
    from hybridize.generation.sampling import SamplingSettings

    made = GenerationConfig()
    if (path / "generation_config.json").is_file():
        try:
            made = GenerationConfig.from_pretrained(path, local_files_only=True)
            _check(made)
        except Exception as error:  # whatever it has against the file
            raise InputError(f"{path / 'generation_config.json'} cannot be read: {first_line(error)}") from error
    samples = bool(made.do_sample)
    own = made.temperature if samples and made.temperature is not None else float(samples)
    settings = SamplingSettings(
        own if temperature is None else temperature,
        (made.top_k if samples and made.top_k else 0) if top_k is None else top_k,
        (made.top_p if samples and made.top_p else 1.0) if top_p is None else top_p,
        (made.min_p if samples and made.min_p else 0.0) if min_p is None else min_p,
    )
    ends = made.eos_token_id if isinstance(made.eos_token_id, list) else [made.eos_token_id]
    return settings, {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


def _check(made: Any) -> None:
    """ValueError where something that is used here is of no use."""
    for name in ("temperature", "top_p", "min_p", "top_k"):
        if not isinstance(getattr(made, name), int | float | None):
            raise ValueError(f"{name} is {getattr(made, name)!r}")
    for end in made.eos_token_id if isinstance(made.eos_token_id, list) else [made.eos_token_id]:
        if not isinstance(end, int | None):
            raise ValueError(f"eos_token_id is {made.eos_token_id!r}")


def _text(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _say(answers: list[dict[str, Any]]) -> None:
    """One answer has been printed while it was written."""
    print("" if len(answers) == 1 else "\n\n".join(answer["text"] for answer in answers))
