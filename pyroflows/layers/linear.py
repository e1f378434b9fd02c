"""Layers that mix coordinates: fixed permutations, and learned matrices (Glow, section 3.2)."""

import contextlib
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from pyroflows.transform import Pair, TransformModule
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
        >>> import torch
        >>> from pyroflows import Permutation
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0])).tolist()
        [30.0, 10.0, 20.0]
    """

    permutation: Int[Tensor, " d"]

    def __init__(self, permutation: Sequence[int] | Int[Tensor, " d"]) -> None:
        index = torch.as_tensor(permutation)
        if index.ndim != 1 or index.sort().values.tolist() != list(range(len(index))):
            raise ValueError(f"`permutation` is {index.tolist()}, expected each of 0 … D − 1 once")
        super().__init__(len(index))
        self.register_buffer("permutation", index.to(torch.int64))

    @override
    def forward_and_ladj(self, x: Float[Tensor, "*batch d"]) -> Pair:
        return x[..., self.permutation], x.new_zeros(()).expand(x.shape[:-1])

    @override
    def inverse_and_ladj(self, y: Float[Tensor, "*batch d"]) -> Pair:
        return y[..., self.permutation.argsort()], y.new_zeros(()).expand(y.shape[:-1])


def exactly(like: Float[Tensor, "..."]) -> contextlib.AbstractContextManager[object]:
    """Compute in the precision of the operands, also under the user's autocast.

    No inverse recovers what a half-precision product rounds away.
    """
    device = like.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


class PLU(TransformModule):
    """Base class of the two layers below: a matrix and its PLU factors."""

    permutation: Int[Tensor, " d"]
    signs: Int[Tensor, " d"]

    def __init__(
        self, event_shape: int | Sequence[int], rank: int, expected: str, gain: float | None
    ) -> None:
        super().__init__(event_shape)
        if len(self.event_shape) != rank:
            raise ValueError(f"`event_shape` is {self.event_shape}, expected {expected}")
        size = self.event_shape[0]
        gain = shared_gain(1, size) if gain is None else as_scale(gain, "gain", zero=False)
        self.gain = gain
        together, order = map(torch.as_tensor, rotated_blocks(size))
        rotation = torch.linalg.qr(torch.randn(size, size) * together).Q[order]
        p, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1) / gain)
        self.upper = nn.Parameter(upper.triu(1) / gain)
        self.log_diagonal = nn.Parameter(diagonal.abs().log() / gain)
        self.register_buffer("permutation", p.argmax(1))
        self.register_buffer("signs", diagonal.sign().to(torch.int64))

    def _triangles(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return L and U with their diagonals."""
        eye = torch.eye(len(self.lower), dtype=dtype, device=self.lower.device)
        lower = self.gain * self.lower.to(dtype).tril(-1) + eye
        diagonal = self.signs * (self.gain * self.log_diagonal.to(dtype)).exp()
        return lower, self.gain * self.upper.to(dtype).triu(1) + torch.diag(diagonal)

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        """Return W = P L U."""
        lower, upper = self._triangles(dtype)
        with exactly(lower):
            return (lower @ upper)[self.permutation]

    def _solve(self, rows: Tensor) -> Tensor:
        """Multiply rows `(n, D)` by the transposed inverse of W: two triangular solves."""
        # PyTorch has no solver in half precision.
        dtype = torch.promote_types(rows.dtype, torch.float32)
        lower, upper = self._triangles(dtype)
        y = rows[:, self.permutation.argsort()].to(dtype)
        y = torch.linalg.solve_triangular(lower.mT, y, upper=True, left=False, unitriangular=True)
        y = torch.linalg.solve_triangular(upper.mT, y, upper=False, left=False)
        return y.to(rows.dtype)

    def _ladj(self, x: Tensor) -> Tensor:
        pixels = math.prod(self.event_shape[1:])
        ladj = -pixels * self.gain * self.log_diagonal.to(x.dtype).sum()
        return ladj.expand(x.shape[: x.ndim - len(self.event_shape)])


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

    Raises:
        ValueError: if `event_shape` or `gain` is invalid.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 3.2, equations 10 and 11.

    Examples:
        >>> import torch
        >>> from pyroflows import InvertibleLinear
        >>> layer = InvertibleLinear(3)
        >>> torch.allclose(layer.inv(layer(torch.ones(3))), torch.ones(3), atol=1e-5)
        True
    """

    def __init__(self, event_shape: int | Sequence[int], *, gain: float | None = None) -> None:
        super().__init__(event_shape, 1, "an int or (D,)", gain)

    def forward_and_ladj(self, x: Float[Tensor, "*batch d"]) -> Pair:
        """Map base to data: two triangular solves."""
        return self._solve(x.reshape(-1, *self.event_shape)).reshape(x.shape), self._ladj(x)

    def inverse_and_ladj(self, y: Float[Tensor, "*batch d"]) -> Pair:
        """Map data to base: a matrix product."""
        matrix = self._matrix(y.dtype)
        with exactly(y):
            return y @ matrix.mT, -self._ladj(y)


class InvertibleConv1x1(PLU):
    r"""Glow's invertible 1×1 convolution: one learned matrix on the channels of each pixel.

    $$x_{hw} = W y_{hw}, \qquad W = P L (U + \mathrm{diag}(s \odot e^{d})), \qquad
    \log|\det dy/dx| = -H W' \sum_j d_j$$

    for images of height H and width W'. Everything else is as in `InvertibleLinear`.

    Shapes: `(*batch, C, H, W)` to `(*batch, C, H, W)`, ladj `(*batch,)`.

    Args:
        event_shape: `(C, H, W)`.
        gain: factor on the parameters. Default: as in `InvertibleLinear`, with C for D.

    Raises:
        ValueError: if `event_shape` or `gain` is invalid.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 3.2, equations 9 to 11.

    Examples:
        >>> import torch
        >>> from pyroflows import InvertibleConv1x1
        >>> layer = InvertibleConv1x1((3, 2, 2))
        >>> image = torch.ones(3, 2, 2)
        >>> torch.allclose(layer.inv(layer(image)), image, atol=1e-5)
        True
    """

    def __init__(self, event_shape: Sequence[int], *, gain: float | None = None) -> None:
        super().__init__(event_shape, 3, "(C, H, W)", gain)

    def forward_and_ladj(self, x: Float[Tensor, "*batch c h w"]) -> Pair:
        """Map base to data: a 1×1 convolution with the inverse, from two triangular solves."""
        inverse = self._solve(torch.eye(self.event_shape[0], dtype=x.dtype, device=x.device)).mT
        return self._convolved(x, inverse), self._ladj(x)

    def inverse_and_ladj(self, y: Float[Tensor, "*batch c h w"]) -> Pair:
        """Map data to base: a 1×1 convolution."""
        return self._convolved(y, self._matrix(y.dtype)), -self._ladj(y)

    def _convolved(self, x: Tensor, matrix: Tensor) -> Tensor:
        with exactly(x):
            return torch.einsum("...chw,oc->...ohw", x, matrix)


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
        >>> import torch
        >>> from pyroflows import LowerTriangular
        >>> LowerTriangular(2)(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(self, event_shape: int | Sequence[int], *, gain: float = 1.0) -> None:
        super().__init__(event_shape)
        self.gain = as_scale(gain, "gain", zero=False)
        size = check_vector(self.event_shape)
        self.loc = nn.Parameter(torch.zeros(size))
        self.lower = nn.Parameter(torch.zeros(size, size))
        self.log_diagonal = nn.Parameter(torch.zeros(size))

    def forward_and_ladj(self, x: Float[Tensor, "*batch d"]) -> Pair:
        """Map base to data: a matrix product."""
        with exactly(x):
            return x @ self._matrix(x.dtype).mT + self.gain * self.loc, self._ladj(x)

    def inverse_and_ladj(self, y: Float[Tensor, "*batch d"]) -> Pair:
        """Map data to base: a triangular solve."""
        # PyTorch has no solver in half precision.
        matrix = self._matrix(torch.promote_types(y.dtype, torch.float32))
        rows = (y - self.gain * self.loc).reshape(-1, *self.event_shape).to(matrix.dtype)
        x = torch.linalg.solve_triangular(matrix.mT, rows, upper=True, left=False)
        return x.reshape(y.shape).to(y.dtype), -self._ladj(y)

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        return self.gain * self.lower.to(dtype).tril(-1) + torch.diag(
            (self.gain * self.log_diagonal.to(dtype)).exp()
        )

    def _ladj(self, x: Tensor) -> Tensor:
        return (self.gain * self.log_diagonal.to(x.dtype).sum()).expand(x.shape[:-1])
