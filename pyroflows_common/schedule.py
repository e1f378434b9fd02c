"""The schedule of a run: the learning rate at each step, and the stretches of the run."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# Number of stretches of a guide's run, and the fewest steps of one.
STRETCHES, SHORTEST = 50, 10

# Numbers of steps whose mean losses are compared, and the most in which the rate falls after that.
WINDOW, LONGEST_FALL = 250, 1000
# Nats that make no difference.
SLIGHT = 0.025


def check_schedule(schedule: Any, *, auto: bool = False) -> None:
    """Check that `schedule` is a schedule of the learning rate.

    Args:
        schedule: what was given.
        auto: whether it may be `"auto"`, as it may for guides.
    """
    named = ("cosine", "auto") if auto else ("cosine",)
    if not (schedule in (None, *named) or callable(schedule)):
        names = ", ".join(map(repr, named))
        raise ValueError(
            f"`schedule` is {schedule!r}, expected None, {names} or a function of a step"
        )


def factor(schedule: str | Callable[[int], float] | None, step: int, steps: int) -> float:
    """Return the factor on the learning rate at one step."""
    if schedule in ("cosine", "auto"):
        return 0.5 * (1.0 + math.cos(math.pi * step / steps))
    if not callable(schedule):
        return 1.0
    value = schedule(step)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`schedule` gives {value!r} at step {step}, expected a number") from None


class Course:
    """The factors on the learning rate along a run of `fit_guide`, stretch by stretch.

    With `"auto"` they fall along a cosine to zero, which comes sooner once the mean loss of the
    last `WINDOW` steps is no longer below that of as many before, beyond its noise. Where that
    noise is large, it tells nothing, and the run takes all steps.

    Args:
        schedule: a schedule.
        steps: the most steps of the run.
    """

    def __init__(self, schedule: str | Callable[[int], float] | None, steps: int) -> None:
        self.factors = np.array([factor(schedule, k, steps) for k in range(steps)])
        self.length = min(max(steps // STRETCHES, SHORTEST), steps)
        self.automatic, self.converged = schedule == "auto", False
        self.done = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the factors of each stretch; the last one takes the rest."""
        while left := len(self.factors) - self.done:
            length = left if left < 2 * self.length else self.length
            self.done += length
            yield self.factors[self.done - length : self.done]

    def shorten(self, losses: np.ndarray) -> int:
        """Let the learning rate fall to zero sooner if the loss has converged.

        Args:
            losses: those of all steps so far.

        Returns:
            The number of steps that are saved.
        """
        left = len(self.factors) - self.done
        fall = min(self.done, LONGEST_FALL)
        if not self.automatic or self.converged or left <= fall or not _level(losses):
            return 0
        last = self.factors[self.done - 1]
        steps = [last * factor("cosine", k, fall) for k in range(fall)]
        self.factors = np.concatenate([self.factors[: self.done], steps])
        self.converged = True
        return left - fall


def _level(losses: np.ndarray) -> bool:
    """Whether the loss no longer falls from one window to the next, as far as its noise tells."""
    if len(losses) < 2 * WINDOW:
        return False
    windows = losses[-2 * WINDOW : -WINDOW], losses[-WINDOW:]
    noise = math.hypot(*map(standard_error, windows))
    before, after = map(mean_loss, windows)
    return 2.0 * noise < SLIGHT and before - after <= 2.0 * noise


def mean_loss(losses: np.ndarray) -> float:
    """Return the mean of the finite losses; infinity if most are not finite."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if 2 * len(finite) > len(losses) else math.inf


def standard_error(losses: np.ndarray) -> float:
    """Return the standard error of the mean of the finite losses."""
    finite = losses[np.isfinite(losses)]
    return float(finite.std() / math.sqrt(len(finite))) if len(finite) else 0.0
