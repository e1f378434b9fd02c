"""Sources of training data: arrays, datasets of rows and iterables of batches."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any, ClassVar

import numpy as np

from pyroflows_common.checks import check_rows

Batch = tuple[Any, Any]  # events and their contexts, None where there are none

# Numbers looked at in one go, so that data mapped from a disk is never read in whole.
CHUNK = 2**20


@dataclass(frozen=True)
class Arrays(ABC):
    """What a flow takes, and the functions of its host's arrays, which each wing fills in.

    Args:
        event_shape: shape of the flow's events.
        context_dim: size of its context.
        augmented: whether batches are augmented before they come to the flow.
        dtype: the flow's, by its name.
    """

    event_shape: tuple[int, ...]
    context_dim: int
    augmented: bool
    dtype: str

    array_maker: ClassVar[str]  # the function that messages name to users who pass lists

    @abstractmethod
    def is_array(self, value: Any) -> bool:
        """Whether a value is an array of the host or of NumPy."""

    @abstractmethod
    def as_array(self, value: Any) -> Any:
        """Return an array as the host's or NumPy's; nothing is copied."""

    @abstractmethod
    def kind(self, x: Any) -> str:
        """Return NumPy's letter for the kind of a dtype, such as f for floats."""

    @abstractmethod
    def finite(self, x: Any) -> np.ndarray:
        """Tell for each row whether it is finite as numbers of the flow's dtype."""

    @abstractmethod
    def take(self, x: Any, index: np.ndarray) -> Any:
        """Return the rows of an array at some places."""

    @abstractmethod
    def stack(self, rows: Sequence[Any]) -> Any:
        """Return rows as one array."""

    @abstractmethod
    def as_bytes(self, x: Any) -> bytes:
        """Return an array's numbers as bytes."""

    def check(self, x: Any, context: Any, name: str) -> None:
        """Check that rows suit the flow; the message calls them by `name`."""
        if x.ndim == 0 or not len(x):
            raise ValueError(f"{name} of shape {tuple(x.shape)} has no rows")
        kind = self.kind(x)
        if kind not in "fiub":
            raise TypeError(f"{name} has dtype {x.dtype}, expected floating-point numbers")
        if not self.augmented:
            if kind != "f":
                raise TypeError(
                    f"{name} has dtype {x.dtype}, expected floating-point numbers; turn whole "
                    "numbers into real ones by `augment`, for instance by adding uniform noise"
                )
            self.check_shape(x, name)
        self.check_finite(x, name)
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
        if self.kind(context) not in "fiub":
            raise TypeError(f"`context` of {name} has dtype {context.dtype}, expected numbers")
        self.check_finite(context, f"`context` of {name}")

    def check_shape(self, x: Any, name: str) -> None:
        """Check that `x` is a batch of events with one batch dimension."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but this flow transforms events of shape "
                f"{self.event_shape}: expected (n, {', '.join(map(str, self.event_shape))})"
            )

    def check_finite(self, x: Any, name: str) -> None:
        """Check that all rows are finite as numbers of the flow's dtype."""
        if self.kind(x) != "f":
            return
        size = rows_at_once(x.shape[1:])
        finite = [self.finite(x[start : start + size]) for start in range(0, len(x), size)]
        cast = "" if str(x.dtype).removeprefix("torch.") == self.dtype else f" as {self.dtype}"
        check_rows(np.concatenate(finite), name, cast)


class Rows:
    """Rows in an array, which may be mapped from a file."""

    def __init__(self, arrays: Arrays, x: Any, context: Any, name: str) -> None:
        arrays.check(x, context, name)
        self.arrays, self.x, self.context = arrays, x, context

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: np.ndarray) -> Batch:
        """Return the rows at these places."""
        context = None if self.context is None else self.arrays.take(self.context, index)
        return self.arrays.take(self.x, index), context

    def describe(self) -> list[Any]:
        """Return what tells this data from other data: shapes, and a digest of some rows."""
        digest = hashlib.sha256()
        some = np.unique(np.linspace(0, len(self) - 1, 1000).astype(int))
        for part in self.take(some):
            if part is not None:
                digest.update(self.arrays.as_bytes(part))
        return ["rows", list(self.x.shape), str(self.x.dtype), digest.hexdigest()]


