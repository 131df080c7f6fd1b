"""One step's gradient: micro-batches, and the parts of a CUDA graph that a CPU can run; the graph
itself on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridize.data.packing import Batch
from hybridize.distillation.loop import Training
from hybridize.distillation.losses import Loss
from hybridize.distillation.run_dir import RunDir
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.step import Accumulator, Student, backward, can_graph
from hybridize.runtime.device import compile_layers
from hybridize.runtime.forward import hidden_states, output_weight
from hybridize.runtime.loading import load_model
from hybridize.runtime.offload import offload
from hybridize.runtime.packed_attention import use_packed_attention
from tests.conftest import hybrid, make_teacher, worst
from tests.families import make_family
from tests.test_attention import packed


def stream(seed: int, rows: int = 4, length: int = 16, device: str = "cpu") -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (rows, length + 1), generator=g)
    keep = torch.rand(rows, length, generator=g) > 0.4
    return Batch(ids[:, :-1], None, ids[:, 1:], keep).to(torch.device(device))


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_weighting_every_token_equals_choosing_the_kept_ones(kind: str) -> None:
    """What a graph of fixed shapes computes is what the eager path computes on the kept tokens
    alone."""
    teacher, batch = hybrid("aaa", seed=2), stream(0)
    found = []
    for scale, kept in ((1 / batch.kept, batch.loss_mask.flatten()), (batch.loss_mask.flatten() / batch.kept, None)):
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
    """Two steps of two micro-batches, the second with other tokens; a batch that does not fit; rows
    with too many documents."""
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


def test_an_offloaded_teacher_says_the_same_with_one_layer_there(tmp_path: Path) -> None:
    """Bit for bit; also after a pass that was cut off in the middle."""
    cpu, data = torch.device("cpu"), stream(0)
    model = load_model(make_teacher(tmp_path / "teacher"), cpu, torch.float32)
    plain, wanted = hidden_states(model, data, torch.float32), output_weight(model).clone()
    offload(model, cpu)
    layers, seen, breaks = model.model.layers, [], []

    def there() -> list[int]:
        return [i for i, layer in enumerate(layers) if sum(p.numel() for p in layer.parameters())]

    def look(*_: object) -> None:
        seen.append(there())
        if breaks:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for layer in layers:
        layer.mlp.register_forward_hook(look)
    assert there() == []
    assert torch.equal(hidden_states(model, data, torch.float32), plain)
    assert seen == [[0], [1], [2], [3]]
    breaks.append(1)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        hidden_states(model, data, torch.float32)
    assert there() == []
    breaks.clear()
    assert torch.equal(hidden_states(model, data, torch.float32), plain)
    assert torch.equal(output_weight(model), wanted)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_offloaded_teacher_counts_as_the_one_it_is(tmp_path: Path, name: str) -> None:
    found = []
    for offloaded in (False, True):
        teacher = load_model(make_family(tmp_path / f"{name}-{offloaded}", name), torch.device("cpu"), torch.float32)
        run = RunDir(tmp_path / f"run-{offloaded}", {})
        run.start(False)
        plan = DistillSettings(steps=1, batch_size=4, seq_len=16, offload_teacher=offloaded)
        training = Training(hybrid("mam"), teacher, [], plan, run, device=torch.device("cpu"), dtype=torch.float32)
        training.accumulate.micro = 2
        found.append((training.flops, training.accumulate(stream(0))))
    assert found[0] == found[1]


@pytest.mark.gpu
def test_an_offloaded_teacher_on_a_gpu(tmp_path: Path) -> None:
    gpu, path = torch.device("cuda"), make_teacher(tmp_path / "teacher")
    data, model = stream(0, device="cuda"), load_model(path, torch.device("cpu"), torch.bfloat16)
    offload(model, gpu)
    plain = hidden_states(load_model(path, gpu, torch.bfloat16), data, torch.bfloat16)
    for _ in range(3):
        assert torch.equal(hidden_states(model, data, torch.bfloat16), plain)
