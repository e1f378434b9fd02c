"""Gradients of a guide that go only through its samples.

Roeder, Wu and Duvenaud, "Sticking the landing" (arXiv:1703.09194), section 3.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.guides.reference import GuideDistribution

# Limit on the gradient of one draw, in standard deviations of the whole posterior.
GRADIENT_LIMIT = 10.0


class Limited(torch.autograd.Function):
    """Returns both arguments, and limits the length of the gradient of x.

    `unit` is a zero that is added to the log-density of each draw. Its gradient is therefore the
    weight of one nat of that draw in the objective: a mean over n particles gives each 1/n.
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
        """Shorten the gradient of x."""
        bound = GRADIENT_LIMIT * math.sqrt(slope.shape[-1]) * weight.abs()
        size = slope.norm(dim=-1)
        # A draw without a finite gradient contributes nothing.
        slope = slope.where(size.isfinite()[..., None], 0.0)
        shrunk = (weight != 0) & (size > bound)
        factor = torch.where(shrunk, bound / size.where(shrunk, 1.0), 1.0)
        return slope * factor.where(factor.isfinite(), 0.0)[..., None], None


class PathDistribution(GuideDistribution):
    r"""A guide's posterior, whose `log_prob` has no gradient in the parameters.

    An evidence lower bound keeps the gradient that goes through the samples. That gradient is
    unbiased, and it is zero for every draw if guide and posterior are equal. The gradient of one
    draw is cut to a length of \(10 \sqrt D\), in standard deviations of the Gaussian that the guide
    started from. Otherwise a single far-out draw would outweigh all others for thousands of steps.

    References:
        Roeder, Wu and Duvenaud, "Sticking the landing" (arXiv:1703.09194), section 3.
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw, and keep the unit of each draw for `log_prob` to add."""
        (flow,) = self.transforms
        inner, preconditioner = flow.layers
        x, _ = inner.forward_and_ladj(self.base_dist.rsample(torch.Size(sample_shape)))
        x, unit = Limited.apply(x, x.new_zeros(x.shape[:-1]))
        y, _ = preconditioner.forward_and_ladj(x)
        self._drawn = y, unit
        return y

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of `value`, as a function of the value alone if that has a gradient."""
        if torch.jit.is_tracing():  # takes no inner gradient; the whole one is unbiased, too
            return super().log_prob(value)
        if not (torch.is_grad_enabled() and value.requires_grad):
            return super().log_prob(value)
        leaf = value.detach().requires_grad_()
        density = super().log_prob(leaf)
        (slope,) = torch.autograd.grad(density.sum(), leaf)
        density = density.detach() + ((value - leaf.detach()) * slope).sum(-1)
        drawn, unit = getattr(self, "_drawn", (None, density))
        return density + unit if drawn is value else density
