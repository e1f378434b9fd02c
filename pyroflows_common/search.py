"""Limits on the search for a guide's starting point."""

from typing import NamedTuple

# Up to this many coordinates the search takes Hessians, and covariances have any correlations.
DENSE = 256
# Number of past steps that stand for the Hessian of more coordinates.
HISTORY = 10
# Number of random vectors whose products with the Hessian estimate its diagonal.
PROBES = 8
# Number of step lengths, each half of the one before, that are tried along a way.
HALVINGS = 15
# Multiples of the starts: a coordinate on which a model depends at none of them is free.
FAR = (1.0, 10.0, 1000.0)
# Weight of a draw's rounding error against its log-density.
DOUBT = 10.0

NO_HESSIAN = (
    "the model has no second derivatives: the search for a start takes differences of slopes"
)


class Budget(NamedTuple):
    """How many points, draws and steps a search takes.

    Args:
        starts: number of points it sets out from.
        few: number of draws that score each Gaussian on the way.
        many: number of draws that score the final Gaussians.
        newton_steps: most steps of a path with Hessians.
        quasi_newton_steps: most steps of a path without.
        rounds: number of rounds of batch and match.
    """

    starts: int = 8
    few: int = 16
    many: int = 256
    newton_steps: int = 50
    quasi_newton_steps: int = 200
    rounds: int = 30


# For models that can be evaluated at many points at once, and for those that take one at a time.
LARGE, SMALL = Budget(), Budget(4, 4, 32, 10, 20, 5)
