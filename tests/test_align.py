"""Alignment against autograd through layers called one by one here, and what it does to a
conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hybridize.data.packing import Batch
from hybridize.distillation.align import Aligner
from hybridize.distillation.losses import Loss
from hybridize.distillation.step import Student
from hybridize.modeling import HybridForCausalLM
from tests.conftest import Runner, hybrid, worst
from tests.test_training import batch


def by_hand(student: HybridForCausalLM, teacher: HybridForCausalLM, data: Batch) -> torch.Tensor:
    """The mean relative error in float64, its gradient left in the student."""
    length, kept = data.ids.shape[1], data.loss_mask.flatten()
    hidden = teacher.model.embed_tokens(data.ids)
    rotary = teacher.model.rotary_emb(hidden, position_ids=torch.arange(length).unsqueeze(0))
    ahead = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1).expand(len(data.ids), 1, -1, -1)
    errors = []
    for layer, theirs in enumerate(teacher.model.layers):
        heard = theirs.input_layernorm(hidden).detach()
        wanted = theirs.self_attn(heard, position_embeddings=rotary, attention_mask=ahead)[0].detach()
        ours = student.model.layers[layer]
        if hasattr(ours, "mixer"):
            off = (ours.mixer(heard)[0] - wanted).flatten(0, 1)[kept].square().sum(-1)
            errors.append((off / (wanted.flatten(0, 1)[kept].square().sum(-1) + 1e-6 * wanted.shape[-1])).mean())
        hidden = theirs(hidden, position_embeddings=rotary, attention_mask=ahead)
    value = torch.stack(errors).mean()
    value.backward()
    return value


@pytest.mark.parametrize("micro", [4, 1])
def test_error_and_gradient_of_every_mixer(kind: str, micro: int) -> None:
    found = []
    for wide in (True, False):
        student, teacher = hybrid("mam", kind, seed=1), hybrid("aaa", seed=2)
        if wide:
            student, teacher = (m.double() for m in (student, teacher))
            value = by_hand(student, teacher, batch(0))
        else:
            plain = batch(0)
            rows = Batch(plain.ids, None, plain.labels, plain.loss_mask)
            value = Aligner(Student(student, Loss(), torch.float32), teacher, micro)(rows)
        grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        found.append((value, grads))
    (wanted, right), (value, grads) = found
    assert worst(value, wanted) <= 1e-5
    assert set(grads) == set(right) == {n for n, _ in hybrid("mam", kind).named_parameters() if ".mixer." in n}
    for name, grad in grads.items():
        assert worst(grad, right[name]) <= 1e-4, name


def test_documents_do_not_see_each_other(kind: str) -> None:
    student, teacher = hybrid("mm", kind, seed=1), hybrid("aa", seed=2)
    one, two = batch(0, rows=2, length=6), batch(1, rows=2, length=6)
    aligner = Aligner(Student(student, Loss(), torch.float32), teacher, 4)
    apart = (aligner(one) * one.kept + aligner(two) * two.kept) / (one.kept + two.kept)
    fields = [torch.cat([getattr(b, name) for b in (one, two)], 1) for name in ("ids", "positions", "labels", "loss_mask")]
    assert worst(aligner(Batch(*fields)), apart) <= 1e-5


def test_the_command(tmp_path: Path, cli: Runner, teacher: Path, traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but mixers changes, the error falls, and so does the divergence that nobody asked it
    to lower."""
    monkeypatch.chdir(tmp_path)
    cli("replace", teacher, "--indices", "1,2", "--no-calibrate", "-o", "h2")
    common = ("--data", traces, "--batch-size", 2, "--seq-len", 48, "--lr-mixer", 1e-2, "--warmup-steps", 2)
    cli("distill", "h2", "--stage", "align", "-o", "aligned", "--steps", 30, *common)
    losses = [json.loads(line)["loss"] for line in Path("aligned/metrics.jsonl").open()]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    from safetensors.torch import load_file

    before, after = (load_file(next(Path(name).glob("*.safetensors"))) for name in ("h2", "aligned"))
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {n for n in before if ".mixer." in n}
    assert not torch.equal(before["model.layers.1.mixer.in_proj.weight"], after["model.layers.1.mixer.in_proj.weight"])
    assert "--stage align: " in cli.fails("distill", teacher, "--stage", "align", "--teacher", teacher, "--steps", 1, *common)
    assert "--stage warp is unknown" in cli.fails("distill", "h2", "--stage", "warp", "--steps", 1, *common)
