"""hybridize distill"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import options as opt
from .shared.models import (
    check_weights,
    data_for,
    done_already,
    open_checkpoint,
    open_encoder,
    say_of_rows,
    say_tuning,
    teacher_of,
    warn_of_length,
)
from .shared.output import LINES, Output, guarded
from .shared.planning import check_run, show_plan, with_micro
from .shared.training_settings import settings_of


@guarded
def command(
    context: typer.Context,
    checkpoint: opt.Checkpoint = "./teacher",
    data: opt.Data = None,
    eval_data: opt.EvalData = None,
    teacher: opt.Teacher = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Length: all packed tokens.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Length: optimizer steps.")] = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", help="align: first fit each mixer to its attention layer [default: distill]."),
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help="reverse-kl, forward-kl, js, ce or a mixture: reverse-kl=.9,ce=.1.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Of the divergences [default: 1].")] = None,
    mask: Annotated[
        str | None, typer.Option("--mask", help="assistant: learn its tokens; none: every token of one joined stream.")
    ] = None,
    chat_template: opt.ChatTemplate = None,
    limit: opt.Limit = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Sequences per optimizer step [default: 16].")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option("--micro-batch-size", help="Sequences at once [default: what fits, by the plan].")
    ] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", help="Tokens per sequence [default: 2048].")] = None,
    lr_mixer: Annotated[float | None, typer.Option("--lr-mixer", help="Peak rate of the mixers [default: 1e-3].")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak rate of the rest [default: 1e-4].")] = None,
    lr_groups: Annotated[
        str | None, typer.Option("--lr-groups", help="PATTERN=RATE,...: peak rates by parameter name, before the two above.")
    ] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help="cosine, wsd or linear [default: cosine].")] = None,
    warmup_steps: Annotated[int | None, typer.Option("--warmup-steps", help="Steps up to the peak [default: 50].")] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="On matrices [default: 0].")] = None,
    clip: Annotated[float | None, typer.Option("--clip", help="Largest gradient norm [default: 1].")] = None,
    train: Annotated[
        str | None, typer.Option("--train", help="all, body (not embeddings and head), mixers, or PATTERN,... [default: all].")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, more time.")
    ] = None,
    checkpoint_layers: Annotated[
        str | None, typer.Option("--checkpoint-layers", help="The same for some layers only, like 3,5-8.")
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile for the layers: a minute, then faster steps.")
    ] = None,
    cuda_graph: Annotated[
        bool | None, typer.Option("--cuda-graph/--no-cuda-graph", help="Replay a step as one CUDA graph.")
    ] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic/--no-deterministic", help="The same bits every time, at some cost on a GPU.")
    ] = None,
    shard: Annotated[
        bool | None,
        typer.Option("--shard/--no-shard", help="Of several processes each holds its part of the weights, or all of them."),
    ] = None,
    offload_teacher: Annotated[
        bool | None,
        typer.Option(
            "--offload-teacher/--no-offload-teacher", help="The teacher's layers wait in host memory: less room, slower."
        ),
    ] = None,
    eval_every: Annotated[int | None, typer.Option("--eval-every", help="Steps between measures, 0: ends only.")] = None,
    eval_windows: Annotated[int | None, typer.Option("--eval-windows", help="Held-out sequences [default: 24].")] = None,
    stop_when_flat: Annotated[
        int | None, typer.Option("--stop-when-flat", help="End after so many measures without a better reverse KL, 0: never.")
    ] = None,
    skip_bad_batches: Annotated[
        int | None, typer.Option("--skip-bad-batches", help="Leave out so many batches whose gradient is not finite.")
    ] = None,
    checkpoint_merge: Annotated[
        int | None, typer.Option("--checkpoint-merge", help="The result is the mean of the last so many states.")
    ] = None,
    save_every: Annotated[int | None, typer.Option("--save-every", help="Steps between resumable states, 0: none.")] = None,
    save_minutes: Annotated[float | None, typer.Option("--save-minutes", help="Minutes between them, 0: steps only.")] = None,
    keep_last: Annotated[int | None, typer.Option("--keep-last", help="Resumable states to keep [default: 2].")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML or TOML with training settings; flags win.")] = None,
    output: opt.Output = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of everything random.")] = None,
    track: Annotated[str, typer.Option("--track", help="tensorboard, trackio, wandb: where metrics go besides the file.")] = "",
    log_every: Annotated[int, typer.Option("--log-every", min=1, help="Steps between lines of metrics and progress.")] = 1,
    trust_remote_code: opt.TrustRemoteCode = False,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUTPUT.run/, if there is one.")] = False,
    stop_now: Annotated[
        bool, typer.Option("--stop-now", help="With --resume: make the last saved state the result, and keep the run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it takes in memory, FLOPs and hours, and do nothing.")
    ] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Reads a checkpoint, its teacher and traces; writes a checkpoint (CHECKPOINT-kd/ when -o is omitted) trained on them.

    The loss is the reverse KL from the teacher on the assistant's tokens; --loss ce learns the text itself and needs no
    teacher. Until it is done, metrics and resumable state are in OUTPUT.run/.
    """
    out = Output(as_json, quiet)
    from hybridize.checkpoint.unfinished import check_unfinished, run_path
    from hybridize.errors import InputError

    settings, target = settings_of(context.params), output or Path(f"{Path(checkpoint).name}-kd")
    if stop_now and not resume:
        raise InputError("--stop-now ends a run that --resume goes on with: give both")
    if not dry_run and not target.exists():  # else it may be this run's result; see done_already
        check_unfinished(run_path(target), settings.decisive(), resume, overwrite)
    from hybridize.checkpoint.writer import check_output
    from hybridize.distillation.losses import Loss

    objective = Loss.parse(settings.loss, settings.temperature)
    source = open_checkpoint(checkpoint, revision)
    if not any(map(settings.trains, source.names)):
        if settings.stage == "align" or settings.train == "mixers":
            flag = "--stage align" if settings.stage == "align" else "--train mixers"
            raise InputError(f"{flag}: {checkpoint} has no Mamba layer")
        raise InputError(f"--train {settings.train}: {checkpoint} has no tensor of such a name")
    origin = None
    if objective.needs_teacher or eval_data is not None or settings.stage == "align":
        origin = teacher_of(source, checkpoint, teacher)
    warn_of_length(out, source, settings.seq_len)
    if dry_run:
        show_plan(out, source, origin if objective.needs_teacher else None, settings, device, dtype)
        return
    check_output(target, overwrite or resume, source.path, *([origin.path] if origin else []))
    from hybridize.data.corpus import open_corpus
    from hybridize.distillation.run_dir import RunDir
    from hybridize.runtime.device import pick_compute, ran_on
    from hybridize.runtime.distributed import join
    from hybridize.runtime.loading import quiet_transformers
    from hybridize.surgery.teacher import check_vocabularies

    quiet_transformers()
    if origin is not None:
        check_vocabularies(source, origin)
    where, compute = pick_compute(device, dtype, training=True)
    ranks, where = join(where)
    _check_machine(settings, source, where, ranks)
    if not ranks.main:
        out = Output(quiet=True)
    spec = data_for(out, data, origin)
    encoder = open_encoder(source, settings.mask, chat_template, trust_remote_code)
    corpus = open_corpus(spec, eval_data, encoder, limit, hold_out=origin is not None)
    say_of_rows(out, encoder)
    check_weights(source, *([origin] if origin else []))
    ran = {**ran_on(where, compute), "template": encoder.template if chat_template else None, "data": corpus.hash}
    decisive = settings.decisive() | ran | {"checkpoint": source.hash, "teacher": origin.hash if origin else None}
    run = RunDir(target, decisive, ranks, settings.keep_last, settings.save_every, track)
    if done_already(out, run, target, overwrite, run.made):
        return
    run.check(resume, overwrite)
    if stop_now and not run.steps():
        raise InputError(f"--stop-now: {run.path} holds no saved state")
    ranks.wait()  # before the first one changes what the others look at
    settings = with_micro(out, source, origin if objective.needs_teacher else None, settings, where, compute, ranks)
    _train(
        out, source, checkpoint, origin, corpus, settings, target, spec, device=where, dtype=compute, overwrite=overwrite,
        resume=resume, stop_now=stop_now, log_every=log_every, trust_remote_code=trust_remote_code, run=run, ranks=ranks,
    )  # fmt: skip


