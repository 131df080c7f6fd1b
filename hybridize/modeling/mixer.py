"""What every mixer shares: starting values, parameters that stay float32, and the convolution with its cache.

Knows nothing of the layers around a mixer. Shapes: B batch, T time, I inner = query heads * head_dim, K taps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .scan import causal_conv, conv_step

FLOAT32 = ("A_log", "D", "dt_bias")  # parameters that stay float32 under every cast


def initial(name: str, shape: tuple[int, ...], fan_in: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The starting value of a mixer parameter, float32 on the CPU.

    A = -(1..N) a channel (Mamba) or uniform in -[1, 16] a head (Mamba-2, 2405.21060), D = 1, dt bias = the inverse softplus
    of log-uniform [1e-3, 1e-1] (2312.00752, section 3.6), norm 1; everything else is uniform in +-fan_in^-1/2, torch's
    default for linear and convolution; fan_in is the last dimension unless given.
    """
    if name == "A_log":
        if len(shape) == 1:
            return torch.empty(shape).uniform_(1, 16, generator=generator).log()
        return torch.arange(1, shape[1] + 1, dtype=torch.float32).log().repeat(shape[0], 1)
    if name in ("D", "norm.weight", "B_norm.weight", "C_norm.weight"):
        return torch.ones(shape)
    if name in ("in_proj.bias", "out_proj.bias"):
        return torch.zeros(shape)
    if name == "dt_bias":
        return inverse_softplus(torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp())
    bound = (fan_in or shape[-1]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def inverse_softplus(step: Tensor) -> Tensor:
    """t with softplus(t) = step, for step > 0."""
    return step + torch.log(-torch.expm1(-step))


class VectorNorm(nn.Module):
    """RMSNorm of B or C as the teacher's attention has of keys or queries: over each head, or over all of them together."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.full((size,), 1.0 - offset)), eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, n * size] -> the same, each run of `size` channels by itself."""
        runs = x.float().unflatten(-1, (-1, self.weight.shape[0]))
        runs = runs * torch.rsqrt(runs.square().mean(-1, keepdim=True) + self.eps)
        return (runs * (self.offset + self.weight.float())).flatten(-2).to(x.dtype)


class Mixer(nn.Module):
    """Base of all mixers. A subclass has `in_proj`, `conv1d`, `out_proj`, and the parameters named in FLOAT32."""

    layer_idx: int
    conv1d: nn.Conv1d

    def _add_norms(self, shape: dict[str, Any], head: int, keys: int, queries: int, eps: float) -> None:
        """B_norm and C_norm where the config has `norm_bc`, else nothing; keys, queries: channels of B and C."""
        given = shape.get("norm_bc")
        sizes = (head, head) if given and given["over"] == "head" else (keys, queries)
        made = [VectorNorm(size, eps, given["offset"]) if given else nn.Identity() for size in sizes]
        self.B_norm, self.C_norm = made

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Plain starting values for all parameters."""
        with torch.device("cpu"):
            for name, parameter in self.named_parameters():
                if parameter.is_meta:
                    continue
                fan_in = self.conv1d.kernel_size[0] if name == "conv1d.bias" else None
                value = initial(name, tuple(parameter.shape), fan_in)
                offset = getattr(getattr(self, name.split(".")[0]), "offset", 0.0)
                parameter.copy_(value - offset)

    def _apply(self, fn: Any, recurse: bool = True) -> Mixer:
        """Moves with the module, but never changes the type of A_log, D and dt bias: bf16 loses small steps and decays."""
        kept = {name: getattr(self, name).data for name in FLOAT32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = before.to(parameter.device)
        return self

    def _convolve(self, x: Tensor, attention_mask: Tensor | None, cache: Any, seq_idx: Tensor | None) -> tuple[Tensor, Any]:
        """[B, T, channels] -> the same after convolution and SiLU, and the state that a cached prefix left, if any.

        Continues from and updates the window in `cache`; padding enters as zeros.
        """
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1).to(x.dtype)
        assert self.conv1d.bias is not None
        conv = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if cache is None:
            return causal_conv(x, *conv, seq_idx=seq_idx), None
        # `layers[i]` and not the get_*_state helpers: transformers 5.17 lacks them
        layer, taps, length = cache.layers[self.layer_idx], self.conv1d.kernel_size[0], x.shape[1]
        if self._steps(cache, x):
            return conv_step(x[:, 0], layer.conv_states[0], *conv).unsqueeze(1), layer.recurrent_states[0]
        state = layer.recurrent_states[0] if layer.has_previous_state[0] else None
        window = layer.update_conv_state(x.transpose(1, 2), conv_kernel_size=taps).transpose(1, 2)
        window = window[:, -(length + taps - 1) :]
        return causal_conv(window.to(x.dtype), *conv)[:, -length:], state

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of one sequence's recurrent state, which is float32."""
        raise NotImplementedError

    def state_bytes(self, dtype: torch.dtype) -> int:
        """What one sequence keeps: the window in `dtype`, the state in float32."""
        return self.conv1d.weight.shape[0] * self.conv1d.kernel_size[0] * dtype.itemsize + 4 * math.prod(self.state_shape)

    def _steps(self, cache: Any, x: Tensor) -> bool:
        """Whether x [B, T, channels] is one more token for a cache whose states may be moved on in place, as it says itself.
        transformers' caches may not: what is to be rolled back keeps its past."""
        return cache is not None and x.shape[1] == 1 and getattr(cache.layers[self.layer_idx], "inplace", False)

    def _store(self, cache: Any, state: Tensor) -> None:
        if cache is not None and state is not cache.layers[self.layer_idx].recurrent_states[0]:  # else it has been moved on
            cache.layers[self.layer_idx].update_recurrent_state(state)


def document_starts(seq_idx: Tensor | None) -> Tensor | None:
    """[B, T] bool, True where another document begins inside a row; None for None."""
    if seq_idx is None:
        return None
    return nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
