"""hybridize score-loo"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .shared import options as opt
from .shared.models import check_weights
from .shared.output import LINES, Output, guarded
from .shared.scoring import check_score_output, report_scores

VAGUE = 0.5  # of all ranks, in the median


@guarded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    tasks: opt.Tasks = "mmlu",
    metric: Annotated[str, typer.Option("--metric", help="accuracy or margin (of the tasks), or kl (on --data).")] = "accuracy",
    ablate: Annotated[str, typer.Option("--ablate", help="What a layer loses: its whole block, or the mixer alone.")] = "block",
    data: opt.Data = None,
    teacher: opt.Teacher = None,
    mask: opt.Mask = "assistant",
    windows: Annotated[int, typer.Option("--windows", help="For kl: sequences of data.")] = 16,
    seq_len: Annotated[int, typer.Option("--seq-len", help="For kl: tokens per sequence.")] = 512,
    chat_template: opt.ChatTemplate = None,
    num_fewshot: opt.NumFewshot = None,
    limit: opt.Limit = None,
    include_path: opt.IncludePath = None,
    apply_chat_template: opt.ApplyChatTemplate = False,
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
    """Reads a checkpoint; writes CHECKPOINT/scores/loo.json: what removing each attention layer alone costs.

    Higher means convert later. With --metric accuracy or margin the cost is the drop on lm-eval tasks, with kl the rise of
    the KL divergence from the teacher on data.
    """
    out = Output(as_json, quiet)
    from hybridize.scoring.loo import LooSettings

    settings = LooSettings(metric, ablate)
    source, path = check_score_output(checkpoint, revision, output, "loo", overwrite)
    from hybridize.runtime.device import pick_compute, ran_on
    from hybridize.runtime.loading import load_hybrid, load_model, load_tokenizer, quiet_transformers
    from hybridize.scoring.loo import loo_kl, loo_tasks

    quiet_transformers()
    where, compute = pick_compute(device, dtype)
    started = time.time()

    def progress(done: int, count: int) -> None:
        out.progress(f"{done} of {count} texts after {time.time() - started:.0f} s", last=done == count)

    ran: dict[str, Any] = {**ran_on(where, compute), "seed": seed}
    if metric == "kl":
        from .shared.models import open_encoder, text_beside, warn_of_length

        rows = max(1, min(batch_size, windows // 8))  # at least eight batches where there are as many windows, for the spread
        warn_of_length(out, source, seq_len)
        encoder = open_encoder(source, mask, chat_template, trust_remote_code)
        origin, text, measuring = text_beside(out, source, checkpoint, teacher, data, encoder, limit, windows, seq_len, rows)
        check_weights(source, origin)
        batches = [batch.to(where) for batch in measuring]
        same = origin.path == source.path
        LINES.doing("loading the models")
        other = None if same else load_model(origin.path, where, compute, trust_remote_code)
        found = loo_kl(load_hybrid(source, where, compute), other, settings, batches, compute, progress)
        used = {"data": text, "windows": windows, "seq_len": seq_len, "mask": mask}
    else:
        from hybridize.evaluation.harness import EvalSettings, check_choices, open_tasks, repeatable, task_names

        evaluation = EvalSettings(
            task_names(tasks), num_fewshot, limit, batch_size, apply_chat_template, None, include_path, seed
        )
        manager = repeatable(open_tasks(evaluation))
        check_choices(manager, evaluation)
        check_weights(source)
        tokenizer = load_tokenizer(source.path, trust_remote_code)
        LINES.doing("preparing the tasks")
        by_metric = loo_tasks(load_hybrid(source, where, compute), tokenizer, settings, evaluation, manager, progress)
        found = by_metric[metric]
        _doubt(out, metric, found, by_metric.get("margin"))
        used = evaluation.to_json()
    label = f"{metric} lost, {ablate} removed"
    made = {"settings": asdict(settings) | used | ran, "seconds": round(time.time() - started, 2), "metric": metric}
    report_scores(out, source, path, "loo", label, None, None, found, made)


def _doubt(out: Output, metric: str, found: Any, margin: Any) -> None:
    """Says so when a metric ranks hardly anything, and which one would."""
    from hybridize.scoring.uncertainty import vagueness

    vague, sharper = vagueness(found), vagueness(margin) if metric == "accuracy" and margin else None
    if vague is None or vague <= VAGUE:
        return
    other = "--metric kl on your data may do better"
    if sharper is not None and sharper < vague:
        other = f"--metric margin can (a rank is uncertain by {sharper:.0%} of all ranks)"
    if metric == "margin" or sharper is not None:  # measured: docs/choosing-layers.md
        other += "; on a small model the layers that --metric kl and score-mmr chose trained far better than the margin's"
    out.warn(
        f"{metric} can hardly tell these layers apart: a rank is uncertain by {vague:.0%} of all ranks in the median; {other}"
    )
