"""What a guide's density is relative to, in coordinates on which the model's does not depend."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyroflows.distribution import FlowDistribution
from pyroflows.guides.model import LogDensity
from pyroflows.layers.preconditioner import Preconditioner


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

    free: Float[Tensor, " D"]
    slope: Float[Tensor, " D"]

    def __init__(self, event_shape: int, *, rank: int | None = None) -> None:
        super().__init__(event_shape, rank=rank)
        self.register_buffer("free", torch.zeros(event_shape))
        self.register_buffer("slope", torch.zeros(event_shape))

    @torch.no_grad()
    def relative(self, free: Float[Tensor, " D"], slope: Float[Tensor, " D"]) -> "Start":
        """Set which coordinates are free, and the slopes of their log-densities."""
        self.free.copy_(free)
        self.slope.copy_(slope)
        return self

    def marginal(self, whole: Preconditioner, index: Int[Tensor, " D"]) -> "Start":
        """Set the layer as a `Preconditioner`, and its reference to that of these coordinates."""
        super().marginal(whole, index)
        return self.relative(whole.free[index], whole.slope[index])

    def reference(self, y: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        """Return the log-density of the reference measure."""
        return self._normal(y) - (self.slope * y).sum(-1)

    def target(self, log_density: LogDensity) -> LogDensity:
        """Return the log-density that the guide is to have, relative to no reference."""
        if not self.free.any():
            return log_density  # it may have no second derivatives, and is to say so

        def proper(y: Tensor) -> Tensor:
            return log_density(torch.where(self.free > 0, self.loc, y)) + self._normal(y)

        return proper

    def _normal(self, y: Tensor) -> Tensor:
        normal = -0.5 * (y - self.loc) ** 2 - 0.5 * math.log(2 * math.pi)
        return (self.free * normal).sum(-1)


class GuideDistribution(FlowDistribution):
    """A guide's posterior, whose `log_prob` is relative to the reference measure of its start."""

    def log_prob(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the log-density of `value`, `(*batch, *event_shape)`."""
        start = self.transforms[-1].layers[-1]
        return super().log_prob(value) - start.reference(value)
