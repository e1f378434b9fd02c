"""Pixels: dequantization of integers, and the logit transform."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer
from numpyro.distributions import constraints
from typing_extensions import override

from numpyro_flows.rng import RandomKey
from numpyro_flows.transform import EventPair, Parts, TransformModule


def dequantize(
    x: Integer[Array, "*shape"], key: RandomKey, *, levels: int = 256
) -> Float[Array, "*shape"]:
    r"""Map integers to the unit interval: `(x + u) / levels`, u uniform on [0, 1).

    The expected log-density of the result is a lower bound on the log-probability of the pixels
    (Theis et al., "A note on the evaluation of generative models", arXiv:1511.01844, section 3.1).
    Passed to `fit` as `augment`, it draws new noise for every batch.

    Args:
        x: integers from 0 to `levels − 1`, of any shape.
        key: random key for the noise.
        levels: number of possible values of a pixel.

    Returns:
        Numbers in [0, 1), in JAX's default dtype.

    Raises:
        TypeError: if `x` is not an array of integers.
        ValueError: if an integer is out of range, which cannot be checked under `jit`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import dequantize
        >>> y = dequantize(jnp.array([0, 128, 255]), jax.random.key(0))
        >>> jnp.floor(256 * y).tolist()
        [0.0, 128.0, 255.0]
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"`x` is {x.dtype}, expected an array of whole numbers, such as uint8")
    if x.size and not isinstance(x, jax.core.Tracer):
        if not (0 <= int(x.min()) and int(x.max()) < levels):
            raise ValueError(
                f"`x` has numbers from {int(x.min())} to {int(x.max())}, expected 0 to {levels - 1}"
            )
    noise = jax.random.uniform(key, x.shape)
    # Rounding must not lift the sum to the next integer.
    return jnp.minimum((x + noise) / levels, 1.0 - jnp.finfo(noise.dtype).eps / 2)


class Logit(TransformModule):
    r"""RealNVP's pre-processing of pixels in the unit interval, as a layer.

    $$y = \frac{\mathrm{sigmoid}(x) - \alpha}{1 - 2\alpha}, \qquad
    \log|\det dy/dx| = \sum_j \log \mathrm{sigmoid}(x_j) + \log \mathrm{sigmoid}(-x_j)
    - \log(1 - 2\alpha).$$

    From data to base, this is `logit(α + (1 − 2α) y)`, as in RealNVP's code; the paper's formula
    has `1 − α` in place of `1 − 2α`. α keeps black and white pixels finite. Data outside the
    codomain or on its edge have the density 0: their ladj is −∞, and x is 0 in place of a number
    that does not exist.

    Shapes: `(*batch, *event_shape)` to the same, ladj `(*batch,)`.

    Args:
        event_shape: shape of the images or vectors.
        alpha: α, in [0, 0.5).

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803),
        section 4.1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import Logit
        >>> layer = Logit(3)
        >>> layer(jnp.zeros(3)).tolist()
        [0.5, 0.5, 0.5]
    """

    alpha: float = eqx.field(static=True)

    def __init__(self, event_shape: int | Sequence[int], alpha: float = 0.05) -> None:
        super().__init__(event_shape)
        if not 0 <= alpha < 0.5:
            raise ValueError(f"`alpha` is {alpha}, expected a number from 0 to below 0.5")
        self.alpha = alpha

    @property
    def _margin(self) -> float:
        """How far the codomain extends beyond the unit interval."""
        return self.alpha / (1 - 2 * self.alpha)

    @property
    def codomain(self) -> constraints.Constraint:
        """Events between `−α / (1 − 2α)` and `1 + α / (1 − 2α)`, slightly beyond [0, 1]."""
        inside = constraints.interval(0 - self._margin, 1 + self._margin)
        return constraints.independent(inside, len(self.event_shape))

    @override
    def forward_and_ladj(self, x: Float[Array, "..."]) -> EventPair:
        y = (jax.nn.sigmoid(x) - self.alpha) / (1 - 2 * self.alpha)
        return y, self._sum(jax.nn.log_sigmoid(x) + jax.nn.log_sigmoid(-x))

    @override
    def inverse_and_ladj(self, y: Float[Array, "..."]) -> EventPair:
        p, q = ((1 - 2 * self.alpha) * part for part in (y + self._margin, 1 + self._margin - y))
        outside = (p <= 0) | (q <= 0)
        low, high = (jnp.log(jnp.where(outside, 0.5, part)) for part in (p, q))
        return low - high, -self._sum(jnp.where(outside, jnp.inf, low + high))

    def _standardize(self, parts: Parts) -> tuple[TransformModule, Parts]:
        return self, ((self._encoded(jnp.asarray(y), None), weights) for y, weights in parts)

    def _sum(self, log_slope: Array) -> Array:
        return (log_slope - math.log1p(-2 * self.alpha)).sum()
