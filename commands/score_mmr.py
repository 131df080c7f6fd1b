"""hybridize score-mmr"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import options as opt
from .shared.models import (
    calibration_for,
    check_weights,
    data_for,
    done_already,
    is_here,
    open_encoder,
    say_of_rows,
    say_tuning,
    teacher_of,
    warn_of_length,
)
from .shared.output import LINES, Output, guarded
from .shared.scoring import check_score_output, report_scores

SLACK = 0.1  # of the memory to stay within: what no plan knows of
SHARE = 0.8  # of the free memory that the candidates may fill, unless somebody says how much


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
    max_memory: Annotated[
        float | None, typer.Option("--max-memory", help="GiB to stay within [default: 80% of what is free].")
    ] = None,
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
    from hybridize.checkpoint.scores import scores_path
    from hybridize.checkpoint.unfinished import check_unfinished, run_path
    from hybridize.errors import InputError

    if max_memory is not None and not 0 < max_memory < float("inf"):
        raise InputError(f"--max-memory {max_memory} must be a positive number of GiB")
    asked: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "seq_len": seq_len, "lr_mixer": lr_mixer, "loss": loss, "mask": mask,
        "train": train, "repeats": repeats, "seed": seed,
    }  # fmt: skip
    target = output or scores_path(Path(checkpoint), checkpoint, "mmr")
    if not dry_run and not target.exists():
        check_unfinished(run_path(target), {"settings": asked}, resume, overwrite)
    from hybridize.distillation.losses import Loss
    from hybridize.scoring.mmr import MmrSettings

    settings = MmrSettings(**asked)
    Loss.parse(loss)
    source, path = check_score_output(checkpoint, revision, output, "mmr", overwrite or resume)
    origin = teacher_of(source, checkpoint, teacher)
    warn_of_length(out, source, seq_len)
    from hybridize.checkpoint.scores import read_scores
    from hybridize.data.corpus import open_corpus
    from hybridize.distillation.run_dir import RunDir
    from hybridize.runtime.device import limit_memory, pick_compute, ran_on
    from hybridize.runtime.distributed import join, leave
    from hybridize.runtime.loading import quiet_transformers
    from hybridize.surgery.replace import MixerSettings, plan
    from hybridize.surgery.teacher import check_vocabularies, read_teacher

    quiet_transformers()
    check_vocabularies(source, origin)
    contract, shaped = read_teacher(source), MixerSettings(mixer, d_state, d_conv, dt_rank, expand)
    surgery = plan(contract, contract.attention_layers, shaped)
    shape = surgery.mixer
    assert shape is not None
    if dry_run:
        _dry_run(out, source, origin, shape, settings, device, dtype, max_memory)
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
    if corpus.packing(seed, seq_len) is None:
        raise InputError(f"{text} does not fill one sequence of {seq_len} tokens; a smaller --seq-len may")
    ran = {"data": corpus.rows.name, **ran_on(where, compute)}
    used = {"settings": asdict(settings) | shape | ran | {"calibration": None if fit is None else fit.settings()}}
    planned = _planned(source, origin, shape, settings, where, compute, ranks.size, max_memory)
    check_weights(source, origin)
    identity = {
        **used, "checkpoint": source.hash, "teacher": origin.hash, "data": corpus.hash, "template": encoder.template,
        "ranks": ranks.size,
    }  # fmt: skip
    run = RunDir(path, identity, ranks)
    if done_already(out, run, path, overwrite, lambda path: read_scores(path).settings.get("run") == run.digest):
        return
    run.check(resume, overwrite)
    ranks.wait()  # before the first one changes what the others look at
    began = time.time()
    if max_memory is not None:
        limit_memory(where, max_memory)
    with run.started(resume):
        room = _room(out, planned, run, ranks)
        found = _measured(
            out, run, source, origin, corpus, (contract, shaped, shape, fit), settings, ranks, where, compute, room,
            trust_remote_code,
        )  # fmt: skip
        leave()
        if not ranks.main:
            return
        made = {"settings": used["settings"] | {"run": run.digest}, "seconds": round(time.time() - began, 2), "metric": loss}
        init = "mil" if fit is None else "calibrated"
        report_scores(out, source, path, "mmr", f"{loss} after {steps} steps", shape["kind"], init, found, made)
        run.remove()


def _measured(
    out: Output, run: Any, source: Any, origin: Any, corpus: Any, mixers: tuple[Any, Any, Any, Any], settings: Any, ranks: Any,
    where: Any, compute: Any, room: int, trust_remote_code: bool,
) -> Any:  # fmt: skip
    """The scores of all candidates. mixers: the attention to convert, what mixers it gets, their shape, the calibration."""
    import torch

    from hybridize.runtime.loading import load_hybrid, load_model
    from hybridize.scoring.mmr import measure, share_of
    from hybridize.surgery.replace import plan, starting_values

    contract, shaped, shape, fit = mixers
    surgery = plan(contract, share_of(contract.attention_layers, ranks.rank, ranks.size), shaped)
    starts = list(starting_values(source, surgery, source, settings.seed, fit, together=False, progress=out.progress))
    LINES.doing("loading the models")
    student = load_hybrid(source, where, torch.float32)
    teacher = load_model(origin.path, where, compute, trust_remote_code)
    say_tuning(out, where, shape)
    started = time.time()

    def batches(repeat: int) -> Iterator[Any]:
        order = corpus.training(settings.seed + repeat, settings.seq_len, settings.batch_size)
        return (batch.to(where) for batch in itertools.islice(order, settings.steps))

    def progress(done: int, count: int) -> None:
        out.progress(f"{done} of {count} steps after {time.time() - started:.0f} s", last=done == count)

    LINES.doing("the first step, in which kernels are compiled and tuned")
    return measure(
        student, teacher, shape, starts, batches, settings, compute, room=room, states=run.path, ranks=ranks,
        progress=progress, note=out.note,
    )  # fmt: skip


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part with all candidates side by side, `limit` bytes to stay within, and what that is in words. together:
    whether candidates share calls, so that groups of them need less."""

    parts: dict[str, int]
    limit: float
    words: str
    together: bool

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def room(self) -> float:
        """Bytes that are left for activations; less than nothing where all else does not fit."""
        from hybridize.scoring.mmr import ACTIVATIONS

        return (1 - SLACK) * self.limit - (self.total - self.parts[ACTIVATIONS])

    @property
    def may_run_out(self) -> bool:
        return self.total > (1 - SLACK) * self.limit and (self.room <= 0 or not self.together)

    def __str__(self) -> str:
        from hybridize.distillation.plan import GIB
        from hybridize.scoring.mmr import ACTIVATIONS

        how = "side by side" if self.together else "one after the other"
        said = f"memory: the candidates {how} take {self.total / GIB:.1f} GiB by the plan"
        if self.total <= (1 - SLACK) * self.limit:
            return said
        said += f", more than {1 - SLACK:.0%} of {self.words}: "
        if not self.together:
            return said + "it may run out"
        if not self.may_run_out:
            return said + "they go in groups"
        rest = (self.total - self.parts[ACTIVATIONS]) / GIB
        return said + f"they go one by one, and may still run out, since all but activations take {rest:.1f} GiB"


