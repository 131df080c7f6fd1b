"""hybridize eval"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared import options as opt
from .shared.eval_tables import show_results, warn_of_gate
from .shared.fidelity import Fidelity, measure_fidelity
from .shared.files import result_file
from .shared.flags import expanded
from .shared.output import EXIT_GATE, Output, guarded

if TYPE_CHECKING:
    from hybridize.checkpoint.reader import CheckpointReader
    from hybridize.evaluation.gate import Rule
    from hybridize.evaluation.run import EvalRun


@dataclass(frozen=True)
class Tasks:
    """Tasks and settings for lm-eval."""

    tasks: Annotated[str | None, typer.Option("--tasks", help="lm-eval tasks, separated by commas.")] = None
    num_fewshot: opt.NumFewshot = None
    limit: Annotated[
        str | None, typer.Option("--limit", help="Documents per task or their share, such as 100 or 0.1; with --fidelity rows.")
    ] = None
    include_path: opt.IncludePath = None
    apply_chat_template: opt.ApplyChatTemplate = False
    gen_kwargs: Annotated[
        str | None, typer.Option("--gen-kwargs", help="Generation settings in lm-eval's syntax: a=b,c=d.")
    ] = None
    samples: Annotated[
        int, typer.Option("--samples", help="Answers per document of a generating task; the majority vote counts.")
    ] = 1
    think_end: Annotated[
        str | None,
        typer.Option("--think-end", help="End of the reasoning, such as </think>: only the text after it is the answer."),
    ] = None
    recall_lengths: Annotated[
        str | None, typer.Option("--recall-lengths", help="Lengths in tokens for --tasks recall [default: 1024,4096].")
    ] = None
    batch_size: Annotated[str, typer.Option("--batch-size", help="Requests per forward pass, auto, or auto:N.")] = "8"
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Let tasks run code that the model generates.")
    ] = False
    log_samples: Annotated[bool, typer.Option("--log-samples", help="Write every model output to samples.jsonl.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted evaluation.")] = False


@dataclass(frozen=True)
class Gate:
    """The baseline of a comparison and the conditions of the gate."""

    baseline: Annotated[
        str | None, typer.Option("--baseline", help="A checkpoint, or a results.json with the same settings, to compare with.")
    ] = None
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="Exit 3 if a task drops by more than this from the baseline.")
    ] = None
    confidence: Annotated[
        float | None,
        typer.Option("--confidence", help="Fail only if the drop exceeds --max-drop with this confidence, such as 0.95."),
    ] = None
    strict: Annotated[bool, typer.Option("--strict", help="Fail unless the drop is within --max-drop with 95% confidence.")] = (
        False
    )
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="TASK=METRIC that --max-drop applies to [default: all accuracy-like ones]; repeatable."),
    ] = None
    allow_inconclusive: Annotated[bool, typer.Option("--allow-inconclusive", help="Exit 0 also if a task is inconclusive.")] = (
        False
    )
    junit: Annotated[Path | None, typer.Option("--junit", help="JUnit XML file for CI, with a test case per task.")] = None


@guarded
@expanded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    *,
    given: Tasks,
    gate: Gate,
    fidelity: Fidelity,
    output: opt.Output = None,
    machine: opt.Machine,
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    speech: opt.Speech,
) -> None:
    """Reads a checkpoint; writes results.json into CHECKPOINT/eval/ (or -o): lm-eval's results and
    the score of each document.

    With --fidelity it is compared with its teacher on text: KL divergences, agreement, perplexities
    and greedy continuations.

    With --baseline both are evaluated with the same settings and compared document by document;
    --max-drop makes the comparison a gate. Results of the baseline are reused if checkpoint,
    settings and libraries are the same.
    """
    out = speech.output()
    _check_journals(checkpoint, given, gate, output, overwrite)
    from hybridize.checkpoint.scores import beside
    from hybridize.evaluation.gate import Rule
    from hybridize.inputs import open_checkpoint
    from hybridize.runtime.device import pick_compute

    rule, began = Rule(gate.max_drop, gate.confidence, gate.strict, gate.allow_inconclusive), time.monotonic()
    _check_flags(given, gate, fidelity)
    source = open_checkpoint(checkpoint, revision, notes=out)
    target = output or beside(source.path, checkpoint, "eval")
    if given.tasks is None:
        rows = _rows(given.limit)
        where = pick_compute(machine.device, machine.dtype)
        measure_fidelity(out, source, checkpoint, fidelity, target, where, rows, machine.trust_remote_code, overwrite)
        return
    plan = _prepare(out, checkpoint, source, target, given, gate, machine, seed, overwrite)
    results, other = _measure(plan, gate, given.samples)
    if plan.run.ranks.main:
        _conclude(plan, gate, rule, results, other, began, given.limit is not None)


@dataclass(frozen=True)
class Plan:
    """A checked evaluation before it starts. other: the baseline's results, if they exist already.
    own: the baseline's checkpoint, if it has to be evaluated. metrics: those that the gate uses, by
    task. tokenizers: by path of the checkpoint."""

    out: Output
    name: str
    source: CheckpointReader
    run: EvalRun
    other: dict[str, Any] | None
    own: CheckpointReader | None
    metrics: dict[str, str]
    tokenizers: dict[Path, Any]


def _check_journals(name: str, given: Tasks, gate: Gate, output: Path | None, overwrite: bool) -> None:
    """InputError if an unfinished evaluation blocks the output; runs before torch is imported."""
    from hybridize.checkpoint.journal import check_journal
    from hybridize.checkpoint.scores import beside

    place = output or beside(Path(name), name, "eval")
    if given.tasks is None or (place / "results.json").exists():
        return
    for file in ("answers.part.jsonl", *(["baseline-answers.part.jsonl"] if gate.baseline is not None else [])):
        check_journal(place / file, given.resume, overwrite)


def _check_flags(given: Tasks, gate: Gate, fidelity: Fidelity) -> None:
    """InputError for flags that belong to the other kind of evaluation."""
    from hybridize.errors import InputError, setting

    if (given.tasks is None) == (fidelity.fidelity is None):
        raise InputError(f"say what to measure: either {setting('tasks')}, or {setting('fidelity')} DATA")
    if gate.max_drop is not None and gate.baseline is None:
        raise InputError(f"{setting('max_drop')} requires {setting('baseline')}")
    if given.tasks is not None:
        return
    if gate.baseline is not None:
        raise InputError(f"{setting('baseline')} requires {setting('tasks')}")
    useless = {
        "junit": gate.junit, "log_samples": given.log_samples, "samples": given.samples > 1, "think_end": given.think_end,
        "resume": given.resume, "gen_kwargs": given.gen_kwargs, "num_fewshot": given.num_fewshot is not None,
        "include_path": given.include_path, "metric": gate.metric, "recall_lengths": given.recall_lengths,
    }  # fmt: skip
    for name, value in useless.items():
        if value:
            raise InputError(f"{setting(name)} does not apply to {setting('fidelity')}, only to {setting('tasks')}")


def _rows(limit: str | None) -> int | None:
    """--limit as a number of rows. InputError for a share."""
    from hybridize.errors import InputError, setting
    from hybridize.evaluation.harness import parse_limit

    share = parse_limit(limit)
    if share is not None and share < 1:
        raise InputError(f"{setting('limit')} {limit}: {setting('fidelity')} takes a whole number of rows")
    return None if share is None else int(share)


def _metrics(given: list[str] | None) -> dict[str, str]:
    """Metrics by task, from a list of TASK=METRIC. InputError for other text."""
    from hybridize.errors import InputError, setting

    found = dict[str, str]()
    for text in given or ():
        task, _, name = text.partition("=")
        if not task.strip() or not name.strip():
            raise InputError(f"{setting('metric')} {text} is not TASK=METRIC, such as gsm8k=exact_match,flexible-extract")
        found[task.strip()] = name.strip()
    return found


def _prepare(
    out: Output, name: str, source: CheckpointReader, target: Path, given: Tasks, gate: Gate, machine: opt.Machine, seed: int,
    overwrite: bool,
) -> Plan:  # fmt: skip
    """Opens and checks tasks, tokenizers and the baseline before any model is loaded."""
    from hybridize.errors import InputError, setting
    from hybridize.evaluation import harness
    from hybridize.evaluation.recall import parse_lengths
    from hybridize.evaluation.run import EvalRun, find_baseline
    from hybridize.runtime.device import pick_compute, ran_on
    from hybridize.runtime.distributed import join
    from hybridize.runtime.loading import load_tokenizer, quiet_transformers

    lengths = None if given.recall_lengths is None else parse_lengths(given.recall_lengths)
    settings = harness.EvalSettings(
        harness.task_names(given.tasks or ""), given.num_fewshot, harness.parse_limit(given.limit),
        harness.parse_batch_size(given.batch_size), given.apply_chat_template, given.gen_kwargs, given.include_path, seed,
        given.samples, given.think_end, lengths,
    )  # fmt: skip
    metrics = _metrics(gate.metric)
    _check_targets(target, gate.junit, overwrite or given.resume)
    device, dtype = pick_compute(machine.device, machine.dtype)
    ran = ran_on(device, dtype)
    other, own = find_baseline(gate.baseline, target, settings.to_json(), ran, out)
    quiet_transformers()
    readers = [source] if own is None else [source, own]
    tokenizers = {reader.path: load_tokenizer(reader.path, machine.trust_remote_code) for reader in readers}
    if given.apply_chat_template and not all(t.chat_template for t in tokenizers.values()):
        raise InputError(f"{setting('apply_chat_template')}: the tokenizer has no chat template")
    out.doing("opening the tasks")
    manager = harness.repeatable(harness.open_tasks(settings, tokenizers[source.path]))
    harness.check_code(manager, settings, given.confirm_run_unsafe_code)
    harness.check_metrics(manager, settings, metrics)
    for tokenizer in tokenizers.values():
        harness.check_think_end(tokenizer, given.think_end)
    ranks, device = join(device)
    if not ranks.main:
        out = Output(quiet=True)
    run = EvalRun(
        settings, manager, target, device, dtype, ran, ranks, given.resume, overwrite, given.log_samples,
        machine.trust_remote_code, out,
    )  # fmt: skip
    return Plan(out, name, source, run, other, own, metrics, tokenizers)


def _check_targets(target: Path, junit: Path | None, replaceable: bool) -> None:
    """InputError if the results could not be written."""
    from hybridize.checkpoint.writer import check_writable
    from hybridize.errors import InputError, setting

    result_file(target, "results.json", replaceable)
    if junit is not None:
        if junit.is_dir():
            raise InputError(f"{setting('junit')} {junit} is a directory, not a file")
        check_writable(junit)


def _measure(plan: Plan, gate: Gate, samples: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Evaluates the checkpoint, and its baseline if necessary; returns both results."""
    from hybridize.runtime.distributed import leave

    out, other = plan.out, plan.other
    out.note(f"evaluating {plan.name} on {', '.join(plan.run.settings.tasks)}")
    results = plan.run.results(plan.source, plan.tokenizers[plan.source.path])
    _warn_of_cuts(out, results, samples)
    if plan.own is not None:
        out.note(f"evaluating the baseline {gate.baseline}")
        other = plan.run.results(plan.own, plan.tokenizers[plan.own.path], baseline=True)
    leave()
    return results, other


