"""What a run shows of itself."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hybridize.distillation.watch import Trackers, draw_curve, model_flops, peak_flops
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
    with pytest.raises(InputError, match="--track wandb: pip install wandb first"):
        Trackers("wandb", tmp_path, {})
    with pytest.raises(InputError, match="--track mlflow is unknown; use tensorboard, trackio, wandb"):
        Trackers("mlflow", tmp_path, {})


def test_flops_count_what_is_multiplied() -> None:
    """Tied: the table is the head's matrix. Untied: it only looks up. Frozen weights have no gradient product."""
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
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))
