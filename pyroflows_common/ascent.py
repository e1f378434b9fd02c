"""The loop of `fit_guide`: one run per learning rate; the best stretch of steps is kept."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyroflows_common.checks import as_count, as_scales
from pyroflows_common.progress import bar
from pyroflows_common.schedule import (
    SHORTEST,
    Course,
    check_schedule,
    mean_loss,
    standard_error,
)

# Draws of the guide at each step, by default.
PARTICLES = 16

# A stretch counts as no worse than the lowest one up to so many standard errors of that: the later
# it is, the less it owes to luck.
EQUAL = 3.0

# Why a run ends early.
BOUND = "the evidence lower bound was not finite"
GRADIENT = (
    "the gradient of the evidence lower bound was not finite, although the bound was (likely a NaN "
    "in a branch that `where` or a mask leaves out, which still passes its gradient on: put a "
    "finite value in its place before the model computes with it)"
)


class Settings(NamedTuple):
    """How a guide is trained, as in `fit_guide`."""

    steps: int
    rates: list[float]
    schedule: str | Callable[[int], float] | None
    loss: Any
    progress: bool

    def of_draws(self) -> dict[str, Any]:
        """Return those of the settings that training on draws takes."""
        schedule = "cosine" if self.schedule == "auto" else self.schedule
        return {"steps": self.steps, "schedule": schedule, "progress": self.progress}


def as_settings(
    steps: int,
    learning_rate: float | Sequence[float],
    schedule: str | Callable[[int], float] | None,
    loss: Any,
    progress: bool,
    kind: type,
) -> Settings:
    """Check how a guide is to be trained, with a loss of one of the host's kinds."""
    rates, steps = as_scales(learning_rate, "learning_rate"), as_count(steps, "steps")
    check_schedule(schedule, auto=True)
    if not (loss is None or isinstance(loss, kind)):
        raise TypeError(f"`loss` is {loss!r}, expected one of the host's, such as Trace_ELBO()")
    return Settings(steps, rates, schedule, loss, progress)


class Run(NamedTuple):
    """One run of training.

    Args:
        state: the parameters after the last stretch that is no worse than the lowest one within
            its noise.
        losses: the loss of each step, skipped ones included.
        loss: the mean loss of that stretch; infinite if none was finite.
        learning_rate: its learning rate.
        skipped: number of skipped steps.
        stopped: why it ended: `"steps"`, `"converged"`, `"interrupted"` or `"not finite"`.
    """

    state: Any
    losses: np.ndarray
    loss: float
    learning_rate: float
    skipped: int
    stopped: str

    def warn(self, reason: str) -> None:
        """Warn that the run ended because no step could be taken.

        Args:
            reason: why.
        """
        learned = math.isfinite(self.loss) and self.skipped < len(self.losses)
        left = "those of its best stretch" if learned else "what they were"
        warnings.warn(
            f"training stopped after {len(self.losses)} steps, as {reason}: the guide's parameters "
            f"are {left}",
            stacklevel=3,
        )


class Ascent(ABC):
    """Runs of training from the same start; each wing adds what its host computes."""

    skipped: int  # steps of this run whose loss or gradient was not finite

    @abstractmethod
    def begin(self) -> None:
        """Return to the start."""

    @abstractmethod
    def climb(self, rates: np.ndarray) -> Iterator[np.ndarray]:
        """Take a step at each learning rate, and yield the losses."""

    @abstractmethod
    def state_now(self) -> Any:
        """Return the parameters, safe from further steps."""

    @abstractmethod
    def stands(self, before: Any) -> bool:
        """Return whether no parameter has moved since an earlier state."""

    @abstractmethod
    def blind(self) -> bool:
        """Return whether the model's gradient is finite at no draw of the guide.

        The gradient of an `AutoFlow` is zero there, because it leaves such draws out.
        """

    def best(self, settings: Settings) -> Run:
        """Run once for each learning rate, and return the best run; Ctrl-C ends all runs."""
        runs = []
        total = settings.steps * len(settings.rates)
        with bar(total, title="fit_guide", shown=settings.progress) as shown:
            for rate in settings.rates:
                course = Course(settings.schedule, settings.steps)
                runs.append(self._run(rate, course, shown))
                if runs[-1].stopped == "interrupted":
                    break
        return min(runs, key=lambda run: run.loss)

    def _run(self, rate: float, course: Course, shown: Any) -> Run:
        self.begin()
        best, loss, losses, stopped = self.state_now(), math.inf, [np.array([])], "steps"
        lowest, doubt = math.inf, 0.0
        for factors in course:
            length = len(factors)
            before, skipped = self.state_now(), self.skipped
            parts: list[np.ndarray] = []
            try:
                for part in self.climb(rate * factors):
                    parts.append(part)
                    shown.update(len(part))
            except KeyboardInterrupt:
                stopped = "interrupted"
            stretch = np.concatenate(parts) if parts else np.array([])
            losses.append(stretch)
            mean = mean_loss(stretch) if len(stretch) >= min(length, SHORTEST) else math.inf
            if mean < lowest + EQUAL * doubt:
                best, loss = self.state_now(), mean
            if mean < lowest:
                lowest, doubt = mean, standard_error(stretch)
            if stopped != "steps":
                break
            taken = length - (self.skipped - skipped)
            if not taken or (self.stands(before) and self.blind()):
                self.skipped += taken
                stopped = "not finite"
                break
            shown.total -= course.shorten(np.concatenate(losses))
            shown.set_postfix_str(f"ELBO {-mean:.2f}")
        if stopped == "steps" and course.converged:
            stopped = "converged"
        return Run(best, np.concatenate(losses), loss, rate, self.skipped, stopped)
