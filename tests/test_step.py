"""One step's gradient: micro-batches, and the parts of a CUDA graph that a CPU can run; the graph itself on a GPU."""

from __future__ import annotations

import pytest
import torch

from hybridize.distillation.attention import use_packed_attention
from hybridize.distillation.losses import Loss
from hybridize.distillation.packing import Batch
from hybridize.distillation.step import Accumulator, Student, backward, can_graph
from hybridize.runtime import compile_layers
from tests.conftest import hybrid, worst
from tests.test_attention import packed


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


def test_no_graph_on_a_cpu() -> None:
    student = hybrid("mam")
    use_packed_attention(student)
    assert not can_graph(student, None)


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_gives_the_eager_gradients(kind: str, compiled: bool, documents: bool) -> None:
    """Two steps of two micro-batches, the second with other tokens; a batch that does not fit; rows with too many documents."""
    if documents and kind == "mamba":
        pytest.skip("mamba layers look for documents on the host")
    sizes = [[[16], [9, 7]], [[5, 11], [2, 14]], [[16]], [[1] * 16, [16]]]
    batches = [stream(seed, len(s)) for seed, s in enumerate(sizes)]
    if documents:
        batches = [packed(s, seed) for seed, s in enumerate(sizes)]
    found = []
    for graph in (False, True):
        student, teacher = hybrid("mam", kind, seed=1).cuda(), hybrid("aaa", seed=2).cuda()
        for model in (student, teacher) if graph else ():
            use_packed_attention(model)
        if graph and compiled:
            compile_layers(student)
        assert can_graph(student, teacher) is graph
        accumulate = Accumulator(Student(student, Loss(), torch.float32), teacher, 2, graph=graph)
        for batch in batches:
            value = accumulate(batch.to(torch.device("cuda")))
        found.append((value, gradients(student)))
    assert worst(found[1][0], found[0][0]) <= 1e-4
    assert worst(found[1][1], found[0][1]) <= 1e-3
