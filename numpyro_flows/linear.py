"""Layers that mix coordinates: a fixed permutation, and a learned matrix (Glow, section 3.2)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import lu, solve_triangular

from numpyro_flows.transform import TransformModule


class Permutation(TransformModule):
    r"""A fixed reordering of the coordinates.

    $$y_j = x_{\pi(j)}, \qquad \log|\det dy/dx| = 0.$$

    The permutation is state: it is saved, loaded and copied with the flow.

    Shapes: `(*batch, D)` to `(*batch, D)`, ladj `(*batch,)`.

    Args:
        permutation: π as a sequence of the ints 0 … D − 1.

    Raises:
        ValueError: where the ints are not a permutation.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import Permutation
        >>> Permutation([2, 0, 1])(jnp.array([10.0, 20.0, 30.0])).tolist()
        [30.0, 10.0, 20.0]
    """

    permutation: Array

    def __init__(self, permutation: Sequence[int] | Array) -> None:
        index = np.asarray(permutation)
        if index.ndim != 1 or sorted(index.tolist()) != list(range(len(index))):
            raise ValueError(f"`permutation` is {index.tolist()}, expected each of 0 … D − 1 once")
        super().__init__(len(index))
        self.permutation = jnp.asarray(index.astype(np.int32))

    def forward_and_ladj(self, x: Array) -> tuple[Array, Array]:
        """Map base to data."""
        x = self._entry(x).value
        return x[..., self.permutation], jnp.zeros_like(x, shape=x.shape[:-1])

    def inverse_and_ladj(self, y: Array) -> tuple[Array, Array]:
        """Map data to base."""
        y = self._entry(y).value
        return y[..., jnp.argsort(self.permutation)], jnp.zeros_like(y, shape=y.shape[:-1])


class InvertibleLinear(TransformModule):
    r"""A learned invertible matrix between all coordinates: Glow's 1×1 convolution for vectors.

    $$x = W y, \qquad W = P L (U + \mathrm{diag}(s \odot e^{d})), \qquad
    \log|\det dy/dx| = -\sum_j d_j.$$

    P is a fixed permutation, L unit lower triangular, U strictly upper triangular, s fixed signs
    and d the learned log-diagonal. As in the paper W acts on the way from data to base, which is
    the way of maximum-likelihood training; from base to data two triangular systems are solved.
    W starts as a random rotation.

    Shapes: `(*batch, D)` to `(*batch, D)`, ladj `(*batch,)`.

    Args:
        event_shape: D or `(D,)`.
        key: random key of the rotation at the start.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 3.2, equations 10 and 11.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import InvertibleLinear
        >>> layer = InvertibleLinear(3, key=jax.random.key(0))
        >>> bool(jnp.allclose(layer.inv(layer(jnp.ones(3))), jnp.ones(3), atol=1e-5))
        True
    """

    lower: Array
    upper: Array
    log_diagonal: Array
    permutation: Array
    signs: Array

    def __init__(self, event_shape: int | Sequence[int], *, key: Array) -> None:
        super().__init__(event_shape)
        if len(self.event_shape) != 1:
            raise ValueError(f"`event_shape` is {self.event_shape}, expected an int or (D,)")
        normal = jax.random.normal(key, (*self.event_shape, *self.event_shape))
        p, lower, upper = lu(jnp.linalg.qr(normal)[0])
        diagonal = jnp.diagonal(upper)
        self.lower = jnp.tril(lower, -1)
        self.upper = jnp.triu(upper, 1)
        self.log_diagonal = jnp.log(jnp.abs(diagonal))
        self.permutation = p.argmax(1).astype(jnp.int32)
        self.signs = jnp.sign(diagonal).astype(jnp.int32)

    def _triangles(self) -> tuple[Array, Array]:
        """Return L and U with their diagonals."""
        lower = jnp.tril(self.lower, -1) + jnp.eye(len(self.lower), dtype=self.lower.dtype)
        diagonal = self.signs.astype(self.lower.dtype) * jnp.exp(self.log_diagonal)
        return lower, jnp.triu(self.upper, 1) + jnp.diag(diagonal)

    def forward_and_ladj(self, x: Array) -> tuple[Array, Array]:
        """Map base to data: two triangular solves."""
        x = self._entry(x).value
        lower, upper = self._triangles()
        columns = x[..., jnp.argsort(self.permutation)].reshape(-1, *self.event_shape).T
        # JAX solves no systems in half precision.
        dtype = jnp.promote_types(x.dtype, lower.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        lower, upper, columns = (a.astype(wide) for a in (lower, upper, columns))
        y = solve_triangular(lower, columns, lower=True, unit_diagonal=True)
        y = solve_triangular(upper, y, lower=False)
        return y.T.reshape(x.shape).astype(dtype), self._ladj(x)

    def inverse_and_ladj(self, y: Array) -> tuple[Array, Array]:
        """Map data to base: a matrix product."""
        y = self._entry(y).value
        lower, upper = self._triangles()
        x = y @ (lower @ upper).T
        return x[..., self.permutation], -self._ladj(y)

    def _ladj(self, x: Array) -> Array:
        return jnp.broadcast_to(-self.log_diagonal.sum().astype(x.dtype), x.shape[:-1])