def _train(
    out: Output, source: Any, checkpoint: str, origin: Any, corpus: Any, settings: Any, target: Path, spec: str, *, run: Any,
    ranks: Any, **given: Any,
) -> None:  # fmt: skip
    """Trains and says how it goes: at the start what is learnt, then steps and measures, at the end what came of it."""
    from hybridize.distillation.distill import distill
    from hybridize.runtime.distributed import leave

    where = given["device"]
    last: dict[str, Any] = {}
    measured: list[float] = []
    say_tuning(out, where, source.config.get("mixer"))

    def report(event: dict[str, Any]) -> None:
        kind = event.pop("kind")
        if kind in ("note", "doing"):
            (out.note if kind == "note" else LINES.doing)(event["text"])
            return
        if kind == "rising":
            out.warn(
                f"step {event['step']}: the loss has been rising, from {event['best']:.4f} to {event['now']:.4f} in the mean "
                f"of some 20 steps: {_lower_rates(settings)}"
            )
            return
        last[kind] = event
        if kind == "eval":
            measured.append(event["reverse_kl"])
            out.note(
                f"step {event['step']}: held-out reverse KL {event['reverse_kl']:.4f}, forward KL {event['forward_kl']:.4f}, "
                f"agreement {event['agreement']:.4f} ({event['heldout_tokens']} tokens)"
            )
        else:
            done = event["step"] == event["steps"]
            out.progress(
                f"step {event['step']}/{event['steps']}: loss {event['loss']:.4f}, {event['tokens_per_second']:,.0f} tokens/s, "
                f"{_machine(event)}{_clock(event['seconds_left'])} left",
                last=done,
            )

    if not given["stop_now"]:
        _say_what_begins(out, corpus, settings, f"{where.type}, {spec}", ranks.size)
    try:
        used = distill(source, checkpoint, origin, corpus, settings, target, run=run, ranks=ranks, report=report, **given)
    except KeyboardInterrupt:
        _say_of_interrupt(out, run, settings)
        raise

    leave()
    if not ranks.main:
        return
    steps_done = used // (settings.batch_size * settings.seq_len)
    if steps_done < settings.total_steps and not given["stop_now"]:
        out.note(f"ended after {steps_done} steps: no better in {settings.stop_when_flat} measures")

    _warn_of_harm(out, measured, settings)

    def human() -> None:
        print(f"{target}: trained on {used:,} tokens")
        if given["stop_now"]:
            print(f"{run.path} is kept: --resume --overwrite goes on from step {steps_done} of {settings.total_steps}")

    out.result({"output": str(target), "steps": steps_done, "last": last.get("step"), "heldout": last.get("eval")}, human)


