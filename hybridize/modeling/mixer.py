"""The base class of all mixers: initial values, parameters that stay float32, and the convolution
with its cache.

Independent of the layers around a mixer. Shapes: B batch, T time, I inner width = query heads *
head_dim, K taps.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .scan import causal_conv, conv_step

FLOAT32 = ("A_log", "D", "dt_bias")  # parameters that no cast changes


def initial(name: str, shape: tuple[int, ...], fan_in: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Returns the initial value of a mixer parameter, float32 on the CPU.

    A = -(1..N) per channel (Mamba) or uniform in [-16, -1] per head (Mamba-2, 2405.21060), D = 1,
    dt bias = the inverse softplus of log-uniform [1e-3, 1e-1] (2312.00752, section 3.6), norm
    weights 1, biases of in_proj and out_proj 0; everything else is uniform in +-fan_in^-1/2,
    torch's default for linear layers and convolutions. fan_in: the last dimension unless given.
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
    """Returns t with softplus(t) = step, for step > 0."""
    return step + torch.log(-torch.expm1(-step))


class VectorNorm(nn.Module):
    """RMSNorm of B or C, as the teacher's attention normalises keys or queries: over each head, or
    over all heads together."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.full((size,), 1.0 - offset)), eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """Normalises each group of `size` channels of x [B, T, n * size]; returns the same shape."""
        groups = x.float().unflatten(-1, (-1, self.weight.shape[0]))
        groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (groups * (self.offset + self.weight.float())).flatten(-2).to(x.dtype)


class Mixer(nn.Module):
    """Base class of all mixers. A subclass is constructed from (config, layer index) and has
    `in_proj`, `conv1d` and `out_proj`, the forward signature of a transformers attention layer, and
    `state_shape`.

    kind: its name in the config. sizes: the keys of the config's `mixer` that are positive
    integers. choices: the keys that take one of several words. Flags: fits_float16, no activation
    exceeds float16's range; deterministic, its CUDA kernels add in a fixed order; graphs_documents,
    a CUDA graph can capture a step on packed documents; tunes, its kernels autotune at first use,
    which takes minutes.
    """

    kind: ClassVar[str]
    sizes: ClassVar[tuple[str, ...]]
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    fits_float16: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    graphs_documents: ClassVar[bool] = True
    tunes: ClassVar[bool] = False
    initial = staticmethod(initial)

    layer_idx: int
    conv1d: nn.Conv1d

    @classmethod
    def check(cls, shape: dict[str, Any]) -> None:
        """Raises ValueError unless the config's `mixer` has valid values for all keys of this kind."""
        missing = [key for key in (*cls.sizes, *cls.choices) if key not in shape]
        if missing:
            raise ValueError(f"the config's `mixer` lacks {', '.join(missing)}")
        invalid = [f"{key} {shape[key]!r}" for key in cls.sizes if type(shape[key]) is not int or shape[key] < 1]
        if invalid:
            raise ValueError(f"the config's `mixer` has {', '.join(invalid)}; these must be whole numbers above 0")
        for key, words in cls.choices.items():
            if shape[key] not in words:
                raise ValueError(f"the config's `mixer` has {key} {shape[key]!r}; it must be {' or '.join(words)}")

    def _add_norms(self, shape: dict[str, Any], head: int, keys: int, queries: int, eps: float) -> None:
        """Adds B_norm and C_norm, as the config's `norm_bc` says; identities if it has none. keys,
        queries: the channels of B and of C."""
        given = shape.get("norm_bc")
        sizes = (head, head) if given and given["over"] == "head" else (keys, queries)
        made = [VectorNorm(size, eps, given["offset"]) if given else nn.Identity() for size in sizes]
        self.B_norm, self.C_norm = made

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets all parameters to their initial values (see `initial`)."""
        with torch.device("cpu"):
            for name, parameter in self.named_parameters():
                if parameter.is_meta:
                    continue
                fan_in = self.conv1d.kernel_size[0] if name == "conv1d.bias" else None
                value = self.initial(name, tuple(parameter.shape), fan_in)
                offset = getattr(getattr(self, name.split(".")[0]), "offset", 0.0)
                parameter.copy_(value - offset)

    def _apply(self, fn: Any, recurse: bool = True) -> Mixer:
        """Applies fn as nn.Module does, but keeps A_log, D and dt bias in float32: bfloat16 loses
        small steps and decays."""
        originals = {name: p.data for name, p in self._parameters.items() if p is not None and name in FLOAT32}
        super()._apply(fn, recurse)
        for name, before in originals.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = before.to(parameter.device)
        return self

    def _convolve(self, x: Tensor, attention_mask: Tensor | None, cache: Any, seq_idx: Tensor | None) -> tuple[Tensor, Any]:
        """Returns x [B, T, channels] after convolution and SiLU, and the state that a cached prefix
        left, if any.

        Continues from the window in `cache` and updates it; padding enters as zeros.
        """
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1).to(x.dtype)
        assert self.conv1d.bias is not None
        conv = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if cache is None:
            return causal_conv(x, *conv, seq_idx=seq_idx), None
        # `layers[i]` because transformers 5.17 has no get_*_state helpers
        layer, taps, length = cache.layers[self.layer_idx], self.conv1d.kernel_size[0], x.shape[1]
        if self._steps(cache, x):
            return conv_step(x[:, 0], layer.conv_states[0], *conv).unsqueeze(1), layer.recurrent_states[0]
        state = layer.recurrent_states[0] if layer.has_previous_state[0] else None
        window = layer.update_conv_state(x.transpose(1, 2), conv_kernel_size=taps).transpose(1, 2)
        window = window[:, -(length + taps - 1) :]
        return causal_conv(window.to(x.dtype), *conv)[:, -length:], state

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape of one sequence's recurrent state, which is float32."""
        raise NotImplementedError

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes cached per sequence: the window in `dtype`, the state in float32."""
        return self.conv1d.weight.shape[0] * self.conv1d.kernel_size[0] * dtype.itemsize + 4 * math.prod(self.state_shape)

    def _steps(self, cache: Any, x: Tensor) -> bool:
        """Returns whether x [B, T, channels] is one token and the cache allows its states to be
        updated in place. transformers' own caches do not: they may have to roll back."""
        return cache is not None and x.shape[1] == 1 and getattr(cache.layers[self.layer_idx], "inplace", False)

    def _store(self, cache: Any, state: Tensor) -> None:
        """Writes the last state into the cache, unless it was updated in place."""
        if cache is not None and state is not cache.layers[self.layer_idx].recurrent_states[0]:
            cache.layers[self.layer_idx].update_recurrent_state(state)


