"""Estimates a distillation's peak memory per rank and its FLOPs from the configs, without loading
weights.

Activations are counted in bytes per token as eager autograd keeps them under bfloat16 autocast,
with weights and the residual stream in float32. D is the hidden size, A query heads x head size, K
key/value heads x head size, F the MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hybridize.distillation.losses import CHUNK_BYTES
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.watch import model_flops
from hybridize.modeling import MIXER_LAYER
from hybridize.surgery.families import FAMILIES, FamilySpec
from hybridize.surgery.mixers import kind_of

GIB = 2**30
# Share of a layer's activations that torch.compile keeps; it recomputes cheap ones in backward.
# Measured on H100s: 0.55 to 0.62 for SmolLM2 and Llama-3B shapes, with and without a CUDA graph, on
# one rank and two (docs/performance.md)
COMPILED = 0.6
PROCESS = int(0.8 * GIB)  # memory of Python, torch and the other libraries, on a CPU
# Temporary memory of uncompiled PyTorch on a CPU: copies of the largest trained matrix in the
# optimizer step, and of the logits in the loss, which is compiled only on GPUs. Fitted to CPU runs
COPIES, PLAIN_LOSS = 4, 3.5


@dataclass(frozen=True)
class Plan:
    """Peak memory of a rank within a step, in bytes by part; training tokens; FLOPs for all of
    them."""

    bytes: dict[str, float]
    tokens: int
    flops: float

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


def _widths(config: Any) -> tuple[int, int, int, int, FamilySpec]:
    """Returns D, A, K and F of a dense layer (see the module's docstring) and the family."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    family = getattr(config, "base_model_type", None) or config.model_type
    A, K = config.num_attention_heads * head, config.num_key_value_heads * head
    return config.hidden_size, A, K, config.intermediate_size, FAMILIES[family]


def layer_bytes(config: Any, kind: str, length: int) -> int:
    """Returns the bytes per token that one layer keeps for backward in sequences of `length`. The
    tests compare this with the tensors that autograd saves."""
    D, A, K, F, family = _widths(config)
    norm = 8 * D + 4  # input (the residual stream), normalized input and scale
    mlp = norm + 2 * 2 * D + 4 * 2 * F  # two casts of the input; gate, its SiLU, up, their product
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        # for each of a token's experts: input and output, gathered, cast and weighted, and the MLP
        # as above
        mlp = norm + config.num_experts_per_tok * (24 * D + 4 * 2 * (getattr(config, "moe_intermediate_size", None) or F))
    normed = 8 * (A + K) if family.qk_norm else 0
    mlp += 2 * norm if family.sandwich else 0
    if kind != MIXER_LAYER:
        # only eager attention keeps scores and probabilities; others keep at most the additive mask
        # of a sliding window
        window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
        maps = 2 * length if window is not None and window < length else 0
        maps = 8 * config.num_attention_heads * length if config._attn_implementation == "eager" else maps
        # three casts of the input; q, k, v and the output, shared with o_proj; log-sum-exp per head
        return norm + 3 * 2 * D + 2 * (2 * A + 2 * K) + 4 * config.num_attention_heads + normed + maps + mlp
    return norm + 2 * D + int(kind_of(config.mixer["kind"]).kept_bytes(config.mixer, A, K, plain=False)) + normed + mlp


def plain_bytes(config: Any, kind: str) -> int:
    """Returns the same as `layer_bytes` for float32 on a CPU, where scans are plain PyTorch and
    nothing is cast. Experts count as their MLPs."""
    D, A, K, F, family = _widths(config)
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        F = config.num_experts_per_tok * (getattr(config, "moe_intermediate_size", None) or F)
    rest = 2 * (12 * D + 4) + 16 * F  # two norms: input, scaled input, result; gate, its SiLU, up, their product
    rest += (16 * (A + K) if family.qk_norm else 0) + (2 * (8 * D + 4) if family.sandwich else 0)
    if kind != MIXER_LAYER:
        return rest + 4 * (2 * A + 2 * K + config.num_attention_heads)
    return rest + int(kind_of(config.mixer["kind"]).kept_bytes(config.mixer, A, K, plain=True))


def kept_bytes(config: Any, kind: str, length: int, dtype: torch.dtype, device: str) -> int:
    """Returns the bytes per token that one layer keeps for backward in sequences of `length`, on a
    device that computes in `dtype`."""
    if device == "cpu":
        return plain_bytes(config, kind)
    return layer_bytes(config, kind, length) * dtype.itemsize // 2  # layer_bytes assumes two bytes per value


def plan(student: Any, teacher: Any, settings: DistillSettings, ranks: int, dtype: torch.dtype, device: str = "cuda") -> Plan:
    """Plans a run. student, teacher: models without storage, teacher None if the loss needs none;
    device: `cuda` or `cpu`. Sets requires_grad of the student's parameters."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(settings.trains(name))
    config, wide, shards = student.config, dtype.itemsize, ranks if settings.shard else 1
    ours = 1 if settings.stage == "align" else shards  # alignment does not shard the student
    count = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    rows = min(settings.micro, settings.batch_size // ranks)
    tokens = rows * settings.seq_len
    share = COMPILED if settings.compile else 1.0
    layers = [share * kept_bytes(config, kind, settings.seq_len, dtype, device) for kind in config.layer_types]
    residual = 4 * config.hidden_size
    again = settings.recomputed(len(layers))
    kept = sum(residual if index in again else size for index, size in enumerate(layers))
    kept += max((size for index, size in enumerate(layers) if index in again), default=0)
    logits = (PLAIN_LOSS if device == "cpu" else 1) * min(CHUNK_BYTES, 2 * wide * tokens * config.vocab_size)
    parts = {
        "student's weights": 4 * count / ours,
        "gradients": 4 * trained / ours,
        "AdamW's moments": 8 * trained / ours,
        "teacher's weights": 0 if teacher is None else wide * _on_device(teacher, settings, shards),
        "weights as computed in": wide * (count if ours == 1 else _largest(student) + _rest(student)),
        "activations": tokens * (kept + 3 * residual),
        "logits": logits + (0 if not student.get_output_embeddings().weight.requires_grad else wide * _head(student)),
    }
    if settings.on_policy:
        parts["copy of the student that answers prompts"] = wide * count
    if shards > 1 and teacher is not None and not settings.offload_teacher:
        parts["teacher's layer, gathered"] = wide * (_largest(teacher) + _rest(teacher))
    if wide == 4:
        parts.pop("weights as computed in")
    if device == "cpu":
        largest = max((p.numel() for p in student.parameters() if p.requires_grad), default=0)
        copies = 4 * COPIES * largest  # after activations and logits are freed
        parts["optimizer's copies, beyond"] = max(0, copies - parts["activations"] - parts["logits"])
        parts["Python and its libraries"] = PROCESS
    seen = settings.total_steps * settings.batch_size * settings.seq_len
    return Plan(parts, seen, float(model_flops(student, teacher) * seen))


def micro_that_fits(
    student: Any, teacher: Any, settings: DistillSettings, ranks: int, dtype: torch.dtype, device: str, room: float
) -> tuple[int, float]:
    """Returns the largest micro-batch size that divides a rank's rows evenly and whose plan fits
    into `room` bytes (at least 1), and the bytes of that plan."""
    rows = settings.batch_size // ranks
    for micro in (rows // parts for parts in range(1, rows + 1) if rows % parts == 0):
        total = plan(student, teacher, replace(settings, micro_batch_size=micro), ranks, dtype, device).total
        if total <= room or micro == 1:
            break
    return micro, total


def _on_device(teacher: Any, settings: DistillSettings, shards: int) -> float:
    """Returns how many of the teacher's weights are on a rank's device."""
    if settings.offload_teacher:
        return _largest(teacher) + _rest(teacher)
    return sum(p.numel() for p in teacher.parameters()) / shards


def _head(model: Any) -> int:
    return model.get_output_embeddings().weight.numel()


def _largest(model: Any) -> int:
    return max(sum(p.numel() for p in layer.parameters()) for layer in model.base_model.layers)


def _rest(model: Any) -> int:
    """Returns the number of weights outside the layers; FSDP's root keeps them gathered for the
    whole pass."""
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.base_model.layers.parameters())
