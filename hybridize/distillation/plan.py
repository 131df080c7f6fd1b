"""What a distillation will take, from the configs alone: bytes a rank at the peak, FLOPs, hours. Nothing is loaded.

Activations are counted as eager autograd keeps them under bfloat16 autocast, weights and the residual stream in float32; D
hidden size, A query heads x head size, K key/value heads x head size, F MLP width; bytes a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hybridize.distillation.losses import CHUNK_BYTES
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.watch import PEAKS, model_flops
from hybridize.modeling import MIXER_LAYER
from hybridize.surgery.teacher import GEMMA

GIB = 2**30
QK_NORMED = ("qwen3", "qwen3_moe", "gemma3_text", "olmo2")
# The share that torch.compile keeps of a layer: what is cheap is computed again in backward. Measured on H100s, SmolLM2 and
# Llama-3B shapes, graph or not, one rank or two: 0.55 to 0.62 (docs/performance.md)
COMPILED = 0.6
ASSUMED = 0.4 * PEAKS["H100"] * 1e12  # FLOP/s: 40% of an H100's dense bfloat16 peak


@dataclass(frozen=True)
class Plan:
    """Bytes a rank by part, at the peak in the middle of a step; FLOPs of all tokens; hours at `ASSUMED` a rank."""

    bytes: dict[str, float]
    tokens: int
    flops: float
    hours: float

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


def layer_bytes(config: Any, kind: str, length: int) -> int:
    """What one layer keeps for backward, a token of a row of `length`. Checked against autograd's own list in the tests."""
    D, F = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or D // config.num_attention_heads
    A, K = config.num_attention_heads * head, config.num_key_value_heads * head
    norm = 8 * D + 4  # its input, which is the residual stream, what its weight multiplies, and the scale
    mlp = norm + 2 * 2 * D + 4 * 2 * F  # two casts of the input; gate, its SiLU, up, their product
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        # of each expert that a token goes through: its input and output, gathered, cast and weighed, and as above
        mlp = norm + config.num_experts_per_tok * (24 * D + 4 * 2 * (getattr(config, "moe_intermediate_size", None) or F))
    family = getattr(config, "base_model_type", None) or config.model_type
    normed = 8 * (A + K) if family in QK_NORMED else 0
    mlp += 2 * norm if family in GEMMA else 0
    if kind != MIXER_LAYER:
        # eager attention's scores and what becomes of them, which other attention never keeps; a window's mask as numbers
        window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
        maps = 2 * length if window is not None and window < length else 0
        maps = 8 * config.num_attention_heads * length if config._attn_implementation == "eager" else maps
        # three casts of the input; q, k, v and the output, which o_proj shares; the softmax's sums
        return norm + 3 * 2 * D + 2 * (2 * A + 2 * K) + 4 * config.num_attention_heads + normed + maps + mlp
    shape, mlp = config.mixer, mlp + normed
    if shape["kind"] == "mamba2":
        # in_proj's output; the convolution's input and output; x, B, C side by side; y, z and the normed product; step sizes
        return norm + 2 * D + 2 * (4 * A + 3 * A + 3 * A + 3 * A + 4 * A) + 12 * (A // shape["d_state"]) + mlp
    # in_proj's output; expanded x, conv in and out; dt in, out; x, dt, B, C as the kernel has them; y, z, gate, product
    return norm + 2 * D + 2 * (2 * A + 2 * K + shape["dt_rank"] + 3 * A + 2 * A + 4 * A + 5 * A) + mlp


def plan(student: Any, teacher: Any, settings: DistillSettings, ranks: int, dtype: torch.dtype) -> Plan:
    """student, teacher: models without storage, teacher None for a loss that needs none."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(settings.trains(name))
    config, wide, shards = student.config, dtype.itemsize, ranks if settings.shard else 1
    ours = 1 if settings.stage == "align" else shards  # alignment has the student whole
    count = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    rows = min(settings.micro, settings.batch_size // ranks)
    tokens = rows * settings.seq_len
    share = COMPILED if settings.compile else 1.0
    layers = [share * layer_bytes(config, kind, settings.seq_len) for kind in config.layer_types]
    residual = 4 * config.hidden_size
    again = settings.recomputed(len(layers))
    kept = sum(residual if index in again else size for index, size in enumerate(layers))
    kept += max((size for index, size in enumerate(layers) if index in again), default=0)
    logits = min(CHUNK_BYTES, 2 * wide * tokens * config.vocab_size)
    parts = {
        "student's weights": 4 * count / ours,
        "gradients": 4 * trained / ours,
        "AdamW's moments": 8 * trained / ours,
        "teacher's weights": 0 if teacher is None else wide * _there(teacher, settings, shards),
        "weights as computed in": wide * (count if ours == 1 else _largest(student) + _rest(student)),
        "activations": tokens * (kept + 3 * residual),
        "logits": logits + (0 if not student.get_output_embeddings().weight.requires_grad else wide * _head(student)),
    }
    if shards > 1 and teacher is not None and not settings.offload_teacher:
        parts["teacher's layer, gathered"] = wide * (_largest(teacher) + _rest(teacher))
    if wide == 4:
        parts.pop("weights as computed in")
    seen = settings.total_steps * settings.batch_size * settings.seq_len
    flops = float(model_flops(student, teacher) * seen)
    return Plan(parts, seen, flops, flops / (ASSUMED * ranks) / 3600)


def _there(teacher: Any, settings: DistillSettings, shards: int) -> float:
    """How many of the teacher's weights a rank's device holds."""
    if settings.offload_teacher:
        return _largest(teacher) + _rest(teacher)
    return sum(p.numel() for p in teacher.parameters()) / shards


def _head(model: Any) -> int:
    return model.get_output_embeddings().weight.numel()


def _largest(model: Any) -> int:
    return max(sum(p.numel() for p in layer.parameters()) for layer in model.base_model.layers)


def _rest(model: Any) -> int:
    """What belongs to no layer: FSDP's root keeps it gathered for the whole pass."""
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.base_model.layers.parameters())
