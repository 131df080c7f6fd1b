"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

DECAY_SHARE = 0.2  # share of the steps after warm-up in which wsd decays
FLOOR = 0.1  # share of the peak rate at which every schedule ends


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    return 1 - progress


def wsd(progress: float) -> float:
    """Warmup-stable-decay with linear decay (MiniCPM, 2404.06395, section 4)."""
    return min(1.0, (1 - progress) / DECAY_SHARE)


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "wsd": wsd, "linear": linear}


def factor(kind: str, step: int, steps: int, warmup: int) -> float:
    """Returns the factor on the peak rate at `step` of `steps` (0-based): linear warm-up over
    `warmup` steps, then `kind` down to FLOOR."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return FLOOR + (1 - FLOOR) * SCHEDULES[kind](progress)
