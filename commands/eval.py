"""hybridize eval"""

from __future__ import annotations

import functools
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared import options as opt
from .shared.eval_tables import say_of_gate, show_results
from .shared.fidelity import measure_fidelity
from .shared.models import check_weights, open_checkpoint, result_file
from .shared.output import EXIT_GATE, LINES, Output, guarded

if TYPE_CHECKING:
    import torch

    from hybridize.checkpoint.reader import CheckpointReader
    from hybridize.evaluation.harness import EvalSettings
    from hybridize.runtime.distributed import Ranks


@guarded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    tasks: Annotated[str | None, typer.Option("--tasks", help="lm-eval tasks, separated by commas.")] = None,
    fidelity: Annotated[
        str | None, typer.Option("--fidelity", help="Data on which to hold the checkpoint against its teacher.")
    ] = None,
    teacher: opt.Teacher = None,
    mask: opt.Mask = "none",
    chat_template: opt.ChatTemplate = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="For --fidelity: sequences of data.")] = 24,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="For --fidelity: tokens per sequence.")] = 2048,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="A checkpoint, or a results.json of the same settings, to compare with.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="Exit 3 when a task falls further than this below the baseline.")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option("--confidence", help="Fail only when so sure that the drop exceeds --max-drop, as 0.95.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail unless 95% sure that the drop does not exceed --max-drop.")
    ] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="TASK=FIGURE to hold against --max-drop [default: all accuracy-like ones]; repeatable."),
    ] = None,
    allow_inconclusive: Annotated[
        bool, typer.Option("--allow-inconclusive", help="Exit 0 also where the documents cannot tell.")
    ] = False,
    junit: Annotated[Path | None, typer.Option("--junit", help="A file for CI services: each task as a test.")] = None,
    log_samples: Annotated[bool, typer.Option("--log-samples", help="Every model output into samples.jsonl as well.")] = False,
    num_fewshot: opt.NumFewshot = None,
    limit: Annotated[str | None, typer.Option("--limit", help="Documents per task, or their share: 100, 0.1; or rows.")] = None,
    recall_lengths: Annotated[
        str | None, typer.Option("--recall-lengths", help="Tokens, for --tasks recall [default: 1024,4096].")
    ] = None,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Let tasks run the code that the model writes.")
    ] = False,
    include_path: opt.IncludePath = None,
    apply_chat_template: opt.ApplyChatTemplate = False,
    gen_kwargs: opt.GenKwargs = None,
    samples: Annotated[
        int, typer.Option("--samples", help="Answers to each document of a generating task; their majority counts.")
    ] = 1,
    think_end: Annotated[
        str | None,
        typer.Option("--think-end", help="What closes a block of thinking, as </think>: the answer is what follows."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted evaluation.")] = False,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Requests per forward, auto, or auto:N.")] = "8",
    output: opt.Output = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    seed: opt.Seed = 0,
    trust_remote_code: opt.TrustRemoteCode = False,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Reads a checkpoint; writes results.json into CHECKPOINT/eval/ (or -o): lm-eval's results, and each document's score.

    With --fidelity it is held against its teacher on text: divergences, agreement, perplexities, greedy continuations.

    With --baseline both are measured alike and compared document by document; --max-drop makes that a gate. A baseline's own
    results are used again where checkpoint, settings and libraries are the same.
    """
    out = Output(as_json, quiet)

    from hybridize.checkpoint.journal import check_journal
    from hybridize.checkpoint.scores import beside

    place = output or beside(Path(checkpoint), checkpoint, "eval")
    for name in ("answers.part.jsonl", "baseline-answers.part.jsonl"):
        if tasks is not None and (baseline is not None or "baseline" not in name) and not (place / "results.json").exists():
            check_journal(place / name, resume, overwrite)
    from hybridize.errors import InputError
    from hybridize.evaluation.gate import Rule, by_task, compare, judge, passes, verdicts_json, write_junit
    from hybridize.evaluation.harness import (
        EvalSettings,
        check_code,
        check_metrics,
        check_think_end,
        open_tasks,
        parse_batch_size,
        parse_limit,
        repeatable,
        task_names,
    )
    from hybridize.evaluation.recall import parse_lengths
    from hybridize.runtime.device import pick_compute, ran_on
    from hybridize.runtime.distributed import join, leave
    from hybridize.runtime.loading import load_tokenizer, quiet_transformers

    rule, began = Rule(max_drop, confidence, strict, allow_inconclusive), time.monotonic()
    share, chosen = parse_limit(limit), _chosen(metric)
    if (tasks is None) == (fidelity is None):
        raise InputError("say what to measure: either --tasks, or --fidelity DATA")
    if max_drop is not None and baseline is None:
        raise InputError("--max-drop needs a --baseline to fall from")
    source = open_checkpoint(checkpoint, revision)
    target = output or beside(source.path, checkpoint, "eval")
    where, compute = pick_compute(device, dtype)
    if tasks is None:
        if baseline is not None:
            raise InputError("--baseline compares tasks; give --tasks")
        _check_of_tasks({
            "--junit": junit, "--log-samples": log_samples, "--samples": samples > 1, "--think-end": think_end,
            "--resume": resume, "--gen-kwargs": gen_kwargs, "--num-fewshot": num_fewshot is not None,
            "--include-path": include_path, "--metric": metric, "--recall-lengths": recall_lengths,
        })  # fmt: skip
        if share is not None and share < 1:
            raise InputError(f"--limit {limit}: --fidelity takes a whole number of rows")
        rows = None if share is None else int(share)
        measure_fidelity(
            out, source, checkpoint, teacher, fidelity, target, overwrite, mask, chat_template, rows, windows, seq_len,
            where, compute, trust_remote_code,
        )  # fmt: skip
        return
    settings = EvalSettings(
        task_names(tasks), num_fewshot, share, parse_batch_size(batch_size), apply_chat_template, gen_kwargs, include_path,
        seed, samples, think_end, None if recall_lengths is None else parse_lengths(recall_lengths),
    )  # fmt: skip
    _check_target(target, junit, overwrite or resume)
    ran = ran_on(where, compute)
    other, own = _baseline(out, baseline, target, settings.to_json(), ran)
    quiet_transformers()
    readers = [source] if own is None else [source, own]
    tokenizers = {reader.path: load_tokenizer(reader.path, trust_remote_code) for reader in readers}
    if apply_chat_template and not all(t.chat_template for t in tokenizers.values()):
        raise InputError("--apply-chat-template: the tokenizer has no chat template")
    LINES.doing("opening the tasks")
    manager = repeatable(open_tasks(settings, tokenizers[source.path]))
    check_code(manager, settings, confirm_run_unsafe_code)
    check_metrics(manager, settings, chosen)
    for tokenizer in tokenizers.values():
        check_think_end(tokenizer, think_end)
    ranks, where = join(where)
    if not ranks.main:
        out = Output(quiet=True)

    measure = functools.partial(
        _measured, out, settings=settings, manager=manager, target=target, where=where, compute=compute, ran=ran, ranks=ranks,
        resume=resume, overwrite=overwrite, log_samples=log_samples, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    out.note(f"evaluating {checkpoint} on {', '.join(settings.tasks)}")
    results = measure(source, tokenizers[source.path])
    _warn_of_cuts(out, results, samples)
    if own is not None:
        out.note(f"evaluating the baseline {baseline}")
        other = measure(own, tokenizers[own.path], prefix="baseline-")
    leave()
    if not ranks.main:
        return
    verdicts = [] if other is None else judge(compare(results, other, chosen, seed), rule)
    met = passes(verdicts, rule)
    if junit is not None:
        write_junit(junit, checkpoint, results, verdicts, rule, time.monotonic() - began)
    told = {"limited": limit is not None, "drops": verdicts_json(verdicts, rule), "outcomes": by_task(verdicts), "passed": met}
    out.result(
        {"results": str(target / "results.json"), **_summary(results), **told},
        lambda: show_results(out, target / "results.json", results, other, verdicts, rule),
    )
    say_of_gate(out, verdicts, rule)
    if not met:
        raise typer.Exit(EXIT_GATE)


def _check_of_tasks(given: dict[str, Any]) -> None:
    from hybridize.errors import InputError

    for flag, value in given.items():
        if value:
            raise InputError(f"{flag} has no use with --fidelity; it belongs to --tasks")


def _summary(results: dict[str, Any]) -> dict[str, Any]:
    """What --json tells of tasks and groups: their figures, without documents."""
    from hybridize.evaluation.results import values_in

    tasks = {
        name: {"metric": task["metric"], "value": task["value"], "figures": values_in(task)}
        for name, task in results["tasks"].items()
    }
    return {"tasks": tasks, "groups": {name: group["figures"] for name, group in results["groups"].items()}}


def _chosen(metric: list[str] | None) -> dict[str, str]:
    """`TASK=FIGURE`s as a table; InputError for what is none."""
    from hybridize.errors import InputError

    found = dict[str, str]()
    for text in metric or ():
        task, _, name = text.partition("=")
        if not task.strip() or not name.strip():
            raise InputError(f"--metric {text}: give TASK=FIGURE, as gsm8k=exact_match,flexible-extract")
        found[task.strip()] = name.strip()
    return found


def _check_target(target: Path, junit: Path | None, replaceable: bool) -> None:
    from hybridize.checkpoint.writer import check_writable
    from hybridize.errors import InputError

    result_file(target, "results.json", replaceable)
    if junit is not None:
        if junit.is_dir():
            raise InputError(f"--junit {junit} is a directory; it names a file")
        check_writable(junit)


def _measured(
    out: Output, reader: CheckpointReader, tokenizer: Any, *, settings: EvalSettings, manager: Any, target: Path,
    where: torch.device, compute: torch.dtype, ran: dict[str, Any], ranks: Ranks, resume: bool, overwrite: bool,
    log_samples: bool, trust_remote_code: bool, prefix: str = "",
) -> dict[str, Any]:  # fmt: skip
    """The checkpoint's results, written into `target` as well; nothing on any rank but the first."""
    from hybridize.checkpoint.atomic import clear_leftovers, write_json_atomic, write_text_atomic
    from hybridize.checkpoint.journal import Journal
    from hybridize.errors import InputError
    from hybridize.evaluation.harness import evaluate, generates
    from hybridize.evaluation.results import make_results, reusable, sample_lines
    from hybridize.generation.decoder import looks_at_the_longest
    from hybridize.modeling import hybrid_config
    from hybridize.runtime.loading import load_hybrid, load_model

    path, journal = target / ("baseline.json" if prefix else "results.json"), None
    check_weights(reader)
    kept = ranks.first(reusable(path, reader.hash, settings.to_json(), ran) if resume and ranks.main else None)
    asked = target / f"{prefix}answers.part.jsonl"
    if kept is not None:
        if ranks.main:
            asked.unlink(missing_ok=True)  # killed after the results were there
            clear_leftovers(path)
        return dict(kept)
    if path.exists() and not overwrite and not prefix:
        raise InputError(f"{path} is of another checkpoint or other settings; give another -o or --overwrite")
    writes = generates(manager, settings)
    if ranks.main:
        told = {**settings.to_json(), **ran, "checkpoint": reader.hash}
        journal = Journal(asked, told, resume, overwrite)
    LINES.doing(f"loading {reader.path}")
    if writes and not looks_at_the_longest(hybrid_config(reader.config)):  # our own class decodes faster, whatever the model
        model: Any = load_hybrid(reader, where, compute)
    else:
        model = load_model(reader.path, where, compute, trust_remote_code)
    started = time.monotonic()
    LINES.doing("preparing the tasks")

    def progress(done: int, count: int) -> None:
        left = f", {(time.monotonic() - started) / done * (count - done) / 60:,.1f} minutes left" if done else ""
        out.progress(f"{done:,} of {count:,} requests{left}", last=done == count)

    found = evaluate(model, tokenizer, settings, manager, journal=journal, ranks=ranks, progress=progress)
    if journal is None:
        return {}
    results = make_results(found, settings, reader.hash, ran)
    if settings.apply_chat_template:
        results["chat_template"] = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    if log_samples:
        write_text_atomic(target / f"{prefix}samples.jsonl", sample_lines(found["samples"]))
    write_json_atomic(path, results)
    journal.remove()
    return results


