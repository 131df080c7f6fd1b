"""hybridize eval"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .models import open_checkpoint
from .output import EXIT_GATE, Output, guarded

if TYPE_CHECKING:
    from hybridize.checkpoint.reader import CheckpointReader


@guarded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    tasks: Annotated[str, typer.Option("--tasks", help="lm-eval tasks, separated by commas.")] = ...,  # type: ignore[assignment]
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="A checkpoint, or a results.json of the same settings, to compare with.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="Exit 3 when a task falls further than this below the baseline.")
    ] = None,
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

    With --baseline both are measured alike and compared document by document; --max-drop makes that a gate.
    """
    out = Output(as_json, quiet)
    from hybridize.checkpoint.scores import beside
    from hybridize.checkpoint.writer import check_writable, write_json_atomic
    from hybridize.errors import InputError
    from hybridize.evaluation.harness import EvalSettings, open_tasks, task_names
    from hybridize.evaluation.results import check_comparable, compare, drops_json, read_results
    from hybridize.runtime import load_tokenizer, pick_compute, quiet_transformers

    if max_drop is not None and baseline is None:
        raise InputError("--max-drop needs a --baseline to fall from")
    settings = EvalSettings(
        task_names(tasks), num_fewshot, limit, batch_size, apply_chat_template, gen_kwargs, include_path, seed
    )
    source = open_checkpoint(checkpoint, revision)
    target = output or beside(source.path, checkpoint, "eval")
    if (target / "results.json").exists() and not overwrite:
        raise InputError(f"{target / 'results.json'} exists; give another -o or --overwrite")
    if target.is_file():
        raise InputError(f"{target} is a file; results go into a directory")
    check_writable(target / "results.json")
    other: Any = None
    if baseline is not None:
        other = read_results(Path(baseline)) if Path(baseline).is_file() else open_checkpoint(baseline)
        if isinstance(other, dict):
            check_comparable(settings.to_json(), other)
    where, compute = pick_compute(device, dtype)
    manager = open_tasks(settings)
    quiet_transformers()

    readers = [source] if other is None or isinstance(other, dict) else [source, other]
    tokenizers = {reader.path: load_tokenizer(reader.path, trust_remote_code) for reader in readers}
    if apply_chat_template and not all(t.chat_template for t in tokenizers.values()):
        raise InputError("--apply-chat-template: the tokenizer has no chat template")

    def measure(reader: CheckpointReader) -> dict[str, Any]:
        from hybridize.evaluation.harness import evaluate
        from hybridize.evaluation.results import make_results
        from hybridize.runtime import load_model, ran_on

        model = load_model(reader.path, where, compute, trust_remote_code)
        found = evaluate(model, tokenizers[reader.path], settings, manager)
        return make_results(found, settings, reader.hash, ran_on(where, compute))

    out.note(f"evaluating {checkpoint} on {', '.join(settings.tasks)}")
    results = measure(source)
    write_json_atomic(target / "results.json", results)
    drops = []
    if other is not None:
        if not isinstance(other, dict):
            out.note(f"evaluating the baseline {baseline}")
            other = measure(other)
            write_json_atomic(target / "baseline.json", other)
        drops = compare(results, other)
    failed = [d for d in drops if max_drop is not None and d.drop > max_drop]

    def human() -> None:
        limited = f" (limited to {limit} documents a task)" if limit is not None else ""
        if drops:
            rows = [
                [d.task, d.metric, str(d.documents), f"{d.baseline:.4f}", f"{d.candidate:.4f}", f"{d.drop:+.4f}"] for d in drops
            ]
            out.table(f"{target / 'results.json'}{limited}", ["task", "metric", "documents", "baseline", "value", "drop"], rows)
        else:
            rows = [[t, v["metric"], str(len(v["documents"])), f"{v['value']:.4f}"] for t, v in results["tasks"].items()]
            out.table(f"{target / 'results.json'}{limited}", ["task", "metric", "documents", "value"], rows)

    summary = {t: {"metric": v["metric"], "value": v["value"]} for t, v in results["tasks"].items()}
    out.result(
        {"results": str(target / "results.json"), "tasks": summary, "drops": drops_json(drops), "passed": not failed}, human
    )
    for drop in failed:
        out.warn(
            f"gate not met: {drop.task} {drop.metric} is {drop.candidate:.4f}, {drop.drop:.4f} worse than the baseline's "
            f"{drop.baseline:.4f}; --max-drop allows {max_drop}"
        )
    if failed:
        raise typer.Exit(EXIT_GATE)
