"""Scale functions of affine couplings: from network output to log-scale, bounded by `limit`."""

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


class TanhScale(eqx.Module):
    """`log_scale = factor · tanh(r)` with learned factors (RealNVP, section 4.1).

    Args:
        shape: shape of the factors: `(D,)`, one per coordinate, or `(C, 1, 1)`, one per channel.
        limit: smooth bound on the factor; None for no bound, as in the paper.
    """

    weight: Float[Array, "..."]
    limit: float | None = eqx.field(static=True)

    def __init__(self, shape: Sequence[int], limit: float | None = None) -> None:
        self.limit = limit
        self.weight = jnp.full(tuple(shape), 1.0 if limit is None else min(1.0, limit), dtype=float)

    @property
    def factor(self) -> Float[Array, "..."]:
        """The factor, bounded by the limit."""
        if self.limit is None:
            return self.weight
        return self.limit * jnp.tanh(self.weight / self.limit)

    def penalty(self) -> Float[Array, ""]:
        """Return the sum of the squared factors."""
        return jnp.square(self.factor).sum()

    def __call__(self, r: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Map network output to a log-scale."""
        return jnp.broadcast_to(self.factor, r.shape) * jnp.tanh(r)


class SigmoidScale(eqx.Module):
    """`log_scale = softplus(−(r + 2))`: encoding multiplies by `sigmoid(r + 2)` (Glow's code).

    The limit bounds the distance from the value at `r = 0`; None for no bound.
    """

    limit: float | None = eqx.field(static=True)

    def __init__(self, shape: Sequence[int], limit: float | None = None) -> None:
        self.limit = limit

    def __call__(self, r: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Map network output to a log-scale."""
        log_scale = jax.nn.softplus(-(r + 2.0))
        if self.limit is None:
            return log_scale
        start = math.log1p(math.exp(-2.0))
        # No steeper than the limit requires: the slope amplifies rounding errors of extreme inputs.
        return start + self.limit * jnp.tanh((log_scale - start) / max(self.limit, 0.5))


class ClampScale(eqx.Module):
    """`log_scale = 2/π · c · arctan(r/c)`, with `c = 0.1` for positive r and 2 for negative.

    The asymmetric soft clamp of Andrade, "Stable training of normalizing flows for
    high-dimensional variational inference" (2024), section 4.1. The limit is a smaller bound on
    both sides; None for no further bound.
    """

    upper: float = eqx.field(static=True)
    lower: float = eqx.field(static=True)

    def __init__(self, shape: Sequence[int], limit: float | None = None) -> None:
        limit = math.inf if limit is None else limit
        self.upper, self.lower = min(0.1, limit), min(2.0, limit)

    def __call__(self, r: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Map network output to a log-scale."""
        upper = self.upper * jnp.arctan(jnp.maximum(r, 0.0) / self.upper)
        lower = self.lower * jnp.arctan(jnp.minimum(r, 0.0) / self.lower)
        return 2.0 / math.pi * (upper + lower)


class ExpScale(eqx.Module):
    """`log_scale = r`: unbounded, the papers' formula."""

    def __init__(self, shape: Sequence[int], limit: float | None = None) -> None:
        pass

    def __call__(self, r: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Map network output to a log-scale."""
        return r


class FunctionScale(eqx.Module):
    """A plain function as a scale: static, so that all leaves of a flow are arrays."""

    function: Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]] = eqx.field(static=True)

    def __call__(self, r: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Map network output to a log-scale."""
        return self.function(r)


SCALES: dict[str, Callable[..., Callable[[Array], Array]]] = {
    "tanh": TanhScale,
    "sigmoid": SigmoidScale,
    "clamp": ClampScale,
    "exp": ExpScale,
}
