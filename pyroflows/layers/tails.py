"""Elementwise layers that shape the tails of a distribution."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from pyroflows.transform import Pair, TransformModule
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
        >>> import torch
        >>> from pyroflows import SinhArcsinh
        >>> [round(y, 4) for y in SinhArcsinh(2)(torch.ones(2)).tolist()]
        [1.0, 1.0]
    """

    def __init__(self, event_shape: int | Sequence[int], *, tails: bool = True) -> None:
        super().__init__(event_shape)
        self.skewness = nn.Parameter(torch.zeros(self.event_shape))
        weight = nn.Parameter(torch.zeros(self.event_shape)) if tails else None
        self.register_parameter("log_weight", weight)

    @override
    def forward_and_ladj(self, x: Float[Tensor, "..."]) -> Pair:
        s, weight = self._shape(x)
        a = weight * torch.asinh(x / WIDTH) + s
        y = WIDTH / weight * (torch.sinh(a) / torch.cosh(s) - torch.tanh(s))
        return y, self._ladj(x, a, s)

    @override
    def inverse_and_ladj(self, y: Float[Tensor, "..."]) -> Pair:
        s, weight = self._shape(y)
        a = torch.asinh(torch.cosh(s) * (weight * y / WIDTH + torch.tanh(s)))
        x = WIDTH * torch.sinh((a - s) / weight)
        return x, -self._ladj(x, a, s)

    def _shape(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return s and exp(w) in the precision of the input."""
        s = self.skewness.to(like.dtype)
        if self.log_weight is None:
            return s, torch.ones_like(s)
        return s, self.log_weight.to(like.dtype).exp()

    def _ladj(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        # hypot, since squares overflow.
        log_cosh = torch.logaddexp(a, -a) - torch.logaddexp(s, -s)
        ladj = log_cosh - torch.hypot(x.new_ones(()), x / WIDTH).log()
        return ladj.sum(tuple(range(-len(self.event_shape), 0)))


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
        >>> import torch
        >>> from pyroflows import LogTails
        >>> [round(y, 1) for y in LogTails(2)(torch.tensor([-3.0, 1e6])).tolist()]
        [-3.0, 113.8]
    """

    def __init__(self, event_shape: int | Sequence[int], *, threshold: float = 100.0) -> None:
        super().__init__(event_shape)
        self.threshold = as_scale(threshold, "threshold", zero=False)

    @override
    def forward_and_ladj(self, x: Float[Tensor, "..."]) -> Pair:
        size = x.abs()
        over = (size - self.threshold).clamp(min=0.0)
        near = over.clamp(max=math.expm1(STRAIGHT))
        far = (over - math.expm1(STRAIGHT)).clamp(min=0.0) * math.exp(-STRAIGHT)
        beyond = torch.log1p(near)
        y = x.sign() * (size.clamp(max=self.threshold) + beyond + far)
        return y, -beyond.sum(tuple(range(-len(self.event_shape), 0)))

    @override
    def inverse_and_ladj(self, y: Float[Tensor, "..."]) -> Pair:
        size = y.abs()
        over = (size - self.threshold).clamp(min=0.0)
        beyond = over.clamp(max=STRAIGHT)
        near, far = torch.expm1(beyond), (over - STRAIGHT).clamp(min=0.0) * math.exp(STRAIGHT)
        x = y.sign() * (size.clamp(max=self.threshold) + near + far)
        return x, beyond.sum(tuple(range(-len(self.event_shape), 0)))
