"""Checks of what a flow is given: events, contexts and rows."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Shaped

from pyroflows_common.checks import check_rows, check_shape

# Events and contexts as users pass them: NumPy's arrays, too.
Events = Float[Array | np.ndarray, "..."]
Contexts = Shaped[Array | np.ndarray, "*batch context_dim"]


def check_event(x: Any, event_shape: tuple[int, ...], name: str = "x") -> Float[Array, "..."]:
    """Check that `x` is a real floating-point array of events, and return it as JAX's."""
    if not hasattr(x, "dtype"):
        raise TypeError(f"`{name}` is a {type(x).__name__}, expected a jax.Array")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` has dtype {x.dtype}, expected a real floating-point array such as float32; "
            "pixels of whole numbers go through `dequantize`"
        )
    check_shape(x.shape, event_shape, name)
    return jnp.asarray(x)


def as_context(
    context: Any, context_dim: int, dtype: DTypeLike
) -> Float[Array, "*batch context_dim"]:
    """Check that `context` fits a flow; convert whole numbers to `dtype`."""
    if not context_dim:
        raise ValueError("`context` was given, but this flow takes none (context_dim=0)")
    floating = hasattr(context, "dtype") and jnp.issubdtype(context.dtype, jnp.floating)
    if not floating and (not hasattr(context, "dtype") or context.dtype.kind not in "iub"):
        kind = getattr(context, "dtype", type(context).__name__)
        raise TypeError(f"`context` is {kind}, expected a jax.Array of real numbers")
    if context.ndim == 0 or context.shape[-1] != context_dim:
        size = context.shape[-1] if context.ndim else "none"
        raise ValueError(
            f"`context` has last dimension {size}, but this flow was built with "
            f"context_dim={context_dim}"
        )
    return jnp.asarray(context, None if floating else dtype)


def check_finite(x: Events, event_shape: tuple[int, ...], name: str = "`x`") -> None:
    """Check that `x` has rows and that, unless it is traced, all of them are finite."""
    if not x.size:
        raise ValueError(f"{name} of shape {tuple(x.shape)} has no rows")
    if not isinstance(x, jax.core.Tracer):
        check_rows(np.asarray(_finite(x, math.prod(event_shape))), name)


@functools.partial(jax.jit, static_argnames="size")
def _finite(x: Array, size: int) -> Bool[Array, " rows"]:
    return jnp.isfinite(x).reshape(-1, size).all(-1)
