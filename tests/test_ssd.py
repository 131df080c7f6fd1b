"""The Mamba-2 scan and its gated norm against float64 definitions written here, step by step and
head by head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize.modeling import ssd
from tests.conftest import worst
from tests.test_scan import masks

HEADS, WIDTH, STATES = 3, 5, 4


def inputs(batch: int, length: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", size=None):
    """x, dt, A, B, C, D, dt_bias in ssd_scan's order, as leaves. size: (heads, head size, states)."""
    heads, width, states = size or (HEADS, WIDTH, STATES)
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    x, dt = draw(batch, length, heads, width), draw(batch, length, heads) - 2
    A = -torch.rand(heads, generator=g) * 8 - 0.1
    B, C = draw(batch, length, heads, states) / 2, draw(batch, length, heads, states) / 2
    D, bias = draw(heads), draw(heads)
    wide = [t.to(device, dtype).requires_grad_() for t in (x, dt, B, C)]
    kept = [t.to(device).requires_grad_() for t in (A, D, bias)]
    return wide[0], wide[1], kept[0], wide[2], wide[3], kept[1], kept[2]


def recurrence(x, dt, A, B, C, D, bias, mask=None, reset=None, state=None):
    """The definition, in float64, one step and one head at a time: y [B, T, H, P], last state [B,
    H, P, N]."""
    x, dt, A, B, C, D, bias = (t.double() for t in (x, dt, A, B, C, D, bias))
    batch, length, heads, width = x.shape
    rows, finals = [], []
    for b in range(batch):
        columns, last = [], []
        for i in range(heads):
            h = torch.zeros(width, B.shape[-1], dtype=torch.float64) if state is None else state[b, i].double()
            outs = []
            for t in range(length):
                if reset is not None and reset[b, t]:
                    h = torch.zeros_like(h)
                delta = torch.log1p(torch.exp(dt[b, t, i] + bias[i]))
                if mask is None or mask[b, t]:
                    h = torch.exp(delta * A[i]) * h + delta * torch.outer(x[b, t, i], B[b, t, i])
                outs.append(h @ C[b, t, i] + D[i] * x[b, t, i])
            columns.append(torch.stack(outs))
            last.append(h)
        rows.append(torch.stack(columns, 1))
        finals.append(torch.stack(last))
    return torch.stack(rows), torch.stack(finals)


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 130, 400])
def test_scan_is_the_recurrence(length: int) -> None:
    args = inputs(2, length, seed=length)
    y, last = ssd.ssd_scan(*args, backend="torch")
    expected, state = recurrence(*args)
    assert worst(y, expected) <= 1e-5
    assert worst(last, state) <= 1e-5


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_gradients_masks_resets_and_states(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd, "CHUNK", chunk)
    args = inputs(2, 21)
    mask, reset = masks(2, 21)
    start = torch.randn(2, HEADS, WIDTH, STATES, requires_grad=True)
    weight, weight_state = torch.randn(2, 21, HEADS, WIDTH), torch.randn(2, HEADS, WIDTH, STATES)
    y, last = ssd.ssd_scan(*args, mask=mask, reset=reset, state=start, backend="torch")
    got = torch.autograd.grad((y * weight).sum() + (last * weight_state).sum(), [*args, start])
    expected, state = recurrence(*args, mask=mask, reset=reset, state=start)
    wanted = torch.autograd.grad((expected * weight).sum() + (state * weight_state).sum(), [*args, start])
    assert worst(y, expected) <= 1e-5
    assert worst(last, state) <= 1e-5
    for ours, theirs in zip(got, wanted, strict=True):
        assert worst(ours, theirs) <= 1e-5


def test_a_head_that_forgets_at_once_and_one_that_never_does() -> None:
    """Decay exponents from -80 a step, which underflow inside a chunk, to almost nothing over 400
    steps."""
    x, dt, A, B, C, D, bias = inputs(1, 400)
    with torch.no_grad():
        A.copy_(torch.tensor([-800.0, -1.0, -1e-6]))
        bias.fill_(2.0)
    y, last = ssd.ssd_scan(x, dt, A, B, C, D, bias, backend="torch")
    expected, state = recurrence(x, dt, A, B, C, D, bias)
    for head in range(HEADS):
        assert worst(y[:, :, head], expected[:, :, head]) <= 1e-5
        assert worst(last[:, head], state[:, head]) <= 1e-5
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.square().sum(), [x, dt, A, B, C, D, bias]))


