"""Layers that shift and scale each coordinate, by parameters or by moments of the data."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float
from typing_extensions import override

from numpyro_flows.networks import RunningMoments
from numpyro_flows.transform import Context, EventPair, Parts, TransformModule
from numpyro_flows.tree import replace, select
from pyroflows_common.checks import as_scale, parameter_shape


class Elementwise(TransformModule):
    """Base class of the elementwise layers: `y = x · exp(log_scale) + loc`."""

    def _loc_and_log_scale(self) -> tuple[Array | float, Array]:
        raise NotImplementedError

    @override
    def forward_and_ladj(self, x: Float[Array, "..."]) -> EventPair:
        loc, log_scale = self._broadcast_to(x)
        return x * jnp.exp(log_scale) + loc, log_scale.sum()

    @override
    def inverse_and_ladj(self, y: Float[Array, "..."]) -> EventPair:
        loc, log_scale = self._broadcast_to(y)
        return (y - loc) * jnp.exp(-log_scale), -log_scale.sum()

    def _broadcast_to(self, x: Array) -> tuple[Array | float, Array]:
        loc, log_scale = self._loc_and_log_scale()
        dtype = jnp.result_type(x, log_scale)
        return loc, jnp.broadcast_to(log_scale.astype(dtype), x.shape)


class ShiftAndScale(Elementwise):
    """Base class of the layers with a shift and a scale."""

    loc: Float[Array, "..."]
    log_scale: Float[Array, "..."]

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape)
        self.loc = jnp.zeros(parameter_shape(self.event_shape))
        self.log_scale = jnp.zeros(parameter_shape(self.event_shape))

    def _loc_and_log_scale(self) -> tuple[Array | float, Array]:
        return self.loc, self.log_scale

    def _with_moments(self, mean: Array, deviation: Array) -> Self:
        """Return the layer that encodes data with these moments to mean 0 and variance 1."""
        log_scale = log_deviation(mean, deviation).astype(self.log_scale.dtype)
        return replace(self, loc=mean.astype(self.loc.dtype), log_scale=log_scale)


class DiagonalScaling(Elementwise):
    r"""NICE's scaling layer.

    $$y = x \odot \exp(\mathrm{log\_scale}), \qquad
    \log|\det dy/dx| = \sum_j \mathrm{log\_scale}_j.$$

    The paper's s, which acts from data to base, is `-log_scale`.

    Shapes: `(*batch, D)` to `(*batch, D)`, ladj `(*batch,)`.

    Args:
        event_shape: D or `(D,)`.

    References:
        Dinh, Krueger and Bengio, "NICE" (arXiv:1410.8516), section 3.3.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import DiagonalScaling
        >>> DiagonalScaling(2)(jnp.ones(2)).tolist()
        [1.0, 1.0]
    """

    log_scale: Float[Array, "..."]

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape)
        self.log_scale = jnp.zeros(self.event_shape)

    def _loc_and_log_scale(self) -> tuple[Array | float, Array]:
        return 0.0, self.log_scale


class ActNorm(ShiftAndScale):
    r"""Glow's activation normalisation: a learned shift and scale, initialised from data.

    $$y = x \odot \exp(\mathrm{log\_scale}) + \mathrm{loc}, \qquad
    \log|\det dy/dx| = \sum_j \mathrm{log\_scale}_j.$$

    `flow.initialize(x)` sets both so that the encoded batch has mean 0 and variance 1 in each
    coordinate; until then the layer is the identity. A coordinate that is constant in the batch
    keeps scale 1.

    Shapes: `(*batch, *event_shape)` to the same, ladj `(*batch,)`. The parameters are `(D,)` for
    vectors and `(C, 1, 1)` for images, where the sum over j runs over all pixels.

    Args:
        event_shape: D or `(D,)` for vectors; `(C, H, W)` for images.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 3.1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import ActNorm
        >>> layer = ActNorm(1).initialize(jnp.array([[1.0], [5.0]]))
        >>> layer.inv(jnp.array([[1.0], [5.0]])).tolist()
        [[-1.0], [1.0]]
    """

    initialized: Bool[Array, ""]

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape)
        self.initialized = jnp.array(False)

    def _absorb(self, y: Array, context: Context, first: bool) -> tuple[TransformModule, Array]:
        layer = self
        if first:
            learned = self._with_moments(*moments(y, self.event_shape))
            learned = replace(learned, initialized=jnp.ones_like(self.initialized))
            layer = select(self.initialized, self, learned)
        return layer, layer._encoded(y, context)


class Standardization(ShiftAndScale):
    r"""A fixed shift and scale at the data end of a flow, initially the identity.

    $$y = x \odot \exp(\mathrm{log\_scale}) + \mathrm{loc}, \qquad
    \log|\det dy/dx| = \sum_j \mathrm{log\_scale}_j.$$

    `fit(…, standardize=True)` sets both to the moments of the training data. They are not trained.

    Shapes: `(*batch, *event_shape)` to the same, ladj `(*batch,)`. The parameters are `(D,)` for
    vectors and `(C, 1, 1)` for images, where the sum over j runs over all pixels.

    Args:
        event_shape: D or `(D,)` for vectors; `(C, H, W)` for images.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import Standardization
        >>> layer = Standardization(1).standardize(jnp.array([[1.0], [5.0]]))
        >>> layer(jnp.array([-1.0, 0.0, 1.0])[:, None]).flatten().tolist()
        [1.0, 3.0, 5.0]
    """

    buffers: ClassVar[tuple[str, ...]] = ("loc", "log_scale")

    def standardize(self, x: Float[Array, "..."] | Parts) -> "Standardization":
        """Return the layer with shift and scale that give the encoded data mean 0 and variance 1.

        Args:
            x: data `(*batch, *event_shape)`; or an iterator over pairs, of a part of the data
                `(n, *event_shape)` and the weights `(n,)` of its rows or None.

        Raises:
            ValueError: if the moments of the data are not finite.
        """
        if isinstance(x, Iterator):
            mean, deviation = pooled_moments(x, self.event_shape)
        else:
            mean, deviation = moments(x, self.event_shape)
        traced = isinstance(mean, jax.core.Tracer)
        if not traced and not jnp.isfinite(mean + deviation).all():
            raise ValueError(f"the data's moments are not finite as {mean.dtype}")
        return self._with_moments(mean, deviation)

    def _standardize(self, parts: Parts) -> tuple[TransformModule, None]:
        return self.standardize(parts), None


class BatchNorm(Elementwise, RunningMoments):
    r"""RealNVP's batch normalisation with running averages, as a layer of the flow.

    $$y = x \odot \sqrt{\tilde\sigma^2 + \epsilon} + \tilde\mu, \qquad
    \log|\det dy/dx| = \tfrac12 \sum_j \log(\tilde\sigma^2_j + \epsilon).$$

    Encoding normalises by the running averages, during and after training, so that the density of
    an event never depends on the rest of its batch. `flow.initialize(x)` sets them from a batch and
    `flow.update(x)` updates them with one; `fit` calls both. No other call changes them.

    Shapes: `(*batch, *event_shape)` to the same, ladj `(*batch,)`. The parameters are `(D,)` for
    vectors and `(C, 1, 1)` for images, where the sum over j runs over all pixels.

    Args:
        event_shape: D or `(D,)` for vectors; `(C, H, W)` for images.
        momentum: weight of a new batch in the running averages.
        eps: constant added to the variance.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803),
        section 3.7 and appendix E.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import BatchNorm
        >>> layer = BatchNorm(1, eps=0.0).initialize(jnp.array([[1.0], [5.0]]))
        >>> layer.running_mean.item(), layer.running_var.item()
        (3.0, 4.0)
    """

    buffers: ClassVar[tuple[str, ...]] = RunningMoments.buffers

    momentum: float = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(
        self, event_shape: int | Sequence[int], *, momentum: float = 0.1, eps: float = 1e-5
    ) -> None:
        super().__init__(event_shape)
        if not 0 < momentum <= 1:
            raise ValueError(f"`momentum` is {momentum}, expected a number in (0, 1]")
        self.momentum, self.eps = momentum, as_scale(eps, "eps")
        self._start_moments(parameter_shape(self.event_shape))

    def _loc_and_log_scale(self) -> tuple[Array | float, Array]:
        return self.running_mean, 0.5 * jnp.log(self.running_var + self.eps)

    def _absorb(self, y: Array, context: Context, first: bool) -> tuple[TransformModule, Array]:
        mean, deviation = moments(y, self.event_shape)
        layer = self._move_moments(mean, jnp.square(deviation), self.momentum, first)
        return layer, layer._encoded(y, context)


@functools.partial(jax.jit, static_argnums=1)
def moments(
    x: Float[Array, "..."], event_shape: tuple[int, ...], weights: Float[Array, " n"] | None = None
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return mean and standard deviation over the batch and, for images, over the pixels.

    With weights, one for each row of x, rows count as often as they weigh.
    """
    rows = x.reshape(-1, *event_shape)
    dims = (0, 2, 3) if len(event_shape) == 3 else (0,)
    first = rows[(slice(1), slice(None), *[slice(1)] * (len(dims) - 1))]
    # Relative to the first row, a constant has deviation 0, whatever the rounding of sums. In units
    # of the largest entry, squares neither overflow nor underflow.
    rest = rows - first
    unit = jnp.abs(rest).max(dims, keepdims=True)
    rest = rest / jnp.where(unit == 0, jnp.ones_like(unit), unit)
    if weights is not None:
        shares = (weights * (len(rows) / weights.sum())).reshape(-1, *(1 for _ in event_shape))
        centre = (shares * rest).mean(dims, keepdims=True)
        variance = (shares * jnp.square(rest - centre)).mean(dims, keepdims=True)
        return (first + unit * centre)[0], (unit * jnp.sqrt(variance))[0]
    mean = first + unit * rest.mean(dims, keepdims=True)
    return mean[0], (unit * rest.std(dims, keepdims=True))[0]


def pooled_moments(
    parts: Parts, event_shape: tuple[int, ...]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return the moments of data that arrives in parts, holding one part at a time."""
    rows, mean, deviation = 0.0, np.zeros(()), np.zeros(())
    for part, weights in parts:
        size = len(part) if weights is None else float(weights.sum())
        if not size:
            continue
        rows += size
        weight = size / rows
        found, spread = moments(part, event_shape, weights)
        gap = np.asarray(found, float) - mean
        mean = mean + weight * gap
        within = np.hypot(
            math.sqrt(1 - weight) * deviation, math.sqrt(weight) * np.asarray(spread, float)
        )
        deviation = np.hypot(within, math.sqrt(weight * (1 - weight)) * gap)
    return jnp.asarray(mean, found.dtype), jnp.asarray(deviation, spread.dtype)


def log_deviation(
    mean: Float[Array, "*shape"], deviation: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Return the log standard deviation; 0 for coordinates that are constant up to rounding."""
    varies = deviation > jnp.finfo(deviation.dtype).eps * jnp.abs(mean)
    return jnp.where(varies, jnp.log(jnp.where(varies, deviation, 1.0)), 0.0)
