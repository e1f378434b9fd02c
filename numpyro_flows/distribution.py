"""Flow distributions: a base distribution and a flow as one NumPyro distribution."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float
from numpyro.distributions.util import validate_sample

from numpyro_flows.inputs import Events
from numpyro_flows.rng import RandomKey
from numpyro_flows.support import check_base, log_prob_inside
from numpyro_flows.transform import Context, TransformModule
from numpyro_flows.tree import dtype_of
from pyroflows_common.checks import check_shape

BASES = {"normal": dist.Normal, "logistic": dist.Logistic}


class FlowDistribution(dist.TransformedDistribution):
    """A `TransformedDistribution` of one flow, whose `log_prob` evaluates each network once.

    The host's own `log_prob` asks for the inverse and for the log-determinant separately; XLA
    merges the two forward passes but not the two backward passes. Created by `flow_distribution`.
    """

    @validate_sample
    def log_prob(
        self, value: Events, intermediates: Sequence[Sequence[Array]] | None = None
    ) -> Float[Array, "..."]:
        """Return the log-density of `value`, `(*batch, *event_shape)`."""
        *inner, flow = self.transforms  # NumPyro puts those of a transformed base first
        base = dist.TransformedDistribution(self.base_dist, inner) if inner else self.base_dist
        if intermediates is None:
            x, ladj = flow.inverse_and_ladj(value)
        else:
            x, ladj = intermediates[-1]
            ladj = -ladj
        surplus = tuple(range(len(flow.event_shape) - self.event_dim, 0))
        return log_prob_inside(base, x) + (ladj.sum(surplus) if surplus else ladj)


def flow_distribution(
    flow: TransformModule,
    base: str | dist.Distribution | None = None,
    *,
    context: Context = None,
    temperature: float = 1.0,
) -> FlowDistribution:
    r"""Return the distribution of `flow(z)` for z from a base distribution.

    $$\log p(x) = \log p_z(z) + \log|\det dz/dx|, \qquad z = \mathrm{flow}^{-1}(x).$$

    Args:
        flow: the flow.
        base: `"normal"`, `"logistic"` (NICE, section 3.4), or any NumPyro distribution over events
            of the flow's shape. Default: the base of the flow's last fit, at first normal.
        context: `(*batch, context_dim)` for a conditional flow.
        temperature: scale factor of a named base (Glow, section 5).

    Returns:
        A NumPyro distribution with the context's batch shape.

    Raises:
        ValueError: if base, context or temperature does not fit the flow.
        TypeError: if `flow` is not a `TransformModule`, or `base` is not a distribution.

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
        flow._entry(jnp.zeros(flow.event_shape))  # raises the error about the missing context
    traced = isinstance(temperature, jax.core.Tracer)
    if not traced and not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}, expected a positive number")
    density = flow.base if base is None else base
    if isinstance(density, str):
        density = named_base(density, plain, temperature)
    elif not isinstance(density, dist.Distribution):
        raise TypeError(f"`base` is {base!r}, expected 'normal', 'logistic' or a distribution")
    elif traced or temperature != 1.0:
        raise ValueError("`temperature` applies to named bases only; scale your own distribution")
    else:
        check_base(density)
    check_shape(density.batch_shape + density.event_shape, flow.base_shape, "base")
    return FlowDistribution(density, [flow])


def named_base(name: str, flow: TransformModule, temperature: float = 1.0) -> dist.Distribution:
    """Return the base distribution of this name in the dtype of the flow."""
    if name == "custom":
        raise ValueError(
            "`base` is missing: this flow was fitted with a custom base distribution; pass it"
        )
    if name not in BASES:
        raise ValueError(f"`base` is {name!r}, expected one of {sorted(BASES)} or a distribution")
    return _made(name, temperature, flow.base_shape, dtype_of(flow))


class NamedBase(dist.Independent):
    """A base distribution that is compiled once for each shape, also when used outside `jit`.

    It does not validate its values, because `FlowDistribution` does. `expand` gives the host's own.
    """

    @jax.jit
    def log_prob(self, value: Events, intermediates: object = None) -> Float[Array, "..."]:
        """Return the log-density of `value`, `(*batch, *base_shape)`."""
        return super().log_prob(value)

    @functools.partial(jax.jit, static_argnums=2)
    def sample(self, key: RandomKey, sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Draw `(*sample_shape, *base_shape)`."""
        return super().sample(key, sample_shape)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _made(name: str, temperature: float, shape: tuple[int, ...], dtype: DTypeLike) -> NamedBase:
    zeros = jnp.zeros(shape, dtype)
    return NamedBase(BASES[name](zeros, jnp.full_like(zeros, temperature)), len(shape))