def _say_what_begins(out: Output, corpus: Any, settings: Any, place: str, ranks: int) -> None:
    """What is learnt, how rows are packed, how long the run is."""
    packing = corpus.packing(settings.seed, settings.seq_len)
    out.note(f"first document, what is learnt in \u27e6\u27e7: {corpus.example(settings.seed)}")
    if packing is not None:
        out.note(f"packing: {packing.held:.1%} of the positions hold text, {packing.learnt:.1%} are learnt{_cut(packing)}")
    at_once = f"{min(settings.micro, settings.batch_size // ranks)} sequences at once"
    out.note(f"{settings.total_steps} steps of {settings.batch_size} x {settings.seq_len} tokens, {at_once}, on {place}")
    if settings.warmup < settings.warmup_steps:
        asked = f"--warmup-steps {settings.warmup_steps}"
        out.note(f"warm-up: {settings.warmup} of {settings.total_steps} steps; it takes at most half of a run ({asked})")


def _say_of_interrupt(out: Output, run: Any, settings: Any) -> None:
    """What an interrupted run leaves, and how to go on with it."""
    steps = run.steps()
    if steps:
        saved = f"{steps[-1]} of {settings.total_steps} steps are saved in {run.path}"
        out.warn(f"{saved}; the same command with --resume goes on from there, with --resume --stop-now makes it a checkpoint")
    else:
        out.warn(f"nothing was saved yet; the same command with --overwrite starts again, and {run.path} may be removed")


def _warn_of_harm(out: Output, measured: list[float], settings: Any) -> None:
    """Says so where training has taken the student further from its teacher, and what to try."""
    if len(measured) > 1 and measured[-1] > measured[0]:
        out.warn(
            f"the held-out reverse KL ended at {measured[-1]:.4f}, above the {measured[0]:.4f} where it began: "
            f"{_lower_rates(settings)}"
        )


def _lower_rates(settings: Any) -> str:
    lower = f"--lr-mixer {settings.lr_mixer * 0.3:.1g} --lr {settings.lr * 0.3:.1g}"
    return f"the rates are too high for this model or warm-up; try {lower}"


def _cut(packing: Any) -> str:
    """What becomes of long documents, if there are any."""
    if not packing.cut:
        return ""
    return (
        f"; {packing.cut} of the first {packing.documents} documents are longer than --seq-len and cut into pieces that do not "
        f"see each other (the longest has {packing.longest} tokens)"
    )


def _check_machine(settings: Any, source: Any, where: Any, ranks: Any) -> None:
    """InputError when the run cannot be on this device."""
    from hybridize.errors import InputError
    from hybridize.modeling import mixer_class

    if settings.cuda_graph and where.type != "cuda":
        raise InputError("--cuda-graph needs a CUDA device")
    mixer = source.config.get("mixer")
    if settings.deterministic and where.type == "cuda" and mixer and not mixer_class(mixer).deterministic:
        raise InputError(f"--deterministic: the CUDA scan of {mixer['kind']} layers adds in no fixed order")
    check_run(settings, source, ranks)


def _machine(event: dict[str, Any]) -> str:
    """How busy and how full the GPU is, where that is known."""
    share = "" if event["mfu"] is None else f"MFU {event['mfu']:.0%}, "
    return share + ("" if event["peak_memory_gib"] is None else f"{event['peak_memory_gib']:.1f} GiB, ")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
