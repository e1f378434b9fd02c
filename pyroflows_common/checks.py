"""Checks of numbers, shapes and rows, whose messages name the argument."""

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import Any, SupportsIndex

import numpy as np

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a model and its guide


def as_event_shape(event_shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return an event's shape as a tuple, from an int or a sequence of ints."""
    shape = tuple(event_shape) if isinstance(event_shape, Sequence) else (event_shape,)
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"`event_shape` is {event_shape!r}, expected positive ints")
    return shape


def as_count(value: SupportsIndex, name: str, least: int = 1) -> int:
    """Check that `value` is a whole number of at least `least`, and return it as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise ValueError(f"`{name}` is {value!r}, expected a whole number, at least {least}")
    return operator.index(value)


def as_scale(value: Any, name: str, zero: bool = True) -> float:
    """Check that `value` is a finite positive number, or zero if `zero` allows it."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not (0 <= value < math.inf if zero else 0 < value < math.inf):
        raise ValueError(
            f"`{name}` is {value!r}, expected a {'number from 0' if zero else 'positive number'}"
        )
    return value


def as_scales(value: Any, name: str) -> list[float]:
    """Return one positive number, or several, as a list."""
    several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    values = list(value) if several else [value]
    if not values:
        raise ValueError(f"`{name}` is empty, expected a number or several")
    return [as_scale(one, name, zero=False) for one in values]


def as_widths(hidden: Sequence[int]) -> tuple[int, ...]:
    """Return the widths of hidden layers as a tuple."""
    widths = tuple(hidden) if isinstance(hidden, Sequence) else (None,)
    if not all(isinstance(n, int) and n > 0 for n in widths):
        raise ValueError(f"`hidden` is {hidden!r}, expected a sequence of positive ints")
    return widths


def as_numpy(x: Any) -> np.ndarray:
    """Return an array of either host, or what NumPy can read, as NumPy's."""
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)


def check_shape(shape: Sequence[int], event_shape: tuple[int, ...], name: str = "x") -> None:
    """Check that a shape ends in the shape of an event."""
    shape = tuple(shape)
    if shape[max(len(shape) - len(event_shape), 0) :] != event_shape:
        raise ValueError(
            f"`{name}` has shape {shape}, but this flow transforms events of shape "
            f"{event_shape}: expected (*batch, {', '.join(map(str, event_shape))})"
        )


def joint_batch(batch: Sequence[int], contexts: Sequence[int]) -> tuple[int, ...]:
    """Return the batch shape that events and contexts of these batch shapes have together."""
    pairs = list(zip_longest(reversed(batch), reversed(contexts), fillvalue=1))
    if any(a != b and a != 1 and b != 1 for a, b in pairs):
        raise ValueError(
            f"`context` has batch shape {tuple(contexts)}, which does not broadcast with the batch "
            f"shape of the events, {tuple(batch)}"
        )
    return tuple(b if a == 1 else a for a, b in reversed(pairs))


def check_vector(event_shape: tuple[int, ...]) -> int:
    """Return the D of an event shape `(D,)`."""
    if len(event_shape) != 1:
        raise ValueError(f"`event_shape` is {event_shape}, expected an int or (D,)")
    return event_shape[0]


def parameter_shape(event_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of parameters per coordinate of a vector or channel of an image."""
    return (event_shape[0], 1, 1) if len(event_shape) == 3 else event_shape


def check_fit(layers: Sequence[Any]) -> None:
    """Check that each layer takes the events that the one before it gives."""
    for i, (layer, following) in enumerate(pairwise(layers)):
        if layer.event_shape != following.base_shape:
            raise ValueError(
                f"`layers` do not fit: layer {i} gives events of shape {layer.event_shape}, but "
                f"layer {i + 1} takes {following.base_shape}"
            )


def check_context_dims(layers: Sequence[Any], name: str) -> int:
    """Return the context size of the layers; 0 if none of them takes a context."""
    contexts = {layer.context_dim for layer in layers} - {0}
    if len(contexts) > 1:
        raise ValueError(f"`{name}` take contexts of different sizes: {sorted(contexts)}")
    return max(contexts, default=0)


def check_activation(name: str, known: Iterable[str]) -> None:
    """Check that an activation function is known by its name."""
    if name not in known:
        raise ValueError(f"`activation` is {name!r}, expected one of {sorted(known)}")


def check_rows(good: np.ndarray, name: str, fault: str = "with NaN or inf") -> None:
    """Check that all rows are good; the error counts those that are not and locates the first.

    Args:
        good: `(n,)`, whether each row is good.
        name: name of the data in the message.
        fault: what is wrong with the other rows, as the message puts it.
    """
    bad = np.flatnonzero(~good)
    if len(bad):
        raise ValueError(
            f"{name} has {len(bad)} of {len(good)} rows {fault}; the first is row {bad[0]}"
        )


def as_inputs(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Inputs:
    """Check the arguments of a model and its guide, and return them as a tuple and a dict."""
    if isinstance(args, str) or not isinstance(args, Sequence):
        raise TypeError(f"`args` is a {type(args).__name__}, expected a tuple of arguments")
    if not (kwargs is None or isinstance(kwargs, Mapping)):
        raise TypeError(f"`kwargs` is a {type(kwargs).__name__}, expected a dict or None")
    return tuple(args), dict(kwargs or {})
