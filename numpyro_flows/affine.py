"""Affine maps of vectors: a triangular one that is learned, and a fixed one around a posterior."""

from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from numpyro_flows.checks import as_count, as_scale
from numpyro_flows.linear import exact_product
from numpyro_flows.transform import TransformModule
from numpyro_flows.tree import replace


class LowerTriangular(TransformModule):
    r"""A learned shift and lower-triangular matrix: what turns N(0, 1) into any Gaussian.

    $$y = A x + \mathrm{loc}, \qquad A = \mathrm{lower} + \mathrm{diag}(e^{d}), \qquad
    \log|\det dy/dx| = \sum_j d_j.$$

    It starts as the identity. Shift, lower part and d are `gain` times the parameters.

    Shapes: `(*batch, D)` to `(*batch, D)`, ladj `(*batch,)`.

    Args:
        event_shape: D or `(D,)`.
        gain: what the parameters are multiplied by.

    Raises:
        ValueError: where `event_shape` is that of an image, or `gain` not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import LowerTriangular
        >>> LowerTriangular(2)(jnp.ones(2)).tolist()
        [1.0, 1.0]
    """

    loc: Array
    lower: Array
    log_diagonal: Array
    gain: float = eqx.field(static=True)

    def __init__(self, event_shape: int | Sequence[int], *, gain: float = 1.0) -> None:
        super().__init__(event_shape)
        self.gain = as_scale(gain, "gain", zero=False)
        size = _vector_size(self.event_shape)
        self.loc = jnp.zeros(size)
        self.lower = jnp.zeros((size, size))
        self.log_diagonal = jnp.zeros(size)

    def forward_and_ladj(self, x: Array) -> tuple[Array, Array]:
        """Map base to data: a matrix product."""
        x = self._entry(x).value
        return exact_product(x, self._matrix(x).T) + self.gain * self.loc, self._ladj(x)

    def inverse_and_ladj(self, y: Array) -> tuple[Array, Array]:
        """Map data to base: a triangular solve."""
        y = self._entry(y).value
        matrix = self._matrix(y)
        wide = jnp.promote_types(matrix.dtype, jnp.float32)  # JAX solves nothing in half precision
        rows = (y - self.gain * self.loc).reshape(-1, *self.event_shape)
        x = solve_triangular(matrix.astype(wide), rows.T.astype(wide), lower=True).T
        return x.reshape(y.shape).astype(matrix.dtype), -self._ladj(y)

    def _matrix(self, x: Array) -> Array:
        dtype = jnp.result_type(x, self.lower)
        diagonal = jnp.exp(self.gain * self.log_diagonal.astype(dtype))
        return self.gain * jnp.tril(self.lower, -1).astype(dtype) + jnp.diag(diagonal)

    def _ladj(self, x: Array) -> Array:
        ladj = self.gain * self.log_diagonal.astype(x.dtype).sum()
        return jnp.broadcast_to(ladj, x.shape[:-1])


