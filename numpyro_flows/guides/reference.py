"""What a guide's density is relative to, in coordinates on which the model's does not depend."""

import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from numpyro_flows.distribution import FlowDistribution
from numpyro_flows.guides.model import LogDensity
from numpyro_flows.layers.preconditioner import Preconditioner
from numpyro_flows.tree import frozen, replace


class Start(Preconditioner):
    r"""Where a guide starts, and the reference measure of its density.

    The posterior is improper in a coordinate on which the model's density does not depend: an entry
    of a site with missing data that is observed, or a site under a mask. There the evidence lower
    bound has no maximum, and the guide's density is given relative to a normal density of unit
    scale, which makes the bound that of the model without the coordinate:

    $$\log r(y) = \sum_j f_j \log N(y_j; \mathrm{loc}_j, 1) - c_j y_j$$

    where f marks the free coordinates, and c is the slope of their log-density.

    Args:
        event_shape: as in `Preconditioner`.
        rank: as in `Preconditioner`.
    """

    buffers: ClassVar[tuple[str, ...]] = (*Preconditioner.buffers, "free", "slope")

    free: Float[Array, " D"]
    slope: Float[Array, " D"]

    def __init__(self, event_shape: int, *, rank: int | None = None) -> None:
        super().__init__(event_shape, rank=rank)
        self.free = jnp.zeros(event_shape)
        self.slope = jnp.zeros(event_shape)

    def relative(self, free: Float[Array, " D"], slope: Float[Array, " D"]) -> "Start":
        """Return the layer with these free coordinates and slopes of their log-densities."""
        return replace(self, free=free, slope=slope)

    def marginal(self, whole: Preconditioner, index: Int[np.ndarray, " D"]) -> "Start":
        """Return the layer set as a `Preconditioner`, with the reference of these coordinates."""
        return super().marginal(whole, index).relative(whole.free[index], whole.slope[index])

    def reference(self, y: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        """Return the log-density of the reference measure."""
        return self._normal(y) - (self.slope * y).sum(-1)

    def target(self, log_density: LogDensity) -> LogDensity:
        """Return the log-density that the guide is to have, relative to no reference."""

        def proper(y: Array) -> Array:
            return log_density(jnp.where(self.free > 0, self.loc, y)) + self._normal(y)

        return proper

    def _normal(self, y: Array) -> Array:
        normal = -0.5 * (y - self.loc) ** 2 - 0.5 * math.log(2 * math.pi)
        return (self.free * normal).sum(-1)


class GuideDistribution(FlowDistribution):
    """A guide's posterior, whose `log_prob` is relative to the reference measure of its start."""

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Return the log-density of `value`, `(*batch, *event_shape)`."""
        start = frozen(self.transforms[-1].layers[-1])
        return super().log_prob(value, intermediates) - start.reference(value)