class Items:
    """A dataset with a length that gives its rows one by one, as PyTorch's do."""

    def __init__(self, arrays: Arrays, data: Any, name: str) -> None:
        if not len(data):
            raise ValueError(f"{name} has no rows")
        self.arrays, self.data, self.name = arrays, data, name

    def __len__(self) -> int:
        return len(self.data)

    def take(self, index: np.ndarray) -> Batch:
        """Return the rows at these places."""
        rows = [as_pair(self.arrays, self.data[int(i)], f"a row of {self.name}") for i in index]
        x, context = (
            None if part[0] is None else self.arrays.stack(part) for part in zip(*rows, strict=True)
        )
        self.arrays.check(x, context, f"a batch of {self.name}")
        return x, context

    def describe(self) -> list[Any]:
        """Return what tells this data from other data, as far as it can be known."""
        return ["items", len(self)]


class Batches:
    """An iterable of batches."""

    def __init__(self, arrays: Arrays, data: Any, name: str) -> None:
        self.arrays, self.data, self.name = arrays, data, name

    def checked(self, batch: Any, number: int) -> Batch:
        """Return a batch as a pair, if it suits the flow."""
        name = f"batch {number} of {self.name}"
        x, context = as_pair(self.arrays, batch, name)
        if tuple(x.shape) == self.arrays.event_shape and not self.arrays.augmented:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, which is one event, expected a batch of them; "
                "a DataLoader makes batches of rows"
            )
        self.arrays.check(x, context, name)
        return x, context

    def describe(self) -> list[Any]:
        """Return what tells this data from other data, as far as it can be known."""
        return ["batches"]


Source = Rows | Items | Batches


def as_source(arrays: Arrays, data: Any, context: Any = None, name: str = "`data`") -> Source:
    """Return data as a source of batches.

    Args:
        arrays: what the flow takes.
        data: an array, a pair of arrays (x, context), a dataset with a length and rows, or an
            iterable of batches.
        context: an array of contexts that goes with an array.
        name: what messages call the data.

    Raises:
        TypeError: where it is none of these, or its numbers are not real.
        ValueError: where it does not suit the flow.
    """
    if isinstance(data, tuple):
        if context is not None and len(data) == 2:
            raise ValueError(f"`context` was given, but {name} is a pair that has one already")
        data, paired = as_pair(arrays, data, name)
        context = paired if context is None else context
    if arrays.is_array(data):
        context = None if context is None else _as_array(arrays, context, "`context`")
        return Rows(arrays, _as_array(arrays, data, name), context, name)
    if context is not None:
        raise ValueError(
            f"`context` goes with an array, but {name} is a {type(data).__name__}: let it give "
            "pairs (x, context)"
        )
    _check_not_numbers(arrays, data, name)
    if not isinstance(data, str | bytes | Mapping):
        if hasattr(data, "__iter__"):
            return Batches(arrays, data, name)
        if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            return Items(arrays, data, name)
    raise TypeError(
        f"{name} is a {type(data).__name__}, expected an array, a dataset or an iterable of batches"
    )


def as_pair(arrays: Arrays, value: Any, name: str) -> Batch:
    """Return `x`, `(x,)` or `(x, context)` as events and contexts, None where there are none."""
    if isinstance(value, tuple | list):
        if len(value) not in (1, 2) or isinstance(value[0], Number):
            _check_not_numbers(arrays, value, name)
            raise TypeError(
                f"{name} is a {type(value).__name__} of {len(value)} items, expected x, (x,) or "
                "(x, context)"
            )
        x, context = (*value, None)[:2]
        context = None if context is None else _as_array(arrays, context, "`context`")
        return _as_array(arrays, x, name), context
    return _as_array(arrays, value, name), None


def rows_at_once(shape: Any) -> int:
    """Return how many rows of this shape to look at in one go."""
    return max(1, CHUNK // max(1, math.prod(shape)))


def _as_array(arrays: Arrays, value: Any, name: str) -> Any:
    if not arrays.is_array(value):
        _check_not_numbers(arrays, value, name)
        raise TypeError(f"{name} is a {type(value).__name__}, expected an array")
    return arrays.as_array(value)


def _check_not_numbers(arrays: Arrays, value: Any, name: str) -> None:
    """Check that rows are not lists of numbers, however deep the lists."""
    inner = value
    while isinstance(inner, tuple | list) and inner:
        inner = inner[0]
    if isinstance(inner, Number) and inner is not value:
        raise TypeError(
            f"{name} is a {type(value).__name__} of numbers, expected an array or tensor of rows: "
            f"{arrays.array_maker} makes one of them"
        )