@settings(max_examples=25, deadline=None)
@given(length=st.integers(2, 90), cut=st.floats(0.01, 0.99), chunk=st.sampled_from([1, 3, 16, 64]))
def test_a_sequence_in_two_parts_is_the_sequence(length: int, cut: float, chunk: int) -> None:
    before, ssd.CHUNK = ssd.CHUNK, chunk
    try:
        x, dt, A, B, C, D, bias = inputs(1, length, seed=length)
        whole, last = ssd.ssd_scan(x, dt, A, B, C, D, bias, backend="torch")
        at = max(1, min(length - 1, int(length * cut)))
        one, state = ssd.ssd_scan(x[:, :at], dt[:, :at], A, B[:, :at], C[:, :at], D, bias, backend="torch")
        rest = (x[:, at:], dt[:, at:], A, B[:, at:], C[:, at:], D, bias)
        two, final = ssd.ssd_scan(*rest, state=state, backend="torch")
    finally:
        ssd.CHUNK = before
    assert worst(torch.cat([one, two], 1), whole) <= 1e-5
    assert worst(final, last) <= 1e-5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_documents_in_one_row_are_separate_documents(lengths: list[int]) -> None:
    total = sum(lengths)
    x, dt, A, B, C, D, bias = inputs(1, total, seed=total)
    reset = torch.zeros(1, total, dtype=torch.bool)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    reset[0, starts[1:]] = True
    packed, last = ssd.ssd_scan(x, dt, A, B, C, D, bias, reset=reset, backend="torch")
    for begin, length in zip(starts, lengths, strict=True):
        part = slice(begin, begin + length)
        alone, state = ssd.ssd_scan(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, bias, backend="torch")
        assert worst(packed[:, part], alone) <= 1e-5
    assert worst(last, state) <= 1e-5


def normed(y, z, weight, eps, group):
    """The definition in float64, group by group: gate first, then norm
    (docs/concepts/architecture.md)."""
    y, z, weight = y.double(), z.double(), weight.double()
    gated = y * z / (1 + torch.exp(-z))
    parts = [p / torch.sqrt((p * p).sum(-1, keepdim=True) / group + eps) for p in gated.split(group, -1)]
    return torch.cat(parts, -1) * weight


def test_gated_norm_and_its_gradients() -> None:
    torch.manual_seed(0)
    y, z, weight = torch.randn(2, 7, 12, requires_grad=True), torch.randn(2, 7, 12, requires_grad=True), torch.rand(12)
    weight.requires_grad_()
    up = torch.randn(2, 7, 12)
    ours, theirs = ssd.gated_norm(y, z, weight, 1e-5, 4, backend="torch"), normed(y, z, weight, 1e-5, 4)
    assert worst(ours, theirs) <= 1e-5
    for one, other in zip(*(torch.autograd.grad((o * up).sum(), [y, z, weight]) for o in (ours, theirs)), strict=True):
        assert worst(one, other) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("extra", ["plain", "packed", "padded", "continued"])
def test_kernel_equals_torch(dtype: torch.dtype, bound: float, extra: str) -> None:
    args = inputs(2, 300, dtype=dtype, device="cuda", size=(4, 64, 64))
    mask, reset = (m.cuda() for m in masks(2, 300))
    told = {
        "plain": {}, "packed": {"reset": reset}, "padded": {"mask": mask},
        "continued": {"state": torch.randn(2, 4, 64, 64, device="cuda")},
    }[extra]  # fmt: skip
    weight = torch.randn(2, 300, 4, 64, device="cuda")
    got, want = [], []
    for backend, found in (("kernel", got), ("torch", want)):
        y, last = ssd.ssd_scan(*args, **told, backend=backend)
        found += [y, last, *torch.autograd.grad((y.float() * weight).sum(), args)]
    for ours, theirs in zip(got, want, strict=True):
        assert worst(ours, theirs) <= bound


@pytest.mark.gpu
def test_kernel_norm_equals_torch() -> None:
    torch.manual_seed(0)
    y, z, weight = torch.randn(2, 50, 576).cuda(), torch.randn(2, 50, 576).cuda(), torch.rand(576).cuda()
    one, other = (ssd.gated_norm(y, z, weight, 1e-5, 64, backend=backend) for backend in ("kernel", "torch"))
    assert worst(one, other) <= 1e-3
