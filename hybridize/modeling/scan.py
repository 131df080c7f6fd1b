"""The selective scan and the causal convolution, each with two backends behind one function.

`kernel` is mamba-ssm / causal-conv1d on a CUDA device, `torch` is plain PyTorch written for a few
CPU cores. Only `backend_for` chooses. Independent of models, checkpoints and configs.

Shapes: B batch, T time, I inner channels, N state size, G groups of B/C (channel i reads group i //
(I / G)), K taps.
"""

from __future__ import annotations

import functools
import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
LOG2E = 1.4426950408889634
KEEP_BYTES = 128 << 20
_NEVER, _ALWAYS = -1e4, 1e6  # pre-softplus dt that leaves a state unchanged / erases it, in any float type


@functools.cache
def missing_on_cuda(*modules: str) -> str | None:
    """Returns in a few words why code that needs CUDA and these modules cannot run here, or None if
    it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        for name in modules:
            importlib.import_module(name)
    except Exception as error:  # a broken extension raises whatever its loader raises
        return f"{type(error).__name__}: {error}"
    return None


def kernels_missing() -> str | None:
    """Returns why the kernels of mamba-ssm and causal-conv1d cannot run here, or None if they can."""
    return missing_on_cuda("causal_conv1d", "mamba_ssm.ops.selective_scan_interface")


def backend_for(device: torch.device) -> str:
    """Returns `kernel` if `device` is CUDA and mamba-ssm and causal-conv1d work, else `torch`."""
    return "kernel" if device.type == "cuda" and kernels_missing() is None else "torch"


@torch.compiler.disable  # the kernels cannot be traced, so torch.compile calls every scan as it is
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Returns the depthwise causal convolution of x, then SiLU: [B, T, I] in x's dtype.

    x [B, T, I]; weight [I, K]; bias [I]; seq_idx [B, T] int, equal within a document: taps do not
    cross into another. Inputs before x count as zeros: prepend the cached inputs to continue a
    sequence.
    """
    if (backend or backend_for(x.device)) == "kernel" and x.shape[2] % 8 == 0:
        from causal_conv1d import causal_conv1d_fn

        x = x.contiguous()  # rows of a slice are not aligned for the kernel's vector loads

        if seq_idx is not None:
            seq_idx = seq_idx.to(torch.int32).contiguous()
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, seq_idx=seq_idx, activation="silu").transpose(1, 2)
    taps, length = weight.shape[1], x.shape[1]
    out = x * weight[:, -1]
    for back in range(1, min(taps, length)):
        shifted = F.pad(x[:, :-back], (0, 0, back, 0))
        if seq_idx is not None:
            same = F.pad(seq_idx[:, back:] == seq_idx[:, :-back], (back, 0))
            shifted = shifted * same.unsqueeze(-1).to(x.dtype)
        out = out + shifted * weight[:, -1 - back]
    return F.silu(out + bias).to(x.dtype)


