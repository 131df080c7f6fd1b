"""A frozen model whose layers stay in host memory and are on the device only while they run.

Knows nothing of distillation: any model with `base_model.layers`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def offload(model: Any, device: torch.device) -> None:
    """Moves a model that is on the CPU and never trained to `device`, all but the weights of its
    layers.

    Those are kept on the host, page-locked for a GPU, and each pass copies every layer once, so a
    pass costs at least the bytes of the layers over the bus (16 GB of an 8 B model at 55 GB/s: 0.3
    s), however many tokens it has. Copies and layers share a stream: a layer's room is free again
    as soon as it has run.
    """
    for layer in model.base_model.layers:
        held = [(p, p.data.pin_memory() if device.type == "cuda" else p.data) for p in layer.parameters()]
        _leave(held)
        layer.register_forward_pre_hook(lambda *_, held=held: _bring(held, device))
        layer.register_forward_hook(lambda *_, held=held: _leave(held), always_call=True)
    model.to(device)


def _bring(held: list[tuple[nn.Parameter, Tensor]], device: torch.device) -> None:
    for parameter, value in held:
        parameter.data = value.to(device, non_blocking=True)


def _leave(held: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, _ in held:
        parameter.data = parameter.data.new_empty(0)
