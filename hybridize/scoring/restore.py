"""Scores an attention layer by the KL that restoring it recovers in a fully converted student
(after KL-guided selection, 2512.20569).

All attention layers are converted and briefly aligned; then each is restored on its own.
Leave-one-out measures what the original model loses without a layer; this measures what the
finished hybrid would gain from it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint.scores import LayerScore
from hybridize.data.packing import Batch
from hybridize.distillation.align import Aligner
from hybridize.distillation.losses import Loss
from hybridize.distillation.optimize import Optimization
from hybridize.distillation.step import Student
from hybridize.errors import InputError, WorkError, setting
from hybridize.inputs import check_weights, warn_of_length
from hybridize.modeling import MIXER_LAYER, HybridForCausalLM
from hybridize.runtime.device import note_tuning
from hybridize.scoring.candidates import converted
from hybridize.scoring.loo import batch_for_spread, kl_changes
from hybridize.scoring.scorer import Progress, Scorer
from hybridize.scoring.settings import RestoreSettings
from hybridize.scoring.setup import Ranking, Setup


def restore(
    student: HybridForCausalLM,
    teacher: Any,
    mixer: dict[str, Any],
    starts: Iterable[tuple[int, dict[str, Tensor]]],
    training: Iterable[Batch],
    heldout: Sequence[Batch],
    settings: RestoreSettings,
    dtype: torch.dtype,
    progress: Progress = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> list[LayerScore]:
    """Score = the decrease of the forward KL from `teacher` on `heldout` when the layer is
    restored.

    student: all of its attention layers are converted in place; starts: initial parameters of their
    mixers; training: one batch per step. WorkError if the alignment's loss is not finite.
    """
    config, originals = student.config, {}
    kinds = list(config.layer_types)
    for layer, values in starts:
        originals[layer] = student.model.layers[layer]
        student.model.layers[layer] = converted(student, mixer, layer, values).to(student.lm_head.weight.device)
    config.mixer, config.layer_types = mixer, [MIXER_LAYER] * len(kinds)
    plain = settings.as_distill()
    student.requires_grad_(False)
    for layer in originals:  # existing mixers stay frozen
        student.model.layers[layer].mixer.requires_grad_(True)  # type: ignore[union-attr]
    optimization = Optimization(student, plain)
    aligner = Aligner(Student(student, Loss(), dtype), teacher, settings.batch_size)
    aligner.layers = sorted(originals)
    value = torch.zeros(())
    student.train()
    for step, batch in zip(range(settings.steps), training, strict=False):
        value = optimization.take(step, functools.partial(aligner, batch))
        progress(step + 1, settings.steps)
    if not bool(torch.isfinite(value)):
        raise WorkError(f"the alignment's loss is not finite; try a lower {setting('lr_mixer')}")
    aligned = f", aligned to a relative error of {float(value):.3f}" if settings.steps else ""
    note(f"{len(originals)} attention layers converted{aligned}")
    student.eval()

    def restored(index: int, _: Any, hidden: Tensor, kwargs: dict[str, dict[str, Any]]) -> Tensor:
        return originals[index](hidden, **kwargs[kinds[index]])

    layers = sorted(originals)
    more = sorted({kinds[layer] for layer in layers})
    return kl_changes(student, teacher, layers, restored, heldout, dtype, kinds=more, sign=-1.0, progress=progress)


class RestoreScorer(Scorer):
    """Ranks layers by the KL recovered by restoring each in the fully converted model."""

    kind = "restore"
    summary = "Rank layers by the KL that restoring attention recovers."
    settings = RestoreSettings
    trains = True

    def score(self, setup: Setup, settings: RestoreSettings) -> Ranking:
        """See Scorer.score."""
        (device, dtype), notes = setup.compute, setup.notes
        warn_of_length(setup.source, settings.seq_len, notes)
        batch_size = batch_for_spread(settings.batch_size, settings.windows)
        held_out = setup.corpus.held_out(settings.windows, settings.seq_len, batch_size)
        setup.check_filled(settings.seq_len)
        if not held_out:
            raise InputError(
                f"the held-out rows of {setup.data} do not fill one sequence of {settings.seq_len} tokens; "
                f"give a smaller {setting('seq_len')} or {setting('eval_data')}"
            )
        check_weights(setup.source, setup.origin, notes=notes)
        notes.doing("loading the models")
        student, teacher = setup.student(torch.float32), setup.teacher()
        note_tuning(device, setup.shape, notes)
        batches = setup.corpus.training(settings.seed, settings.seq_len, settings.batch_size)
        training = (batch.to(device) for batch in itertools.islice(batches, settings.steps))
        found = restore(
            student, teacher, setup.shape, setup.starts(), training, [batch.to(device) for batch in held_out], settings,
            dtype, setup.counted("steps"), notes.note,
        )  # fmt: skip
        described = asdict(settings) | setup.described()
        return Ranking(found, "kl recovered", "KL recovered by restoring a layer", described, mixed=True)