@torch.compiler.disable
def conv_step(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    """Returns `causal_conv` of the next step x [B, I] as [B, I]; window [B, I, K], the last K
    inputs, is shifted in place."""
    given, x = x.dtype, x.to(window.dtype)
    if (backend or backend_for(x.device)) == "kernel" and weight.shape[1] in (2, 3, 4):
        from causal_conv1d import causal_conv1d_update

        out = causal_conv1d_update(x.contiguous(), window, weight.to(x.dtype), bias.to(x.dtype), activation="silu")
        return out.to(given)
    window.copy_(torch.cat([window[..., 1:], x.unsqueeze(-1)], -1))
    return causal_conv(window.transpose(1, 2), weight, bias, backend="torch")[:, -1].to(given)


@torch.compiler.disable
def selective_scan(
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
    """Runs h_t = exp(delta A) h_{t-1} + delta B x, y = C h + D x with delta = softplus(dt +
    dt_bias) (Mamba, 2312.00752, alg. 2).

    x, dt [B, T, I]; A [I, N] negative, D, dt_bias [I], all float32; B, C [B, T, G, N]. mask [B, T]
    bool: False (padding) leaves the state unchanged. reset [B, T] bool: True (a new document)
    clears the state first. state [B, I, N] float32: left by a cached prefix. Returns y [B, T, I] in
    x's dtype and the last state in float32; with `inplace` this may be `state` itself.
    """
    backend = backend or backend_for(x.device)
    with torch.autocast(x.device.type, enabled=False):
        if backend == "kernel" and inplace and state is not None and x.shape[1] == 1 and mask is None:
            from mamba_ssm.ops.triton.selective_state_update import selective_state_update

            heads = B.shape[2]
            split = lambda t: t.unflatten(-1, (heads, -1))  # noqa: E731
            y = selective_state_update(
                state.unflatten(1, (heads, -1)), split(x[:, 0]), split(dt[:, 0]), A.unflatten(0, (heads, -1)), B[:, 0], C[:, 0],
                split(D), dt_bias=split(dt_bias), dt_softplus=True,
            )  # fmt: skip
            return y.flatten(1).unsqueeze(1), state
        if backend == "kernel" and state is None and x.shape[1] > 1:
            return _scan_kernel(x, dt, A, B, C, D, dt_bias, mask, reset)
        delta = F.softplus(dt.float() + dt_bias)
        if mask is not None:
            delta = delta * mask.unsqueeze(-1)
        if state is None:
            state = x.new_zeros(x.shape[0], x.shape[2], A.shape[1], dtype=torch.float32)
        xs = x.float()
        y, last = _ChunkedScan.apply(xs, delta, A, B.float(), C.float(), state, reset)
        return (y + D * xs).to(x.dtype), last


def _scan_kernel(x, dt, A, B, C, D, dt_bias, mask, reset):  # type: ignore[no-untyped-def]
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    if mask is not None:
        dt = dt.masked_fill(~mask.unsqueeze(-1), _NEVER)
    back = None
    if reset is not None and bool(reset[:, 1:].any()):
        # The kernel has no document boundaries: one extra step before each, with x = 0 and a huge
        # delta, erases the state.
        source, back = _gaps(reset)
        gap = (source < 0).unsqueeze(-1)
        rows = source.clamp(min=0) + torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]

        def spread(t: Tensor) -> Tensor:
            return t.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, *t.shape[2:])

        x, dt, B, C = (
            spread(x).masked_fill(gap, 0),
            spread(dt).masked_fill(gap, min(_ALWAYS, torch.finfo(dt.dtype).max)),
            spread(B),
            spread(C),
        )
    # time-dependent B and C are passed as [B, G, N, T]; all time-dependent inputs share a dtype
    y, last = selective_scan_fn(
        x.transpose(1, 2).contiguous(), dt.to(x.dtype).transpose(1, 2).contiguous(), A,
        B.to(x.dtype).permute(0, 2, 3, 1).contiguous(), C.to(x.dtype).permute(0, 2, 3, 1).contiguous(), D,
        delta_bias=dt_bias, delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    y = y.transpose(1, 2)
    if back is not None:
        y = y.gather(1, back.unsqueeze(-1).expand(-1, -1, y.shape[2]))
    return y, last


def _gaps(reset: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the source index of each step of the sequence with gaps (-1: a gap), and the new
    index of each original step.

    There is a gap before every reset, except at t = 0; shorter rows are padded with gaps at the
    front, where there is no state yet.
    """
    batch, length = reset.shape
    before = torch.cat([torch.zeros_like(reset[:, :1]), reset[:, 1:]], 1).cumsum(1)
    most = int(before[:, -1].max())
    back = torch.arange(length, device=reset.device) + before + (most - before[:, -1:])
    source = torch.full((batch, length + most), -1, device=reset.device)
    return source.scatter_(1, back, torch.arange(length, device=reset.device).expand(batch, -1)), back


class _ChunkedScan(torch.autograd.Function):
    """The recurrence over chunks of CHUNK steps, with states as [t, B, N, I], so that each step is
    one contiguous multiply-add.

    Backward goes through the chunks in reverse. Small calls keep all decays and states for it;
    larger ones keep the states at chunk starts and recompute each chunk, so that memory does not
    grow with T x N. Inside, everything is time first, I is split into [G, P], and A is transposed
    and in units of log 2, because exp2 takes half the time of exp.
    """

    @staticmethod
    def forward(ctx, x, delta, A, B, C, state, reset):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, delta, A, B, C, reset)
        A2 = A.t().contiguous() * LOG2E
        spare = _Work(x, A2, B.shape[2])
        keep = any(ctx.needs_input_grad) and 8 * x.numel() * A.shape[1] <= KEEP_BYTES
        y, h, ctx.starts = x.new_empty(x.shape[1], x.shape[0], x.shape[2]), state.transpose(1, 2).contiguous(), []
        for begin in range(0, x.shape[1], CHUNK):
            xc, dc, Bc, Cc, rc = _chunk(begin, x, delta, B, C, reset)
            work = _Work(x, A2, B.shape[2]) if keep else spare
            H = work.run(xc, dc, Bc, rc, A2, h)
            ctx.starts.append(work if keep else h)
            h = H[-1].clone()
            torch.sum(work.product(H[1:], work.outer(Cc), spare.decay[: len(xc)]).flatten(3), 2, out=y[begin : begin + len(xc)])
        return y.transpose(0, 1), h.transpose(1, 2)

    @staticmethod
    def backward(ctx, dy, dlast):  # type: ignore[no-untyped-def]
        x, delta, A, B, C, reset = ctx.saved_tensors
        A2, carry, dA = A.t().contiguous() * LOG2E, dlast.transpose(1, 2), torch.zeros_like(A.t())
        again, scratch = _Work(x, A2, B.shape[2]), _Work(x, A2, B.shape[2])
        dx, ddelta, dB, dC = (torch.empty_like(t.transpose(0, 1)).contiguous() for t in (x, delta, B, C))
        starts = range(0, x.shape[1], CHUNK)
        for begin, start in zip(reversed(starts), reversed(ctx.starts), strict=True):
            xc, dc, Bc, Cc, rc, dyc = _chunk(begin, x, delta, B, C, reset, dy)
            now, work = slice(begin, begin + len(xc)), start if isinstance(start, _Work) else again
            if work is again:
                again.run(xc, dc, Bc, rc, A2, start)
            decay, H = work.decay[: len(xc)], work.H[: len(xc) + 1]
            S, spare = scratch.decay[: len(xc)], scratch.H[: len(xc)]  # S becomes dL/dh_t
            dC[now] = work.product(H[1:], work.inner(dyc), spare).sum(-1).transpose(2, 3)
            work.product(work.inner(dyc), work.outer(Cc), S)
            after = scratch.decays[len(xc) - 1].add_(carry)
            for t in range(len(xc) - 2, -1, -1):
                after = scratch.decays[t].addcmul_(work.decays[t + 1], after)
            carry = decay[0] * after
            dB[now] = work.product(S, work.inner(dc * xc), spare).sum(-1).transpose(2, 3)
            du = work.product(S, work.outer(Bc), spare).flatten(3).sum(2)  # u = delta x
            torch.mul(decay, H[:-1], out=spare).mul_(S)  # dL/d(delta A)
            dA = dA + torch.mul(spare, dc.unsqueeze(2), out=S).sum((0, 1))
            torch.addcmul(spare.mul_(A.t()).sum(2), du, xc, out=ddelta[now])
            torch.mul(du, dc, out=dx[now])
        dx, ddelta, dB, dC = (t.transpose(0, 1) for t in (dx, ddelta, dB, dC))
        return dx, ddelta, dA.t(), dB, dC, carry.transpose(1, 2), None


def _chunk(begin, *tensors):  # type: ignore[no-untyped-def]
    """Returns one chunk of each [B, T, ...] tensor, time first."""
    return [None if t is None else t[:, begin : begin + CHUNK].transpose(0, 1).contiguous() for t in tensors]


class _Work:
    """Buffers for decays [CHUNK, B, N, I] and states [CHUNK + 1, B, N, I], reused because
    allocating new pages takes as long as the arithmetic."""

    def __init__(self, x: Tensor, A2: Tensor, groups: int) -> None:
        steps, self.groups = min(CHUNK, x.shape[1]), groups
        self.decay, self.H = A2.new_empty(steps, len(x), *A2.shape), A2.new_empty(steps + 1, len(x), *A2.shape)
        self.decays, self.states = self.decay.unbind(0), self.H.unbind(0)  # created once: a view takes as long as a small step

    def inner(self, t: Tensor) -> Tensor:
        """[t, B, I] or [t, B, N, I] -> [t, B, 1 or N, G, P]."""
        t = t.unsqueeze(2) if t.ndim == 3 else t
        return t.unflatten(3, (self.groups, -1))

    def outer(self, t: Tensor) -> Tensor:
        """[t, B, G, N] -> [t, B, N, G, 1]."""
        return t.transpose(2, 3).unsqueeze(-1)

    def product(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """Writes left (states or inner) times right (inner or outer) into `out`; returns it as [t,
        B, N, G, P]."""
        return torch.mul(left if left.ndim == 5 else self.inner(left), right, out=self.inner(out))

    def run(self, x, delta, B, reset, A2, h):  # type: ignore[no-untyped-def]
        """Runs one chunk, all tensors time first: fills decays and states; returns the states, h
        first."""
        decay, H = self.decay[: len(x)], self.H[: len(x) + 1]
        torch.mul(delta.unsqueeze(2), A2, out=decay).exp2_()
        if reset is not None:
            decay.masked_fill_(reset[:, :, None, None], 0)
        H[0] = h
        self.product(self.inner(delta * x), self.outer(B), H[1:])
        for factor, after in zip(self.decays[: len(x)], self.states[1:], strict=False):
            h = after.addcmul_(factor, h)
        return H
