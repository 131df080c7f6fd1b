"""The Mamba-2 mixer (2405.21060), identical to the layer of GraniteMoeHybridForCausalLM, so that
stock runtimes can serve it (hybridize's docs/concepts/architecture.md). KV heads are repeated per
query head in the weights: every head is its own group.

Shapes: B batch, T time, D hidden size, H heads, P head size = N state size, I = H * P.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_hybridize import HybridConfig
from .mixer import Mixer, document_starts, register_mixer
from .ssd import gated_norm, ssd_scan


class GatedRMSNorm(nn.Module):
    """Applies the gate, then RMSNorm over each group of `group` channels."""

    def __init__(self, channels: int, group: int, eps: float) -> None:
        super().__init__()
        self.weight, self.group, self.eps = nn.Parameter(torch.ones(channels)), group, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Returns [B, T, channels], of y and z [B, T, channels]."""
        return gated_norm(y, z, self.weight, self.eps, self.group)


@register_mixer
class Mamba2Mixer(Mixer):
    """Mamba-2 with one group per head. Rows of in_proj, in order: z (I), x (I), B (I), C (I), dt
    (H); convolution and SiLU run over x, B and C; the gate comes before the norm."""

    kind = "mamba2"
    sizes = ("d_inner", "d_state", "d_conv")
    tunes = True

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        shape = config.mixer
        assert shape is not None
        self.layer_idx, self.inner, self.head = layer_idx, shape["d_inner"], shape["d_state"]
        if self.inner % self.head:
            raise ValueError(f"mixer {shape}: d_inner must be a multiple of d_state")
        self.heads = self.inner // self.head
        self.in_proj = nn.Linear(config.hidden_size, 4 * self.inner + self.heads, bias=shape.get("in_bias", False))
        self.conv1d = nn.Conv1d(3 * self.inner, 3 * self.inner, shape["d_conv"], groups=3 * self.inner, bias=True)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(self.heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(self.inner, self.head, config.rms_norm_eps)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=shape.get("out_bias", False))
        self.normed = "norm_bc" in shape
        self._add_norms(shape, self.head, self.inner, self.inner, config.rms_norm_eps)
        self.reset_parameters()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        seq_idx: Tensor | None = None,
        cache: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """See MambaMixer.forward."""
        cache = past_key_values if cache is None else cache
        z, xBC, dt = self.project(hidden_states)
        xBC, state = self._convolve(xBC, attention_mask, cache, seq_idx)
        kwargs: dict[str, Any] = {"mask": attention_mask, "reset": document_starts(seq_idx), "state": state}
        y, last = self.scan(xBC, dt, inplace=self._steps(cache, xBC), **kwargs)
        self._store(cache, last)
        return self.out_proj(self.norm(y, z)), None

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.heads, self.head, self.head

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns z [B, T, I]; x, B and C concatenated [B, T, 3 I]; dt [B, T, H]; of hidden states
        [B, T, D]."""
        z, xBC, dt = self.in_proj(hidden_states).split([self.inner, 3 * self.inner, self.heads], dim=-1)
        if self.normed:
            x, B, C = xBC.split(self.inner, dim=-1)
            xBC = torch.cat([x, self.B_norm(B), self.C_norm(C)], -1)
        return z, xBC, dt

    def scan(self, xBC: Tensor, dt: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Runs the part between convolution and gate; returns y [B, T, I] and the last state.
        kwargs: those of ssd_scan."""
        x, B, C = (t.unflatten(-1, (-1, self.head)) for t in xBC.split(self.inner, dim=-1))
        y, last = ssd_scan(x, dt, -torch.exp(self.A_log.float()), B, C, self.D, self.dt_bias, **kwargs)
        return y.flatten(2), last
