"""The Mamba-2 scan (state space duality, 2405.21060) and its gated norm, each with two backends
behind one function.

`kernel` is mamba-ssm's Triton code on a CUDA device, `torch` is matrix products over chunks.
Independent of models.

Shapes: B batch, T time, H heads (each its own group of B and C), P head size, N state size, L steps
of a chunk.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import backend_for

CHUNK = 64  # torch: L^2 (N + P) + 2 L N P products per chunk and head; per step, fewest for L near N and P
KERNEL_CHUNK = 256


@torch.compiler.disable
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    state: Tensor | None = None,
    backend: str | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs h_t = exp(delta A) h_{t-1} + delta x B^T, y = h C + D x with delta = softplus(dt +
    dt_bias), one A, D and delta per head.

    x [B, T, H, P]; dt [B, T, H]; A [H] negative, D, dt_bias [H], all float32; B, C [B, T, H, N].
    mask [B, T] bool: False (padding) leaves the state unchanged. reset [B, T] bool: True (a new
    document) clears the state first. state [B, H, P, N] float32: left by a cached prefix. Returns y
    [B, T, H, P] in x's dtype and the last state in float32; with `inplace` this may be `state`
    itself.
    """
    kernel = (backend or backend_for(x.device)) == "kernel"
    with torch.autocast(x.device.type, enabled=False):
        if kernel and inplace and state is not None and x.shape[1] == 1 and mask is None:
            from mamba_ssm.ops.triton.selective_state_update import selective_state_update

            across = lambda t: t.unsqueeze(-1).expand(*t.shape, x.shape[3])  # noqa: E731
            y = selective_state_update(
                state, x[:, 0], across(dt[:, 0]), across(A).unsqueeze(-1).expand(-1, -1, B.shape[3]), B[:, 0], C[:, 0],
                across(D), dt_bias=across(dt_bias), dt_softplus=True,
            )  # fmt: skip
            return y.unsqueeze(1), state
        delta = F.softplus(dt.float() + dt_bias)
        if mask is not None:
            delta = delta * mask.unsqueeze(-1)
        if kernel and x.shape[1] > 1:
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

            if x.dtype == torch.float32:  # Triton's default for float32 products is TF32, accurate to three digits
                os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
            documents = None if reset is None else reset.cumsum(1, dtype=torch.int32)
            y, last = mamba_chunk_scan_combined(
                x.contiguous(), delta, A, B.to(x.dtype).contiguous(), C.to(x.dtype).contiguous(), KERNEL_CHUNK, D=D,
                initial_states=state, seq_idx=documents, return_final_states=True,
            )  # fmt: skip
            return y, last.float()
        wide = x.float()
        y, last = _chunked(wide, delta, A, B.float(), C.float(), reset, state)
        return (y + D.unsqueeze(-1) * wide).to(x.dtype), last


def _chunked(x, delta, A, B, C, reset, state):  # type: ignore[no-untyped-def]
    """Chunked scan: pairs of steps within a chunk by matrix products, states between chunks one
    after the other (2405.21060, section 6).

    Time is padded with steps of delta = 0, which change nothing. Decay exponents are summed in
    float64, because they are differences of sums that grow with the chunk.
    """
    batch, length, heads, width = x.shape
    size = min(CHUNK, length)
    fill = -length % size

    def chunks(t: Tensor) -> Tensor:
        """[B, T, H, ...] -> [chunks, B, H, L, ...]."""
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, fill))
        return t.unflatten(1, (-1, size)).transpose(2, 3).transpose(0, 1)

    dA = chunks(delta * A).double()
    s = dA.cumsum(-1)  # [chunks, B, H, L]
    within = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    onward = torch.ones_like(s, dtype=torch.bool)  # whether step t depends on the chunk's initial state
    until = onward  # whether the chunk's final state depends on step t
    if reset is not None:
        document = chunks(reset.long().unsqueeze(-1)).cumsum(-1)  # [chunks, B, 1, L]
        within = within & (document.unsqueeze(-1) == document.unsqueeze(-2))
        onward, until = document == 0, document == document[..., -1:]
    between = (s.unsqueeze(-1) - s.unsqueeze(-2)).masked_fill(~within, -torch.inf).float().exp()  # [chunks, B, H, L, L]
    xd, B, C = chunks(x * delta.unsqueeze(-1)), chunks(B), chunks(C)
    y = ((C @ B.transpose(-1, -2)) * between) @ xd
    out = (s[..., -1:] - s).float().exp() * until
    gained = (xd * out.unsqueeze(-1)).transpose(-1, -2) @ B  # [chunks, B, H, P, N]
    into = s.float().exp() * onward
    h = x.new_zeros(batch, heads, width, B.shape[-1]) if state is None else state
    entered = []
    for gain, factor in zip(gained, into[..., -1], strict=True):
        entered.append(h)
        h = h * factor[..., None, None] + gain
    y = y + (C @ torch.stack(entered).transpose(-1, -2)) * into.unsqueeze(-1)
    return y.transpose(0, 1).transpose(2, 3).flatten(1, 2)[:, :length], h


@torch.compiler.disable
def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, group: int, backend: str | None = None) -> Tensor:
    """Returns RMSNorm over each `group` channels of y * silu(z), times `weight` [I], computed in
    float32; y, z [B, T, I]; the result has y's dtype."""
    if (backend or backend_for(y.device)) == "kernel":
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

        return rmsnorm_fn(y, weight, None, z=z.contiguous(), eps=eps, group_size=group, norm_before_gate=False)
    gated = (y.float() * F.silu(z.float())).unflatten(-1, (-1, group))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (weight * normed.flatten(-2)).to(y.dtype)
