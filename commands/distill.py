"""hybridize distill"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridize.distillation.settings import DistillSettings

from .shared import options as opt
from .shared.flags import Given, expanded
from .shared.output import LESS_MEMORY, Output, guarded
from .shared.planning import plan_json, plan_lines
from .shared.reporting import TrainingReport
from .shared.training_settings import settings_of

if TYPE_CHECKING:
    import torch

    from hybridize.checkpoint.reader import CheckpointReader
    from hybridize.data.corpus import Corpus
    from hybridize.distillation.run_dir import RunDir
    from hybridize.runtime.distributed import DistributedContext


@dataclass(frozen=True)
class Text:
    """Training data, and how it is read."""

    data: opt.Data = None
    eval_data: opt.EvalData = None
    teacher: opt.Teacher = None
    chat_template: opt.ChatTemplate = None
    limit: opt.Limit = None


@dataclass(frozen=True)
class Running:
    """Output, logging and resumption of a run."""

    output: opt.Output = None
    track: Annotated[str, typer.Option("--track", help="Also log metrics to tensorboard, trackio or wandb.")] = ""
    log_every: Annotated[int, typer.Option("--log-every", min=1, help="Steps between log lines.")] = 1
    overwrite: opt.Overwrite = False
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUTPUT.run/, if there is one.")] = False
    stop_now: Annotated[
        bool, typer.Option("--stop-now", help="With --resume: write the last saved state as the result and keep the run.")
    ] = False


@guarded
@expanded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    *,
    given: Annotated[dict[str, Any], Given(DistillSettings)],
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML or TOML file with training settings; flags override it.")
    ] = None,
    text: Text,
    running: Running,
    machine: opt.Machine,
    revision: opt.Revision = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show memory, FLOPs and hours that the run needs; do nothing.")
    ] = False,
    speech: opt.Speech,
) -> None:
    """Reads a checkpoint, its teacher and traces; writes a checkpoint (CHECKPOINT-kd/ when -o is
    omitted) trained on them.

    The loss is the reverse KL divergence from the teacher on assistant tokens; --loss ce is
    cross-entropy on the text and needs no teacher. During the run, metrics and resumable state are
    in OUTPUT.run/.
    """
    out = speech.output()
    settings, target = settings_of(given, config), running.output or Path(f"{Path(checkpoint).name}-kd")
    _check_early(settings, target, running, dry_run)
    source, origin = _open(out, checkpoint, revision, settings, text)
    settings = settings.with_rates(source.config.get("hidden_size", 0))
    if dry_run:
        _show_plan(out, source, origin, settings, machine)
        return
    plan = _prepare(out, checkpoint, source, origin, settings, text, target, running, machine)
    if plan is not None:
        _train(plan, running, machine.trust_remote_code)


@dataclass(frozen=True)
class Plan:
    """A checked run before it starts. spec: the name of the data."""

    out: Output
    name: str
    source: CheckpointReader
    origin: CheckpointReader | None
    corpus: Corpus
    spec: str
    settings: DistillSettings
    target: Path
    device: torch.device
    dtype: torch.dtype
    run: RunDir
    ranks: DistributedContext


def _check_early(settings: DistillSettings, target: Path, running: Running, dry_run: bool) -> None:
    """InputError if the flags contradict each other or an unfinished run; runs before torch is
    imported."""
    from hybridize.checkpoint.unfinished import check_unfinished, run_path
    from hybridize.errors import InputError, setting

    if running.stop_now and not running.resume:
        raise InputError(f"{setting('stop_now')} requires {setting('resume')}")
    if not dry_run and not target.exists():  # an existing target may be this run's result, see run_dir.already_made
        check_unfinished(run_path(target), settings.decisive(), running.resume, running.overwrite)


def _open(
    out: Output, name: str, revision: str | None, settings: DistillSettings, text: Text
) -> tuple[CheckpointReader, CheckpointReader | None]:
    """Opens the checkpoint, and its teacher if the run needs one. InputError if nothing would be
    trained."""
    from hybridize.distillation.losses import Loss
    from hybridize.errors import InputError, setting
    from hybridize.inputs import open_checkpoint, teacher_of, warn_of_length

    needs_teacher = Loss.parse(settings.loss, settings.temperature).needs_teacher
    source = open_checkpoint(name, revision, notes=out)
    if not any(map(settings.trains, source.names)):
        aligns = settings.stage == "align"
        what = f"{setting('stage')} align" if aligns else f"{setting('train')} {settings.train}"
        if aligns or settings.train == "mixers":
            raise InputError(f"{what}: {name} has no Mamba layer")
        raise InputError(f"{what}: {name} has no tensor with such a name")
    origin = None
    if needs_teacher or text.eval_data is not None or settings.stage == "align":
        origin = teacher_of(source, name, text.teacher, out)
    warn_of_length(source, settings.seq_len, out)
    return source, origin


def _guide(origin: CheckpointReader | None, settings: DistillSettings) -> CheckpointReader | None:
    """The teacher if the loss needs it; None if only the evaluation does."""
    from hybridize.distillation.losses import Loss

    return origin if Loss.parse(settings.loss, settings.temperature).needs_teacher else None


def _show_plan(
    out: Output, source: CheckpointReader, origin: CheckpointReader | None, settings: DistillSettings, machine: opt.Machine
) -> None:
    """Shows memory, FLOPs and hours of the run on its device."""
    from hybridize.distillation.fitting import check_layers, expected
    from hybridize.runtime.device import planned_on
    from hybridize.runtime.distributed import DistributedContext, world_size

    ranks, guide = world_size(), _guide(origin, settings)
    check_layers(settings, source.config, DistributedContext(0, ranks))
    where, compute = planned_on(machine.device, machine.dtype)
    found = expected(source.config, None if guide is None else guide.config, settings, ranks, where, compute)
    out.result(plan_json(found, where.type), lambda: print("\n".join(plan_lines(found, ranks, where.type))))


def _prepare(
    out: Output, name: str, source: CheckpointReader, origin: CheckpointReader | None, settings: DistillSettings, text: Text,
    target: Path, running: Running, machine: opt.Machine,
) -> Plan | None:  # fmt: skip
    """Opens and checks everything that the run needs. Returns None, after a note, if the result of
    the run already exists."""
    from hybridize.checkpoint.writer import check_output
    from hybridize.data.corpus import open_corpus
    from hybridize.distillation.fitting import check_layers, with_micro
    from hybridize.distillation.run_dir import RunDir, already_made
    from hybridize.errors import InputError, setting
    from hybridize.inputs import check_weights, data_for, open_encoder, remark_on_rows
    from hybridize.runtime.device import pick_compute, ran_on
    from hybridize.runtime.distributed import join
    from hybridize.runtime.loading import quiet_transformers
    from hybridize.surgery.teacher import check_vocabularies

    check_output(target, running.overwrite or running.resume, source.path, *([origin.path] if origin else []))
    quiet_transformers()
    if origin is not None:
        check_vocabularies(source, origin)
    device, dtype = pick_compute(machine.device, machine.dtype, training=True)
    ranks, device = join(device)
    check_layers(settings, source.config, ranks, device)
    if not ranks.main:
        out = Output(quiet=True)
    spec = data_for(text.data, origin, out)
    encoder = open_encoder(source, settings.mask, text.chat_template, machine.trust_remote_code, out)
    corpus = open_corpus(spec, text.eval_data, encoder, text.limit, hold_out=origin is not None)
    remark_on_rows(encoder, out)
    if settings.on_policy:
        corpus.check_prompts(settings.on_policy_prompt)
    check_weights(source, *([origin] if origin else []), notes=out)
    template = encoder.template if text.chat_template else None
    ran = {**ran_on(device, dtype), "template": template, "data": corpus.hash}
    decisive = settings.decisive() | ran | {"checkpoint": source.hash, "teacher": origin.hash if origin else None}
    run = RunDir(target, decisive, ranks, settings.keep_last, settings.save_every, running.track)
    if already_made(run, target, running.overwrite, run.made):
        out.note(f"{target} already is the result of this run")
        out.result({"output": str(target), "already": True})
        return None
    run.check(running.resume, running.overwrite)
    if running.stop_now and not run.steps():
        raise InputError(f"{setting('stop_now')}: {run.path} holds no saved state")
    ranks.wait()  # the other ranks must have checked the files before the main one changes them
    settings = with_micro(source, _guide(origin, settings), settings, device, dtype, ranks, out, LESS_MEMORY)
    return Plan(out, name, source, origin, corpus, spec, settings, target, device, dtype, run, ranks)


def _train(plan: Plan, running: Running, trust_remote_code: bool) -> None:
    """Trains, and shows which tokens have a loss, steps, evaluations and the result."""
    from hybridize.distillation.distill import distill
    from hybridize.runtime.device import note_tuning
    from hybridize.runtime.distributed import leave

    report = TrainingReport(plan.out, plan.settings)
    note_tuning(plan.device, plan.source.config.get("mixer"), plan.out)
    if not running.stop_now:
        report.begin(plan.corpus, f"{plan.device.type}, {plan.spec}", plan.ranks.size)
    try:
        used = distill(
            plan.source, plan.name, plan.origin, plan.corpus, plan.settings, plan.target, device=plan.device,
            dtype=plan.dtype, overwrite=running.overwrite, resume=running.resume, stop_now=running.stop_now,
            log_every=running.log_every, trust_remote_code=trust_remote_code, run=plan.run, ranks=plan.ranks, report=report,
        )  # fmt: skip
    except KeyboardInterrupt:
        report.interrupted(plan.run)
        raise
    leave()
    if plan.ranks.main:
        report.end(plan.target, used, plan.run if running.stop_now else None)