Kind = TypeVar("Kind", bound=type[Mixer])
MIXERS: dict[str, type[Mixer]] = {}  # kind in the config -> class


def register_mixer(mixer: Kind) -> Kind:
    """Class decorator: models whose config's `mixer.kind` is the class's `kind` are built with it.
    Raises ValueError if another class has that kind."""
    known = MIXERS.get(mixer.kind)
    if known is not None and known is not mixer:
        raise ValueError(f"the mixer kind {mixer.kind!r} of {mixer.__module__} is taken by {known.__module__}")
    MIXERS[mixer.kind] = mixer
    return mixer


def mixer_class(shape: dict[str, Any]) -> type[Mixer]:
    """Returns the class of a config's `mixer`. Raises ValueError if its kind is not registered or
    its keys are incomplete."""
    kind = shape["kind"]
    if kind not in MIXERS:
        raise ValueError(
            f"the config's `mixer` is of unknown kind {kind!r}; known kinds: {', '.join(MIXERS)} (a kind of another package "
            "needs that package to be imported first; hybridize's commands import what HYBRIDIZE_EXTENSIONS names)"
        )
    MIXERS[kind].check(shape)
    return MIXERS[kind]


def document_starts(seq_idx: Tensor | None) -> Tensor | None:
    """Returns [B, T] bool, True where a document begins inside a row; None for None."""
    if seq_idx is None:
        return None
    return nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
