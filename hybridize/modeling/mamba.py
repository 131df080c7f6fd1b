"""The Mamba-1 mixer in M1's grouped form (2504.10449, section 3), a drop-in replacement of a
`self_attn` module.

Shapes: B batch, T time, D hidden size, I inner width = query heads * head_dim, X = KV heads *
head_dim, N state size, R rank of dt, G = I / N groups.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .configuration_hybridize import HybridConfig
from .mixer import Mixer, document_starts, register_mixer
from .scan import selective_scan


@register_mixer
class MambaMixer(Mixer):
    """Mamba-1 with grouped x and B. Rows of in_proj, in order: z (I), x (X), B (X), C (I), dt (R);
    x and B are repeated from KV heads to query heads."""

    kind = "mamba"
    sizes = ("d_inner", "d_state", "d_conv", "dt_rank")
    choices: ClassVar = {"expand": ("head", "chunk")}
    fits_float16 = deterministic = graphs_documents = False

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        shape = config.mixer
        assert shape is not None
        self.layer_idx, self.d_state, self.d_conv = layer_idx, shape["d_state"], shape["d_conv"]
        self.inner, self.rank = shape["d_inner"], shape["dt_rank"]
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kv = config.num_key_value_heads * head
        self.repeats = self.inner // self.kv
        self.unit = head if shape["expand"] == "head" else self.d_state  # channels that are repeated as one block
        if self.inner % self.kv or head % self.d_state:
            raise ValueError(f"mixer {shape} does not fit {config.num_key_value_heads} KV heads of size {head}")
        rows = 2 * self.inner + 2 * self.kv + self.rank
        self.in_proj = nn.Linear(config.hidden_size, rows, bias=shape.get("in_bias", False))
        self.conv1d = nn.Conv1d(self.inner, self.inner, self.d_conv, groups=self.inner, bias=True)
        self.dt_proj = nn.Linear(self.rank, self.inner, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(self.inner, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.zeros(self.inner, self.d_state, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(self.inner, dtype=torch.float32))
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=shape.get("out_bias", False))
        self._add_norms(shape, head, self.kv, self.inner, config.rms_norm_eps)
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
        """Returns ([B, T, D], None); the None takes the place of attention weights.

        hidden_states [B, T, D]; attention_mask [B, T] bool, False at padding; seq_idx [B, T] int,
        the index of each token's document. cache: a transformers cache whose layer `layer_idx` is a
        linear-attention layer; it is read and updated in place. transformers before 5.24 passes it
        as past_key_values.
        """
        if hidden_states.dtype == torch.float16:
            raise ValueError("a mamba mixer's output is not normalised and overflows float16; use bfloat16 or float32")
        cache = past_key_values if cache is None else cache
        z, x, B, C, dt = self.project(hidden_states)
        x, state = self._convolve(x, attention_mask, cache, seq_idx)
        kwargs: dict[str, Any] = {"mask": attention_mask, "reset": document_starts(seq_idx), "state": state}
        y, last = self.scan(x, B, C, dt, inplace=self._steps(cache, x), **kwargs)
        self._store(cache, last)
        return self.out_proj(y * nn.functional.silu(z)), None

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.inner, self.d_state

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns z, x, B, C and dt, all [B, T, I], of hidden states [B, T, D]."""
        sizes = [self.inner, self.kv, self.kv, self.inner, self.rank]
        z, x, B, C, dt = self.in_proj(hidden_states).split(sizes, dim=-1)
        return z, self._expand(x), self._expand(self.B_norm(B)), self.C_norm(C), self.dt_proj(dt)

    def scan(self, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Runs the part between convolution and gate; returns y [B, T, I] and the last state.
        kwargs: those of selective_scan."""
        groups = (2, (-1, self.d_state))
        return selective_scan(
            x, dt, -torch.exp(self.A_log.float()), B.unflatten(*groups), C.unflatten(*groups), self.D, self.dt_bias, **kwargs
        )

    def _expand(self, t: Tensor) -> Tensor:
        """[B, T, X] -> [B, T, I]: repeats each block of `unit` channels (a head, or M1's chunk of
        N) once per query head that shares it."""
        return t.unflatten(-1, (-1, 1, self.unit)).expand(-1, -1, -1, self.repeats, -1).flatten(2)
