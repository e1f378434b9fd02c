"""Layers that shift and scale each coordinate, by parameters or by moments of the data."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from pyroflows.networks import RunningMoments
from pyroflows.transform import Context, Pair, Parts, TransformModule
from pyroflows_common.checks import as_scale, parameter_shape


class Elementwise(TransformModule):
    """Base class of the elementwise layers: `y = x · exp(log_scale) + loc`."""

    def _loc_and_log_scale(self) -> tuple[Tensor | float, Tensor]:
        raise NotImplementedError

    @override
    def forward_and_ladj(self, x: Float[Tensor, "..."]) -> Pair:
        loc, log_scale = self._in_dtype_of(x)
        return x * log_scale.exp() + loc, self._ladj(log_scale, x)

    @override
    def inverse_and_ladj(self, y: Float[Tensor, "..."]) -> Pair:
        loc, log_scale = self._in_dtype_of(y)
        return (y - loc) * (-log_scale).exp(), -self._ladj(log_scale, y)

    def _in_dtype_of(self, x: Tensor) -> tuple[Tensor | float, Tensor]:
        loc, log_scale = self._loc_and_log_scale()
        return loc, log_scale.to(torch.promote_types(x.dtype, log_scale.dtype))

    def _ladj(self, log_scale: Tensor, x: Tensor) -> Tensor:
        pixels = math.prod(self.event_shape) // log_scale.numel()  # pixels share the scale
        ladj = pixels * log_scale.sum().to(x.dtype)
        return ladj.expand(x.shape[: x.ndim - len(self.event_shape)])


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
        >>> import torch
        >>> from pyroflows import DiagonalScaling
        >>> DiagonalScaling(2)(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape)
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    def _loc_and_log_scale(self) -> tuple[Tensor | float, Tensor]:
        return 0.0, self.log_scale


class ActNorm(Elementwise):
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
        >>> import torch
        >>> from pyroflows import ActNorm
        >>> layer = ActNorm(1).initialize(torch.tensor([[1.0], [5.0]]))
        >>> layer.inv(torch.tensor([[1.0], [5.0]])).tolist()
        [[-1.0], [1.0]]
    """

    initialized: Bool[Tensor, ""]

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape)
        self.loc = nn.Parameter(torch.zeros(parameter_shape(self.event_shape)))
        self.log_scale = nn.Parameter(torch.zeros(parameter_shape(self.event_shape)))
        self.register_buffer("initialized", torch.tensor(False))

    def _loc_and_log_scale(self) -> tuple[Tensor | float, Tensor]:
        return self.loc, self.log_scale

    def _absorb(self, y: Tensor, context: Context, first: bool) -> Tensor:
        if first and not self.initialized:
            mean, deviation = moments(y, self.event_shape)
            self.loc.copy_(mean)
            self.log_scale.copy_(log_deviation(mean, deviation))
            self.initialized.fill_(True)
        return super()._absorb(y, context, first)


