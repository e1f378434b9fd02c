"""A fixed affine map: location, scale and correlations, from which guides and priors start."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyroflows.layers.chain import Chain
from pyroflows.layers.linear import exactly
from pyroflows.transform import Pair, TransformModule
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
        >>> import torch
        >>> from pyroflows import Preconditioner
        >>> layer = Preconditioner(2).precondition(torch.tensor([1.0, 2.0]), 3.0 * torch.eye(2))
        >>> [round(y, 4) for y in layer(torch.ones(2)).tolist()]
        [4.0, 5.0]
    """

    loc: Float[Tensor, " D"]
    log_scale: Float[Tensor, " D"]
    basis: Float[Tensor, "D rank"]
    log_values: Float[Tensor, " rank"]

    def __init__(self, event_shape: int | Sequence[int], *, rank: int | None = None) -> None:
        super().__init__(event_shape)
        size = check_vector(self.event_shape)
        rank = size if rank is None else as_count(rank, "rank", 0)
        if rank > size:
            raise ValueError(f"`rank` is {rank}, expected at most {size}, the event's size")
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("log_scale", torch.zeros(size))
        self.register_buffer("basis", torch.eye(size, rank))
        self.register_buffer("log_values", torch.zeros(rank))

    @torch.no_grad()
    def at(self, loc: Float[Tensor, " D"], scale: float | Float[Tensor, " D"]) -> "Preconditioner":
        """Set the layer so that N(0, 1) becomes N(loc, scale²), uncorrelated.

        Args:
            loc: the mean.
            scale: the standard deviations, or one for all.

        Returns:
            The layer itself.
        """
        self.loc.copy_(loc)
        self.log_scale.copy_(torch.as_tensor(scale, dtype=loc.dtype, device=loc.device).log())
        self.log_values.zero_()
        return self

    @torch.no_grad()
    def precondition(
        self, loc: Float[Tensor, " D"], factor: Float[Tensor, "D n"]
    ) -> "Preconditioner":
        """Set the layer so that N(0, 1) becomes N(loc, factor factorᵀ).

        Args:
            loc: the mean.
            factor: any factor of the covariance, with n at least D.

        Returns:
            The layer itself.
        """
        scale = factor.norm(dim=1)
        # Singular values, because small eigenvalues of the correlations are lost to rounding.
        basis, values, _ = torch.linalg.svd(factor / scale[:, None], full_matrices=False)
        self.loc.copy_(loc)
        self.log_scale.copy_(scale.log())
        self.basis.copy_(basis)
        self.log_values.copy_(values.log())
        return self

    @torch.no_grad()
    def marginal(self, whole: "Preconditioner", index: Int[Tensor, " D"]) -> "Preconditioner":
        """Set the layer so that N(0, 1) becomes a marginal of what `whole` makes of it.

        A layer of full rank keeps the correlations.

        Args:
            whole: a layer of no fewer dimensions.
            index: the coordinates of `whole` to keep.

        Returns:
            The layer itself.
        """
        if torch.equal(index, torch.arange(len(whole.loc), device=index.device)):
            self.load_state_dict(whole.state_dict())
            return self
        factor = (whole(torch.eye(len(whole.loc)).to(whole.loc)) - whole.loc).mT[index]
        if self.basis.shape[0] == self.basis.shape[1]:
            return self.precondition(whole.loc[index], factor)
        return self.at(whole.loc[index], factor.norm(dim=1))

    def forward_and_ladj(self, x: Float[Tensor, "*batch D"]) -> Pair:
        """Map base to data."""
        loc, log_scale, *rest = self._in_precision_of(x)
        return _stretched(x, *rest) * log_scale.exp() + loc, self._ladj(x)

    def inverse_and_ladj(self, y: Float[Tensor, "*batch D"]) -> Pair:
        """Map data to base."""
        loc, log_scale, basis, log_values = self._in_precision_of(y)
        return _stretched((y - loc) * (-log_scale).exp(), basis, -log_values), -self._ladj(y)

    def _in_precision_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the state in the precision of the input."""
        names = ("loc", "log_scale", "basis", "log_values")
        loc, log_scale, basis, log_values = (getattr(self, name).to(x.dtype) for name in names)
        if x.dtype == torch.float64 != self.basis.dtype:
            basis = torch.linalg.qr(basis).Q  # orthonormal to the new precision
        return loc, log_scale, basis, log_values

    def _ladj(self, x: Tensor) -> Tensor:
        ladj = self.log_scale.to(x.dtype).sum() + self.log_values.to(x.dtype).sum()
        return ladj.expand(x.shape[:-1])


def preconditioned(flow: TransformModule, rank: int | None = None) -> TransformModule:
    """Return a flow with a `Preconditioner` at its data end, recorded for `save`."""
    layer = Preconditioner(flow.event_shape, rank=rank)
    whole = Chain([flow, layer])
    whole.base = flow.base
    if flow.recipe is not None:
        arguments = (*flow.recipe.arguments, ("rank", layer.basis.shape[1]))
        whole.recipe = Recipe(flow.recipe.builder, arguments)
    return whole


def _stretched(x: Tensor, basis: Tensor, log_values: Tensor) -> Tensor:
    """Stretch a vector along each column of a basis, by the exponential of its value."""
    with exactly(x):
        return x + ((x @ basis) * torch.expm1(log_values)) @ basis.mT
