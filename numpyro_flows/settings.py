"""What a run of `fit` is told, and what it has to tell."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
from jax import Array

from numpyro_flows.batches import seed_of
from numpyro_flows.checks import check_key


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `fit` that are numbers and functions."""

    steps: int
    batch_size: int
    learning_rate: float
    patience: int | None
    validate_every: int | None
    standardize: bool
    schedule: str | Callable[[int], float] | None
    clip_norm: float | None
    penalty: float
    augment: Callable[..., Any] | None
    optimizer: optax.GradientTransformation | None
    key: Array

    def check(self) -> None:
        """Refuse what is out of its range."""
        for name, least in (("steps", 1), ("batch_size", 1)):
            _check_whole(name, getattr(self, name), least)
        for name in ("patience", "validate_every"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` is {self.learning_rate}, expected a positive number")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"`clip_norm` is {self.clip_norm}, expected a positive number or None")
        if not 0 <= self.penalty < math.inf:
            raise ValueError(f"`penalty` is {self.penalty}, expected a number from 0")
        check_schedule(self.schedule)
        if not (self.augment is None or callable(self.augment)):
            raise TypeError(f"`augment` is {self.augment!r}, expected a function or None")
        if not (self.optimizer is None or hasattr(self.optimizer, "update")):
            raise TypeError(
                f"`optimizer` is of type {type(self.optimizer).__name__}, expected an optax "
                "transformation or None"
            )
        check_key(self.key)

    def factor(self, step: int) -> float:
        """Return the schedule's factor on the learning rate."""
        return factor(self.schedule, step, self.steps)

    def describe(self) -> dict[str, Any]:
        """Return the settings by their names."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**named, "key": seed_of(self.key)}


@dataclasses.dataclass
class History:
    """What has happened so far: with the parameters, all that a checkpoint needs."""

    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    validation_losses: list[float] = dataclasses.field(default_factory=list)
    validation_steps: list[int] = dataclasses.field(default_factory=list)
    skipped: int = 0
    skipped_in_row: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    since_best: int = 0
    stopped: str | None = None

    @property
    def made(self) -> int:
        """Number of steps that have moved the parameters."""
        return self.step - self.skipped

    @property
    def validated(self) -> bool:
        """Whether a validation has found a finite loss."""
        return self.best_loss < math.inf


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"`{name}` is {value!r}, expected a whole number from {least}")


def check_schedule(schedule: Any) -> None:
    """Refuse what is no schedule of the learning rate."""
    if not (schedule in (None, "cosine") or callable(schedule)):
        raise ValueError(
            f"`schedule` is {schedule!r}, expected None, 'cosine' or a function of a step"
        )


def factor(schedule: str | Callable[[int], float] | None, step: int, steps: int) -> float:
    """Return a schedule's factor on the learning rate."""
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * step / steps))
    if not callable(schedule):
        return 1.0
    value = schedule(step)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`schedule` gives {value!r} at step {step}, expected a number") from None
