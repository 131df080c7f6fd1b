"""hybridize eval"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .fidelity import measure_fidelity
from .models import open_checkpoint
from .output import EXIT_GATE, Output, guarded

if TYPE_CHECKING:
    from hybridize.checkpoint.reader import CheckpointReader
    from hybridize.evaluation.gate import TaskDrop


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
    junit: Annotated[Path | None, typer.Option("--junit", help="A file for CI services: each task as a test.")] = None,
    log_samples: Annotated[bool, typer.Option("--log-samples", help="Every model output into samples.jsonl as well.")] = False,
    num_fewshot: opt.NumFewshot = None,
    limit: opt.Limit = None,
    include_path: opt.IncludePath = None,
    apply_chat_template: opt.ApplyChatTemplate = False,
    gen_kwargs: opt.GenKwargs = None,
    batch_size: opt.EvalBatchSize = 8,
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
    from hybridize.checkpoint.scores import beside
    from hybridize.checkpoint.writer import check_writable, write_json_atomic, write_text_atomic
    from hybridize.errors import InputError
    from hybridize.evaluation.gate import Rule, compare, drops_json, write_junit
    from hybridize.evaluation.harness import EvalSettings, open_tasks, task_names
    from hybridize.runtime import load_tokenizer, pick_compute, quiet_transformers, ran_on

    rule, began = Rule(max_drop, confidence, strict), time.monotonic()
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
        measure_fidelity(
            out, source, checkpoint, teacher, fidelity, target, overwrite, mask, chat_template, limit, windows, seq_len,
            where, compute, trust_remote_code,
        )  # fmt: skip
        return
    settings = EvalSettings(
        task_names(tasks), num_fewshot, limit, batch_size, apply_chat_template, gen_kwargs, include_path, seed
    )
    if (target / "results.json").exists() and not overwrite:
        raise InputError(f"{target / 'results.json'} exists; give another -o or --overwrite")
    if target.is_file():
        raise InputError(f"{target} is a file; results go into a directory")
    check_writable(target / "results.json")
    if junit is not None:
        if junit.is_dir():
            raise InputError(f"--junit {junit} is a directory; it names a file")
        check_writable(junit)
    ran = ran_on(where, compute)
    other, own = _baseline(out, baseline, target, settings.to_json(), ran)
    manager = open_tasks(settings)
    quiet_transformers()

    readers = [source] if own is None else [source, own]
    tokenizers = {reader.path: load_tokenizer(reader.path, trust_remote_code) for reader in readers}
    if apply_chat_template and not all(t.chat_template for t in tokenizers.values()):
        raise InputError("--apply-chat-template: the tokenizer has no chat template")

    def measure(reader: CheckpointReader) -> dict[str, Any]:
        from hybridize.evaluation.harness import evaluate
        from hybridize.evaluation.results import make_results, sample_lines
        from hybridize.runtime import load_model

        model = load_model(reader.path, where, compute, trust_remote_code)
        found = evaluate(model, tokenizers[reader.path], settings, manager)
        if log_samples:
            name = "samples.jsonl" if reader is source else "baseline-samples.jsonl"
            write_text_atomic(target / name, sample_lines(found["samples"]))
        return make_results(found, settings, reader.hash, ran)

    out.note(f"evaluating {checkpoint} on {', '.join(settings.tasks)}")
    results = measure(source)
    write_json_atomic(target / "results.json", results)
    if own is not None:
        out.note(f"evaluating the baseline {baseline}")
        other = measure(own)
        write_json_atomic(target / "baseline.json", other)
    drops = [] if other is None else compare(results, other, rule.level, seed)
    failed = [drop for drop in drops if rule.fails(drop)]
    if junit is not None:
        write_junit(junit, checkpoint, results, drops, rule, time.monotonic() - began)

    summary = {t: {"metric": v["metric"], "value": v["value"]} for t, v in results["tasks"].items()}
    out.result(
        {
            "results": str(target / "results.json"),
            "tasks": summary,
            "limited": limit is not None,
            "drops": drops_json(drops, rule),
            "passed": not failed,
        },
        lambda: _show(out, target / "results.json", results, drops, rule.level),
    )
    for drop in failed:
        out.warn(f"gate not met: {drop.describe(rule.level)}; --max-drop allows {max_drop}")
    if failed:
        raise typer.Exit(EXIT_GATE)


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


def _show(out: Output, path: Path, results: dict[str, Any], drops: list[TaskDrop], level: float) -> None:
    limit = results["settings"].get("limit")
    title = f"{path}" + (f" (limited to {limit} documents a task)" if limit is not None else "")
    if not drops:
        plain = [[t, v["metric"], str(len(v["documents"])), f"{v['value']:.4f}"] for t, v in results["tasks"].items()]
        out.table(title, ["task", "metric", "documents", "value"], plain)
        return
    rows = [
        [
            d.task, d.metric, str(d.documents), f"{d.baseline:.4f}", f"{d.candidate:.4f}", f"{d.drop:+.4f}",
            "" if d.low is None else f"{d.low:+.4f} .. {d.high:+.4f}", "" if d.p is None else f"{d.p:.3g}",
        ]
        for d in drops
    ]  # fmt: skip
    out.table(title, ["task", "metric", "documents", "baseline", "value", "drop", f"{level:.0%} interval", "McNemar p"], rows)
