"""Supports: the events that a flow or a distribution can give."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float
from numpyro.distributions import biject_to, constraints

from pyroflows_common.checks import check_rows
from pyroflows_common.support import each, outside


def support_of(distribution: Any) -> Any:
    """Return the support of a distribution; all real events if the host does not know it."""
    try:
        support = distribution.support
    except NotImplementedError:
        support = None
    if support is None or constraints.is_dependent(support):
        return constraints.independent(constraints.real, len(distribution.event_shape))
    return support


def is_real(support: Any) -> bool:
    """Return whether a support has all real events."""
    return isinstance(each(support), type(constraints.real))


def inside(y: Float[Array, "..."], support: Any) -> Bool[Array, "*batch"]:
    """Return whether each event lies in the interior of a support.

    The ends of an interval belong to the host's constraints, but a density of a smooth bijection
    need not have a limit there.
    """
    if isinstance(support, constraints.independent):
        within = inside(y, support.base_constraint)
        return within.reshape(*y.shape[: y.ndim - support.event_dim], -1).all(-1)
    if isinstance(support, constraints.cat):
        slices = jnp.split(y, np.cumsum(support.lengths)[:-1], support.dim)
        parts = zip(slices, support.cseq, strict=True)
        return jnp.concatenate([inside(part, inner) for part, inner in parts], support.dim)
    within = support(y)
    if hasattr(support, "lower_bound"):
        within = within & (y > support.lower_bound)
    if hasattr(support, "upper_bound"):
        within = within & (y < support.upper_bound)
    if isinstance(support, type(constraints.simplex)):
        within = within & (y > 0).all(-1)
    return within


def kept_inside(y: Float[Array, "..."], support: Any) -> Float[Array, "..."]:
    """Return numbers that rounding has put on an end of their interval as the nearest inside."""
    kind = jnp.finfo(y.dtype)
    ends = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    low, high = (
        None if end is None else end + side * max(abs(end) * float(kind.eps), float(kind.tiny))
        for side, end in zip((1, -1), ends, strict=True)
    )
    return y if low is high is None else jnp.clip(y, low, high)


def inverse_inside(
    bijection: Any, y: Float[Array, "..."], support: Any
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return the inverse of a bijection to a support and the log-slope log|det dy/dx|.

    Outside the support or on its edge, the inverse is 0 and the log-slope ∞. NaN stays NaN.
    """
    nan = jnp.isnan(y)
    outside = ~(inside(y, support) | nan.any(tuple(range(-support.event_dim, 0))))
    harmless = bijection(jnp.zeros(bijection.inverse_shape(y.shape), y.dtype))
    y = jnp.where(outside[(..., *[None] * support.event_dim)], harmless, y)
    x = bijection._inverse(y)
    return x, jnp.where(outside, jnp.inf, bijection.log_abs_det_jacobian(x, y))


def check_support(x: Float[Array, "..."], support: Any, name: str = "`x`") -> None:
    """Check that all events lie inside a support, unless they are traced."""
    if not is_real(support) and not isinstance(x, jax.core.Tracer):
        check_rows(np.asarray(inside(x, support)).reshape(-1), name, outside(support))


def check_base(base: Any) -> None:
    """Check that a base distribution has a density."""
    if support_of(base).is_discrete:
        raise ValueError(f"`base` is {base!r}, expected a distribution over real numbers")


def log_prob_inside(base: Any, z: Float[Array, "..."]) -> Float[Array, "*batch"]:
    """Return a base's log-density: −inf outside of its support, NaN for NaN, and no error."""
    support = support_of(base)
    if is_real(support):
        return base.log_prob(z)
    within = inside(z, support)
    known = within.reshape(*within.shape, *(1 for _ in base.event_shape))
    harmless = biject_to(support)(jnp.zeros_like(z))
    missing = jnp.where(z == z, -jnp.inf, z).reshape(*within.shape, -1).sum(-1)
    return jnp.where(within, base.log_prob(jnp.where(known, z, harmless)), missing)