class Standardization(Elementwise):
    r"""A fixed shift and scale at the data end of a flow, initially the identity.

    $$y = x \odot \exp(\mathrm{log\_scale}) + \mathrm{loc}, \qquad
    \log|\det dy/dx| = \sum_j \mathrm{log\_scale}_j.$$

    `fit(…, standardize=True)` sets both to the moments of the training data. They are not trained.

    Shapes: `(*batch, *event_shape)` to the same, ladj `(*batch,)`. The parameters are `(D,)` for
    vectors and `(C, 1, 1)` for images, where the sum over j runs over all pixels.

    Args:
        event_shape: D or `(D,)` for vectors; `(C, H, W)` for images.

    Examples:
        >>> import torch
        >>> from pyroflows import Standardization
        >>> layer = Standardization(1).standardize(torch.tensor([[1.0], [5.0]]))
        >>> layer(torch.tensor([-1.0, 0.0, 1.0])[:, None]).flatten().tolist()
        [1.0, 3.0, 5.0]
    """

    loc: Float[Tensor, "..."]
    log_scale: Float[Tensor, "..."]

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape)
        self.register_buffer("loc", torch.zeros(parameter_shape(self.event_shape)))
        self.register_buffer("log_scale", torch.zeros(parameter_shape(self.event_shape)))

    def _loc_and_log_scale(self) -> tuple[Tensor | float, Tensor]:
        return self.loc, self.log_scale

    @torch.no_grad()
    def standardize(self, x: Float[Tensor, "..."] | Parts) -> "Standardization":
        """Set shift and scale so that the encoded data has mean 0 and variance 1.

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
        if not (mean + deviation).isfinite().all():
            kind = str(mean.dtype).removeprefix("torch.")
            raise ValueError(f"the data's moments are not finite as {kind}")
        self.loc.copy_(mean)
        self.log_scale.copy_(log_deviation(mean, deviation))
        return self

    def _standardize(self, parts: Parts) -> None:
        self.standardize(parts)


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
        >>> import torch
        >>> from pyroflows import BatchNorm
        >>> layer = BatchNorm(1, eps=0.0).initialize(torch.tensor([[1.0], [5.0]]))
        >>> layer.running_mean.item(), layer.running_var.item()
        (3.0, 4.0)
    """

    def __init__(
        self, event_shape: int | Sequence[int], *, momentum: float = 0.1, eps: float = 1e-5
    ) -> None:
        super().__init__(event_shape)
        if not 0 < momentum <= 1:
            raise ValueError(f"`momentum` is {momentum}, expected a number in (0, 1]")
        self.momentum, self.eps = momentum, as_scale(eps, "eps")
        self._register_moments(parameter_shape(self.event_shape))

    def _loc_and_log_scale(self) -> tuple[Tensor | float, Tensor]:
        return self.running_mean, 0.5 * (self.running_var + self.eps).log()

    def _absorb(self, y: Tensor, context: Context, first: bool) -> Tensor:
        if not (first and self.initialized):
            mean, deviation = moments(y, self.event_shape)
            self._move_moments(mean, deviation.square(), self.momentum)
        return super()._absorb(y, context, first)


def moments(
    x: Float[Tensor, "..."],
    event_shape: tuple[int, ...],
    weights: Float[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Return mean and standard deviation over the batch and, for images, over the pixels.

    With weights, one for each row of x, rows count as often as they weigh.
    """
    rows = x.reshape(-1, *event_shape)
    dims = (0, 2, 3) if len(event_shape) == 3 else (0,)
    first = rows[(slice(1), slice(None), *[slice(1)] * (len(dims) - 1))]
    # Relative to the first row, a constant has deviation 0, whatever the rounding of sums. In units
    # of the largest entry, squares neither overflow nor underflow.
    rest = rows - first
    unit = rest.abs().amax(dims, keepdim=True)
    rest = rest / torch.where(unit == 0, torch.ones_like(unit), unit)
    if weights is not None:
        shares = (weights * (len(rows) / weights.sum())).reshape(-1, *(1 for _ in event_shape))
        centre = (shares * rest).mean(dims, keepdim=True)
        variance = (shares * torch.square(rest - centre)).mean(dims, keepdim=True)
        return (first + unit * centre)[0], (unit * torch.sqrt(variance))[0]
    mean = first + unit * rest.mean(dims, keepdim=True)
    return mean[0], (unit * rest.std(dims, correction=0, keepdim=True))[0]


def pooled_moments(
    parts: Parts, event_shape: tuple[int, ...]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Return the moments of data that arrives in parts, holding one part at a time."""
    rows, mean, deviation = 0.0, torch.zeros(()).double(), torch.zeros(()).double()
    for part, weights in parts:
        size = len(part) if weights is None else float(weights.sum())
        if not size:
            continue
        rows += size
        weight = size / rows
        found, spread = moments(part, event_shape, weights)
        gap = found.cpu().double() - mean
        mean = mean + weight * gap
        within = torch.hypot(
            math.sqrt(1 - weight) * deviation, math.sqrt(weight) * spread.cpu().double()
        )
        deviation = torch.hypot(within, math.sqrt(weight * (1 - weight)) * gap)
    return mean.to(found), deviation.to(spread)


def log_deviation(
    mean: Float[Tensor, "*shape"], deviation: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return the log standard deviation; 0 for coordinates that are constant up to rounding."""
    floor = torch.finfo(deviation.dtype).eps * mean.abs()
    return torch.where(deviation > floor, deviation.log(), torch.zeros_like(deviation))
