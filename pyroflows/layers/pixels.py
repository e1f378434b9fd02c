"""Pixels: dequantization of integers, and the logit transform."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from pyro.distributions import constraints
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from pyroflows.transform import Pair, Parts, TransformModule


def dequantize(
    x: Integer[Tensor, "*shape"], generator: torch.Generator | None = None, *, levels: int = 256
) -> Float[Tensor, "*shape"]:
    r"""Map integers to the unit interval: `(x + u) / levels`, u uniform on [0, 1).

    The expected log-density of the result is a lower bound on the log-probability of the pixels
    (Theis et al., "A note on the evaluation of generative models", arXiv:1511.01844, section 3.1).
    Passed to `fit` as `augment`, it draws new noise for every batch.

    Args:
        x: integers from 0 to `levels − 1`, of any shape.
        generator: source of the noise; None for torch's default.
        levels: number of possible values of a pixel.

    Returns:
        Numbers in [0, 1), in torch's default dtype.

    Raises:
        TypeError: if `x` is not a tensor of integers.
        ValueError: if an integer is out of range.

    Examples:
        >>> import torch
        >>> from pyroflows import dequantize
        >>> (dequantize(torch.tensor([0, 128, 255])) * 256).floor().tolist()
        [0.0, 128.0, 255.0]
    """
    kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
    if kind not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"`x` is {kind}, expected a tensor of whole numbers, such as uint8")
    if x.numel() and not (0 <= int(x.min()) and int(x.max()) < levels):
        raise ValueError(
            f"`x` has numbers from {int(x.min())} to {int(x.max())}, expected 0 to {levels - 1}"
        )
    noise = torch.rand(x.shape, generator=generator, device=x.device)
    # Rounding must not lift the sum to the next integer.
    return ((x + noise) / levels).clamp(max=1.0 - torch.finfo(noise.dtype).eps / 2)


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
        >>> import torch
        >>> from pyroflows import Logit
        >>> layer = Logit(3)
        >>> layer(torch.zeros(3)).tolist()
        [0.5, 0.5, 0.5]
    """

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
    def forward_and_ladj(self, x: Float[Tensor, "..."]) -> Pair:
        y = (x.sigmoid() - self.alpha) / (1 - 2 * self.alpha)
        return y, self._sum(F.logsigmoid(x) + F.logsigmoid(-x))

    @override
    def inverse_and_ladj(self, y: Float[Tensor, "..."]) -> Pair:
        p, q = ((1 - 2 * self.alpha) * part for part in (y + self._margin, 1 + self._margin - y))
        outside = (p <= 0) | (q <= 0)
        low, high = (torch.where(outside, 0.5, part).log() for part in (p, q))
        return low - high, -self._sum(torch.where(outside, torch.inf, low + high))

    def _standardize(self, parts: Parts) -> Parts:
        return ((self._inverse_pair(y, None)[0], weights) for y, weights in parts)

    def _sum(self, log_slope: Tensor) -> Tensor:
        dims = tuple(range(-len(self.event_shape), 0))
        return (log_slope - math.log1p(-2 * self.alpha)).sum(dims)