def _conclude(
    plan: Plan, gate: Gate, rule: Rule, results: dict[str, Any], other: dict[str, Any] | None, began: float, limited: bool
) -> None:
    """Shows the results and exits with 3 if the gate is not met."""
    from hybridize.evaluation.gate import by_task, compare, judge, passes, verdicts_json, write_junit

    out, path = plan.out, plan.run.target / "results.json"
    verdicts = [] if other is None else judge(compare(results, other, plan.metrics, plan.run.settings.seed), rule)
    met = passes(verdicts, rule)
    if gate.junit is not None:
        write_junit(gate.junit, plan.name, results, verdicts, rule, time.monotonic() - began)
    more = {"limited": limited, "drops": verdicts_json(verdicts, rule), "outcomes": by_task(verdicts), "passed": met}
    out.result(
        {"results": str(path), **_summary(results), **more},
        lambda: show_results(out, path, results, other, verdicts, rule),
    )
    warn_of_gate(out, verdicts, rule)
    if not met:
        raise typer.Exit(EXIT_GATE)


def _summary(results: dict[str, Any]) -> dict[str, Any]:
    """Metrics of tasks and groups for --json, without documents."""
    from hybridize.evaluation.results import values_in

    tasks = {
        name: {"metric": task["metric"], "value": task["value"], "figures": values_in(task)}
        for name, task in results["tasks"].items()
    }
    return {"tasks": tasks, "groups": {name: group["figures"] for name, group in results["groups"].items()}}


def _warn_of_cuts(out: Output, results: dict[str, Any], samples: int) -> None:
    """Warns of answers that were cut at their maximum length."""
    from hybridize.evaluation.recall import kind_and_length

    for task, entry in results.get("tasks", {}).items():
        if entry.get("cut") and kind_and_length(task) is None:  # recall answers are scored by their beginning
            count = len(entry["documents"]) * samples
            out.warn(
                f"{task}: {entry['cut']} of {count} answers were cut at the length limit; raise --gen-kwargs max_gen_toks=N"
            )
