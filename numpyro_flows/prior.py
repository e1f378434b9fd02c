"""`FlowPrior`: a joint flow over named, constrained values as the prior of a model."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from jaxtyping import Float
from numpyro.distributions import biject_to, constraints

from numpyro_flows.distribution import named_base
from numpyro_flows.layers.constrained import KNOWN, BijectTo, between
from numpyro_flows.support import inverse_inside
from numpyro_flows.transform import TransformModule
from pyroflows_common.priors import (
    Site,
    check_sites,
    check_values,
    checked_region,
    draws_of,
    joint_shape,
)
from pyroflows_common.support import Support, as_support

WHOLE = {**KNOWN, "corr_cholesky": constraints.corr_cholesky}


class FlowPrior(eqx.Module):
    r"""A joint prior over named values, which `fit_prior` learns from draws.

    Called in a model, it draws one latent vector z of D numbers from the base of its flow, at the
    site `name`, and returns the named values, each also a `deterministic` site of its own name:

    $$\theta = c(\mathrm{flow}(z)), \qquad
    \log p(\theta) = \log p_z(z) + \log|\det dz/d\theta|,$$

    where c maps onto the supports. NUTS and guides thus see a vector that is standard normal
    before any data are. Its draws are those of the values, with all their dependences. To fix or to
    hand on values, as to `Predictive`, give the latent vector, of which they are functions.

    Args:
        flow: a flow on the D unconstrained coordinates of all values, in the order of `sites`.
        sites: the values: name, shape, number of plates' dimensions, support.
        draws: number of draws that the flow has learned from.
        name: name of the latent site.

    Raises:
        ValueError: if flow and sites do not fit each other, or two of the names are equal.

    Examples:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_flows import fit_prior
        >>> from numpyro.distributions import constraints
        >>> a, b = jax.random.normal(jax.random.key(0), (2, 1000))
        >>> supports = {"rate": constraints.positive, "shift": constraints.real}
        >>> draws = {"rate": jax.numpy.exp(a), "shift": a + b}
        >>> prior = fit_prior(draws, supports=supports, steps=100, progress=False)
        >>> def model(y):
        ...     values = prior()
        ...     numpyro.sample("y", dist.Normal(values["shift"], values["rate"]), obs=y)
    """

    flow: TransformModule
    sites: tuple[Site, ...] = eqx.field(static=True)
    draws: float = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __init__(
        self, flow: TransformModule, sites: Sequence[Site], draws: float, name: str = "prior"
    ) -> None:
        self.flow, self.sites, self.draws, self.name = flow, tuple(sites), draws, name
        check_sites(self.sites, name)
        size = sum(map(size_of, self.sites))
        if flow.event_shape != (size,):
            raise ValueError(
                f"`flow` has events of shape {flow.event_shape}, but the sites have {size} "
                "unconstrained numbers"
            )

    def __repr__(self) -> str:
        names = ", ".join(site.name for site in self.sites)
        return f"FlowPrior({names}; {self.flow.event_shape[0]} numbers, {self.draws:.0f} draws)"

    def __call__(self) -> dict[str, Array]:
        """Draw the values in a model: one latent site, and a deterministic one for each value."""
        z = numpyro.sample(self.name, named_base(self.flow.base, self.flow))
        values = {
            site.name: value.reshape(joint_shape(site, tuple(z.shape[:-1])))
            for site, value in zip(self.sites, self.values(z).values(), strict=True)
        }
        return {name: numpyro.deterministic(name, value) for name, value in values.items()}

    @property
    def supports(self) -> dict[str, Any]:
        """The support of each value, as `fit_prior` takes them."""
        return {site.name: _constraints(site) for site in self.sites}

    def values(self, z: Float[Array, "*batch D"]) -> dict[str, Array]:
        """Return the named values at latent vectors, each `(*batch, *shape)`."""
        x, values, start = self.flow(z), {}, 0
        for site in self.sites:
            stop = start + size_of(site)
            values[site.name] = _constrained(site, x[..., start:stop])
            start = stop
        return values

    def inverse_and_ladj(
        self, values: Mapping[str, Array]
    ) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch"]]:
        """Return latent vectors z of values θ, each `(*batch, *shape)`, and log|det dz/dθ|."""
        check_values({name: jnp.shape(value) for name, value in values.items()}, self.sites)
        pairs = [unconstrained(site, jnp.asarray(values[site.name])) for site in self.sites]
        parts, ladjs = zip(*pairs, strict=True)
        z, ladj = self.flow.inverse_and_ladj(jnp.concatenate(parts, -1))
        return z, ladj + sum(ladjs)

    def log_prob(self, values: Mapping[str, Array]) -> Float[Array, "*batch"]:
        """Return the joint log-density of named values, each `(*batch, *shape)`.

        It is −∞ outside of the supports.

        Raises:
            ValueError: if a value is missing, unknown or of another shape.
        """
        z, ladj = self.inverse_and_ladj(values)
        return named_base(self.flow.base, self.flow).log_prob(z) + ladj

    def check(self, draws: Any, weights: Any = None) -> float:
        r"""Warn if a new posterior lies where this prior has learned from few draws.

        The prior is standard normal in the coordinates z of its base. Along each of the main
        directions of the new draws, with mean m and variance v there, the n draws of the prior
        count as \(n \sqrt{v (2 - v)}\, e^{-m^2 / (2 - v)}\) draws of N(m, v). Fewer than 100 in
        the worst direction give a warning.

        Args:
            draws: draws of a posterior with this prior, as `fit_prior` takes them, but no guide.
            weights: weights `(draws,)` of the draws.

        Returns:
            The effective number in the worst direction. Autocorrelated draws of the prior count in
            full.

        Raises:
            ValueError: if the draws have NaN, lie outside of a support, or are no more than D.
        """
        (size,) = self.flow.base_shape
        named = draws_of(self.sites, self.name, size, draws, weights)
        values = {name: jnp.asarray(value) for name, value in named.values.items()}
        if self.name in values:
            z = values[self.name]
        else:
            z, ladj = self.inverse_and_ladj(values)
            z = jnp.where(jnp.isfinite(ladj)[:, None], z, jnp.nan)
        # Equinox wraps methods.
        return checked_region(np.asarray(z, float), named.weights, self.draws, level=4)


def as_form(support: Any) -> Support:
    """Return a constraint of NumPyro, or one for each number of a site, as files hold it."""
    form = as_support(support, WHOLE)
    return ((None, None),) if form == "real" else form


def size_of(site: Site) -> int:
    """Return the number of unconstrained coordinates of a site."""
    return math.prod(_inner(site))


def _constraints(site: Site) -> Any:
    """Return the constraint on a site, or one for each of its numbers."""
    if isinstance(site.support, str):
        return WHOLE[site.support]
    found = [between(*pair) for pair in site.support]
    return found if len(found) > 1 else found[0]


def _inner(site: Site) -> tuple[int, ...]:
    """Return the shape of the unconstrained coordinates of a site."""
    if isinstance(site.support, str):
        return biject_to(WHOLE[site.support]).inverse_shape(site.shape)
    return (math.prod(site.shape),)


@functools.cache
def _layer(site: Site) -> BijectTo:
    """Return the bijection onto the intervals of a site's numbers."""
    return BijectTo(math.prod(site.shape), site.support)


def _constrained(site: Site, x: Float[Array, "*batch n"]) -> Array:
    batch = x.shape[:-1]
    x = x.reshape(*batch, *_inner(site))
    if isinstance(site.support, str):
        y = biject_to(WHOLE[site.support])(x)
    else:
        y = _layer(site)(x)
    return y.reshape(*batch, *site.shape)


def unconstrained(site: Site, y: Array) -> tuple[Array, Array]:
    """Return unconstrained coordinates x of values y of a site, and log|det dx/dy|, batch-shaped.

    Outside the support or on its edge, x is 0 and the other −∞.
    """
    batch = y.shape[: y.ndim - len(site.shape)]
    if isinstance(site.support, str):
        support = WHOLE[site.support]
        x, slope = inverse_inside(biject_to(support), y, support)
        ladj = -slope.reshape(*batch, -1).sum(-1)
    else:
        layer = _layer(site)
        x, ladj = layer.inverse_and_ladj(y.reshape(*batch, *layer.event_shape))
    return x.reshape(*batch, -1), ladj
