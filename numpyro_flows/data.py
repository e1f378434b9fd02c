"""What `fit` can train on: arrays, datasets of rows and iterables of batches."""

import hashlib
import math
from collections.abc import Mapping
from numbers import Number
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Batch = tuple[Any, Any]  # events and their contexts, None where there are none

# Numbers that are looked at in one go, so that data mapped from a disk is never read in whole.
CHUNK = 2**20


class Rules(NamedTuple):
    """What a flow, and a function that augments batches, can take."""

    event_shape: tuple[int, ...]
    context_dim: int
    augmented: bool
    dtype: Any

    def check(self, x: Any, context: Any, name: str) -> None:
        """Refuse rows that do not suit the flow; `name` says in the message which they are."""
        if x.ndim == 0 or not len(x):
            raise ValueError(f"{name} of shape {tuple(x.shape)} has no rows")
        kind = kind_of(x)
        if kind not in "fiub":
            raise TypeError(f"{name} has dtype {x.dtype}, expected floating-point numbers")
        if not self.augmented:
            if kind != "f":
                raise TypeError(
                    f"{name} has dtype {x.dtype}, expected floating-point numbers; turn whole "
                    "numbers into real ones by `augment`, for instance by adding uniform noise"
                )
            check_rows(x, self.event_shape, name)
        check_finite(x, name, self.dtype)
        if context is None:
            if self.context_dim:
                raise ValueError(
                    f"{name} comes without context, but the flow was built with "
                    f"context_dim={self.context_dim}"
                )
            return
        if not self.context_dim:
            raise ValueError(
                f"{name} comes with a context, but the flow was built without (context_dim=0)"
            )
        if tuple(context.shape) != (len(x), self.context_dim):
            raise ValueError(
                f"`context` of {name} has shape {tuple(context.shape)}, expected "
                f"{(len(x), self.context_dim)}: a row for each row of x"
            )
        if kind_of(context) not in "fiub":
            raise TypeError(f"`context` of {name} has dtype {context.dtype}, expected numbers")
        check_finite(context, f"`context` of {name}", self.dtype)


class Rows:
    """Rows in an array, which may be mapped from a file."""

    def __init__(self, rules: Rules, x: Any, context: Any, name: str) -> None:
        rules.check(x, context, name)
        self.x, self.context = x, context

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: np.ndarray) -> Batch:
        """Return the rows at these places."""
        return _gather(self.x, index), None if self.context is None else _gather(
            self.context, index
        )

    def describe(self) -> list[Any]:
        """Return what tells this data from other data: shapes, and a digest of some rows."""
        digest = hashlib.sha256()
        some = np.unique(np.linspace(0, len(self) - 1, 1000).astype(int))
        for part in self.take(some):
            if part is not None:
                digest.update(np.asarray(part).tobytes())
        return ["rows", list(self.x.shape), str(self.x.dtype), digest.hexdigest()]


class Items:
    """A dataset with a length that gives its rows one by one, as PyTorch's do."""

    def __init__(self, rules: Rules, data: Any, name: str) -> None:
        if not len(data):
            raise ValueError(f"{name} has no rows")
        self.rules, self.data, self.name = rules, data, name

    def __len__(self) -> int:
        return len(self.data)

    def take(self, index: np.ndarray) -> Batch:
        """Return the rows at these places."""
        rows = [as_pair(self.data[int(i)], f"a row of {self.name}") for i in index]
        x, context = (
            None if part[0] is None else np.stack([np.asarray(row) for row in part])
            for part in zip(*rows, strict=True)
        )
        self.rules.check(x, context, f"a batch of {self.name}")
        return x, context

    def describe(self) -> list[Any]:
        """Return what tells this data from other data, as far as it can be known."""
        return ["items", len(self)]


class Batches:
    """An iterable of batches."""

    def __init__(self, rules: Rules, data: Any, name: str) -> None:
        self.rules, self.data, self.name = rules, data, name

    def checked(self, batch: Any, number: int) -> Batch:
        """Return a batch as a pair, if it suits the flow."""
        name = f"batch {number} of {self.name}"
        x, context = as_pair(batch, name)
        if tuple(x.shape) == self.rules.event_shape and not self.rules.augmented:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, which is one event, expected a batch of them; "
                "a DataLoader makes batches of rows"
            )
        self.rules.check(x, context, name)
        return x, context

    def describe(self) -> list[Any]:
        """Return what tells this data from other data, as far as it can be known."""
        return ["batches"]


