"""Stand-ins for the step kernels of mamba-ssm and causal-conv1d, by their documented shapes: CI has
no GPU, and what our code hands to them can be wrong in ways of its own."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F


def state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):  # type: ignore[no-untyped-def]
    """state [b, h, d, n] in place; x, dt [b, h, d]; A [h, d, n]; B, C [b, g, n]; D, dt_bias [h, d]."""
    assert state.dtype == torch.float32
    assert z is None
    assert x.shape == dt.shape == state.shape[:3]
    assert A.shape == state.shape[1:]
    assert D.shape == dt_bias.shape == state.shape[1:3]
    assert B.shape == C.shape
    wide = [t.double().repeat_interleave(state.shape[1] // t.shape[1], 1) for t in (B, C)]
    delta = F.softplus(dt.double() + dt_bias) if dt_softplus else dt.double() + dt_bias
    decay = torch.exp(delta.unsqueeze(-1) * A)
    state.copy_(state.double() * decay + (delta * x).unsqueeze(-1) * wide[0].unsqueeze(2))
    return ((state.double() * wide[1].unsqueeze(2)).sum(-1) + D * x).to(x.dtype)


def conv_update(x, conv_state, weight, bias=None, activation=None):  # type: ignore[no-untyped-def]
    """x [b, c]; conv_state [b, c, k] in place; weight [c, k]."""
    assert x.is_contiguous()
    assert activation == "silu"
    assert x.dtype == conv_state.dtype == weight.dtype == bias.dtype
    conv_state.copy_(torch.cat([conv_state[..., 1:], x.unsqueeze(-1)], -1))
    return F.silu((conv_state.double() * weight).sum(-1) + bias).to(x.dtype)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' modules, with nothing but these in them."""
    parts: dict[str, dict[str, Any]] = {
        "mamba_ssm": {}, "mamba_ssm.ops": {}, "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": state_update},
        "causal_conv1d": {"causal_conv1d_update": conv_update},
    }  # fmt: skip
    for name, content in parts.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
