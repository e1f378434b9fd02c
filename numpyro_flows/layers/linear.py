"""Layers that mix coordinates: fixed permutations, and learned matrices (Glow, section 3.2)."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import lu, solve_triangular
from jax.typing import DTypeLike
from jaxtyping import Float, Int
from typing_extensions import override

from numpyro_flows.rng import RandomKey, normal
from numpyro_flows.transform import EventPair, TransformModule
from pyroflows_common.blocks import rotated_blocks
from pyroflows_common.budgets import shared_gain
from pyroflows_common.checks import as_scale, check_vector


class Permutation(TransformModule):
    r"""A fixed reordering of the coordinates.

    $$y_j = x_{\pi(j)}, \qquad \log|\det dy/dx| = 0.$$

    The permutation is state: it is saved, loaded and copied with the flow.

    Shapes: `(*batch, D)` to `(*batch, D)`, ladj `(*batch,)`.

    Args:
        permutation: π as a sequence of the integers 0 … D − 1.

    Raises:
        ValueError: if the integers are not a permutation.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import Permutation
        >>> Permutation([2, 0, 1])(jnp.array([10.0, 20.0, 30.0])).tolist()
        [30.0, 10.0, 20.0]
    """

    permutation: Int[Array, " d"]

    def __init__(self, permutation: Sequence[int] | Int[Array, " d"]) -> None:
        index = np.asarray(permutation)
        if index.ndim != 1 or sorted(index.tolist()) != list(range(len(index))):
            raise ValueError(f"`permutation` is {index.tolist()}, expected each of 0 … D − 1 once")
        super().__init__(len(index))
        self.permutation = jnp.asarray(index.astype(np.int32))

    @override
    def forward_and_ladj(self, x: Float[Array, " d"]) -> EventPair:
        return x[self.permutation], jnp.zeros((), x.dtype)

    @override
    def inverse_and_ladj(self, y: Float[Array, " d"]) -> EventPair:
        return y[jnp.argsort(self.permutation)], jnp.zeros((), y.dtype)


def exact_product(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `a @ b` in the precision of the operands, whatever the default of the device.

    No inverse recovers what a product of lower precision rounds away.
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


class PLU(TransformModule):
    """Base class of the two layers below: a matrix and its PLU factors."""

    lower: Float[Array, "d d"]
    upper: Float[Array, "d d"]
    log_diagonal: Float[Array, " d"]
    permutation: Int[Array, " d"]
    signs: Int[Array, " d"]
    gain: float = eqx.field(static=True)

    def __init__(
        self,
        event_shape: int | Sequence[int],
        rank: int,
        expected: str,
        gain: float | None,
        key: RandomKey,
    ) -> None:
        super().__init__(event_shape)
        if len(self.event_shape) != rank:
            raise ValueError(f"`event_shape` is {self.event_shape}, expected {expected}")
        size = self.event_shape[0]
        gain = shared_gain(1, size) if gain is None else as_scale(gain, "gain", zero=False)
        self.gain = gain
        together, order = rotated_blocks(size)
        factors = _factors(normal(key, (size, size)), together, order, gain)
        self.lower, self.upper, self.log_diagonal, self.permutation, self.signs = factors

    def _triangles(self, dtype: DTypeLike) -> tuple[Array, Array]:
        """Return L and U with their diagonals."""
        eye = jnp.eye(len(self.lower), dtype=dtype)
        lower = self.gain * jnp.tril(self.lower.astype(dtype), -1) + eye
        diagonal = self.signs.astype(dtype) * jnp.exp(self.gain * self.log_diagonal.astype(dtype))
        return lower, self.gain * jnp.triu(self.upper.astype(dtype), 1) + jnp.diag(diagonal)

    def _matrix(self, x: Array) -> Array:
        """Return W = P L U in the dtype of its product with x."""
        lower, upper = self._triangles(jnp.result_type(x, self.lower))
        return exact_product(lower, upper)[self.permutation]

    def _solve(self, columns: Array) -> Array:
        """Multiply a vector `(D,)`, or columns `(D, n)`, by the inverse of W: two solves."""
        dtype = jnp.result_type(columns, self.lower)
        wide = jnp.promote_types(dtype, jnp.float32)  # JAX has no solver in half precision
        lower, upper = self._triangles(wide)
        y = columns[jnp.argsort(self.permutation)].astype(wide)
        y = solve_triangular(lower, y, lower=True, unit_diagonal=True)
        return solve_triangular(upper, y, lower=False).astype(dtype)

    def _ladj(self, x: Array) -> Array:
        pixels = math.prod(self.event_shape[1:])
        return -pixels * self.gain * self.log_diagonal.astype(x.dtype).sum()


@jax.jit
def _factors(
    noise: Array, together: np.ndarray, order: np.ndarray, gain: float
) -> tuple[Array, ...]:
    """Return the PLU factors of a random rotation of blocks."""
    p, lower, upper = lu(jnp.linalg.qr(jnp.where(together, noise, 0.0))[0][order])
    diagonal = jnp.diagonal(upper)
    return (
        jnp.tril(lower, -1) / gain,
        jnp.triu(upper, 1) / gain,
        jnp.log(jnp.abs(diagonal)) / gain,
        p.argmax(1).astype(jnp.int32),
        jnp.sign(diagonal).astype(jnp.int32),
    )


class InvertibleLinear(PLU):
    r"""A learned invertible matrix on all coordinates: Glow's 1×1 convolution for vectors.

    $$x = W y, \qquad W = P L (U + \mathrm{diag}(s \odot e^{d})), \qquad
    \log|\det dy/dx| = -\sum_j d_j.$$

    P is a fixed permutation, L unit lower triangular, U strictly upper triangular, s fixed signs
    and d the learned log-diagonal. As in the paper, W acts from data to base, the direction of
    maximum-likelihood training; from base to data, two triangular systems are solved. W is
    initially a random rotation of blocks of at most eight coordinates, which it then interleaves;
    triangular factors of a wider rotation would amplify every step of training.

    L, U and d are `gain` times the parameters, which are initialised to match: one step of Adam
    then moves each entry by `gain` times the learning rate. In a deep flow the steps of many
    matrices add up, in a wide one those of many entries, and a small gain keeps training stable.

    Shapes: `(*batch, D)` to `(*batch, D)`, ladj `(*batch,)`.

    Args:
        event_shape: D or `(D,)`.
        gain: factor on the parameters. Default: 1 up to D = 48, and (48 / D)^1.5 beyond.
        key: random key for the initial rotation.

    Raises:
        ValueError: if `event_shape` or `gain` is invalid.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 3.2, equations 10 and 11.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import InvertibleLinear
        >>> layer = InvertibleLinear(3, key=jax.random.key(0))
        >>> bool(jnp.allclose(layer.inv(layer(jnp.ones(3))), jnp.ones(3), atol=1e-5))
        True
    """

    def __init__(
        self, event_shape: int | Sequence[int], *, gain: float | None = None, key: RandomKey
    ) -> None:
        super().__init__(event_shape, 1, "an int or (D,)", gain, key)

    def forward_and_ladj(self, x: Float[Array, " d"]) -> EventPair:
        """Map base to data: two triangular solves."""
        return self._solve(x), self._ladj(x)

    def inverse_and_ladj(self, y: Float[Array, " d"]) -> EventPair:
        """Map data to base: a matrix product."""
        return exact_product(y, self._matrix(y).T), -self._ladj(y)


class InvertibleConv1x1(PLU):
    r"""Glow's invertible 1×1 convolution: one learned matrix on the channels of each pixel.

    $$x_{hw} = W y_{hw}, \qquad W = P L (U + \mathrm{diag}(s \odot e^{d})), \qquad
    \log|\det dy/dx| = -H W' \sum_j d_j$$

    for images of height H and width W'. Everything else is as in `InvertibleLinear`.

    Shapes: `(*batch, C, H, W)` to `(*batch, C, H, W)`, ladj `(*batch,)`.

    Args:
        event_shape: `(C, H, W)`.
        gain: factor on the parameters. Default: as in `InvertibleLinear`, with C for D.
        key: random key for the initial rotation.

    Raises:
        ValueError: if `event_shape` or `gain` is invalid.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 3.2, equations 9 to 11.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import InvertibleConv1x1
        >>> layer = InvertibleConv1x1((3, 2, 2), key=jax.random.key(0))
        >>> image = jnp.ones((3, 2, 2))
        >>> bool(jnp.allclose(layer.inv(layer(image)), image, atol=1e-5))
        True
    """

    def __init__(
        self, event_shape: Sequence[int], *, gain: float | None = None, key: RandomKey
    ) -> None:
        super().__init__(event_shape, 3, "(C, H, W)", gain, key)

    def forward_and_ladj(self, x: Float[Array, "c h w"]) -> EventPair:
        """Map base to data: a 1×1 convolution with the inverse, from two triangular solves."""
        inverse = self._solve(jnp.eye(self.event_shape[0], dtype=x.dtype))
        return self._convolved(x, inverse), self._ladj(x)

    def inverse_and_ladj(self, y: Float[Array, "c h w"]) -> EventPair:
        """Map data to base: a 1×1 convolution."""
        return self._convolved(y, self._matrix(y)), -self._ladj(y)

    def _convolved(self, x: Array, matrix: Array) -> Array:
        return exact_product(matrix, x.reshape(len(x), -1)).reshape(x.shape)


class LowerTriangular(TransformModule):
    r"""A learned shift and lower-triangular matrix, which map N(0, I) to any Gaussian.

    $$y = A x + \mathrm{loc}, \qquad A = \mathrm{lower} + \mathrm{diag}(e^{d}), \qquad
    \log|\det dy/dx| = \sum_j d_j.$$

    It is initially the identity. loc, lower and d are `gain` times the parameters.

    Shapes: `(*batch, D)` to `(*batch, D)`, ladj `(*batch,)`.

    Args:
        event_shape: D or `(D,)`.
        gain: factor on the parameters.

    Raises:
        ValueError: if `event_shape` is that of an image, or if `gain` is not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import LowerTriangular
        >>> LowerTriangular(2)(jnp.ones(2)).tolist()
        [1.0, 1.0]
    """

    loc: Float[Array, " d"]
    lower: Float[Array, "d d"]
    log_diagonal: Float[Array, " d"]
    gain: float = eqx.field(static=True)

    def __init__(self, event_shape: int | Sequence[int], *, gain: float = 1.0) -> None:
        super().__init__(event_shape)
        self.gain = as_scale(gain, "gain", zero=False)
        size = check_vector(self.event_shape)
        self.loc = jnp.zeros(size)
        self.lower = jnp.zeros((size, size))
        self.log_diagonal = jnp.zeros(size)

    def forward_and_ladj(self, x: Float[Array, " d"]) -> EventPair:
        """Map base to data: a matrix product."""
        return exact_product(x, self._matrix(x).T) + self.gain * self.loc, self._ladj(x)

    def inverse_and_ladj(self, y: Float[Array, " d"]) -> EventPair:
        """Map data to base: a triangular solve."""
        matrix = self._matrix(y)
        wide = jnp.promote_types(matrix.dtype, jnp.float32)  # JAX has no half-precision solver
        column = (y - self.gain * self.loc).astype(wide)
        x = solve_triangular(matrix.astype(wide), column, lower=True)
        return x.astype(matrix.dtype), -self._ladj(y)

    def _matrix(self, x: Array) -> Array:
        dtype = jnp.result_type(x, self.lower)
        diagonal = jnp.exp(self.gain * self.log_diagonal.astype(dtype))
        return self.gain * jnp.tril(self.lower, -1).astype(dtype) + jnp.diag(diagonal)

    def _ladj(self, x: Array) -> Array:
        return self.gain * self.log_diagonal.astype(x.dtype).sum()
