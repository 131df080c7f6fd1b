"""One step's gradient: micro-batches, and the parts of a CUDA graph that a CPU can run; the graph itself on a GPU."""

from __future__ import annotations

import pytest
import torch

from hybridize.distillation.losses import Loss
from hybridize.distillation.measure import hidden_states
from hybridize.distillation.packing import Batch
from hybridize.distillation.step import CAUSAL, Accumulator, Student, _causal_attention, backward, can_graph
from hybridize.runtime import compile_layers
from tests.conftest import hybrid, worst


def stream(seed: int, rows: int = 4, length: int = 16, device: str = "cpu") -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (rows, length + 1), generator=g)
    keep = torch.rand(rows, length, generator=g) > 0.4
    return Batch(ids[:, :-1], None, ids[:, 1:], keep).to(torch.device(device))


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_weighting_every_token_equals_choosing_the_kept_ones(kind: str) -> None:
    """What a graph of fixed shapes computes is what the eager path computes on the kept tokens alone."""
    teacher, batch = hybrid("aaa", seed=2), stream(0)
    found = []
    for scale, kept in ((1 / batch.kept, batch.keep.flatten()), (batch.keep.flatten() / batch.kept, None)):
        student = hybrid("mam", kind, seed=1)
        value = backward(Student(student, Loss(), torch.float32), teacher, batch, scale, kept)
        found.append((value, gradients(student)))
    assert worst(found[1][0], found[0][0]) <= 1e-5
    assert worst(found[1][1], found[0][1]) <= 1e-5


def test_attention_without_a_mask_is_the_same_on_plain_rows_and_is_put_back() -> None:
    student, teacher, batch = hybrid("mam", seed=1), hybrid("aaa", seed=2), stream(0)
    plain = [hidden_states(m, batch, torch.float32) for m in (student, teacher)]
    with _causal_attention(student, teacher, None):
        assert student.config._attn_implementation == teacher.config._attn_implementation == CAUSAL
        bare = [hidden_states(m, batch, torch.float32) for m in (student, teacher)]
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
    for got, want in zip(bare, plain, strict=True):
        assert worst(got, want) <= 1e-5


def test_no_graph_on_a_cpu() -> None:
    assert not can_graph(hybrid("mam"), hybrid("aaa"), 16)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_gives_the_eager_gradients(kind: str, compiled: bool) -> None:
    """Two steps of two micro-batches, the second with other tokens, and one batch that does not fit."""
    found = []
    for graph in (False, True):
        student, teacher = hybrid("mam", kind, seed=1).cuda(), hybrid("aaa", seed=2).cuda()
        if graph and compiled:
            compile_layers(student)
        assert can_graph(student, teacher, 16)
        accumulate = Accumulator(Student(student, Loss(), torch.float32), teacher, 2, graph=graph)
        for seed, rows in ((0, 4), (1, 4), (2, 3)):
            value = accumulate(stream(seed, rows, device="cuda"))
        found.append((value, gradients(student)))
    assert worst(found[1][0], found[0][0]) <= 1e-4
    assert worst(found[1][1], found[0][1]) <= 1e-3
