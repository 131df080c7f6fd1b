"""Attention within packed documents: boundaries, the kernel against float64 attention of each
document alone, whole models."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hybridize.data.packing import Batch
from hybridize.runtime.forward import hidden_states
from hybridize.runtime.packed_attention import attend, can_attend, use_packed_attention
from tests.conftest import hybrid, worst

HEADS, GROUPS, WIDTH = 4, 2, 16


def packed(lengths: list[list[int]], seed: int = 0, vocabulary: int = 64) -> Batch:
    """Rows of documents of these lengths, which add up to the same in every row; some tokens do not
    count."""
    g = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ids, labels = (torch.randint(2, vocabulary, positions.shape, generator=g) for _ in range(2))
    return Batch(ids, positions, labels, torch.rand(positions.shape, generator=g) > 0.4)


@st.composite
def rows(draw: st.DrawFn) -> list[list[int]]:
    length = draw(st.integers(1, 24))
    cuts = st.sets(st.integers(1, length - 1) if length > 1 else st.nothing(), max_size=length - 1)
    made = []
    for _ in range(draw(st.integers(1, 4))):
        edges = [0, *sorted(draw(cuts)), length]
        made.append([b - a for a, b in itertools.pairwise(edges)])
    return made


@settings(max_examples=60, deadline=None)
@given(rows(), st.integers(0, 3), st.integers(1, 4))
def test_boundaries_are_where_documents_begin_and_survive_splitting(lengths: list[list[int]], spare: int, size: int) -> None:
    batch = packed(lengths)
    assert batch.documents == max(len(row) for row in lengths)
    for begin, part in zip(range(0, len(lengths), size), batch.to(torch.device("cpu")).split(size), strict=True):
        edges = torch.tensor([0, *(n for row in lengths[begin : begin + size] for n in row)]).cumsum(0).tolist()
        room = batch.documents + spare
        found = part.boundaries(room)
        assert found.dtype == torch.int32
        assert len(found) == len(part.ids) * room + 1
        assert found.tolist() == edges + [part.ids.numel()] * (len(found) - len(edges))
        assert part.documents >= max(len(row) for row in lengths[begin : begin + size])
        assert part.kept == int(part.loss_mask.sum())


def each_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[list[int]], scale: float) -> torch.Tensor:
    """float64 attention of every document by itself; [B, H, T, d] -> [B, T, H, d]."""
    q, k, v = (t.detach().double().cpu() for t in (q, k, v))
    k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
    out = torch.zeros_like(q)
    for row, sizes in enumerate(lengths):
        begin = 0
        for size in sizes:
            at = (row, slice(None), slice(begin, begin + size))
            scores = (q[at] @ k[at].transpose(-1, -2)) * scale
            later = torch.ones(size, size, dtype=torch.bool).triu(1)
            out[at] = scores.masked_fill(later, -torch.inf).softmax(-1) @ v[at]
            begin += size
    return out.transpose(1, 2)


def heads() -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // GROUPS, True  # type: ignore[assignment]
    return module.eval()


def drawn(batch: Batch, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    sizes = [(len(batch.ids), h, batch.ids.shape[1], WIDTH) for h in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(size, generator=g).to(device, dtype).requires_grad_() for size in sizes]


DEVICES = [
    ("cpu", torch.float32, 1e-5),
    pytest.param("cuda", torch.float32, 1e-4, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("device", "dtype", "bound"), DEVICES)
def test_packed_documents_attend_as_each_alone(device: str, dtype: torch.dtype, bound: float) -> None:
    lengths = [[20, 1, 43], [64], [7, 30, 27]]
    batch = packed(lengths).to(torch.device(device))
    q, k, v = drawn(batch, device, dtype)
    out, _ = attend(heads(), q, k, v, None, scaling=0.3, cu_seq_lens_q=batch.boundaries(5))
    assert worst(out, each_alone(q, k, v, lengths, 0.3)) <= bound
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out.backward(towards.to(out))
    exact = [t.detach().double().cpu().requires_grad_() for t in (q, k, v)]
    repeated = [exact[0], *(t.repeat_interleave(HEADS // GROUPS, 1) for t in exact[1:])]
    index = torch.repeat_interleave(torch.arange(7), torch.tensor([n for row in lengths for n in row])).view(3, 1, 64)
    mask = (index.unsqueeze(-1) == index.unsqueeze(-2)).tril()
    scores = (repeated[0] @ repeated[1].transpose(-1, -2) * 0.3).masked_fill(~mask, -torch.inf)
    (scores.softmax(-1) @ repeated[2]).transpose(1, 2).backward(towards)
    for got, want in zip((q, k, v), exact, strict=True):
        assert worst(got.grad, want.grad) <= bound  # type: ignore[arg-type]


def test_models_compute_the_same_with_it(kind: str) -> None:
    lengths = [[5, 11], [16], [1, 2, 13]]
    plain = Batch(
        *(
            getattr(packed(lengths), name) if name != "positions" else None
            for name in ("ids", "positions", "labels", "loss_mask")
        )
    )
    for batch in (packed(lengths), plain):
        for model in (hybrid("mam", kind, seed=1), hybrid("aaa", seed=2)):
            want = hidden_states(model, batch, torch.float32)
            assert can_attend(model, 16)
            use_packed_attention(model)
            assert can_attend(model, 16)
            assert worst(hidden_states(model, batch, torch.float32), want) <= 1e-5


def test_a_window_shorter_than_the_rows_is_left_to_transformers() -> None:
    model = hybrid("aaa", sliding_window=8)
    assert can_attend(model, 8)
    assert not can_attend(model, 9)
    model.config._attn_implementation = "eager"
    assert not can_attend(model, 8)
