"""Plans the memory of MMR candidates from the configs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.distillation.plan import GIB, PROCESS, kept_bytes
from hybridize.errors import setting
from hybridize.modeling import converted_layer
from hybridize.runtime.device import free_memory, is_here
from hybridize.scoring.scorer import attention_layers
from hybridize.scoring.settings import MmrSettings
from hybridize.surgery.teacher import empty_model

ACTIVATIONS = "activations"
SLACK = 0.1  # share of the limit kept free for memory that the plan does not cover
SHARE = 0.8  # share of free memory that the candidates may use if max_memory is not set


def share_of(layers: Sequence[int], rank: int, size: int) -> list[int]:
    """Returns one rank's candidates, dealt out in alternating order of ranks (0, 1, 1, 0, ...),
    since lower layers cost more."""
    return [layer for place, layer in enumerate(layers) if min(place % (2 * size), 2 * size - 1 - place % (2 * size)) == rank]


def memory(
    student: Any, teacher: Any, mixer: dict[str, Any], settings: MmrSettings, ranks: int, dtype: torch.dtype,
    device: str = "cuda",
) -> dict[str, int]:  # fmt: skip
    """Returns bytes by part on the rank with most candidates, with all of them in one group. Groups
    reduce only the part ACTIVATIONS. student, teacher: models, possibly without storage."""
    config, tokens = student.config, settings.batch_size * settings.seq_len
    kinds, before = list(config.layer_types), config.mixer
    layers = attention_layers(student)
    mine = share_of(layers, 0, ranks)
    sizes = [kept_bytes(config, kind, settings.seq_len, dtype, device) for kind in kinds]
    with torch.device("meta"):
        config.mixer = mixer
        made: Any = converted_layer(type(student.model.layers[layers[0]]), config, layers[0]).mixer
        config.mixer = before
    new = sum(p.numel() for p in made.parameters())
    linear = sum(m.weight.numel() for m in student.model.layers.modules() if isinstance(m, nn.Linear))
    count, wide = sum(p.numel() for p in student.parameters()), dtype.itemsize
    shared = {
        "teacher's weights": wide * sum(p.numel() for p in teacher.parameters()),
        "teacher's logits": wide * tokens * config.vocab_size,
    }
    if device == "cpu":
        shared["Python and its libraries"] = PROCESS
    if settings.train == "all":
        # the original student, and the copy in which one candidate trains
        parts = {"student's weights": 4 * count, "a candidate's weights, gradients and moments": 16 * (count + new)}
        return shared | parts | {ACTIVATIONS: tokens * sum(sizes)}
    return shared | {
        "student's weights": 4 * (count - linear) + wide * linear,
        "mixers, gradients and AdamW's moments": 16 * new * len(mine),
        "layers' inputs": 4 * tokens * config.hidden_size * len(layers),
        ACTIVATIONS: tokens * sum(sum(sizes[layer:]) for layer in mine),
    }


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part with all candidates in one group, the limit in bytes and in words.

    together: whether candidates train in parallel, so that smaller groups need less memory."""

    parts: dict[str, int]
    limit: float
    words: str
    together: bool

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def room(self) -> float:
        """Bytes left for activations, negative if the other parts do not fit."""
        return (1 - SLACK) * self.limit - (self.total - self.parts[ACTIVATIONS])

    @property
    def may_run_out(self) -> bool:
        return self.total > (1 - SLACK) * self.limit and (self.room <= 0 or not self.together)

    def __str__(self) -> str:
        how = "in parallel" if self.together else "one at a time"
        text = f"memory: training the candidates {how} takes {self.total / GIB:.1f} GiB by the plan"
        if self.total <= (1 - SLACK) * self.limit:
            return text
        text += f", more than {1 - SLACK:.0%} of {self.words}: "
        if not self.together:
            return text + "it may run out"
        if not self.may_run_out:
            return text + "they train in groups"
        rest = (self.total - self.parts[ACTIVATIONS]) / GIB
        return text + f"they train one at a time and may still run out, since all but activations take {rest:.1f} GiB"


def memory_plan(
    source: CheckpointReader, origin: CheckpointReader, mixer: dict[str, Any], settings: MmrSettings, device: torch.device,
    dtype: torch.dtype, ranks: int, max_memory: float | None,
) -> MemoryPlan:  # fmt: skip
    """Plans the memory of a run. max_memory: limit in GiB; None for a share of the free memory, or
    no limit if the device is not present."""
    student, teacher = (empty_model(reader.config, str(reader.path)) for reader in (source, origin))
    parts = memory(student, teacher, mixer, settings, ranks, dtype, device.type)
    free = SHARE * free_memory(device) if max_memory is None and is_here(device) else float("inf")
    limit = free if max_memory is None else max_memory * GIB
    words = f"{limit / GIB:.1f} GiB" + (
        f", {SHARE:.0%} of what is free ({setting('max_memory')})" if max_memory is None else ""
    )
    return MemoryPlan(parts, limit, words, settings.train == "mixers")