Source = Rows | Items | Batches


def as_source(rules: Rules, data: Any, context: Any = None, name: str = "`data`") -> Source:
    """Return the source of batches that `data` is.

    Args:
        rules: what the flow takes.
        data: an array, a pair of arrays (x, context), a dataset with a length and rows, or an
            iterable of batches.
        context: an array of contexts that goes with an array.
        name: how messages call the data.

    Raises:
        TypeError: where it is none of these, or has numbers that are not real.
        ValueError: where it does not suit the flow.
    """
    if isinstance(data, tuple):
        if context is not None and len(data) == 2:
            raise ValueError(f"`context` was given, but {name} is a pair that has one already")
        data, paired = as_pair(data, name)
        context = paired if context is None else context
    if _is_array(data):
        context = None if context is None else as_array(context, "`context`")
        return Rows(rules, as_array(data, name), context, name)
    if context is not None:
        raise ValueError(
            f"`context` goes with an array, but {name} is a {type(data).__name__}: let it give "
            "pairs (x, context)"
        )
    _check_not_numbers(data, name)
    if not isinstance(data, str | bytes | Mapping):
        if hasattr(data, "__iter__"):
            return Batches(rules, data, name)
        if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            return Items(rules, data, name)
    raise TypeError(
        f"{name} is a {type(data).__name__}, expected an array, a dataset or an iterable of batches"
    )


def as_pair(value: Any, name: str) -> Batch:
    """Return `x`, `(x,)` or `(x, context)` as events and contexts, None where there are none."""
    if isinstance(value, tuple | list):
        if len(value) not in (1, 2) or isinstance(value[0], Number):
            _check_not_numbers(value, name)
            raise TypeError(
                f"{name} is a {type(value).__name__} of {len(value)} items, expected x, (x,) or "
                "(x, context)"
            )
        x, context = (*value, None)[:2]
        return as_array(x, name), None if context is None else as_array(context, "`context`")
    return as_array(value, name), None


def as_array(value: Any, name: str) -> Any:
    """Return a JAX or NumPy array; nothing is copied."""
    if isinstance(value, Array):
        return value
    if not _is_array(value):
        _check_not_numbers(value, name)
        raise TypeError(f"{name} is a {type(value).__name__}, expected an array")
    return np.asarray(value)


def _check_not_numbers(value: Any, name: str) -> None:
    """Refuse rows that are lists of numbers, whatever the depth of the lists."""
    inner = value
    while isinstance(inner, tuple | list) and inner:
        inner = inner[0]
    if isinstance(inner, Number) and inner is not value:
        raise TypeError(
            f"{name} is a {type(value).__name__} of numbers, expected an array or tensor of rows: "
            "numpy.array makes one of them"
        )


def check_rows(x: Any, event_shape: tuple[int, ...], name: str) -> None:
    """Refuse what is not a batch of events with one batch dimension."""
    if tuple(x.shape[1:]) != event_shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, but this flow transforms events of shape "
            f"{event_shape}: expected (n, {', '.join(map(str, event_shape))})"
        )


def check_finite(x: Any, name: str, dtype: Any) -> None:
    """Refuse rows that have, as numbers of a dtype, NaN or inf; say how many and where."""
    if kind_of(x) != "f":
        return
    x = np.asarray(x)
    count, first, size = 0, 0, rows_at_once(x.shape[1:])
    for start in range(0, len(x), size):
        with np.errstate(over="ignore"):
            rows = x[start : start + size].astype(dtype)
        bad = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(1))
        if len(bad) and not count:
            first = start + int(bad[0])
        count += len(bad)
    if count:
        kind = str(np.dtype(dtype))
        cast = "" if str(x.dtype) == kind else f" as {kind}"
        raise ValueError(
            f"{name} has {count} of {len(x)} rows with NaN or inf{cast}; the first is row {first}"
        )


def rows_at_once(shape: Any) -> int:
    """Return how many rows of this shape to look at in one go."""
    return max(1, CHUNK // max(1, math.prod(shape)))


def _is_array(value: Any) -> bool:
    return isinstance(value, Array) or hasattr(value, "__array__")


def kind_of(x: Any) -> str:
    """Return the letter that NumPy has for the kind of a dtype, such as f for floats."""
    return "f" if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype.kind


def _gather(x: Any, index: np.ndarray) -> Any:
    return _taken(x, index) if isinstance(x, Array) else np.asarray(x[index])


@jax.jit
def _taken(x: Array, index: Array) -> Array:
    return x[index]