def _warn_of_cuts(out: Output, results: dict[str, Any], samples: int) -> None:
    from hybridize.evaluation.recall import kind_and_length

    for task, entry in results.get("tasks", {}).items():
        if entry.get("cut") and kind_and_length(task) is None:  # judged by their beginning
            asked = len(entry["documents"]) * samples
            out.warn(f"{task}: {entry['cut']} of {asked} answers were cut at their length; --gen-kwargs max_gen_toks=N")


def _baseline(
    out: Output, name: str | None, target: Path, settings: dict[str, Any], ran: dict[str, Any]
) -> tuple[dict[str, Any] | None, CheckpointReader | None]:
    """The baseline's results, where there are such that can be used, and else the checkpoint to measure."""
    from hybridize.checkpoint.scores import beside
    from hybridize.evaluation.results import check_comparable, read_results, reusable

    if name is None:
        return None, None
    if Path(name).is_file():
        found = read_results(Path(name))
        check_comparable(settings, ran, found)
        return found, None
    own = open_checkpoint(name)
    for path in (beside(own.path, name, "eval") / "results.json", target / "baseline.json"):
        kept = reusable(path, own.hash, settings, ran)
        if kept is not None:
            out.note(f"the baseline's figures are those of {path}: same checkpoint, same settings")
            return kept, None
    return None, own
