"""Densities: a base distribution and a flow as one NumPyro distribution."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions.util import validate_sample

from numpyro_flows.transform import TransformModule
from pyroflows_common.checks import check_shape

BASES = {"normal": dist.Normal, "logistic": dist.Logistic}


class FlowDistribution(dist.TransformedDistribution):
    """A `TransformedDistribution` of one flow, whose `log_prob` evaluates each network once.

    The host's own `log_prob` asks for the inverse and for the log-determinant separately; XLA
    merges the two forward passes but not the two backward passes. Made by `flow_distribution`.
    """

    @validate_sample
    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log-density of `value`, `(*batch, *event_shape)`, by the change of variables."""
        *inner, flow = self.transforms  # the host joins those of a transformed base to the flow
        base = dist.TransformedDistribution(self.base_dist, inner) if inner else self.base_dist
        if intermediates is None:
            x, ladj = flow.inverse_and_ladj(value)
        else:
            x, ladj = intermediates[-1]
            ladj = -ladj
        surplus = tuple(range(len(flow.event_shape) - self.event_dim, 0))
        return base.log_prob(x) + (ladj.sum(surplus) if surplus else ladj)


def flow_distribution(
    flow: TransformModule,
    base: str | dist.Distribution | None = None,
    *,
    context: Array | None = None,
    temperature: float = 1.0,
) -> FlowDistribution:
    r"""Return the distribution of `flow(z)` for z from a base distribution.

    $$\log p(x) = \log p_z(z) + \log|\det dz/dx|, \qquad z = \mathrm{flow}^{-1}(x).$$

    Args:
        flow: the flow.
        base: `"normal"`, `"logistic"` (NICE, section 3.4), or any NumPyro distribution over events
            of the flow's shape. Default: what the flow was last fitted with, normal at first.
        context: `(*batch, context_dim)` for a conditional flow.
        temperature: factor on the scale of a named base (Glow, section 5).

    Returns:
        A NumPyro distribution with the context's batch shape.

    Raises:
        ValueError: where base, context or temperature do not suit the flow.
        TypeError: where `flow` is not a `TransformModule`.

    Examples:
        >>> import jax
        >>> from numpyro_flows import flow_distribution, realnvp
        >>> density = flow_distribution(realnvp(2, key=jax.random.key(0)), temperature=0.7)
        >>> density.sample(jax.random.key(1), (5,)).shape
        (5, 2)
    """
    if not isinstance(flow, TransformModule):
        raise TypeError(f"`flow` is a {type(flow).__name__}, expected a TransformModule")
    plain = flow
    if context is not None:
        flow = flow.condition(context)
    elif flow.context_dim:
        flow._entry(jnp.zeros(flow.event_shape))  # says what is missing
    traced = _is_traced(temperature)
    if not traced and not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}, expected a positive number")
    density: Any = flow.base if base is None else base
    if isinstance(density, str):
        density = named_base(density, plain, temperature)
    elif traced or temperature != 1.0:
        raise ValueError("`temperature` is for the named bases; scale your own distribution")
    check_shape(density.batch_shape + density.event_shape, flow.base_shape, "base")
    return FlowDistribution(density, [flow])


def named_base(name: str, flow: TransformModule, temperature: float = 1.0) -> Any:
    """Return the base distribution of this name in the flow's dtype."""
    if name == "custom":
        raise ValueError(
            "`base` is missing: this flow was fitted with a base distribution of your own; pass it"
        )
    if name not in BASES:
        raise ValueError(f"`base` is {name!r}, expected one of {sorted(BASES)} or a distribution")
    arrays = filter(eqx.is_inexact_array, jax.tree.leaves(flow))
    zeros = jnp.zeros(flow.base_shape, next(arrays, jnp.zeros(())).dtype)
    base = BASES[name](zeros, jnp.full_like(zeros, temperature))
    return base.to_event(len(flow.base_shape))


def _is_traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)
