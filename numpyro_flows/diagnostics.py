"""Diagnostics: the round-trip error of a flow in floating point."""

import math

import jax.numpy as jnp

from numpyro_flows.inputs import Events, check_event, check_finite
from numpyro_flows.transform import TransformModule
from pyroflows_common.invertibility import Invertibility


def check_invertible(flow: TransformModule, x: Events) -> Invertibility:
    """Measure the round-trip error of a flow in floating point.

    Args:
        flow: the flow or layer; a conditional one as `flow.condition(context)`.
        x: data `(*batch, *event_shape)`.

    Returns:
        The largest errors over all rows; infinity if the flow gives a NaN.

    Raises:
        ValueError: if `x` has the wrong shape, no rows or non-finite rows.
        TypeError: if `flow` is not a `TransformModule` or `x` not a floating-point array.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import check_invertible, realnvp
        >>> flow = realnvp(2, key=jax.random.key(0))
        >>> check_invertible(flow, jnp.linspace(-9, 9, 20).reshape(10, 2)).error < 1e-4
        True
    """
    if not isinstance(flow, TransformModule):
        raise TypeError(f"`flow` is a {type(flow).__name__}, expected a TransformModule")
    x = check_event(x, flow.event_shape)
    check_finite(x, flow.event_shape)
    z, inverse_ladj = flow.inverse_and_ladj(x)
    back, ladj = flow.forward_and_ladj(z)
    size = math.prod(flow.event_shape)
    rows, error = (jnp.abs(a).reshape(-1, size).max(-1) for a in (x, x - back))
    errors = error / jnp.maximum(rows, 1), jnp.abs(ladj + inverse_ladj)
    worst = (float(error.max()) for error in errors)
    return Invertibility(*(math.inf if math.isnan(error) else error for error in worst))
