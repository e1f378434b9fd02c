"""Elementwise layers that shape the tails of a distribution."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from typing_extensions import override

from numpyro_flows.transform import EventPair, TransformModule
from pyroflows_common.checks import as_scale

# Width of the middle of `SinhArcsinh`, with which it fits logarithms of Gamma and Beta variables.
WIDTH = 3.0
# Width of the logarithmic range of `LogTails` beyond its threshold.
STRAIGHT = 40.0


class SinhArcsinh(TransformModule):
    r"""A learned skewness and tail weight for each coordinate.

    $$y = c\, e^{-w}\, \frac{\sinh a - \sinh s}{\cosh s}, \qquad
    a = e^{w}\, \mathrm{asinh}(x / c) + s, \qquad
    \log|\det dy/dx| = \sum_j \log \frac{\cosh a_j}{\cosh s_j}
    - \tfrac12 \log(1 + x_j^2 / c^2)$$

    with skewness s, log-weight w and the width c = 3. It keeps zero in place, and the scale there.
    A positive w makes the tails heavier: \(y \sim x^{e^w}\) for large x. It is initially the
    identity.

    Shapes: `(*batch, *event_shape)` to the same, ladj `(*batch,)`.

    Args:
        event_shape: D, `(D,)` or `(C, H, W)`.
        tails: whether to learn the weight of the tails, too; w is 0 otherwise.

    References:
        Jones and Pewsey, "Sinh-arcsinh distributions", Biometrika 96 (2009), equation 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import SinhArcsinh
        >>> [round(y, 4) for y in SinhArcsinh(2)(jnp.ones(2)).tolist()]
        [1.0, 1.0]
    """

    skewness: Float[Array, "..."]
    log_weight: Float[Array, "..."] | None

    def __init__(self, event_shape: int | Sequence[int], *, tails: bool = True) -> None:
        super().__init__(event_shape)
        self.skewness = jnp.zeros(self.event_shape)
        self.log_weight = jnp.zeros(self.event_shape) if tails else None

    @override
    def forward_and_ladj(self, x: Float[Array, "..."]) -> EventPair:
        s, weight = self._shape(x)
        a = weight * jnp.arcsinh(x / WIDTH) + s
        y = WIDTH / weight * (jnp.sinh(a) / jnp.cosh(s) - jnp.tanh(s))
        return y, self._ladj(x, a, s)

    @override
    def inverse_and_ladj(self, y: Float[Array, "..."]) -> EventPair:
        s, weight = self._shape(y)
        a = jnp.arcsinh(jnp.cosh(s) * (weight * y / WIDTH + jnp.tanh(s)))
        x = WIDTH * jnp.sinh((a - s) / weight)
        return x, -self._ladj(x, a, s)

    def _shape(self, like: Array) -> tuple[Array, Array]:
        """Return s and exp(w) in the precision of the input."""
        s = self.skewness.astype(like.dtype)
        if self.log_weight is None:
            return s, jnp.ones_like(s)
        return s, jnp.exp(self.log_weight.astype(like.dtype))

    def _ladj(self, x: Array, a: Array, s: Array) -> Array:
        # hypot, since squares overflow.
        log_cosh = jnp.logaddexp(a, -a) - jnp.logaddexp(s, -s)
        return (log_cosh - jnp.log(jnp.hypot(1.0, x / WIDTH))).sum()


class LogTails(TransformModule):
    r"""The identity up to a threshold t, a logarithm beyond it: a limit on extreme draws.

    $$y = \mathrm{sign}(x) (\min(|x|, t) + \log(1 + \max(|x| - t, 0))), \qquad
    \log|\det dy/dx| = -\sum_j \log(1 + \max(|x_j| - t, 0)).$$

    Beyond |y| = t + 40 it is linear, which keeps its inverse finite.

    Shapes: `(*batch, *event_shape)` to the same, ladj `(*batch,)`.

    Args:
        event_shape: D, `(D,)` or `(C, H, W)`.
        threshold: t, a positive number.

    Raises:
        ValueError: if `threshold` is not positive.

    References:
        Andrade, "Stable training of normalizing flows for high-dimensional variational inference"
        (2024), section 4.2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import LogTails
        >>> [round(y, 1) for y in LogTails(2)(jnp.array([-3.0, 1e6])).tolist()]
        [-3.0, 113.8]
    """

    threshold: float = eqx.field(static=True)

    def __init__(self, event_shape: int | Sequence[int], *, threshold: float = 100.0) -> None:
        super().__init__(event_shape)
        self.threshold = as_scale(threshold, "threshold", zero=False)

    @override
    def forward_and_ladj(self, x: Float[Array, "..."]) -> EventPair:
        size = jnp.abs(x)
        over = jnp.maximum(size - self.threshold, 0.0)
        near = jnp.minimum(over, math.expm1(STRAIGHT))
        far = jnp.maximum(over - math.expm1(STRAIGHT), 0.0) * math.exp(-STRAIGHT)
        beyond = jnp.log1p(near)
        y = jnp.sign(x) * (jnp.minimum(size, self.threshold) + beyond + far)
        return y, -beyond.sum()

    @override
    def inverse_and_ladj(self, y: Float[Array, "..."]) -> EventPair:
        size = jnp.abs(y)
        over = jnp.maximum(size - self.threshold, 0.0)
        beyond = jnp.minimum(over, STRAIGHT)
        near, far = jnp.expm1(beyond), jnp.maximum(over - STRAIGHT, 0.0) * math.exp(STRAIGHT)
        x = jnp.sign(y) * (jnp.minimum(size, self.threshold) + near + far)
        return x, beyond.sum()
