"""hybridize score-mmr"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from . import options as opt
from .models import (
    calibration_for,
    data_for,
    done_already,
    open_encoder,
    say_of_rows,
    say_tuning,
    teacher_of,
    warn_of_length,
)
from .output import Output, guarded
from .scoring import check_score_output, report_scores


@guarded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    data: opt.Data = None,
    teacher: opt.Teacher = None,
    steps: Annotated[int, typer.Option("--steps", help="Training steps per candidate layer.")] = 100,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences per step.")] = 8,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens per sequence.")] = 512,
    lr_mixer: Annotated[float, typer.Option("--lr-mixer", help="Peak learning rate of the new mixer.")] = 1e-3,
    loss: Annotated[str, typer.Option("--loss", help="As in distill.")] = "reverse-kl",
    train: Annotated[
        str, typer.Option("--train", help="mixers, or all: the whole student, one candidate at a time.")
    ] = "mixers",
    repeats: Annotated[int, typer.Option("--repeats", help="How often, each time on another order of the data.")] = 1,
    mask: opt.Mask = "assistant",
    chat_template: opt.ChatTemplate = None,
    limit: opt.Limit = None,
    mixer: opt.Mixer = None,
    no_calibrate: opt.NoCalibrate = False,
    calibration_tokens: opt.CalibrationTokens = opt.CALIBRATION_TOKENS,
    d_state: opt.DState = None,
    d_conv: opt.DConv = None,
    dt_rank: opt.DtRank = None,
    expand: opt.Expand = None,
    output: opt.Output = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    seed: opt.Seed = 0,
    trust_remote_code: opt.TrustRemoteCode = False,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run beside the scores, if there is one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it takes in memory, and do nothing.")] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Reads a checkpoint and traces; writes CHECKPOINT/scores/mmr.json: how badly each attention layer converts.

    Each remaining attention layer alone becomes a Mamba layer and is trained for a few steps on the same batches; its score
    is the loss that is left (MIL-Mamba-Replacement). Higher means convert later. All train side by side; under torchrun each
    process has its share of them.
    """
    out = Output(as_json, quiet)
    from hybridize.distillation.losses import Loss
    from hybridize.scoring.mmr import MmrSettings

    settings = MmrSettings(steps, batch_size, seq_len, lr_mixer, loss, mask, train, repeats, seed)
    Loss.parse(loss)
    source, path = check_score_output(checkpoint, revision, output, "mmr", overwrite or resume)
    origin = teacher_of(source, checkpoint, teacher)
    warn_of_length(out, source, seq_len)
    import torch

    from hybridize.checkpoint.scores import read_scores
    from hybridize.distillation.distill import check_vocabularies, open_corpus
    from hybridize.distillation.ranks import join, leave
    from hybridize.distillation.run_dir import RunDir
    from hybridize.errors import InputError
    from hybridize.runtime import load_hybrid, load_model, pick_compute, quiet_transformers, ran_on
    from hybridize.scoring.mmr import measure, share_of
    from hybridize.surgery.replace import MixerSettings, plan, starting_values
    from hybridize.surgery.teacher import read_teacher

    quiet_transformers()
    check_vocabularies(source, origin)
    contract, shaped = read_teacher(source), MixerSettings(mixer, d_state, d_conv, dt_rank, expand)
    surgery = plan(contract, contract.attention_layers, shaped)
    shape = surgery.mixer
    assert shape is not None
    if dry_run:
        _dry_run(out, source, origin, shape, settings, dtype)
        return
    where, compute = pick_compute(device, dtype, training=True)
    ranks, where = join(where)
    if not ranks.main:
        out = Output(quiet=True)
    encoder = open_encoder(source, mask, chat_template, trust_remote_code)
    text = data_for(out, data, origin)
    fit = calibration_for(
        out, None if no_calibrate else text, source, opt.CALIBRATION_PARTS, calibration_tokens, device, seed, chat_template,
        trust_remote_code,
    )  # fmt: skip
    corpus = open_corpus(text, None, encoder, limit)
    say_of_rows(out, encoder)
    if corpus.packing(settings.as_distill()) is None:
        raise InputError(f"{text} does not fill one sequence of {seq_len} tokens; a smaller --seq-len may")
    ran = {"data": corpus.rows.name, **ran_on(where, compute)}
    used = {"settings": asdict(settings) | shape | ran | {"calibration": None if fit is None else fit.settings()}}
    identity = {
        **used, "checkpoint": source.hash, "teacher": origin.hash, "data": corpus.hash, "template": encoder.template,
        "ranks": ranks.size,
    }  # fmt: skip
    run = RunDir(path, identity, ranks)
    if done_already(out, run, path, overwrite, lambda path: read_scores(path).settings.get("run") == run.digest):
        return
    run.check(resume, overwrite)
    ranks.wait()  # before the first one changes what the others look at
    with run.started(resume):
        mine = share_of(contract.attention_layers, ranks.rank, ranks.size)
        starts = starting_values(source, plan(contract, mine, shaped), source, seed, fit, together=False)
        student = load_hybrid(source, where, torch.float32)
        model = load_model(origin.path, where, compute, trust_remote_code)
        started = time.time()
        say_tuning(out, where, shape)

        def batches(repeat: int) -> Iterator[Any]:
            order = replace(settings.as_distill(), seed=seed + repeat)
            return (batch.to(where) for batch in itertools.islice(corpus.training(order), steps))

        def progress(done: int, count: int) -> None:
            out.progress(f"{done} of {count} steps after {time.time() - started:.0f} s", last=done == count)

        found = measure(
            student, model, shape, starts, batches, settings, compute, states=run.path, ranks=ranks, progress=progress,
            note=out.note,
        )  # fmt: skip
        leave()
        if not ranks.main:
            return
        used["settings"]["run"] = run.digest
        made = {**used, "seconds": round(time.time() - started, 2), "metric": loss}
        init = "mil" if fit is None else "calibrated"
        report_scores(out, source, path, "mmr", f"{loss} after {steps} steps", shape["kind"], init, found, made)
        run.remove()


def _dry_run(out: Output, source: Any, origin: Any, mixer: dict[str, Any], settings: Any, dtype: str) -> None:
    from hybridize.distillation.ranks import world_size
    from hybridize.runtime import load_empty, planned_dtype
    from hybridize.scoring.mmr import memory
    from hybridize.surgery.teacher import empty_model

    compute, student = planned_dtype(dtype), empty_model(source.config, str(source.path))
    found = memory(student, load_empty(origin.path, compute), mixer, settings, world_size(), compute)
    total = sum(found.values())

    def human() -> None:
        together = "at the peak" if settings.train == "all" else "at the peak, or less in groups"
        for name, size in {**found, together: total}.items():
            print(f"{name:42} {size / 2**30:9.2f} GiB")

    gib = {name: round(size / 2**30, 3) for name, size in found.items()}
    out.result({"gib": gib, "total_gib": round(total / 2**30, 3)}, human)
