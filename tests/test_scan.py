"""The scan and the convolution against float64 recurrences written here, step by step and channel
by channel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize.modeling import scan
from tests.conftest import worst


def inputs(batch: int, length: int, inner: int, states: int, seed: int = 0, dtype: torch.dtype = torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    groups = inner // states
    x, dt = draw(batch, length, inner), draw(batch, length, inner) - 3
    A = -torch.rand(inner, states, generator=g) * 4 - 0.1
    B, C = draw(batch, length, groups, states), draw(batch, length, groups, states)
    D, bias = draw(inner), draw(inner)
    wide = [t.to(device, dtype).requires_grad_() for t in (x, dt, B, C)]
    kept = [t.to(device).requires_grad_() for t in (A, D, bias)]
    return wide[0], wide[1], kept[0], wide[2], wide[3], kept[1], kept[2]


def recurrence(x, dt, A, B, C, D, bias, mask=None, reset=None, state=None):
    """The definition, in float64, one step and one channel at a time."""
    x, dt, A, B, C, D, bias = (t.double() for t in (x, dt, A, B, C, D, bias))
    batch, length, inner = x.shape
    width = inner // B.shape[2]
    rows, finals = [], []
    for b in range(batch):
        columns, last = [], []
        for i in range(inner):
            h = torch.zeros(A.shape[1], dtype=torch.float64, device=x.device) if state is None else state[b, i].double()
            outs = []
            for t in range(length):
                if reset is not None and reset[b, t]:
                    h = torch.zeros_like(h)
                delta = torch.log1p(torch.exp(dt[b, t, i] + bias[i]))
                if mask is None or mask[b, t]:
                    h = torch.exp(delta * A[i]) * h + delta * x[b, t, i] * B[b, t, i // width]
                outs.append((h * C[b, t, i // width]).sum() + D[i] * x[b, t, i])
            columns.append(torch.stack(outs))
            last.append(h)
        rows.append(torch.stack(columns, 1))
        finals.append(torch.stack(last))
    return torch.stack(rows), torch.stack(finals)


def masks(batch: int, length: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, length, generator=g) > 0.2, torch.rand(batch, length, generator=g) < 0.2


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 130])
def test_scan_is_the_recurrence(length: int) -> None:
    args = inputs(2, length, 8, 4, seed=length)
    y, last = scan.selective_scan(*args, backend="torch")
    expected, state = recurrence(*args)
    assert worst(y, expected) <= 1e-5
    assert worst(last, state) <= 1e-5


@pytest.mark.parametrize("keep_all", [True, False])
def test_gradients_masks_resets_and_states(keep_all: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of backward: states kept, and states computed again."""
    monkeypatch.setattr(scan, "KEEP_BYTES", 1 << 40 if keep_all else 0)
    monkeypatch.setattr(scan, "CHUNK", 8)
    args = inputs(2, 21, 8, 4)
    mask, reset = masks(2, 21)
    start = torch.randn(2, 8, 4, requires_grad=True)
    weight, weight_state = torch.randn(2, 21, 8), torch.randn(2, 8, 4)
    y, last = scan.selective_scan(*args, mask=mask, reset=reset, state=start, backend="torch")
    got = torch.autograd.grad((y * weight).sum() + (last * weight_state).sum(), [*args, start])
    expected, state = recurrence(*args, mask=mask, reset=reset, state=start)
    wanted = torch.autograd.grad((expected * weight).sum() + (state * weight_state).sum(), [*args, start])
    assert worst(y, expected) <= 1e-5
    for ours, theirs in zip(got, wanted, strict=True):
        assert worst(ours, theirs) <= 1e-5


@settings(max_examples=25, deadline=None)
@given(length=st.integers(2, 90), cut=st.floats(0.01, 0.99), chunk=st.sampled_from([1, 3, 16, 64]))
def test_a_sequence_in_two_parts_is_the_sequence(length: int, cut: float, chunk: int) -> None:
    before, scan.CHUNK = scan.CHUNK, chunk
    try:
        x, dt, A, B, C, D, bias = inputs(1, length, 4, 2, seed=length)
        whole, last = scan.selective_scan(x, dt, A, B, C, D, bias, backend="torch")
        at = max(1, min(length - 1, int(length * cut)))
        one, state = scan.selective_scan(x[:, :at], dt[:, :at], A, B[:, :at], C[:, :at], D, bias, backend="torch")
        rest = (x[:, at:], dt[:, at:], A, B[:, at:], C[:, at:], D, bias)
        two, final = scan.selective_scan(*rest, state=state, backend="torch")
    finally:
        scan.CHUNK = before
    assert worst(torch.cat([one, two], 1), whole) <= 1e-5
    assert worst(final, last) <= 1e-5


def convolution(x, weight, bias, seq_idx=None):
    """The definition in float64: taps[-1] is the present."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    taps = weight.shape[1]
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            total = bias.clone()
            for back in range(taps):
                if t - back >= 0 and (seq_idx is None or seq_idx[b, t] == seq_idx[b, t - back]):
                    total = total + weight[:, -1 - back] * x[b, t - back]
            out[b, t] = total
    return F.silu(out)


@pytest.mark.parametrize("length", [1, 3, 4, 17])
@pytest.mark.parametrize("packed", [False, True])
def test_convolution(length: int, packed: bool) -> None:
    torch.manual_seed(length)
    x, weight, bias = torch.randn(2, length, 8), torch.randn(8, 4), torch.randn(8)
    seq_idx = torch.arange(length).div(3, rounding_mode="floor").expand(2, -1) if packed else None
    assert worst(scan.causal_conv(x, weight, bias, seq_idx, backend="torch"), convolution(x, weight, bias, seq_idx)) <= 1e-5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_gaps_put_an_empty_step_before_each_reset(rows: list[list[bool]]) -> None:
    reset = torch.tensor(rows)
    source, back = scan._gaps(reset)
    for b, row in enumerate(rows):
        assert source[b][back[b]].tolist() == list(range(6))
        for t in range(1, 6):
            between = source[b][back[b, t - 1] + 1 : back[b, t]].tolist()
            assert between == ([-1] if row[t] else [])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("packed", [False, True])
def test_kernel_equals_torch(dtype: torch.dtype, bound: float, packed: bool) -> None:
    args = inputs(2, 200, 64, 16, dtype=dtype, device="cuda")
    mask, reset = (m.cuda() for m in masks(2, 200))
    extra = {"mask": mask, "reset": reset} if packed else {}
    weight = torch.randn(2, 200, 64, device="cuda")
    got, want = [], []
    for backend, found in (("kernel", got), ("torch", want)):
        y, last = scan.selective_scan(*args, **extra, backend=backend)
        found += [y, last, *torch.autograd.grad((y.float() * weight).sum(), args)]
    for ours, theirs in zip(got, want, strict=True):
        assert worst(ours, theirs) <= bound


@pytest.mark.gpu
def test_kernel_convolution_equals_torch() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 50, 64).cuda(), torch.randn(64, 4).cuda(), torch.randn(64).cuda()
    seq_idx = torch.arange(50, device="cuda").div(7, rounding_mode="floor").expand(2, -1)
    for index in (None, seq_idx):
        ours = scan.causal_conv(x, weight, bias, index, backend="kernel")
        assert worst(ours, scan.causal_conv(x, weight, bias, index, backend="torch")) <= 1e-3
