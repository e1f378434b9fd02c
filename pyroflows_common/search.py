"""Limits on the search for a guide's starting point, and its warning of separate modes."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Up to this many coordinates the search takes Hessians, and covariances have any correlations.
DENSE = 256
# Number of past steps that stand for the Hessian of more coordinates.
HISTORY = 10
# Number of random vectors whose products with the Hessian estimate its diagonal.
PROBES = 8
# Number of step lengths, each half of the one before, that are tried along a way.
HALVINGS = 15
# Range of the random points, and how much further they reach in a search for several modes.
NEAR, FURTHER = 2.0, 8.0
# Most modes that such a search refines.
MODES = 16
# Multiples of the starts: a coordinate on which a model depends at none of them is free.
FAR = (1.0, 10.0, 1000.0)
# Weight of a draw's rounding error against its log-density.
DOUBT = 10.0
# Two points are the same if the square of their distance, in standard deviations of the Gaussian at
# one of them, is below this: a number, and as much again for each coordinate as the second says.
SAME = 1.0, 0.1
# A Gaussian is refined if its bound is no lower than the best one by a number, and by as much again
# for each coordinate as the second says.
HOPEFUL = 100.0, 10.0
# Two modes are separate if their Gaussians are so many standard deviations apart, and the
# log-density between the modes is lower than at both, by so much at one of so many points.
APART, VALLEY, BETWEEN = 4.0, 3.0, 15
# A mode whose bound is no lower than the best one by this has a part of the posterior, too.
CLOSE = 5.0
# It may have one if the bound is no lower by a number, and by as much again for each coordinate as
# the second says, because its Gaussian may fit it worse.
POSSIBLE = 7.0, 0.1

NO_HESSIAN = (
    "the model has no second derivatives: the search for a start takes differences of slopes"
)


class Budget(NamedTuple):
    """How many points, draws and steps a search takes.

    Args:
        starts: number of points it sets out from.
        prior: how many of them are draws of the prior.
        few: number of draws that score each Gaussian on the way.
        many: number of draws that score the final Gaussians.
        newton_steps: most steps of a path with Hessians.
        quasi_newton_steps: most steps of a path without.
        rounds: number of rounds of batch and match.
        refined: number of Gaussians, the best ones, that are refined at first, and again.
        spread: ratio of the widest to the narrowest range of the random points.
    """

    starts: int = 12
    prior: int = 4
    few: int = 16
    many: int = 256
    newton_steps: int = 50
    quasi_newton_steps: int = 200
    rounds: int = 30
    refined: tuple[int, ...] = (12, 3)
    spread: float = 1.0

    @property
    def ranges(self) -> np.ndarray:
        """The range of each random point, as a column: it lies between minus that and that.

        The last ones, as many as draws of the prior, stand in for those.
        """
        own = np.geomspace(1.0, self.spread, self.starts - 2 - self.prior)
        return NEAR * np.concatenate([own, np.full(self.prior, self.spread)])[:, None]


# For models that can be evaluated at many points at once, and for those that take one at a time.
LARGE, SMALL = Budget(), Budget(5, 1, 4, 32, 10, 20, 5, (2,))


def matched_draws(size: int) -> int:
    """Return the number of draws in a round of batch and match, in so many coordinates."""
    return min(max(2 * size, 32), 512)


def for_modes(budget: Budget, starts: int) -> Budget:
    """Return the budget of a search for several modes: half of the starts are of the prior."""
    refined = (min(starts, MODES),) * len(budget.refined)
    return budget._replace(starts=starts, prior=starts // 2, refined=refined, spread=FURTHER)


def separate(bounds: Sequence[float], apart: np.ndarray, gap: float) -> list[int]:
    """Return which Gaussians stand for a separate mode each, the best one first.

    Args:
        bounds: evidence lower bound of each, up to the constant of the entropy, in falling order.
        apart: `(n, n)`, whether two lie at separate modes.
        gap: how much lower than the best one a bound may be.
    """
    kept: list[int] = []
    for k, bound in enumerate(bounds):
        if bound > bounds[0] - gap and apart[k, kept].all():
            kept.append(k)
    return kept


def warn_of_many(modes: int) -> None:
    """Warn that there may be more modes than are kept, if there are as many."""
    if modes >= MODES:
        warnings.warn(
            f"the search found {modes} modes, and keeps no more: others may be missed",
            stacklevel=2,
        )


def warn_of_modes(bounds: Sequence[float], apart: np.ndarray, size: int) -> None:
    """Warn of separate modes that are close in their bounds, if there are any.

    Args:
        bounds: evidence lower bound of the Gaussian at each, up to the constant of the entropy, the
            best one first.
        apart: `(n, n)`, whether two modes are separate.
        size: number of coordinates.
    """
    kept = separate(bounds, apart, CLOSE)
    if len(kept) < 2:
        return
    constant = 0.5 * size * (1.0 + math.log(2.0 * math.pi))
    shown = ", ".join(f"{bounds[k] + constant:.1f}" for k in kept)
    warnings.warn(
        f"the search for a start found {len(kept)} separate modes, with the evidence lower bounds "
        f"{shown}: the guide starts at the first one, and may miss the others; fit_mixture fits a "
        "guide to each, and mixes them",
        stacklevel=2,
    )
