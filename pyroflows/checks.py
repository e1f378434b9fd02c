"""What a flow refuses: checks of shapes, dtypes and numbers, with messages that name them."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_event_shape(event_shape: int | Sequence[int]) -> tuple[int, ...]:
    """Turn an int or a sequence of ints into the tuple of an event's shape."""
    shape = tuple(event_shape) if isinstance(event_shape, Sequence) else (event_shape,)
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"`event_shape` is {event_shape!r}, expected positive ints")
    return shape


def as_count(value: Any, name: str, least: int = 1) -> int:
    """Refuse what is not a whole number from `least` on."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"`{name}` is {value!r}, expected a whole number, at least {least}")
    return operator.index(value)


def as_scale(value: Any, name: str, zero: bool = True) -> float:
    """Refuse what is not a positive number, or zero where that is allowed."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not (0 <= value < math.inf if zero else 0 < value < math.inf):
        raise ValueError(
            f"`{name}` is {value!r}, expected a {'number from 0' if zero else 'positive number'}"
        )
    return value


def as_scales(value: Any, name: str) -> list[float]:
    """Turn a positive number, or several, into a list of them."""
    several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    values = list(value) if several else [value]
    if not values:
        raise ValueError(f"`{name}` is empty, expected a number or several")
    return [as_scale(one, name, zero=False) for one in values]


def as_widths(hidden: Sequence[int]) -> tuple[int, ...]:
    """Turn the widths of hidden layers into a tuple of ints."""
    widths = tuple(hidden) if isinstance(hidden, Sequence) else (None,)
    if not all(isinstance(n, int) and n > 0 for n in widths):
        raise ValueError(f"`hidden` is {hidden!r}, expected a sequence of positive ints")
    return widths


def check_shape(shape: Sequence[int], event_shape: tuple[int, ...], name: str = "x") -> torch.Size:
    """Refuse a shape that does not end in the event's."""
    shape = torch.Size(shape)
    if tuple(shape[max(len(shape) - len(event_shape), 0) :]) != event_shape:
        raise ValueError(
            f"`{name}` has shape {tuple(shape)}, but this flow transforms events of shape "
            f"{event_shape}: expected (*batch, {', '.join(map(str, event_shape))})"
        )
    return shape


def check_event(x: Tensor, event_shape: tuple[int, ...], name: str = "x") -> Tensor:
    """Refuse what is not a real floating-point tensor of events."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` is a {type(x).__name__}, expected a torch.Tensor")
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"`{name}` has dtype {x.dtype}, expected a real floating-point tensor such as float32"
        )
    check_shape(x.shape, event_shape, name)
    return x


def check_context(context: Tensor, context_dim: int) -> None:
    """Refuse a context that the flow was not built for."""
    if not context_dim:
        raise ValueError("`context` was given, but this flow was built without (context_dim=0)")
    if not isinstance(context, Tensor) or not context.dtype.is_floating_point:
        raise TypeError("`context` must be a floating-point torch.Tensor")
    if context.ndim == 0 or context.shape[-1] != context_dim:
        size = context.shape[-1] if context.ndim else "none"
        raise ValueError(
            f"`context` has last dimension {size}, but this flow was built with "
            f"context_dim={context_dim}"
        )


def check_finite(x: Tensor, event_shape: tuple[int, ...], name: str) -> Tensor:
    """Refuse data without rows or with rows that are not finite, and say where the first is."""
    check_event(x, event_shape, name)
    rows = x.reshape(-1, math.prod(event_shape))
    if not len(rows):
        raise ValueError(f"`{name}` of shape {tuple(x.shape)} has no rows")
    bad = (~rows.isfinite().all(-1)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"`{name}` has {len(bad)} of {len(rows)} rows with NaN or inf; the first is row "
            f"{int(bad[0])}"
        )
    return x
