"""hybridize score-mmr"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict
from typing import Annotated

import typer

from . import options as opt
from .models import calibration_for, data_for, teacher_of, template_text
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
    """Reads a checkpoint and traces; writes CHECKPOINT/scores/mmr.json: how badly each attention layer converts.

    Each remaining attention layer alone becomes a Mamba layer and is trained for a few steps on the same batches; its score
    is the loss that is left (MIL-Mamba-Replacement). Higher means convert later.
    """
    out = Output(as_json, quiet)
    from hybridize.distillation.losses import Loss
    from hybridize.scoring.mmr import MmrSettings

    settings = MmrSettings(steps, batch_size, seq_len, lr_mixer, loss, mask, seed)
    Loss.parse(loss)
    source, path = check_score_output(checkpoint, revision, output, "mmr", overwrite)
    origin = teacher_of(source, checkpoint, teacher)
    from hybridize.distillation.distill import check_vocabularies, open_corpus
    from hybridize.distillation.encode import Encoder
    from hybridize.modeling import HybridForCausalLM
    from hybridize.runtime import load_model, load_tokenizer, pick_compute, quiet_transformers, ran_on
    from hybridize.scoring.mmr import mmr
    from hybridize.surgery.replace import MixerSettings, plan, starting_values
    from hybridize.surgery.teacher import hybrid_config, read_teacher

    quiet_transformers()
    check_vocabularies(source, origin)
    contract = read_teacher(source)
    surgery = plan(contract, contract.attention_layers, MixerSettings(mixer, d_state, d_conv, dt_rank, expand))
    shape = surgery.mixer
    assert shape is not None
    where, compute = pick_compute(device, dtype, training=True)
    encoder = Encoder(load_tokenizer(source.path, trust_remote_code), mask, template_text(chat_template))
    text = data_for(data, origin)
    fit = calibration_for(
        None if no_calibrate else text, source, opt.CALIBRATION_PARTS, calibration_tokens, device, seed, chat_template,
        trust_remote_code,
    )  # fmt: skip
    corpus = open_corpus(text, None, encoder, limit)
    batches = [batch.to(where) for batch in itertools.islice(corpus.training(settings.as_distill()), steps)]
    import torch

    student = HybridForCausalLM.from_pretrained(source.path, config=hybrid_config(source.config), dtype=torch.float32)
    model = load_model(origin.path, where, compute, trust_remote_code)
    started = time.time()

    def progress(layer: int, score: float) -> None:
        out.progress(f"layer {layer}: {score:.5f} after {time.time() - started:.0f} s")

    starts = starting_values(source, surgery, source, seed, fit, together=False)
    found = mmr(student.to(where), model, shape, starts, batches, settings, compute, progress)
    ran = {"data": corpus.rows.name, **ran_on(where, compute)}
    init = "mil" if fit is None else "calibrated"
    made = {
        "settings": asdict(settings) | shape | ran | {"calibration": None if fit is None else fit.settings()},
        "seconds": round(time.time() - started, 2), "metric": loss,
    }  # fmt: skip
    report_scores(out, source, path, "mmr", f"{loss} after {steps} steps", shape["kind"], init, found, made)
