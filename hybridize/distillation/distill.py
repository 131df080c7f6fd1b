"""Distils a checkpoint: loads the models, trains, and writes the result with its lineage."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hybridize.checkpoint.atomic import AtomicDirectory
from hybridize.checkpoint.experts import as_on_disk
from hybridize.checkpoint.manifest import Manifest, descend
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.checkpoint.writer import CheckpointWriter
from hybridize.data.corpus import Corpus
from hybridize.data.prefetch import prefetched
from hybridize.distillation.loop import Report, Training
from hybridize.distillation.rollouts import Rollouts
from hybridize.distillation.run_dir import RunDir
from hybridize.distillation.settings import DistillSettings
from hybridize.generation.settings import read_generation
from hybridize.runtime.device import ran_on
from hybridize.runtime.distributed import DistributedContext, whole
from hybridize.runtime.loading import load_empty, load_hybrid, load_model


def distill(
    source: CheckpointReader,
    name: str,
    teacher: CheckpointReader | None,
    corpus: Corpus,
    settings: DistillSettings,
    output: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    overwrite: bool = False,
    resume: bool = False,
    stop_now: bool = False,
    log_every: int = 1,
    trust_remote_code: bool = False,
    run: RunDir,
    ranks: DistributedContext | None = None,
    report: Report = lambda _: None,
) -> int:
    """Trains float32 weights under autocast to `dtype` and writes them in the source's storage
    types. Returns the number of training tokens.

    stop_now: writes the last saved state of an unfinished run as a checkpoint and leaves the run
    directory as it is. Every rank calls this function; the first one writes.
    """
    ranks, settings = ranks or DistributedContext(), settings.with_rates(source.config.get("hidden_size", 0))
    torch.manual_seed(settings.seed)
    streams = settings.sharded(
        ranks.size
    )  # weights are loaded into their shards layer by layer; alignment needs the whole student

    doing = lambda text: report({"kind": "doing", "text": text})  # noqa: E731
    doing("loading the models")
    student, model = _load(source, teacher, settings, device, dtype, streams, trust_remote_code)
    doing("preparing the first step")
    held_out = corpus.held_out(settings.eval_windows, settings.seq_len, settings.micro)
    rollouts = None if not settings.on_policy else _rollouts(source, student, corpus, settings, run, device, dtype, report)
    training = Training(
        student, model, held_out, settings, run, device=device, dtype=dtype, log_every=log_every, ranks=ranks,
        sources=(source, teacher) if streams else (None, None), rollouts=rollouts, report=report,
    )  # fmt: skip
    with run.started(resume):
        batches = prefetched(corpus.training(settings.seed, settings.seq_len, settings.batch_size - settings.on_policy_rows))
        with contextlib.closing(batches):
            used = training.go(batches, resume, stop_now)
        doing(f"writing {output}")
        made = asdict(settings) | ran_on(device, dtype) | {"ranks": ranks.size}
        # the digest marks the finished result of a run; a checkpoint of an unfinished run has none
        made |= {"stopped_after": used // (settings.batch_size * settings.seq_len)} if stop_now else {"run": run.digest}
        manifest = _trained_manifest(descend(source, name, output, "distill", made, settings.seed), corpus, used, rollouts)
        tensors = _trained_tensors(source, student, settings, ranks if streams else None)
        if ranks.main:
            _write(source, tensors, output, manifest, overwrite, run)
            if not stop_now:
                run.remove()
        else:
            for _ in tensors if streams else ():  # gathering a sharded tensor needs all ranks
                pass
        ranks.wait()
    return used


def _rollouts(
    source: CheckpointReader, student: Any, corpus: Corpus, settings: DistillSettings, run: RunDir, device: torch.device,
    dtype: torch.dtype, report: Report,
) -> Rollouts:  # fmt: skip
    """The student's answers, decoded by a copy of the student; it samples from its own distribution,
    whatever generation settings the checkpoint has."""
    ends = read_generation(source.path, source.config, corpus.encoder.tokenizer, {}).ends
    return Rollouts(load_hybrid(source, device, dtype), student, corpus, ends, settings, run.path, report)


def _load(
    source: CheckpointReader, teacher: CheckpointReader | None, settings: DistillSettings, device: torch.device,
    dtype: torch.dtype, streams: bool, trust_remote_code: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """The student and the teacher (None if there is none). streams: models are loaded without
    weights where those are later loaded into their shards layer by layer."""
    if streams and settings.stage == "distill":
        student: Any = load_empty(source.path, torch.float32, trust_remote_code)
    else:
        student = load_model(source.path, device, torch.float32, trust_remote_code)
    if teacher is None:
        return student, None
    if settings.offload_teacher:  # its layers stay in host memory between uses
        return student, load_model(teacher.path, torch.device("cpu"), dtype, trust_remote_code)
    if streams:
        return student, load_empty(teacher.path, dtype, trust_remote_code)
    return student, load_model(teacher.path, device, dtype, trust_remote_code)


def _trained_manifest(manifest: Manifest, corpus: Corpus, used: int, rollouts: Rollouts | None) -> Manifest:
    """The manifest with the data sources of this run, each with its share of the `used` tokens."""
    shares, own = sum(weight for _, weight in corpus.sources), 0
    if rollouts is not None:
        own = used * rollouts.settings.on_policy_rows // rollouts.settings.batch_size
    data = [
        {
            "path": Path(rows.name).name if Path(rows.name).is_file() else rows.name,
            "rows": len(rows),
            "tokens": round((used - own) * weight / shares),
        }
        for rows, weight in corpus.sources
    ]
    if rollouts is not None:
        data.append({"path": "the student's own answers", "rows": rollouts.count(), "tokens": own})
    return dataclasses.replace(manifest, data=[*manifest.data, *data], tokens=manifest.tokens + used)


def _trained_tensors(
    source: CheckpointReader, student: Any, settings: DistillSettings, ranks: DistributedContext | None
) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yields (name, value, whether the value is the source's), in the source's order.

    The source's value stands for buffers that the model does not have and for weights that were
    not trained. ranks: given where weights are sharded; every rank must then iterate over all
    tensors.
    """
    trained = student.state_dict()

    @functools.lru_cache(maxsize=2)  # the tensors of experts alternate between two parameters
    def gathered(parameter: str) -> torch.Tensor:
        if ranks is not None:  # the writing rank may be slow, and NCCL's own timeout is ten minutes
            ranks.wait()
        return whole(trained[parameter])

    for name, old in source.tensors():
        new = as_on_disk(name, trained, gathered)
        kept = new is None or not settings.trains(name)
        yield name, old if new is None or kept else new.to(old.dtype), kept


def _write(
    source: CheckpointReader, tensors: Iterable[tuple[str, torch.Tensor, bool]], output: Path, manifest: Manifest,
    overwrite: bool, run: RunDir,
) -> None:  # fmt: skip
    """Writes the trained checkpoint and the logs of its run atomically."""
    with AtomicDirectory(output, overwrite) as path:
        writer = CheckpointWriter(path)
        for name, value, kept in tensors:
            writer.add(name, value, source if kept else None)
        run.finish(path)
        writer.close(source.config, manifest, carry_from=source.path)
