"""The benchmark of distillation runs; what it says of a toy on a CPU is nobody's figure."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks import distill, scaling

TOY = ("--shape", "tiny", "--rows", "4", "--length", "16", "--micro", "2", "--repeats", "1")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("step", *TOY, "--ways", "eager", "naive"), ["eager", "naive"]),
        (("parts", *TOY, "--documents", "2"), ["teacher, forward", "optimizer and clipping"]),
        (("loss", "--tokens", "20", "--hidden", "16", "--vocab", "50", "--repeats", "1"), ["ours", "checkpointed", "products"]),
    ],
)
def test_distill(
    arguments: tuple[str, ...], says: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distill.py", *arguments])
    distill.main()
    lines = capsys.readouterr().out.splitlines()
    for name in says:
        (line,) = [line for line in lines if line.strip().startswith(name) and " ms" in line]
        assert float(line.split(" ms")[0].split()[-1]) > 0


def test_scaling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    toy = ("--shape", "tiny", "--rows", "2", "--length", "16", "--micro", "1", "--steps", "4")
    monkeypatch.setattr(sys, "argv", ["scaling.py", *toy, "--ways", "whole", "sharded+gradient_checkpointing"])
    scaling.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if " ms (spread" in line]
    assert [line.split()[0] for line in lines] == ["whole"] * 2 + ["sharded+gradient_checkpointing"] * 2
