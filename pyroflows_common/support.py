"""Supports, the host's constraints on events: their form in files, and words about them."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# The name of a constraint on whole vectors, or the lower and the upper end for each column, None
# where there is no end; one pair holds for all columns.
Pair = tuple[float | None, float | None]
Support = str | tuple[Pair, ...]


def as_support(value: Any, known: Mapping[str, Any]) -> Support:
    """Return a constraint of the host, or a sequence of one for each column, as files hold it.

    Args:
        value: a constraint, a sequence of constraints, or a support as files hold it.
        known: the host's constraint on real numbers and those on whole vectors, by name.

    Raises:
        ValueError: if there is no smooth bijection from real events to the support.
    """
    if isinstance(value, str) and value in known:
        return value
    inner = each(value)
    for name, constraint in known.items():
        if name != "real" and type(inner) is type(constraint):
            return name
    columns = inner if isinstance(inner, list | tuple) else getattr(inner, "cseq", [inner])
    pairs = tuple(pair for column in columns for pair in _pairs(column, known))
    if not pairs:
        raise ValueError("`support` is empty, expected a constraint or one for each column")
    return pairs


def _pairs(column: Any, known: Mapping[str, Any]) -> Iterator[Pair]:
    """Yield the ends of an interval; several if they are arrays."""
    if isinstance(column, tuple) and len(column) == 2:
        ends: tuple[Any, ...] = column
    elif type(column) is type(known["real"]):
        ends = (None, None)
    else:
        ends = (getattr(column, "lower_bound", None), getattr(column, "upper_bound", None))
        if ends == (None, None) or column.is_discrete:
            names = ", ".join(known)
            raise ValueError(
                f"`support` is {column!r}, expected an interval of real numbers, one for each "
                f"column, or one of {names}"
            )
    arrays = [np.asarray(math.nan if end is None else end, float).ravel() for end in ends]
    for low, high in zip(*np.broadcast_arrays(*arrays), strict=True):
        pair = tuple(None if math.isnan(end) else float(end) for end in (low, high))
        if low >= high or not all(end is None or math.isfinite(end) for end in pair):
            raise ValueError(f"`support` is an interval from {low} to {high}")
        yield pair[0], pair[1]


def check_columns(support: Support, event_shape: tuple[int, ...]) -> None:
    """Check that a support fits events of this shape."""
    if isinstance(support, str):
        if len(event_shape) != 1 or (support == "simplex" and event_shape[0] < 2):
            raise ValueError(f"`support` is {support}, but the events have shape {event_shape}")
    elif len(support) > 1 and event_shape != (len(support),):
        raise ValueError(
            f"`support` has {len(support)} columns, but the events have shape {event_shape}"
        )


def runs(support: tuple[Pair, ...]) -> Iterator[tuple[Pair, slice]]:
    """Yield the ends of neighbouring columns with the same ends, and the place of the columns."""
    start = 0
    for pair, group in itertools.groupby(support):
        stop = start + len(list(group))
        yield pair, slice(start, stop)
        start = stop


def each(support: Any) -> Any:
    """Return the constraint on each number, or on each vector, of an event."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def words(support: Any) -> str:
    """Return a support in words."""
    inner = each(support)
    return str(list(inner.cseq) if hasattr(inner, "cseq") else inner)


def outside(support: Any) -> str:
    """Return what a message says of rows that are not inside a flow's support."""
    return f"outside the flow's support, {words(support)}, or on its edge"


def no_density(support: Any) -> str:
    """Return a message about a base that gives no row of a batch a density."""
    return (
        "the flow maps every row of the first batch outside the support of `base`, "
        f"{words(support)}: standardize the data, or pass a base on all real numbers"
    )
