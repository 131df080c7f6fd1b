"""The Mamba-1 mixer in M1's grouped form (2504.10449, section 3; DESIGN section 4), a drop-in for a `self_attn` module.

Knows nothing of the layers around it. Shapes: B batch, T time, D hidden, I inner = query heads * head_dim,
X = key/value heads * head_dim, N state size, R rank of dt, G = I / N groups.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_hybridize import HybridConfig
from .scan import causal_conv, selective_scan

FLOAT32 = ("A_log", "D", "dt_bias")  # parameters that stay float32 under every cast


def initial(name: str, shape: tuple[int, ...], fan_in: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The starting value of a mixer parameter, float32 on the CPU.

    A = -(1..N), D = 1, dt bias = the inverse softplus of log-uniform [1e-3, 1e-1] (2312.00752, section 3.6); everything else
    is uniform in +-fan_in^-1/2, torch's default for linear and convolution; fan_in is the last dimension unless given.
    """
    if name == "A_log":
        return torch.arange(1, shape[1] + 1, dtype=torch.float32).log().repeat(shape[0], 1)
    if name == "D":
        return torch.ones(shape)
    if name == "dt_bias":
        step = torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
        return step + torch.log(-torch.expm1(-step))
    bound = (fan_in or shape[-1]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class MambaMixer(nn.Module):
    """in_proj rows, in order: z (I), x (X), B (X), C (I), dt (R); x and B are expanded from key/value to query heads."""

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        shape = config.mixer
        assert shape is not None
        self.layer_idx, self.d_state, self.d_conv = layer_idx, shape["d_state"], shape["d_conv"]
        self.inner, self.rank = shape["d_inner"], shape["dt_rank"]
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kv = config.num_key_value_heads * head
        self.repeats = self.inner // self.kv
        self.unit = head if shape["expand"] == "head" else self.d_state  # what is repeated as a whole
        if shape["expand"] not in ("head", "chunk") or self.inner % self.kv or head % self.d_state:
            raise ValueError(f"mixer {shape} does not fit {config.num_key_value_heads} key/value heads of {head}")
        rows = 2 * self.inner + 2 * self.kv + self.rank
        self.in_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.conv1d = nn.Conv1d(self.inner, self.inner, self.d_conv, groups=self.inner, bias=True)
        self.dt_proj = nn.Linear(self.rank, self.inner, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(self.inner, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.zeros(self.inner, self.d_state, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(self.inner, dtype=torch.float32))
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        with torch.device("cpu"):
            for name, parameter in self.named_parameters():
                fan_in = self.d_conv if name == "conv1d.bias" else None
                parameter.copy_(initial(name, tuple(parameter.shape), fan_in))

    def _apply(self, fn: Any, recurse: bool = True) -> MambaMixer:
        """Moves with the module, but never changes the type of A_log, D and dt bias: bf16 loses small steps and decays."""
        kept = {name: getattr(self, name).data for name in FLOAT32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = before.to(parameter.device)
        return self

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        seq_idx: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, D]; attention_mask [B, T] bool, False at padding; seq_idx [B, T] int, a document's number.

        past_key_values: a transformers cache whose layer `layer_idx` is a linear-attention layer; read and updated in place.
        Returns ([B, T, D], None), the second in place of attention weights.
        """
        sizes = [self.inner, self.kv, self.kv, self.inner, self.rank]
        z, x, B, C, dt = self.in_proj(hidden_states).split(sizes, dim=-1)
        dt = self.dt_proj(dt)
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1).to(x.dtype)
        x = self._expand(x)
        state, length = None, x.shape[1]
        assert self.conv1d.bias is not None
        conv = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if past_key_values is not None:
            # `layers[i]` and not the get_*_state helpers: transformers 5.17 lacks them
            layer = past_key_values.layers[self.layer_idx]
            if layer.has_previous_state[0]:
                state = layer.recurrent_states[0]
            window = layer.update_conv_state(x.transpose(1, 2), conv_kernel_size=self.d_conv).transpose(1, 2)
            window = window[:, -(length + self.d_conv - 1) :]
            x = causal_conv(window.to(x.dtype), *conv)[:, -length:]
        else:
            x = causal_conv(x, *conv, seq_idx=seq_idx)
        reset = None
        if seq_idx is not None:
            reset = torch.cat([seq_idx.new_zeros(len(x), 1, dtype=torch.bool), seq_idx[:, 1:] != seq_idx[:, :-1]], 1)
        groups = (2, (-1, self.d_state))
        y, last = selective_scan(
            x, dt, -torch.exp(self.A_log.float()), self._expand(B).unflatten(*groups), C.unflatten(*groups),
            self.D, self.dt_bias, keep=attention_mask, reset=reset, state=state,
        )  # fmt: skip
        if past_key_values is not None:
            layer.update_recurrent_state(last)
        return self.out_proj(y * nn.functional.silu(z)), None

    def _expand(self, t: Tensor) -> Tensor:
        """[B, T, X] -> [B, T, I]: each unit (a head, or M1's chunk of N) stands once for every query head that shares it."""
        return t.unflatten(-1, (-1, 1, self.unit)).expand(-1, -1, -1, self.repeats, -1).flatten(2)
