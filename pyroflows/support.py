"""Supports: the events that a flow or a distribution can give."""

from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from pyroflows_common.checks import check_rows
from pyroflows_common.support import each, outside


def support_of(distribution: Any) -> Any:
    """Return the support of a distribution; all real events if the host does not know it."""
    try:
        support = distribution.support
    except NotImplementedError:
        support = None
    if support is None or constraints.is_dependent(support):
        return constraints.independent(constraints.real, len(distribution.event_shape))
    return support


def is_real(support: Any) -> bool:
    """Return whether a support has all real events."""
    return isinstance(each(support), type(constraints.real))


def inside(y: Float[Tensor, "..."], support: Any) -> Bool[Tensor, "*batch"]:
    """Return whether each event lies in the interior of a support.

    The ends of an interval belong to the host's constraints, but a density of a smooth bijection
    need not have a limit there.
    """
    if isinstance(support, constraints.independent):
        within = inside(y, support.base_constraint)
        return within.reshape(*y.shape[: y.ndim - support.event_dim], -1).all(-1)
    if isinstance(support, constraints.cat):
        parts = zip(y.split(support.lengths, support.dim), support.cseq, strict=True)
        return torch.cat([inside(part, inner) for part, inner in parts], support.dim)
    within = support.check(y)
    if hasattr(support, "lower_bound"):
        within = within & (y > support.lower_bound)
    if hasattr(support, "upper_bound"):
        within = within & (y < support.upper_bound)
    if isinstance(support, type(constraints.simplex)):
        within = within & (y > 0).all(-1)
    return within


def kept_inside(y: Float[Tensor, "..."], support: Any) -> Float[Tensor, "..."]:
    """Return numbers that rounding has put on an end of their interval as the nearest inside."""
    kind = torch.finfo(y.dtype)
    ends = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    low, high = (
        None if end is None else end + side * max(abs(end) * float(kind.eps), float(kind.tiny))
        for side, end in zip((1, -1), ends, strict=True)
    )
    return y if low is high is None else y.clamp(low, high)


def inverse_inside(
    bijection: Any, y: Float[Tensor, "..."], support: Any
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Return the inverse of a bijection to a support and the log-slope log|det dy/dx|.

    Outside the support or on its edge, the inverse is 0 and the log-slope ∞. NaN stays NaN.
    """
    nan = y.isnan()
    missing = nan.flatten(-support.event_dim).any(-1) if support.event_dim else nan
    outside = ~(inside(y, support) | missing)
    harmless = bijection(y.new_zeros(bijection.inverse_shape(y.shape)))
    y = torch.where(outside[(..., *[None] * support.event_dim)], harmless, y)
    x = bijection.inv(y)
    return x, torch.where(outside, torch.inf, bijection.log_abs_det_jacobian(x, y))


def check_support(x: Float[Tensor, "..."], support: Any, name: str = "`x`") -> None:
    """Check that all events lie inside a support."""
    if not is_real(support):
        check_rows(inside(x, support).reshape(-1).cpu().numpy(), name, outside(support))


def check_base(base: Any) -> None:
    """Check that a base distribution has a density."""
    if support_of(base).is_discrete:
        raise ValueError(f"`base` is {base!r}, expected a distribution over real numbers")


def log_prob_inside(base: Any, z: Float[Tensor, "..."]) -> Float[Tensor, "*batch"]:
    """Return a base's log-density: −inf outside of its support, NaN for NaN, and no error."""
    # torch.compile cannot trace the host's constraints, and named bases need none.
    inner = getattr(base, "base_dist", None)
    if isinstance(inner, dist.Normal | dist.Logistic) and not inner._validate_args:
        return base.log_prob(z)
    support = support_of(base)
    if is_real(support):
        try:
            return base.log_prob(z)
        except ValueError:  # the host's validation
            if z.isfinite().all():
                raise
            return torch.full(z.shape[: z.ndim - len(base.event_shape)], torch.nan).to(z)
    within = inside(z, support)
    known = within.reshape(*within.shape, *(1 for _ in base.event_shape))
    harmless = biject_to(support)(torch.zeros_like(z))
    missing = torch.where(z == z, -torch.inf, z).flatten(len(within.shape)).sum(-1)
    return torch.where(within, base.log_prob(torch.where(known, z, harmless)), missing)
