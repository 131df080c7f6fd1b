"""What a run shows of itself: speed against the machine's peak, trackers by name, a curve. Knows
nothing of training."""

from __future__ import annotations

import importlib
import math
import time
from pathlib import Path
from typing import Any

import torch

from hybridize.errors import InputError, setting

TRACKERS = ("tensorboard", "trackio", "wandb")
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "GH200": 989, "A100": 312, "L40S": 362, "B200": 2250, "RTX 4090": 165}


def model_flops(student: Any, teacher: Any) -> int:
    """FLOPs a token of training: 2 N forward and 2 N back through the student, 2 for each weight
    that is trained, 2 N for the teacher; N without the embedding table, and of experts those that a
    token goes through; no credit for recomputation nor for attention's products."""

    def size(model: Any, trained: bool = False) -> int:
        table = model.get_input_embeddings().weight
        tied, chosen = model.get_output_embeddings().weight is table, getattr(model.config, "num_experts_per_tok", 1)
        return sum(
            p.numel() * chosen // p.shape[0] if ".experts." in name else p.numel()
            for name, p in model.named_parameters()
            if (p is not table or tied) and (p.requires_grad or not trained)
        )

    return 4 * size(student) + 2 * size(student, trained=True) + (0 if teacher is None else 2 * size(teacher))


# Shares of an H100's peak that training steps were measured at, by hidden size
# (docs/performance.md), with --compile and, where it can be had, --cuda-graph; between them they
# are interpolated.
MEASURED = ((576, 0.19), (896, 0.29), (3072, 0.42))
CPU_SHARE = 0.5  # of what a matrix product reaches on a CPU; see docs/performance.md
SQUARE = 1024  # rows and columns of that product


def expected_flops(device: torch.device, hidden: int) -> tuple[float, str]:
    """FLOP/s that training a model of this hidden size can be expected to reach, and in words what
    that is a share of.

    A GPU that is not there, or not in the list of PEAKS, is reckoned as an H100; a CPU is asked.
    """
    if device.type != "cuda":
        speed = _product_speed()
        return CPU_SHARE * speed, f"{CPU_SHARE:.0%} of the {speed / 1e9:,.0f} GFLOP/s that a matrix product reaches on this CPU"
    peak = peak_flops(device) if torch.cuda.is_available() else None
    name = "an H100" if peak is None else torch.cuda.get_device_name(device)
    peak = peak or PEAKS["H100"] * 1e12
    (low, start), *rest = MEASURED
    share = start
    for size, value in rest:
        if hidden > low:
            share = start + (value - start) * min(1.0, math.log(hidden / low) / math.log(size / low))
        low, start = size, value
    return share * peak, f"{share:.0%} of the peak of {name}, with compiled layers and a CUDA graph"


def _product_speed() -> float:
    """FLOP/s of a float32 matrix product here: the best of three."""
    left, right, best = torch.rand(SQUARE, SQUARE), torch.rand(SQUARE, SQUARE), math.inf
    for _ in range(3):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * SQUARE**3 / best


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s by the vendor's sheet, None for a device that is not in the list."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAKS.items() if part in name), None)


class Rising:
    """Notices, once, that a loss has been above its best for long: in means over the last SPAN or
    so steps, LONG steps in a row by more than the share TOO_MUCH. Batches differ, so a single step
    says nothing."""

    SPAN, LONG, TOO_MUCH = 20, 50, 0.2

    def __init__(self) -> None:
        self.mean = self.weight = 0.0
        self.steps = 0
        self.best, self.above, self.said = math.inf, 0, False

    def add(self, loss: float) -> tuple[float, float] | None:
        """The best mean so far and the mean now, where that is the news."""
        keep = 1 - 1 / self.SPAN
        self.mean, self.weight = keep * self.mean + (1 - keep) * loss, keep * self.weight + (1 - keep)
        now, self.steps = self.mean / self.weight, self.steps + 1
        if self.steps < self.SPAN:  # the mean of a few says little
            return None
        self.best = min(self.best, now)
        self.above = self.above + 1 if now > (1 + self.TOO_MUCH) * self.best else 0
        if self.said or self.above < self.LONG:
            return None
        self.said = True
        return self.best, now


class Trackers:
    """Sends metrics to the services of `names`, opened at the first record. InputError for one
    unknown or not installed.

    TensorBoard's files lie in `place`; the others take its name.
    """

    def __init__(self, names: str, place: Path, settings: dict[str, Any]) -> None:
        self.place, self.settings, self.writers = place, settings, list[Any]()
        self.modules = {name.strip(): _module(name.strip()) for name in names.split(",") if name.strip()}

    def log(self, record: dict[str, Any]) -> None:
        """One record of numbers with its `step`."""
        for name, module in () if self.writers else self.modules.items():
            if name == "tensorboard":
                self.writers.append(module.SummaryWriter(str(self.place / name)))
            else:
                self.writers.append(module.init(project="hybridize", name=self.place.stem, config=self.settings))
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        for writer in self.writers:
            if hasattr(writer, "add_scalar"):
                for key, value in numbers.items():
                    writer.add_scalar(key, value, record["step"])
            else:
                writer.log(numbers, step=record["step"])

    def close(self) -> None:
        """Before the run's folder is put away."""
        for writer in self.writers:
            (getattr(writer, "close", None) or writer.finish)()
        self.writers, self.modules = [], {}


def _module(name: str) -> Any:
    if name not in TRACKERS:
        raise InputError(f"{setting('track')} {name} is unknown; use {', '.join(TRACKERS)}")
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise InputError(f"{setting('track')} {name}: pip install {name} first ({error})") from error


def draw_curve(steps: list[dict[str, Any]], measures: list[dict[str, Any]], output: Path) -> None:
    """Training loss, held-out reverse KL and agreement, learning rate over tokens, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=120)
    axis, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    good = [s for s in steps if s["loss"] is not None]
    axis.plot([s["tokens"] / 1e6 for s in good], [s["loss"] for s in good], lw=0.8, label="training loss")
    below.plot([s["tokens"] / 1e6 for s in good], [s["lr"] for s in good], lw=0.8)
    below.set(xlabel="million tokens", ylabel="rate")
    axis.set(ylabel="nats per token", yscale="log" if any(s["loss"] > 0 for s in good) else "linear")
    lines = list(axis.get_lines())
    if measures:
        tokens = [m["tokens"] / 1e6 for m in measures]
        lines += axis.plot(tokens, [m["reverse_kl"] for m in measures], "o-", label="held-out reverse KL")
        other = axis.twinx()
        lines += other.plot(tokens, [m["agreement"] for m in measures], "s--", color="tab:green", label="held-out agreement")
        other.set_ylabel("top-1 agreement with the teacher")
    axis.legend(lines, [line.get_label() for line in lines], loc="center right")
    figure.tight_layout()
    figure.savefig(output)
