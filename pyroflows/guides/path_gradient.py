"""Gradients of a guide that go through its samples alone.

Roeder, Wu and Duvenaud, "Sticking the landing" (arXiv:1703.09194), section 3.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pyroflows.distribution import FlowDistribution

# Longest gradient that one draw may contribute, in standard deviations of the whole posterior.
GRADIENT_LIMIT = 10.0


class Limited(torch.autograd.Function):
    """Both arguments as they are; what comes back to x is no longer than the limit.

    The gradient that comes back to `unit`, a zero that is added to each draw's log-density, is
    what one nat of that draw weighs in the objective: a mean over particles weighs each by one in
    their number.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Copy both."""
        return x.clone(), unit.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, slope: Tensor, weight: Tensor) -> tuple[Tensor, None]:
        """Shorten what comes back to x."""
        bound = GRADIENT_LIMIT * math.sqrt(slope.shape[-1]) * weight.abs()
        size = slope.norm(dim=-1)
        # A draw without a finite gradient contributes nothing.
        slope = slope.where(size.isfinite()[..., None], 0.0)
        shrunk = (weight != 0) & (size > bound)
        factor = torch.where(shrunk, bound / size.where(shrunk, 1.0), 1.0)
        return slope * factor.where(factor.isfinite(), 0.0)[..., None], None


class PathDistribution(FlowDistribution):
    r"""A guide's posterior, whose `log_prob` has no gradient in the parameters.

    An evidence lower bound keeps the gradient that goes through the samples: as right on average,
    and zero for every draw where guide and posterior are equal. What one draw contributes is cut
    to a length of \(10 \sqrt D\), in standard deviations of the Gaussian that the guide started
    from: one draw from far out would otherwise outweigh all others for thousands of steps.

    References:
        Roeder, Wu and Duvenaud, "Sticking the landing" (arXiv:1703.09194), section 3.
    """

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, and keep what `log_prob` adds for `Limited` to know the weight of a draw."""
        (flow,) = self.transforms
        inner, preconditioner = flow.layers
        x, _ = inner.forward_and_ladj(self.base_dist.rsample(torch.Size(sample_shape)))
        x, unit = Limited.apply(x, x.new_zeros(x.shape[:-1]))
        y, _ = preconditioner.forward_and_ladj(x)
        self._drawn = y, unit
        return y

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of `value`: as a function of the value alone, where that has a gradient."""
        if torch.jit.is_tracing():  # where gradients cannot be taken: the whole one is right, too
            return super().log_prob(value)
        if not (torch.is_grad_enabled() and value.requires_grad):
            return super().log_prob(value)
        leaf = value.detach().requires_grad_()
        density = super().log_prob(leaf)
        (slope,) = torch.autograd.grad(density.sum(), leaf)
        density = density.detach() + ((value - leaf.detach()) * slope).sum(-1)
        drawn, unit = getattr(self, "_drawn", (None, density))
        return density + unit if drawn is value else density
