"""Divergences and the chunked loss against float64 formulas and autograd written here."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize.distillation import losses
from hybridize.distillation.losses import Loss, chunked_loss
from hybridize.errors import InputError
from hybridize.runtime.device import keep_compiled_apart
from tests.conftest import worst


def reference(kind: str, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, T: float) -> torch.Tensor:
    """Per token, float64, from probabilities."""
    student, teacher = student.double(), teacher.double()
    if kind == "ce":
        return -torch.softmax(student, -1).gather(1, labels[:, None]).squeeze(1).log()
    q, p = torch.softmax(student / T, -1), torch.softmax(teacher / T, -1)
    if kind == "reverse-kl":
        value = (q * (q / p).log()).sum(-1)
    elif kind == "forward-kl":
        value = (p * (p / q).log()).sum(-1)
    else:
        m = 0.5 * p + 0.5 * q
        value = 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1)
    return T**2 * value


def problem(n: int = 13, V: int = 37, D: int = 8, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    labels = torch.randint(0, V, (n,), generator=g)
    return draw(n, D).requires_grad_(), draw(V, D).requires_grad_(), draw(n, D + 2), draw(V, D + 2), labels


@pytest.mark.parametrize("text", ["reverse-kl", "forward-kl", "js", "ce", "reverse-kl=.9,ce=.1", "js=2,forward-kl=.5"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_value_and_gradients(text: str, temperature: float, chunk: int) -> None:
    h, W, th, tW, labels = problem()
    ours = chunked_loss(h, W, th, tW, labels, Loss.parse(text, temperature), scale=1 / 20, chunk=chunk)
    grads = torch.autograd.grad(3 * ours, [h, W])
    given = chunked_loss(h, W, th @ tW.t(), None, labels, Loss.parse(text, temperature), scale=1 / 20, chunk=chunk)
    assert worst(given, ours) <= 1e-6  # the teacher's logits in place of its hidden states
    h64, W64 = (t.detach().double().requires_grad_() for t in (h, W))
    total = torch.zeros((), dtype=torch.float64)
    for part in text.split(","):
        kind, _, weight = part.partition("=")
        total = total + float(weight or 1) * reference(kind, h64 @ W64.t(), th @ tW.t(), labels, temperature).sum() / 20
    wanted = torch.autograd.grad(3 * total, [h64, W64])
    assert worst(ours, total) <= 1e-5
    for got, want in zip(grads, wanted, strict=True):
        assert worst(got, want) <= 1e-4


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 12), max_size=3), chunk=st.integers(1, 20))
def test_any_split_gives_the_same_gradient(cuts: list[int], chunk: int) -> None:
    h, W, th, tW, labels = problem()
    whole = torch.autograd.grad(chunked_loss(h, W, th, tW, labels, Loss(), scale=1 / 13), [h, W])
    edges = [0, *sorted(set(cuts)), 13]
    parts = [
        chunked_loss(h[a:b], W, th[a:b], tW, labels[a:b], Loss(), scale=1 / 13, chunk=chunk)
        for a, b in itertools.pairwise(edges)
    ]
    for got, want in zip(torch.autograd.grad(sum(parts), [h, W]), whole, strict=True):
        assert worst(got, want) <= 1e-5


def test_half_precision_projections_and_a_frozen_head() -> None:
    h, W, th, tW, labels = problem(n=64, V=200, D=32)
    exact = torch.autograd.grad(chunked_loss(h, W, th, tW, labels, Loss(), scale=1 / 64), [h, W])
    half = chunked_loss(h, W, th.bfloat16(), tW.bfloat16(), labels, Loss(), scale=1 / 64, dtype=torch.bfloat16)
    for got, want in zip(torch.autograd.grad(half, [h, W]), exact, strict=True):
        assert (got - want).norm() / want.norm() <= 2e-2
    frozen = chunked_loss(h, W.detach(), th, tW, labels, Loss(), scale=1 / 64)
    assert worst(torch.autograd.grad(frozen, [h])[0], exact[0]) == 0


def test_extreme_logits_stay_finite() -> None:
    h, W, th, tW, labels = problem()
    for text in ("reverse-kl", "forward-kl", "js"):
        value = chunked_loss(h * 1e4, W, th * 1e4, tW, labels, Loss.parse(text), scale=1 / 13)
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, [h])[0]).all()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kl", "unknown"),
        ("ce=x", "positive"),
        ("ce=0", "positive"),
        ("ce=-1", "positive"),
        ("ce,ce", "twice"),
        ("", "positive"),
    ],
)
def test_bad_mixtures(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Loss.parse(text)


def plain_and_fused(loss: Loss, rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    draw = lambda: torch.randn(rows, 500, generator=g) * 3  # noqa: E731
    student, teacher, scale = draw(), draw(), torch.rand(rows, generator=g)
    labels = torch.randint(0, 500, (rows,), generator=g)
    other, before = student.clone(), student.clone()
    values = [losses._replace(loss, student, teacher, labels, scale), losses._fused()(loss, other, teacher, labels, scale)]
    # every term of value and gradient is a probability times differences of logits: 16 roundings of
    # the sum of their sizes
    q, p = (logits.double().softmax(-1) for logits in (before, teacher))
    size = 1 + 2 * (before.abs().amax(-1) + teacher.abs().amax(-1)).double().unsqueeze(1)
    terms = (q + p + torch.nn.functional.one_hot(labels, 500)) * size * scale.unsqueeze(1) * loss.temperature**2
    bound = 16 * torch.finfo(torch.float32).eps * (terms + q * terms.sum(-1, keepdim=True))
    assert abs(float(values[1] - values[0])) <= float(bound.sum())
    assert bool(((other - student).abs().double() <= bound).all())
    assert worst(other, student) <= 1e-3, "and the bound is not so wide that it says nothing"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for the CPU needs g++")
def test_the_compiled_loss_is_the_same_at_any_length() -> None:
    losses._fused.cache_clear()
    for rows in (40, 17, 1):
        plain_and_fused(Loss.parse("reverse-kl=.7,ce=.2", 1.3), rows)


def test_without_a_compiler_the_loss_is_slow_but_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object):
        def call(*_: object) -> None:
            raise torch._dynamo.exc.TorchDynamoException("no C compiler")

        return call

    losses._fused.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="could not be compiled and will be slow: no C compiler"):
        plain_and_fused(Loss(), 5)
    plain_and_fused(Loss(), 6)  # says it once
    losses._fused.cache_clear()


COMPILED = """
import torch
from hybridize.distillation.losses import Loss, _fused
g = torch.Generator().manual_seed(40)
student, teacher = (3 * torch.randn(40, 500, generator=g) for _ in range(2))
scale = torch.rand(40, generator=g)
labels = torch.randint(0, 500, (40,), generator=g)
print(float(_fused()(Loss.parse("reverse-kl=.7,ce=.2", 1.3), student, teacher, labels, scale)))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for the CPU needs g++")
def test_code_compiled_for_one_kind_of_cpu_is_not_run_on_another(tmp_path: Path) -> None:
    """torch's own cache does not tell them apart, and then the loss is another, as on a home
    directory that machines share."""
    found = []
    for kind in ("avx512", "avx2", "avx512"):
        told = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
        environment = {**told, "ATEN_CPU_CAPABILITY": kind, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=True)
        found.append(float(done.stdout))
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-5)


def test_a_user_without_a_name_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is started with a user id alone."""

    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("getpass.getuser", nameless)
    keep_compiled_apart()
    assert f"uid_{os.getuid()}_" in os.environ["TORCHINDUCTOR_CACHE_DIR"]
