"""Gradients of a guide that go only through its samples.

Roeder, Wu and Duvenaud, "Sticking the landing" (arXiv:1703.09194), section 3.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_flows.guides.reference import GuideDistribution

# Limit on the gradient of one draw, in standard deviations of the whole posterior.
GRADIENT_LIMIT = 10.0


@jax.custom_vjp
def limited(x: Array, unit: Array) -> tuple[Array, Array]:
    """Return both arguments, and limit the length of the gradient of x.

    `unit` is a zero that is added to the log-density of each draw. Its gradient is therefore the
    weight of one nat of that draw in the objective: a mean over n particles gives each 1/n.
    """
    return x, unit


def _limited_forward(x: Array, unit: Array) -> tuple[tuple[Array, Array], None]:
    return (x, unit), None


def _limited_backward(_: None, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
    slope, weight = gradients
    bound = GRADIENT_LIMIT * math.sqrt(slope.shape[-1]) * jnp.abs(weight)
    size = jnp.linalg.norm(slope, axis=-1)
    # A draw without a finite gradient contributes nothing.
    slope = jnp.where(jnp.isfinite(size)[..., None], slope, 0.0)
    shrunk = (weight != 0) & (size > bound)
    factor = jnp.where(shrunk, bound / jnp.where(shrunk, size, 1.0), 1.0)
    return slope * jnp.where(jnp.isfinite(factor), factor, 0.0)[..., None], weight


limited.defvjp(_limited_forward, _limited_backward)


class PathDistribution(GuideDistribution):
    r"""A guide's posterior, whose `log_prob` has no gradient in the parameters.

    An evidence lower bound keeps the gradient that goes through the samples. That gradient is
    unbiased, and it is zero for every draw if guide and posterior are equal. The gradient of one
    draw is cut to a length of \(10 \sqrt D\), in standard deviations of the Gaussian that the guide
    started from. Otherwise a single far-out draw would outweigh all others for thousands of steps.

    References:
        Roeder, Wu and Duvenaud, "Sticking the landing" (arXiv:1703.09194), section 3.
    """

    def sample_with_intermediates(
        self, key: Array, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, list[Array]]:
        """Draw, and return the unit of each draw for `log_prob` to add."""
        (flow,) = self.transforms
        inner, preconditioner = flow.layers
        x = inner(self.base_dist.sample(key, sample_shape))
        x, unit = limited(x, jnp.zeros_like(x, shape=x.shape[:-1]))
        return preconditioner(x), [unit]

    def log_prob(self, value: Array, intermediates: Sequence[Array] | None = None) -> Array:
        """Log-density of `value`, as a function of the value alone."""
        density = GuideDistribution.log_prob(jax.lax.stop_gradient(self), value)
        return density + sum(intermediates or [])
