"""A fixed affine map: location, scale and correlations, from which guides and priors start."""

from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from numpyro_flows.layers.chain import Chain
from numpyro_flows.layers.linear import exact_product
from numpyro_flows.transform import Pair, TransformModule
from numpyro_flows.tree import rearranged, replace
from pyroflows_common.checks import as_count, check_vector
from pyroflows_common.recipe import Recipe


class Preconditioner(TransformModule):
    r"""A fixed affine map: the location, scale and correlations from which a guide starts.

    $$y = s \odot (x + Q ((e^{\lambda} - 1) \odot Q^\top x)) + \mathrm{loc}, \qquad
    \log|\det dy/dx| = \sum_j \log s_j + \sum_k \lambda_k$$

    where the columns of Q are orthonormal. As many columns as coordinates give any covariance, and
    fewer give a diagonal plus low-rank one. The layer is not trained. It is the identity until it
    is set.

    Shapes: `(*batch, D)` to `(*batch, D)`, ladj `(*batch,)`.

    Args:
        event_shape: D or `(D,)`.
        rank: number of columns of Q; by default D.

    Raises:
        ValueError: if `event_shape` is the shape of an image, or if `rank` is more than D.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import Preconditioner
        >>> layer = Preconditioner(2).precondition(jnp.array([1.0, 2.0]), 3.0 * jnp.eye(2))
        >>> layer(jnp.ones(2)).round(4).tolist()
        [4.0, 5.0]
    """

    buffers: ClassVar[tuple[str, ...]] = ("loc", "log_scale", "basis", "log_values")

    loc: Float[Array, " D"]
    log_scale: Float[Array, " D"]
    basis: Float[Array, "D rank"]
    log_values: Float[Array, " rank"]

    def __init__(self, event_shape: int | Sequence[int], *, rank: int | None = None) -> None:
        super().__init__(event_shape)
        size = check_vector(self.event_shape)
        rank = size if rank is None else as_count(rank, "rank", 0)
        if rank > size:
            raise ValueError(f"`rank` is {rank}, expected at most {size}, the event's size")
        self.loc = jnp.zeros(size)
        self.log_scale = jnp.zeros(size)
        self.basis = rearranged(lambda xp: xp.eye(size, rank))
        self.log_values = jnp.zeros(rank)

    def at(self, loc: Float[Array, " D"], scale: float | Float[Array, " D"]) -> "Preconditioner":
        """Return the layer set so that N(0, 1) becomes N(loc, scale²), uncorrelated.

        Args:
            loc: the mean.
            scale: the standard deviations, or one for all.
        """
        return replace(
            self,
            loc=loc,
            log_scale=jnp.log(jnp.broadcast_to(jnp.asarray(scale, loc.dtype), loc.shape)),
            log_values=jnp.zeros_like(self.log_values),
        )

    def precondition(
        self, loc: Float[Array, " D"], factor: Float[Array, "D n"]
    ) -> "Preconditioner":
        """Return the layer set so that N(0, 1) becomes N(loc, factor factorᵀ).

        Args:
            loc: the mean.
            factor: any factor of the covariance, with n at least D.
        """
        scale = jnp.linalg.norm(factor, axis=1)
        # Singular values, because small eigenvalues of the correlations are lost to rounding.
        basis, values, _ = jnp.linalg.svd(factor / scale[:, None], full_matrices=False)
        state = (loc, jnp.log(scale), basis, jnp.log(values))
        new = [a.astype(self.loc.dtype) for a in state]
        return replace(self, **dict(zip(Preconditioner.buffers, new, strict=True)))

    def marginal(self, whole: "Preconditioner", index: Int[np.ndarray, " D"]) -> "Preconditioner":
        """Return the layer set so that N(0, 1) becomes a marginal of what `whole` makes.

        A layer of full rank keeps the correlations.

        Args:
            whole: a layer of no fewer dimensions.
            index: the coordinates of `whole` to keep, not traced.
        """
        if np.array_equal(index, np.arange(len(whole.loc))):
            return whole
        factor = (whole(jnp.eye(len(whole.loc), dtype=whole.loc.dtype)) - whole.loc).T[index]
        if self.basis.shape[0] == self.basis.shape[1]:
            return self.precondition(whole.loc[index], factor)
        return self.at(whole.loc[index], jnp.linalg.norm(factor, axis=1))

    def forward_and_ladj(self, x: Float[Array, "*batch D"]) -> Pair:
        """Map base to data."""
        loc, log_scale, *rest = self._in_precision_of(x)
        return _stretched(x, *rest) * jnp.exp(log_scale) + loc, self._ladj(x)

    def inverse_and_ladj(self, y: Float[Array, "*batch D"]) -> Pair:
        """Map data to base."""
        loc, log_scale, basis, log_values = self._in_precision_of(y)
        return _stretched((y - loc) * jnp.exp(-log_scale), basis, -log_values), -self._ladj(y)

    def _in_precision_of(self, x: Array) -> tuple[Array, ...]:
        """Return the state in the precision of the input."""
        dtype = jnp.result_type(x, self.loc)
        loc, log_scale, basis, log_values = (
            getattr(self, name).astype(dtype) for name in Preconditioner.buffers
        )
        if dtype != self.basis.dtype:  # orthonormal to the new precision
            basis = jnp.linalg.qr(basis)[0]
        return loc, log_scale, basis, log_values

    def _ladj(self, x: Array) -> Array:
        return self.log_scale.astype(x.dtype).sum() + self.log_values.astype(x.dtype).sum()


def preconditioned(flow: TransformModule, rank: int | None = None) -> TransformModule:
    """Return a flow with a `Preconditioner` at its data end, recorded for `save`."""
    layer = Preconditioner(flow.event_shape, rank=rank)
    recipe = flow.recipe
    if recipe is not None:
        recipe = Recipe(recipe.builder, (*recipe.arguments, ("rank", layer.basis.shape[1])))
    return replace(Chain([flow, layer]), base=flow.base, recipe=recipe)


def _stretched(x: Array, basis: Array, log_values: Array) -> Array:
    """Stretch a vector along each column of a basis, by the exponential of its value."""
    return x + exact_product(jnp.expm1(log_values) * exact_product(x, basis), basis.T)
