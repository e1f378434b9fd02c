"""Settings and history of a `fit` run."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np

from pyroflows_common.checks import as_count, as_scale
from pyroflows_common.schedule import check_schedule, factor

# Fraction of skipped steps above which `fit` warns.
WORRYING = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of `fit` that are numbers or functions; each wing adds its own.

    Raises:
        ValueError: if an argument is out of range; the message names it.
        TypeError: if an argument has the wrong type.
    """

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
    optimizer: Any

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Self:
        """Return the settings among the arguments of a call of `fit`."""
        return cls(**{field.name: arguments[field.name] for field in dataclasses.fields(cls)})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            as_count(getattr(self, name), name)
        for name in ("patience", "validate_every"):
            if getattr(self, name) is not None:
                as_count(getattr(self, name), name)
        as_scale(self.learning_rate, "learning_rate", zero=False)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"`clip_norm` is {self.clip_norm}, expected a positive number or None")
        as_scale(self.penalty, "penalty")
        check_schedule(self.schedule)
        if not (self.augment is None or callable(self.augment)):
            raise TypeError(f"`augment` is {self.augment!r}, expected a function or None")

    def factor(self, step: int) -> float:
        """Return the factor of the schedule on the learning rate."""
        return factor(self.schedule, step, self.steps)

    def describe(self) -> dict[str, Any]:
        """Return the settings by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass
class History:
    """Progress of a run: with the arrays of the run, the content of a checkpoint."""

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
        """Number of steps that moved the parameters."""
        return self.step - self.skipped

    @property
    def validated(self) -> bool:
        """Whether some validation loss is finite."""
        return self.best_loss < math.inf

    def warning(self, bounded_base: bool) -> str | None:
        """Return a warning if training went badly.

        Args:
            bounded_base: whether the base gives a density to some real events only.
        """
        if self.stopped == "not finite":
            what = (
                f"training stopped at step {self.step}: the loss or its gradient was not finite in "
                f"{self.skipped_in_row} steps in a row. The flow has the parameters of step "
                f"{self.best_step}"
            )
        elif self.validated and not self.best_step and self.stopped != "interrupted":
            what = (
                "training did not help: no validation loss was below that of the start, "
                f"{self.best_loss:.4g}, and the flow has the parameters of the start"
            )
        elif self.validation_losses and not self.validated:
            what = "no validation loss was finite: the flow has the last parameters"
        elif self.skipped > (0 if bounded_base else WORRYING * self.step):
            what = (
                f"{self.skipped} of {self.step} steps were skipped, because the loss or its "
                "gradient was not finite"
            )
        else:
            return None
        if bounded_base and (self.skipped or not self.validated):
            return (
                f"{what}. A row that the flow maps outside the support of `base` has an infinite "
                "loss: a base on all real numbers gives each row a density."
            )
        return f"{what}. A smaller learning_rate or a clip_norm may help."

    def result(self, flow: Any) -> "FitResult":
        """Return the trained flow with this history."""
        return FitResult(
            flow=flow,
            losses=np.array(self.losses),
            validation_losses=np.array(self.validation_losses),
            validation_steps=np.array(self.validation_steps, dtype=int),
            skipped=self.skipped,
            best_step=self.best_step,
            stopped=self.stopped or "",
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FitResult:
    """Result of a `fit` run: the trained flow and the history of its training.

    Args:
        flow: the trained flow.
        losses: mean negative log-likelihood of each training batch, in nats per event, including
            skipped steps.
        validation_losses: mean negative log-likelihood of the validation data, at each validation;
            the first is that of the start.
        validation_steps: number of steps before each validation.
        skipped: number of steps skipped because the loss or its gradient was not finite.
        best_step: number of steps that led to the flow's parameters, without skipped ones; 0 if
            the flow has the parameters of the start, because training did not help.
        stopped: reason why training ended: `"steps"`, `"patience"`, `"interrupted"`,
            `"not finite"` or `"data exhausted"`.
    """

    flow: Any
    losses: np.ndarray
    validation_losses: np.ndarray
    validation_steps: np.ndarray
    skipped: int
    best_step: int
    stopped: str

    def __repr__(self) -> str:
        shown = [f"flow={type(self.flow).__name__}", f"steps={len(self.losses)}"]
        if len(self.losses):
            shown.append(f"last_loss={self.losses[-1]:.4g}")
        if len(self.validation_losses):
            shown.append(f"best_validation_loss={self.validation_losses.min():.4g}")
        shown += [f"{name}={getattr(self, name)!r}" for name in ("skipped", "best_step", "stopped")]
        return f"FitResult({', '.join(shown)})"
