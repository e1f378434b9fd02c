"""The schedule of a run: the learning rate at each step, and the stretches of the run."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

# Number of stretches of a guide's run, and the fewest steps of one.
STRETCHES, SHORTEST = 50, 10


def check_schedule(schedule: Any) -> None:
    """Check that `schedule` is a schedule of the learning rate."""
    if not (schedule in (None, "cosine") or callable(schedule)):
        raise ValueError(
            f"`schedule` is {schedule!r}, expected None, 'cosine' or a function of a step"
        )


def factor(schedule: str | Callable[[int], float] | None, step: int, steps: int) -> float:
    """Return the factor on the learning rate at one step."""
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * step / steps))
    if not callable(schedule):
        return 1.0
    value = schedule(step)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`schedule` gives {value!r} at step {step}, expected a number") from None


def stretches(steps: int) -> list[int]:
    """Return the lengths of the stretches of a run."""
    length = min(max(steps // STRETCHES, SHORTEST), steps)
    count = steps // length
    return [length] * (count - 1) + [steps - length * (count - 1)]


def mean_loss(losses: np.ndarray) -> float:
    """Return the mean of the finite losses; infinity if most are not finite."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if 2 * len(finite) > len(losses) else math.inf


def standard_error(losses: np.ndarray) -> float:
    """Return the standard error of the mean of the finite losses."""
    finite = losses[np.isfinite(losses)]
    return float(finite.std() / math.sqrt(len(finite))) if len(finite) else 0.0
