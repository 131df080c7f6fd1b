"""The inputs of every scorer: checkpoint, teacher, data, device and new mixers, opened and checked
on first use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.checkpoint.scores import LayerScore, Scores, scores_path
from hybridize.checkpoint.writer import check_writable
from hybridize.data.corpus import Corpus, open_corpus
from hybridize.data.encode import Encoder
from hybridize.errors import InputError, setting
from hybridize.inputs import calibration_for, data_for, open_checkpoint, open_encoder, remark_on_rows, teacher_of
from hybridize.modeling import HybridForCausalLM
from hybridize.notes import SILENT, Notes
from hybridize.options import CALIBRATION_TOKENS
from hybridize.runtime.device import pick_compute, ran_on
from hybridize.runtime.distributed import DistributedContext, join
from hybridize.runtime.loading import load_hybrid, load_model, quiet_transformers
from hybridize.surgery.replace import Calibration, MixerSettings, Surgery, plan, starting_values
from hybridize.surgery.teacher import Teacher, check_vocabularies, read_teacher


@dataclass(frozen=True)
class Request:
    """The options that all scorers share.

    data, eval_data, teacher, output: None for the default. calibrate: whether to calibrate new
    mixers, on `calibration_tokens` tokens of the data."""

    checkpoint: str
    teacher: str | None = None
    data: str | None = None
    eval_data: str | None = None
    mask: str = "assistant"
    chat_template: Path | None = None
    limit: int | None = None
    mixers: MixerSettings = MixerSettings()  # noqa: RUF009  (frozen)
    calibrate: bool = True
    calibration_tokens: int = CALIBRATION_TOKENS
    seed: int = 0
    output: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Ranking:
    """The result of a scorer.

    metric, settings: for the score file; label: heading of the table; mixed: whether new mixers
    were used, whose kind and initialization the file then records."""

    layers: list[LayerScore]
    metric: str
    label: str
    settings: dict[str, Any]
    mixed: bool = False


class Setup:
    """Opens the inputs of a request on first use. InputError if an input cannot be used."""

    def __init__(self, request: Request, kind: str, notes: Notes = SILENT, training: bool = False) -> None:
        """kind: of the score file; training: whether parameters get gradients, which underflow in
        float16."""
        self.request, self.kind, self.notes, self.training = request, kind, notes, training
        self.source: CheckpointReader = open_checkpoint(request.checkpoint, request.revision, notes=notes)
        if not self.contract.attention_layers:
            raise InputError(f"{request.checkpoint} has no attention layer left to score")
        self.path = request.output or scores_path(self.source.path, request.checkpoint, kind)
        if self.path.exists() and not request.overwrite:
            raise InputError(f"{self.path} exists; give another {setting('output')} or {setting('overwrite')}")
        if self.path.is_dir():
            raise InputError(f"{self.path} is a directory; scores are written to a file")
        check_writable(self.path)
        self.ranks = DistributedContext()
        quiet_transformers()

    def join(self) -> None:
        """Joins the process group if torchrun started this process; all ranks but the first stop
        printing notes."""
        device, dtype = self.compute
        self.ranks, device = join(device)
        self.compute = device, dtype
        if not self.ranks.main:
            self.notes = SILENT

    def counted(self, what: str) -> Callable[[int, int], None]:
        """Returns a callback that reports progress, with the time since this call. what: the unit."""
        began = time.time()

        def report(done: int, count: int) -> None:
            self.notes.progress(f"{done} of {count} {what} after {time.time() - began:.0f} s", last=done == count)

        return report

    def check_filled(self, seq_len: int) -> None:
        """InputError if the data does not fill one training sequence."""
        if self.corpus.packing(self.request.seed, seq_len) is None:
            raise InputError(f"{self.data} does not fill one sequence of {seq_len} tokens; give a smaller {setting('seq_len')}")

    @cached_property
    def contract(self) -> Teacher:
        """The checkpoint's architecture, including its attention layers."""
        return read_teacher(self.source)

    @cached_property
    def origin(self) -> CheckpointReader:
        """The teacher's checkpoint."""
        found = teacher_of(self.source, self.request.checkpoint, self.request.teacher, self.notes)
        check_vocabularies(self.source, found)
        return found

    @cached_property
    def compute(self) -> tuple[torch.device, torch.dtype]:
        return pick_compute(self.request.device, self.request.dtype, self.training)

    @cached_property
    def encoder(self) -> Encoder:
        return open_encoder(
            self.source, self.request.mask, self.request.chat_template, self.request.trust_remote_code, self.notes
        )

    @cached_property
    def data(self) -> str:
        """The name of the data, resolved if it was omitted."""
        return data_for(self.request.data, self.origin, self.notes)

    @cached_property
    def corpus(self) -> Corpus:
        """Training rows and held-out rows (eval_data, else the last training rows)."""
        found = open_corpus(self.data, self.request.eval_data, self.encoder, self.request.limit)
        remark_on_rows(self.encoder, self.notes)
        return found

    def conversion(self, layers: Sequence[int] | None = None) -> Surgery:
        """Returns the plan that puts new mixers into these layers (default: every attention layer)."""
        return plan(self.contract, list(self.contract.attention_layers if layers is None else layers), self.request.mixers)

    @cached_property
    def shape(self) -> dict[str, Any]:
        """The new mixers' config entry."""
        shape = self.conversion().mixer
        assert shape is not None
        return shape

    @cached_property
    def calibration(self) -> Calibration | None:
        request = self.request
        return calibration_for(
            self.data if request.calibrate else None, self.source, self.shape["kind"], parts=None,
            tokens=request.calibration_tokens, device=request.device, seed=request.seed, chat_template=request.chat_template,
            trust_remote_code=request.trust_remote_code, notes=self.notes,
        )  # fmt: skip

    def starts(self, layers: Sequence[int] | None = None, together: bool = True) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yields (layer, its new mixer's parameters) for these layers (default: every attention
        layer). together: see starting_values."""
        return starting_values(
            self.source, self.conversion(layers), self.source, self.request.seed, self.calibration, together,
            progress=self.notes.progress,
        )  # fmt: skip

    def student(self, dtype: torch.dtype) -> HybridForCausalLM:
        """Loads the checkpoint as HybridForCausalLM, with weights in `dtype`."""
        return load_hybrid(self.source, self.compute[0], dtype)

    def teacher(self) -> nn.Module:
        """Loads the teacher in the compute type."""
        return load_model(self.origin.path, *self.compute, self.request.trust_remote_code)

    def described(self) -> dict[str, Any]:
        """Returns the new mixers' initialization, the data, device and types, for the score
        file."""
        fit = None if self.calibration is None else self.calibration.settings()
        return self.shape | {"data": self.corpus.rows.name, **ran_on(*self.compute), "calibration": fit}

    def write(self, found: Ranking, seconds: float) -> Scores:
        """Writes the score file."""
        mixer = init = None
        if found.mixed:
            mixer, init = self.shape["kind"], "mil" if self.calibration is None else "calibrated"
        scores = Scores(self.kind, self.source.hash, mixer, init, found.metric, found.settings, round(seconds, 2), found.layers)
        scores.write(self.path)
        return scores