def _planned(
    source: Any, origin: Any, mixer: dict[str, Any], settings: Any, where: Any, compute: Any, ranks: int,
    max_memory: float | None,
) -> MemoryPlan:  # fmt: skip
    from hybridize.distillation.plan import GIB
    from hybridize.runtime.device import free_memory
    from hybridize.scoring.mmr import memory
    from hybridize.surgery.teacher import empty_model

    student, teacher = (empty_model(reader.config, str(reader.path)) for reader in (source, origin))
    parts = memory(student, teacher, mixer, settings, ranks, compute, where.type)
    limit = max_memory * GIB if max_memory is not None else SHARE * free_memory(where) if is_here(where) else float("inf")
    words = f"{limit / GIB:.1f} GiB" + (f", {SHARE:.0%} of what is free (--max-memory)" if max_memory is None else "")
    return MemoryPlan(parts, limit, words, settings.train == "mixers")


def _room(out: Output, planned: MemoryPlan, run: Any, ranks: Any) -> int:
    """Bytes that all ranks may fill with activations, the same as before the run was cut off: groups are summed apart."""
    from hybridize.scoring.mmr import ACTIVATIONS

    room = min(ranks.all(ranks.first(run.room(ACTIVATIONS)) or max(1, int(planned.room))))
    if ranks.main:
        (out.warn if planned.may_run_out else out.note)(str(planned))
        run.note_room(ACTIVATIONS, room)
    return int(room)


def _dry_run(
    out: Output, source: Any, origin: Any, mixer: dict[str, Any], settings: Any, device: str, dtype: str,
    max_memory: float | None,
) -> None:  # fmt: skip
    from hybridize.distillation.plan import GIB
    from hybridize.runtime.device import planned_on
    from hybridize.runtime.distributed import world_size

    where, compute = planned_on(device, dtype)
    planned = _planned(source, origin, mixer, settings, where, compute, world_size(), max_memory)

    def human() -> None:
        for name, size in {**planned.parts, "together": planned.total}.items():
            print(f"{name:42} {size / GIB:9.2f} GiB")
        print(planned)

    gib = {name: round(size / GIB, 3) for name, size in planned.parts.items()}
    limit = None if planned.limit == float("inf") else round(planned.limit / GIB, 3)
    out.result({"gib": gib, "total_gib": round(planned.total / GIB, 3), "max_gib": limit}, human)
