"""Trains all MMR candidates of one process in parallel.

A batch goes once through the teacher and once through the unmodified student. Each candidate runs
from its own layer on, and all candidates that started at a lower layer go through a layer together,
as rows of one batch. Shapes: B sequences, T tokens, D hidden size.
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

SAVE_EVERY = 10  # steps between saved states


def converted(student: HybridForCausalLM, mixer: dict[str, Any], layer: int, values: dict[str, Tensor]) -> nn.Module:
    """Returns a copy of one layer with a trainable float32 mixer of parameters `values`; all other
    modules are shared with the original."""
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
    """Casts frozen projections to `dtype`, which saves autocast from doing so at every use."""
    for part in student.model.layers.modules():
        if dtype != torch.float32 and isinstance(part, nn.Linear) and not part.weight.requires_grad:
            part.weight.data = part.weight.data.to(dtype)


class Candidates:
    """The converted layers and one optimizer for all of them; AdamW updates weights independently."""

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
        """mixer: the new mixers' config entry; starts: the initial parameters of each candidate
        layer's mixer.

        student, teacher: on one device; unchanged, except that the student is frozen and its
        projections become `dtype`. room: bytes for the activations of one group; None: all
        candidates form one group.
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
        self.losses: list[Tensor] = []  # per step [candidates], in the order of `layers`
        self.groups = self._groups(room)

    def _groups(self, room: int | None) -> list[list[int]]:
        """Splits the candidates into groups of neighbours whose activations, as estimated by
        distillation.plan, fit into `room` bytes."""
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
        """Takes one optimizer step with every candidate."""
        losses = self.optimization.take(len(self.losses), lambda: self._gradients(batch))
        self.losses.append(losses)

    def _gradients(self, batch: Batch) -> Tensor:
        """Adds every candidate's gradient; returns their losses [candidates] in the order of
        `layers`."""
        inputs = self._layer_inputs(batch)
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
            for states in self._forward(batch, group, inputs):
                ours = chosen(states.flatten(0, 1), kept)
                values.append(chunked_loss(ours, weight, logits, None, labels, self.loss, scale=1 / count, dtype=self.dtype))
            torch.stack(values).sum().backward()
            found += [value.detach() for value in values]
        return torch.stack(found)

    def _inputs(self, batch: Batch, times: int, hidden: Tensor) -> dict[str, dict[str, Any]]:
        """Returns the kwargs of each kind of layer, for the batch repeated `times` times."""
        more: dict[str, Any] = {}
        if batch.positions is None:
            at = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
            more["packed"] = False
        else:
            at = batch.positions.repeat(times, 1)
            if self.student.config._attn_implementation == attention.NAME:
                several = Batch(batch.ids.repeat(times, 1), at, batch.labels, batch.loss_mask)
                more["cu_seq_lens_q"] = several.boundaries(batch.documents)
        kwargs = self.student.model.layer_inputs(hidden, None, at, **more)
        return {kind: {**given, "position_ids": at} for kind, given in kwargs.items()}

    @torch.no_grad()
    def _layer_inputs(self, batch: Batch) -> dict[int, Tensor]:
        """Returns the inputs [B, T, D] of each candidate's layer: the unmodified student's hidden
        states."""
        with autocast(batch.ids.device, self.dtype):
            hidden = self.student.model.embed(batch.ids)
            kwargs, states = self._inputs(batch, 1, hidden), {}
            for index, layer in enumerate(self.student.model.layers[: self.layers[-1] + 1]):
                states[index] = hidden
                if index < self.layers[-1]:
                    hidden = layer(hidden, **kwargs[self.student.config.layer_types[index]])
        return {layer: states[layer] for layer in self.layers}

    def _forward(self, batch: Batch, group: list[int], inputs: dict[int, Tensor]) -> Sequence[Tensor]:
        """Returns the final hidden states [B, T, D] of each candidate in a group. A candidate joins
        the batch at its own layer. inputs: of the candidates' layers."""
        model, begun = self.student.model, []
        hidden: Tensor | None = None
        with autocast(batch.ids.device, self.dtype):
            kwargs: dict[str, dict[str, Any]] = {}
            for index in range(group[0], len(model.layers)):
                if hidden is not None:
                    hidden = model.layers[index](hidden, **kwargs[self.student.config.layer_types[index]])
                if index in group:
                    alone = self._inputs(batch, 1, inputs[index])[MIXER_LAYER]
                    fresh = self.mixed[str(index)](inputs[index], **alone)
                    begun.append(index)
                    hidden = fresh if hidden is None else torch.cat([hidden, fresh])
                    kwargs = self._inputs(batch, len(begun), hidden)
            assert hidden is not None
            return before_output(self.student, model.norm(hidden)).chunk(len(begun))

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.mixed.named_parameters() if p.requires_grad)

    def save(self, path: Path) -> None:
        """Saves losses, trained weights and optimizer state to `path`, atomically."""
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
            # only fused AdamW keeps its step count on the device
            places = {"step": device if self.optimizer.defaults["fused"] else torch.device("cpu")}
            self.optimizer.state[parameter] = {
                key: state[f"{key}.{name}"].to(places.get(key, device)) for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.losses = list(state["losses"].to(device).unbind())


def train(
    candidates: Candidates, batches: Iterable[Batch], state: Path | None = None, progress: Progress = lambda *_: None
) -> Tensor:
    """Trains to the last step and returns the losses [steps, candidates] of all steps. Resumes from
    the file `state` if it exists, and writes it every SAVE_EVERY steps.

    batches: one per step, starting at the first step also when resuming; on the student's device.
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
    """Writes tensors to `path`, atomically."""
    beside = path.with_name(f"{path.name}.new")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    beside.replace(path)
