"""Monitoring of a run: FLOPs relative to the device's peak, experiment trackers, a loss curve. Does
not depend on the training code."""

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
    """Returns the training FLOPs per token: 2 N forward and 2 N backward through the student, 2 per
    trained weight, 2 N for the teacher. N excludes the embedding table (unless tied) and inactive
    experts. Recomputation and attention's own matrix products are not counted."""

    def size(model: Any, trained: bool = False) -> int:
        table = model.get_input_embeddings().weight
        tied, chosen = model.get_output_embeddings().weight is table, getattr(model.config, "num_experts_per_tok", 1)
        return sum(
            p.numel() * chosen // p.shape[0] if ".experts." in name else p.numel()
            for name, p in model.named_parameters()
            if (p is not table or tied) and (p.requires_grad or not trained)
        )

    return 4 * size(student) + 2 * size(student, trained=True) + (0 if teacher is None else 2 * size(teacher))


# Measured training speed as a share of an H100's peak, by hidden size (docs/performance.md), with
# compiled layers and, where possible, a CUDA graph; interpolated in between.
MEASURED = ((576, 0.19), (896, 0.29), (3072, 0.42))
CPU_SHARE = 0.5  # of the speed of a matrix product on a CPU; see docs/performance.md
SQUARE = 1024  # rows and columns of that product


def expected_flops(device: torch.device, hidden: int) -> tuple[float, str]:
    """Returns the FLOP/s expected when training a model of this hidden size, and a description of
    how that was estimated.

    A GPU that is absent or not in PEAKS is treated as an H100; a CPU's speed is measured.
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
    """Measures the FLOP/s of a float32 matrix product on this CPU: the best of three runs."""
    left, right, best = torch.rand(SQUARE, SQUARE), torch.rand(SQUARE, SQUARE), math.inf
    for _ in range(3):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * SQUARE**3 / best


def peak_flops(device: torch.device) -> float | None:
    """Returns the dense bfloat16 FLOP/s of the vendor's data sheet, None for a device not in PEAKS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAKS.items() if part in name), None)


class Rising:
    """Detects, once, that the smoothed loss has exceeded its minimum by more than the share
    TOO_MUCH for LONG steps in a row. The loss is smoothed exponentially over about SPAN steps,
    because single batches vary too much."""

    SPAN, LONG, TOO_MUCH = 20, 50, 0.2

    def __init__(self) -> None:
        self.mean = self.weight = 0.0
        self.steps = 0
        self.best, self.above, self.reported = math.inf, 0, False

    def add(self, loss: float) -> tuple[float, float] | None:
        """Adds a step's loss; returns (lowest mean so far, current mean) when the rise is detected,
        else None."""
        decay = 1 - 1 / self.SPAN
        self.mean, self.weight = decay * self.mean + (1 - decay) * loss, decay * self.weight + (1 - decay)
        now, self.steps = self.mean / self.weight, self.steps + 1
        if self.steps < self.SPAN:  # too few steps for a meaningful mean
            return None
        self.best = min(self.best, now)
        self.above = self.above + 1 if now > (1 + self.TOO_MUCH) * self.best else 0
        if self.reported or self.above < self.LONG:
            return None
        self.reported = True
        return self.best, now


class Trackers:
    """Sends metrics to the trackers in `names` (comma-separated), opened at the first record.
    InputError for a tracker that is unknown or not installed.

    place: folder for TensorBoard's files; its name is the run's name in the other trackers.
    """

    def __init__(self, names: str, place: Path, settings: dict[str, Any]) -> None:
        self.place, self.settings, self.writers = place, settings, list[Any]()
        self.modules = {name.strip(): _module(name.strip()) for name in names.split(",") if name.strip()}

    def log(self, record: dict[str, Any]) -> None:
        """Logs the numbers of one record under its `step`."""
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
        """Closes all trackers; called before the run's folder is copied or removed."""
        for writer in self.writers:
            (getattr(writer, "close", None) or writer.finish)()
        self.writers, self.modules = [], {}


def _module(name: str) -> Any:
    if name not in TRACKERS:
        raise InputError(f"{setting('track')} {name} is unknown; use {', '.join(TRACKERS)}")
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise InputError(f"{setting('track')} {name} is not installed: pip install {name} ({error})") from error


def draw_curve(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], output: Path) -> None:
    """Writes a PNG with training loss, held-out reverse KL and agreement, and learning rate over
    tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=120)
    axis, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    good = [s for s in steps if s["loss"] is not None]
    axis.plot([s["tokens"] / 1e6 for s in good], [s["loss"] for s in good], lw=0.8, label="training loss")
    below.plot([s["tokens"] / 1e6 for s in good], [s["lr"] for s in good], lw=0.8)
    below.set(xlabel="million tokens", ylabel="rate")
    axis.set(ylabel="nats per token", yscale="log" if any(s["loss"] > 0 for s in good) else "linear")
    lines = list(axis.get_lines())
    if evaluations:
        tokens = [m["tokens"] / 1e6 for m in evaluations]
        lines += axis.plot(tokens, [m["reverse_kl"] for m in evaluations], "o-", label="held-out reverse KL")
        other = axis.twinx()
        lines += other.plot(tokens, [m["agreement"] for m in evaluations], "s--", color="tab:green", label="held-out agreement")
        other.set_ylabel("top-1 agreement with the teacher")
    axis.legend(lines, [line.get_label() for line in lines], loc="center right")
    figure.tight_layout()
    figure.savefig(output)
