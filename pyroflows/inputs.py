"""Checks of what a flow is given: events, contexts and rows."""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pyroflows_common.checks import check_rows, check_shape


def check_event(x: Float[Tensor, "..."], event_shape: tuple[int, ...], name: str = "x") -> None:
    """Check that `x` is a real floating-point tensor of events."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` is a {type(x).__name__}, expected a torch.Tensor")
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"`{name}` has dtype {x.dtype}, expected a real floating-point tensor such as float32; "
            "pixels of whole numbers go through `dequantize`"
        )
    check_shape(x.shape, event_shape, name)


def as_context(
    context: Shaped[Tensor, "*batch context_dim"], context_dim: int, dtype: torch.dtype
) -> Float[Tensor, "*batch context_dim"]:
    """Check that `context` fits a flow; convert whole numbers to `dtype`."""
    if not context_dim:
        raise ValueError("`context` was given, but this flow takes none (context_dim=0)")
    if not isinstance(context, Tensor) or context.dtype.is_complex:
        kind = context.dtype if isinstance(context, Tensor) else type(context).__name__
        raise TypeError(f"`context` is {kind}, expected a torch.Tensor of real numbers")
    if context.ndim == 0 or context.shape[-1] != context_dim:
        size = context.shape[-1] if context.ndim else "none"
        raise ValueError(
            f"`context` has last dimension {size}, but this flow was built with "
            f"context_dim={context_dim}"
        )
    return context if context.dtype.is_floating_point else context.to(dtype)


def check_finite(x: Float[Tensor, "..."], event_shape: tuple[int, ...], name: str = "`x`") -> None:
    """Check that `x` has rows and that all of them are finite."""
    rows = x.reshape(-1, math.prod(event_shape))
    if not len(rows):
        raise ValueError(f"{name} of shape {tuple(x.shape)} has no rows")
    check_rows(rows.isfinite().all(-1).cpu().numpy(), name)
