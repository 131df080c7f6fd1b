"""All MMR candidates of one process in training, side by side.

A batch goes through the teacher once and through the untouched student once; a candidate runs from
its own layer on, and shares calls with the others: a layer takes all that have begun below it, as
rows of one batch. Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hybridize.data.packing import Batch
from hybridize.distillation.losses import Loss, chunked_loss
from hybridize.distillation.optimize import Optimization
from hybridize.distillation.plan import kept_bytes
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.step import chosen
from hybridize.modeling import MIXER_LAYER, HybridForCausalLM, converted_layer
from hybridize.runtime import packed_attention as attention
from hybridize.runtime.forward import autocast, before_output, hidden_states, output_weight, soft_cap
from hybridize.scoring.scorer import Progress

SAVE_EVERY = 10  # steps of a chunk, after which a killed run goes on


def converted(student: HybridForCausalLM, mixer: dict[str, Any], layer: int, values: dict[str, Tensor]) -> nn.Module:
    """A converted copy of one layer: a mixer with `values`, float32 and to be trained; all else
    shared with the original."""
    original, before = student.model.layers[layer], student.config.mixer
    student.config.mixer = mixer
    try:
        mixed: Any = converted_layer(type(original), student.config, layer)
    finally:
        student.config.mixer = before
    mixed.mixer.load_state_dict({name: value.float() for name, value in values.items()})
    for name, module in original.named_children():
        if name != "self_attn":
            setattr(mixed, name, module)
    mixed.mixer.requires_grad_(True)
    return mixed


def narrow(student: HybridForCausalLM, dtype: torch.dtype) -> None:
    """Frozen projections as `dtype`, which autocast would make of them at every use."""
    for part in student.model.layers.modules():
        if dtype != torch.float32 and isinstance(part, nn.Linear) and not part.weight.requires_grad:
            part.weight.data = part.weight.data.to(dtype)


class Candidates:
    """The converted layers in training, with one optimizer, which treats each weight by itself."""

    def __init__(
        self,
        student: HybridForCausalLM,
        teacher: Any,
        mixer: dict[str, Any],
        starts: Iterable[tuple[int, dict[str, Tensor]]],
        settings: DistillSettings,
        dtype: torch.dtype,
        room: int | None = None,
    ) -> None:
        """mixer: the new mixers' config entry; starts: for each candidate layer the parameters that
        its mixer starts with.

        student, teacher: on one device, left as they are but for the type of the student's frozen
        projections, which becomes `dtype`. room: bytes for the activations of a group, None: of all
        side by side.
        """
        self.student, self.teacher, self.settings, self.dtype = student, teacher, settings, dtype
        self.loss = replace(Loss.parse(settings.loss), soft_cap=soft_cap(student))
        device = output_weight(student).device
        student.requires_grad_(False).train()
        self.mixed = nn.ModuleDict({str(layer): converted(student, mixer, layer, values) for layer, values in starts})
        self.mixed.to(device)
        self.layers = sorted(map(int, self.mixed))
        narrow(student, dtype)
        for model in (student, teacher):
            if device.type == "cuda" and attention.can_attend(model, settings.seq_len):
                attention.use_packed_attention(model)
        parts = [self.mixed[str(layer)] for layer in self.layers]
        self.optimization = Optimization(self.mixed, settings, parts=parts)
        self.optimizer = self.optimization.adamw
        self.losses: list[Tensor] = []  # of each step, [candidates] in the order of `layers`
        self.groups = self._groups(room)

    def _groups(self, room: int | None) -> list[list[int]]:
        """Neighbours whose activations fit side by side, by what `plan` says of a layer that is
        trained."""
        config, tokens = self.student.config, self.settings.batch_size * self.settings.seq_len
        room = sys.maxsize if room is None else room
        device = output_weight(self.student).device.type
        sizes = [kept_bytes(config, kind, self.settings.seq_len, self.dtype, device) for kind in config.layer_types]
        groups: list[list[int]] = []
        left = 0
        for layer in self.layers:
            size = tokens * sum(sizes[layer:])
            if not groups or size > left:
                groups.append([])
                left = room
            groups[-1].append(layer)
            left -= size
        return groups

    def step(self, batch: Batch) -> None:
        """One optimizer step of every candidate."""
        losses = self.optimization.take(len(self.losses), lambda: self._gradients(batch))
        self.losses.append(losses)

    def _gradients(self, batch: Batch) -> Tensor:
        """Adds every candidate's gradient; returns their losses, in the order of `layers`."""
        heard = self._untouched(batch)
        kept, count = batch.loss_mask.flatten(), max(1, batch.kept)
        logits = None
        if self.loss.needs_teacher:
            with torch.no_grad():
                theirs = chosen(hidden_states(self.teacher, batch, self.dtype).flatten(0, 1), kept).to(self.dtype)
                logits = theirs @ output_weight(self.teacher).to(self.dtype).t()
        labels, weight = chosen(batch.labels.flatten(), kept), output_weight(self.student).to(self.dtype)
        found = []
        for group in self.groups:
            values = []
            for states in self._forward(batch, group, heard):
                ours = chosen(states.flatten(0, 1), kept)
                values.append(chunked_loss(ours, weight, logits, None, labels, self.loss, scale=1 / count, dtype=self.dtype))
            torch.stack(values).sum().backward()
            found += [value.detach() for value in values]
        return torch.stack(found)

    def _inputs(self, batch: Batch, times: int, hidden: Tensor) -> dict[str, dict[str, Any]]:
        """The kwargs of each kind of layer for the batch, `times` over."""
        more: dict[str, Any] = {}
        if batch.positions is None:
            at = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
            more["packed"] = False
        else:
            at = batch.positions.repeat(times, 1)
            if self.student.config._attn_implementation == attention.NAME:
                several = Batch(batch.ids.repeat(times, 1), at, batch.labels, batch.loss_mask)
                more["cu_seq_lens_q"] = several.boundaries(batch.documents)
        told = self.student.model.layer_inputs(hidden, None, at, **more)
        return {kind: {**given, "position_ids": at} for kind, given in told.items()}

    @torch.no_grad()
    def _untouched(self, batch: Batch) -> dict[int, Tensor]:
        """What each candidate's layer hears [B, T, D]: the student's own hidden states below it."""
        with autocast(batch.ids.device, self.dtype):
            hidden = self.student.model.embed(batch.ids)
            told, heard = self._inputs(batch, 1, hidden), {}
            for index, layer in enumerate(self.student.model.layers[: self.layers[-1] + 1]):
                heard[index] = hidden
                if index < self.layers[-1]:
                    hidden = layer(hidden, **told[self.student.config.layer_types[index]])
        return {layer: heard[layer] for layer in self.layers}

    def _forward(self, batch: Batch, group: list[int], heard: dict[int, Tensor]) -> Sequence[Tensor]:
        """Final hidden states [B, T, D] of each candidate of a group, which enter one by one as the
        layers go up."""
        model, begun = self.student.model, []
        hidden: Tensor | None = None
        with autocast(batch.ids.device, self.dtype):
            told: dict[str, dict[str, Any]] = {}
            for index in range(group[0], len(model.layers)):
                if hidden is not None:
                    hidden = model.layers[index](hidden, **told[self.student.config.layer_types[index]])
                if index in group:
                    alone = self._inputs(batch, 1, heard[index])[MIXER_LAYER]
                    fresh = self.mixed[str(index)](heard[index], **alone)
                    begun.append(index)
                    hidden = fresh if hidden is None else torch.cat([hidden, fresh])
                    told = self._inputs(batch, len(begun), hidden)
            assert hidden is not None
            return before_output(self.student, model.norm(hidden)).chunk(len(begun))

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.mixed.named_parameters() if p.requires_grad)

    def save(self, path: Path) -> None:
        """Everything that changes, whole or not at all."""
        state = {"losses": torch.stack(self.losses)}
        for name, parameter in self._trained():
            state[f"weight.{name}"] = parameter.detach()
            state |= {f"{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        write_tensors(state, path)

    def load(self, path: Path) -> None:
        state, device = load_file(path), output_weight(self.student).device
        for name, parameter in self._trained():
            with torch.no_grad():
                parameter.copy_(state[f"weight.{name}"])
            # AdamW counts its steps on the device only where it is fused
            places = {"step": device if self.optimizer.defaults["fused"] else torch.device("cpu")}
            self.optimizer.state[parameter] = {
                key: state[f"{key}.{name}"].to(places.get(key, device)) for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.losses = list(state["losses"].to(device).unbind())


def train(
    candidates: Candidates, batches: Iterable[Batch], state: Path | None = None, progress: Progress = lambda *_: None
) -> Tensor:
    """The losses [steps, candidates] of all steps, going on from `state` where that file is; it is
    written every SAVE_EVERY.

    batches: one a step, from the first step on also when some are done; on the student's device.
    """
    if state is not None and state.exists():
        candidates.load(state)
    steps, done = candidates.settings.total_steps, len(candidates.losses)
    for number, batch in enumerate(batches, start=1):
        if number <= done:
            continue
        candidates.step(batch)
        progress(number, steps)
        if state is not None and (number % SAVE_EVERY == 0 or number == steps):
            candidates.save(state)
    return torch.stack(candidates.losses)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Whole or not at all."""
    beside = path.with_name(f"{path.name}.new")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    beside.replace(path)
