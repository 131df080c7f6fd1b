"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math


def cosine(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Factor on the peak rate at `step` of `steps` (0-based): linear up over `warmup`, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
