"""hybridize score-restore"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict
from typing import Annotated

import typer

from .shared import options as opt
from .shared.models import (
    calibration_for,
    check_weights,
    data_for,
    open_encoder,
    say_of_rows,
    say_tuning,
    teacher_of,
    warn_of_length,
)
from .shared.output import LINES, Output, guarded
from .shared.scoring import check_score_output, report_scores


@guarded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    data: opt.Data = None,
    eval_data: opt.EvalData = None,
    teacher: opt.Teacher = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps of alignment, 0: none.")] = 100,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences per step.")] = 8,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens per sequence.")] = 512,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Held-out sequences to measure on.")] = 32,
    lr_mixer: Annotated[float, typer.Option("--lr-mixer", help="Peak learning rate of the mixers.")] = 1e-3,
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
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Reads a checkpoint and traces; writes CHECKPOINT/scores/restore.json: what giving each attention layer back recovers.

    All remaining attention layers become Mamba layers and are aligned for a few steps; then one of them at a time is attention
    again, and the KL from the teacher that this takes away is its score. Higher means convert later.
    """
    out = Output(as_json, quiet)
    from hybridize.errors import InputError
    from hybridize.scoring.restore import RestoreSettings, restore

    settings = RestoreSettings(steps, batch_size, seq_len, lr_mixer, mask, seed)
    source, path = check_score_output(checkpoint, revision, output, "restore", overwrite)
    origin = teacher_of(source, checkpoint, teacher)
    warn_of_length(out, source, seq_len)

    import torch

    from hybridize.data.corpus import open_corpus
    from hybridize.runtime.device import pick_compute, ran_on
    from hybridize.runtime.loading import load_hybrid, load_model, quiet_transformers
    from hybridize.surgery.replace import MixerSettings, plan, starting_values
    from hybridize.surgery.teacher import check_vocabularies, read_teacher

    quiet_transformers()
    check_vocabularies(source, origin)
    contract = read_teacher(source)
    surgery = plan(contract, contract.attention_layers, MixerSettings(mixer, d_state, d_conv, dt_rank, expand))
    shape = surgery.mixer
    assert shape is not None
    where, compute = pick_compute(device, dtype, training=True)
    encoder = open_encoder(source, mask, chat_template, trust_remote_code)
    text = data_for(out, data, origin)
    fit = calibration_for(
        out, None if no_calibrate else text, source, opt.CALIBRATION_PARTS, calibration_tokens, device, seed, chat_template,
        trust_remote_code,
    )  # fmt: skip
    corpus = open_corpus(text, eval_data, encoder, limit)
    say_of_rows(out, encoder)
    rows = max(1, min(batch_size, windows // 8))  # at least eight batches where there are as many windows, for the spread
    held = corpus.held_out(windows, seq_len, rows)
    if not held or corpus.packing(seed, seq_len) is None:
        raise InputError(f"{text} does not fill one sequence of {seq_len} tokens; a smaller --seq-len or --eval-data may")
    check_weights(source, origin)
    LINES.doing("loading the models")
    student = load_hybrid(source, where, torch.float32)
    model = load_model(origin.path, where, compute, trust_remote_code)
    started = time.time()
    say_tuning(out, where, shape)

    def progress(done: int, count: int) -> None:
        out.progress(f"{done} of {count} steps after {time.time() - started:.0f} s", last=done == count)

    starts = starting_values(source, surgery, source, seed, fit, progress=out.progress)
    training = (batch.to(where) for batch in itertools.islice(corpus.training(seed, seq_len, batch_size), steps))
    found = restore(
        student, model, shape, starts, training, [batch.to(where) for batch in held], settings, compute, progress, out.note
    )
    init = "mil" if fit is None else "calibrated"
    made = {
        "settings": asdict(settings) | shape | {"windows": windows, "data": corpus.rows.name, **ran_on(where, compute)}
        | {"calibration": None if fit is None else fit.settings()},
        "seconds": round(time.time() - started, 2), "metric": "kl recovered",
    }  # fmt: skip
    report_scores(out, source, path, "restore", "KL recovered by giving a layer back", shape["kind"], init, found, made)