class Preconditioner(TransformModule):
    r"""A fixed location and scale, correlations among them: where a guide starts.

    $$y = s \odot (x + Q ((e^{\lambda} - 1) \odot Q^\top x)) + \mathrm{loc}, \qquad
    \log|\det dy/dx| = \sum_j \log s_j + \sum_k \lambda_k$$

    with orthonormal columns Q: as many as coordinates for any covariance, fewer for a diagonal one
    plus one of low rank. It is not trained, and the identity until it is set.

    Shapes: `(*batch, D)` to `(*batch, D)`, ladj `(*batch,)`.

    Args:
        event_shape: D or `(D,)`.
        rank: number of columns of Q; by default D.

    Raises:
        ValueError: where `event_shape` is that of an image, or `rank` is more than D.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import Preconditioner
        >>> layer = Preconditioner(2).precondition(jnp.array([1.0, 2.0]), 3.0 * jnp.eye(2))
        >>> layer(jnp.ones(2)).round(4).tolist()
        [4.0, 5.0]
    """

    buffers: ClassVar[tuple[str, ...]] = ("loc", "log_scale", "basis", "log_values")

    loc: Array
    log_scale: Array
    basis: Array
    log_values: Array

    def __init__(self, event_shape: int | Sequence[int], *, rank: int | None = None) -> None:
        super().__init__(event_shape)
        size = _vector_size(self.event_shape)
        rank = size if rank is None else as_count(rank, "rank", 0)
        if rank > size:
            raise ValueError(f"`rank` is {rank}, expected at most {size}, the event's size")
        self.loc = jnp.zeros(size)
        self.log_scale = jnp.zeros(size)
        self.basis = jnp.eye(size, rank)
        self.log_values = jnp.zeros(rank)

    def at(self, loc: Array, scale: float | Array) -> "Preconditioner":
        """Return the layer set so that N(0, 1) becomes N(loc, scale²), uncorrelated.

        Args:
            loc: `(D,)`.
            scale: a positive number, or `(D,)` of them.
        """
        return replace(
            self,
            loc=loc,
            log_scale=jnp.log(jnp.broadcast_to(jnp.asarray(scale, loc.dtype), loc.shape)),
            log_values=jnp.zeros_like(self.log_values),
        )

    def precondition(self, loc: Array, factor: Array) -> "Preconditioner":
        """Return the layer set so that N(0, 1) becomes N(loc, factor factorᵀ).

        Args:
            loc: `(D,)`.
            factor: `(D, n)` with n at least D, any factor of the covariance.
        """
        scale = jnp.linalg.norm(factor, axis=1)
        # By singular values, not by the eigenvalues of the correlations: those lose their small
        # ones to rounding.
        basis, values, _ = jnp.linalg.svd(factor / scale[:, None], full_matrices=False)
        state = (loc, jnp.log(scale), basis, jnp.log(values))
        new = [a.astype(self.loc.dtype) for a in state]
        return replace(self, **dict(zip(self.buffers, new, strict=True)))

    def marginal(self, whole: "Preconditioner", index: np.ndarray) -> "Preconditioner":
        """Return the layer set so that N(0, 1) becomes some coordinates of what `whole` makes.

        A layer of full rank gets their correlations, too.

        Args:
            whole: a layer of no fewer dimensions.
            index: `(D,)`, the coordinates of `whole`, not traced.
        """
        if np.array_equal(index, np.arange(len(whole.loc))):
            return whole
        factor = (whole(jnp.eye(len(whole.loc), dtype=whole.loc.dtype)) - whole.loc).T[index]
        if self.basis.shape[0] == self.basis.shape[1]:
            return self.precondition(whole.loc[index], factor)
        return self.at(whole.loc[index], jnp.linalg.norm(factor, axis=1))

    def forward_and_ladj(self, x: Array) -> tuple[Array, Array]:
        """Map base to data."""
        x = self._entry(x).value
        loc, log_scale, *rest = self._in_precision_of(x)
        return _stretched(x, *rest) * jnp.exp(log_scale) + loc, self._ladj(x)

    def inverse_and_ladj(self, y: Array) -> tuple[Array, Array]:
        """Map data to base."""
        y = self._entry(y).value
        loc, log_scale, basis, log_values = self._in_precision_of(y)
        return _stretched((y - loc) * jnp.exp(-log_scale), basis, -log_values), -self._ladj(y)

    def _in_precision_of(self, x: Array) -> tuple[Array, ...]:
        """Return the state, as precise as what it works on."""
        dtype = jnp.result_type(x, self.loc)
        loc, log_scale, basis, log_values = (
            lax.stop_gradient(getattr(self, name).astype(dtype)) for name in self.buffers
        )
        if dtype != self.basis.dtype:  # orthonormal up to rounding, now to a finer one
            basis = jnp.linalg.qr(basis)[0]
        return loc, log_scale, basis, log_values

    def _ladj(self, x: Array) -> Array:
        log_scale, log_values = lax.stop_gradient((self.log_scale, self.log_values))
        ladj = log_scale.astype(x.dtype).sum() + log_values.astype(x.dtype).sum()
        return jnp.broadcast_to(ladj, x.shape[:-1])


def _stretched(x: Array, basis: Array, log_values: Array) -> Array:
    """Multiply along each column of a basis by the exponential of its value."""
    return x + exact_product(jnp.expm1(log_values) * exact_product(x, basis), basis.T)


def _vector_size(event_shape: tuple[int, ...]) -> int:
    if len(event_shape) != 1:
        raise ValueError(f"`event_shape` is {event_shape}, expected an int or (D,)")
    return event_shape[0]
