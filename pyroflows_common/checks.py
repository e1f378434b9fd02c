"""Checks of numbers, shapes and rows, with messages that name the argument."""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a model and of its guide


def as_event_shape(event_shape: int | Sequence[int]) -> tuple[int, ...]:
    """Turn an int or a sequence of ints into the tuple of an event's shape."""
    shape = tuple(event_shape) if isinstance(event_shape, Sequence) else (event_shape,)
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"`event_shape` is {event_shape!r}, expected positive ints")
    return shape


def as_count(value: Any, name: str, least: int = 1) -> int:
    """Check that `value` is a whole number, at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"`{name}` is {value!r}, expected a whole number, at least {least}")
    return operator.index(value)


def as_scale(value: Any, name: str, zero: bool = True) -> float:
    """Check that `value` is a positive number, or zero where that is allowed."""
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


def check_shape(shape: Sequence[int], event_shape: tuple[int, ...], name: str = "x") -> None:
    """Check that a shape ends in the event's."""
    shape = tuple(shape)
    if shape[max(len(shape) - len(event_shape), 0) :] != event_shape:
        raise ValueError(
            f"`{name}` has shape {shape}, but this flow transforms events of shape "
            f"{event_shape}: expected (*batch, {', '.join(map(str, event_shape))})"
        )


def check_rows(finite: np.ndarray, name: str, cast: str = "") -> None:
    """Check that all rows are finite; say how many are not, and where the first is.

    Args:
        finite: `(n,)`, whether each row is.
        name: how the message calls the data.
        cast: how the message says in what precision they are not.
    """
    bad = np.flatnonzero(~finite)
    if len(bad):
        raise ValueError(
            f"{name} has {len(bad)} of {len(finite)} rows with NaN or inf{cast}; the first is row "
            f"{bad[0]}"
        )


def as_inputs(args: Any, kwargs: Any) -> Inputs:
    """Return the arguments of model and guide, and refuse what is none."""
    if isinstance(args, str) or not isinstance(args, Sequence):
        raise TypeError(f"`args` is a {type(args).__name__}, expected a tuple of arguments")
    if not (kwargs is None or isinstance(kwargs, Mapping)):
        raise TypeError(f"`kwargs` is a {type(kwargs).__name__}, expected a dict or None")
    return tuple(args), dict(kwargs or {})
