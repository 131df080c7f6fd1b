"""Chooses the micro-batch size that fits into free memory and estimates a run's memory and time,
from configs alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.distillation.plan import GIB, Plan, micro_that_fits, plan
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.watch import expected_flops
from hybridize.errors import InputError, setting
from hybridize.generation.decoder import check_decodable
from hybridize.modeling import hybrid_config, mixer_class
from hybridize.notes import Notes
from hybridize.runtime.device import free_memory, is_here
from hybridize.runtime.distributed import DistributedContext
from hybridize.surgery.teacher import empty_model

ROOM = 0.9  # share of free memory that a plan may use


@dataclass(frozen=True)
class Expected:
    """An estimate of a run.

    plan: memory and FLOPs; settings: with the micro-batch size that the plan assumes; fitted:
    whether that size was chosen from free memory; hours: duration at the expected speed; share:
    that speed in words.
    """

    plan: Plan
    settings: DistillSettings
    fitted: bool
    hours: float
    share: str


def check_layers(
    settings: DistillSettings, config: dict[str, Any], ranks: DistributedContext, device: torch.device | None = None
) -> None:
    """InputError if the settings do not fit the model's layers, the number of ranks, or `device`
    (if given)."""
    ranks.share(settings.batch_size, "batch_size")
    settings.sharded(ranks.size)
    settings.recomputed(config.get("num_hidden_layers", 0))
    shape = config.get("mixer")
    mixer = None if not shape else mixer_class(shape)
    if settings.cuda_graph and settings.mask != "none" and mixer is not None and not mixer.graphs_documents:
        raise InputError(
            f"{setting('cuda_graph')} does not support {mixer.kind} layers with packed documents; "
            f"use {setting('mask')} none, which joins them into one stream"
        )
    if settings.on_policy:
        check_decodable(hybrid_config(config))
        if ranks.size > 1:
            raise InputError(f"{setting('on_policy')} runs on one GPU; {ranks.size} processes were started")
    if device is None:
        return
    if settings.cuda_graph and device.type != "cuda":
        raise InputError(f"{setting('cuda_graph')} needs a CUDA device")
    if settings.deterministic and device.type == "cuda" and mixer is not None and not mixer.deterministic:
        raise InputError(f"{setting('deterministic')}: the CUDA scan of {mixer.kind} layers sums in no fixed order")


def expected(
    student: dict[str, Any], teacher: dict[str, Any] | None, settings: DistillSettings, ranks: int, device: torch.device,
    dtype: torch.dtype,
) -> Expected:  # fmt: skip
    """Estimates a run from the configs of student and teacher."""
    ours, theirs = (None if raw is None else empty_model(raw, "the checkpoint") for raw in (student, teacher))
    fitted = settings.micro_batch_size is None and settings.stage != "align" and is_here(device)
    if fitted:
        free = ROOM * free_memory(device)
        micro, _ = micro_that_fits(ours, theirs, settings, ranks, dtype, device.type, free)
        settings = replace(settings, micro_batch_size=micro)
    found = plan(ours, theirs, settings, ranks, dtype, device.type)
    speed, share = expected_flops(device, student["hidden_size"])
    return Expected(found, settings, fitted, found.flops / (speed * ranks) / 3600, share)


def with_micro(
    source: CheckpointReader, teacher: CheckpointReader | None, settings: DistillSettings, device: torch.device,
    dtype: torch.dtype, ranks: DistributedContext, notes: Notes, advice: str,
) -> DistillSettings:  # fmt: skip
    """Returns the settings with the largest micro-batch size that fits into free memory, if none
    was set. advice: what to suggest if even one sequence may not fit."""
    if settings.micro_batch_size is not None or settings.stage == "align":
        return settings
    student, origin = (None if r is None else empty_model(r.config, str(r.path)) for r in (source, teacher))
    free = free_memory(device)
    fits, wanted = micro_that_fits(student, origin, settings, ranks.size, dtype, device.type, ROOM * free)
    micro = min(ranks.all(fits))
    rows = settings.batch_size // ranks.size
    memory = f"the plan takes {wanted / GIB:.1f} GiB, {free / GIB:.1f} are free"
    if ranks.main and micro < rows:
        notes.note(f"{micro} of {rows} sequences at once ({setting('micro_batch_size')}): {memory}")
    if ranks.main and wanted > free:
        notes.warn(f"{memory}: it may run out of memory; {advice}")
    return replace(settings, micro_batch_size=micro)
