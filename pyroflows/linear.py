"""Layers that mix coordinates: a fixed permutation, and a learned matrix (Glow, section 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.transform import TransformModule


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
        >>> import torch
        >>> from pyroflows import Permutation
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0])).tolist()
        [30.0, 10.0, 20.0]
    """

    permutation: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor) -> None:
        index = torch.as_tensor(permutation)
        if index.ndim != 1 or index.sort().values.tolist() != list(range(len(index))):
            raise ValueError(f"`permutation` is {index.tolist()}, expected each of 0 … D − 1 once")
        super().__init__(len(index))
        self.register_buffer("permutation", index.to(torch.int64))

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map base to data."""
        self._entry(x)
        return x[..., self.permutation], x.new_zeros(()).expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map data to base."""
        self._entry(y)
        return y[..., self.permutation.argsort()], y.new_zeros(()).expand(y.shape[:-1])


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

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 3.2, equations 10 and 11.

    Examples:
        >>> import torch
        >>> from pyroflows import InvertibleLinear
        >>> layer = InvertibleLinear(3)
        >>> torch.allclose(layer.inv(layer(torch.ones(3))), torch.ones(3), atol=1e-5)
        True
    """

    permutation: Tensor
    signs: Tensor

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape)
        if len(self.event_shape) != 1:
            raise ValueError(f"`event_shape` is {self.event_shape}, expected an int or (D,)")
        rotation = torch.linalg.qr(torch.randn(*self.event_shape, *self.event_shape)).Q
        p, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())
        self.register_buffer("permutation", p.argmax(1))
        self.register_buffer("signs", diagonal.sign().to(torch.int64))

    def _triangles(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return L and U with their diagonals."""
        eye = torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        lower = self.lower.tril(-1) + eye
        upper = self.upper.triu(1) + torch.diag(self.signs * self.log_diagonal.exp())
        return lower.to(dtype), upper.to(dtype)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map base to data: two triangular solves."""
        self._entry(x)
        # PyTorch solves no systems in half precision.
        dtype = torch.promote_types(x.dtype, torch.float32)
        lower, upper = self._triangles(dtype)
        # Rows are events, so the systems are solved from the right: y = x W^-T.
        y = x[..., self.permutation.argsort()].reshape(-1, *self.event_shape).to(dtype)
        y = torch.linalg.solve_triangular(lower.mT, y, upper=True, left=False, unitriangular=True)
        y = torch.linalg.solve_triangular(upper.mT, y, upper=False, left=False)
        return y.reshape(x.shape).to(x.dtype), self._ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map data to base: a matrix product."""
        self._entry(y)
        lower, upper = self._triangles(y.dtype)
        x = y @ (lower @ upper).mT
        return x[..., self.permutation], -self._ladj(y)

    def _ladj(self, x: Tensor) -> Tensor:
        return -self.log_diagonal.sum().to(x.dtype).expand(x.shape[:-1])
