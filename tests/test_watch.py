"""What a run shows of itself."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hybridize.distillation.watch import Rising, Trackers, draw_curve, model_flops, peak_flops
from hybridize.errors import InputError
from tests.conftest import hybrid


def test_trackers_get_every_number_once_opened_at_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    run = SimpleNamespace(log=lambda numbers, step: told.append((step, numbers)), finish=lambda: told.append("end"))
    module = ModuleType("trackio")
    module.init = lambda **keywords: told.append(keywords) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    trackers = Trackers("trackio", tmp_path / "h2-kd.run", {"lr": 1.0})
    assert told == []
    trackers.log({"step": 3, "metrics/loss": 0.5, "metrics/note": "text"})
    trackers.log({"step": 4, "metrics/loss": None, "eval/agreement": 0.25})
    trackers.close()
    start = {"project": "hybridize", "name": "h2-kd", "config": {"lr": 1.0}}
    assert told == [start, (3, {"metrics/loss": 0.5}), (4, {"eval/agreement": 0.25}), "end"]


def test_unknown_and_missing_trackers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="track wandb is not installed: pip install wandb"):
        Trackers("wandb", tmp_path, {})
    with pytest.raises(InputError, match="track mlflow is unknown; use tensorboard, trackio, wandb"):
        Trackers("mlflow", tmp_path, {})


def test_flops_count_what_is_multiplied() -> None:
    """Tied: the table is the head's matrix. Untied: it only looks up. Frozen weights have no
    gradient product."""
    for tied in (True, False):
        student, teacher = (hybrid(kinds, tie_word_embeddings=tied) for kinds in ("mam", "aaa"))
        count = lambda m: sum(p.numel() for n, p in m.named_parameters() if tied or "embed" not in n)  # noqa: B023, E731
        assert model_flops(student, teacher) == 6 * count(student) + 2 * count(teacher)
        assert model_flops(student, None) == 6 * count(student)
        student.requires_grad_(False)
        student.lm_head.weight.requires_grad_(True)
        assert model_flops(student, None) == 4 * count(student) + 2 * student.lm_head.weight.numel()
    assert peak_flops(torch.device("cpu")) is None


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    steps = [{"step": n, "tokens": n * 100, "loss": None if n == 2 else 1 / n, "lr": 1e-3} for n in range(1, 5)]
    draw_curve(steps, [{"tokens": 400, "reverse_kl": 0.5, "agreement": 0.9}], tmp_path / "a.png")
    draw_curve(steps, [], tmp_path / "b.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curve([{"step": 1, "tokens": 1, "loss": 0.0, "lr": 0.0}], [], tmp_path / "c.png")  # nothing to take a logarithm of
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png", "c.png"))


def test_a_loss_that_rises_for_long_is_noticed_once() -> None:
    """A pilot on a model of 0.5 B: default rates took its loss from .25 to .44 in 75 steps."""
    noise = torch.Generator().manual_seed(0)
    jitter = [float(x) for x in 0.05 * torch.randn(1000, generator=noise)]
    falling = [0.25 + 2 * 0.95**step for step in range(100)]
    rising = [0.25 + 0.19 * min(1.0, step / 75) for step in range(200)]

    def found(losses: list[float]) -> list[tuple[int, tuple[float, float]]]:
        watch = Rising()
        told = [watch.add(loss * (1 + wobble)) for loss, wobble in zip(losses, jitter, strict=False)]
        return [(step, one) for step, one in enumerate(told) if one is not None]

    ((step, (best, now)),) = found(falling + rising)
    assert 100 + Rising.LONG < step < 100 + 140
    assert 0.24 < best < 0.31
    assert now > 1.2 * best
    assert found(falling + [0.25] * 500) == []
    assert found([0.25, 0.4] * 200) == []  # batches differ
    assert found(falling + rising[:30] + [0.25] * 300) == []  # for a while only
