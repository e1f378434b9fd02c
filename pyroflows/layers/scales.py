"""Scale functions of affine couplings: from network output to log-scale, bounded by `limit`."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class TanhScale(nn.Module):
    """`log_scale = factor · tanh(r)` with learned factors (RealNVP, section 4.1).

    Args:
        shape: shape of the factors: `(D,)`, one per coordinate, or `(C, 1, 1)`, one per channel.
        limit: smooth bound on the factor; None for no bound, as in the paper.
    """

    def __init__(self, shape: Sequence[int], limit: float | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.weight = nn.Parameter(torch.full(shape, 1.0 if limit is None else min(1.0, limit)))

    @property
    def factor(self) -> Float[Tensor, "..."]:
        """The factor, bounded by the limit."""
        if self.limit is None:
            return self.weight
        return self.limit * torch.tanh(self.weight / self.limit)

    def penalty(self) -> Float[Tensor, ""]:
        """Return the sum of the squared factors."""
        return self.factor.square().sum()

    def forward(self, r: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Map network output to a log-scale."""
        return self.factor * torch.tanh(r)


class SigmoidScale(nn.Module):
    """`log_scale = softplus(−(r + 2))`: encoding multiplies by `sigmoid(r + 2)` (Glow's code).

    The limit bounds the distance from the value at `r = 0`; None for no bound.
    """

    def __init__(self, shape: Sequence[int], limit: float | None = None) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, r: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Map network output to a log-scale."""
        log_scale = F.softplus(-(r + 2.0))
        if self.limit is None:
            return log_scale
        start = math.log1p(math.exp(-2.0))
        # No steeper than the limit requires: the slope amplifies rounding errors of extreme inputs.
        return start + self.limit * torch.tanh((log_scale - start) / max(self.limit, 0.5))


class ClampScale(nn.Module):
    """`log_scale = 2/π · c · arctan(r/c)`, with `c = 0.1` for positive r and 2 for negative.

    The asymmetric soft clamp of Andrade, "Stable training of normalizing flows for
    high-dimensional variational inference" (2024), section 4.1. The limit is a smaller bound on
    both sides; None for no further bound.
    """

    def __init__(self, shape: Sequence[int], limit: float | None = None) -> None:
        super().__init__()
        limit = math.inf if limit is None else limit
        self.upper, self.lower = min(0.1, limit), min(2.0, limit)

    def forward(self, r: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Map network output to a log-scale."""
        upper = self.upper * torch.arctan(r.clamp(min=0.0) / self.upper)
        lower = self.lower * torch.arctan(r.clamp(max=0.0) / self.lower)
        return 2.0 / math.pi * (upper + lower)


class ExpScale(nn.Module):
    """`log_scale = r`: unbounded, the papers' formula."""

    def __init__(self, shape: Sequence[int], limit: float | None = None) -> None:
        super().__init__()

    def forward(self, r: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Map network output to a log-scale."""
        return r


SCALES: dict[str, Callable[..., nn.Module]] = {
    "tanh": TanhScale,
    "sigmoid": SigmoidScale,
    "clamp": ClampScale,
    "exp": ExpScale,
}
