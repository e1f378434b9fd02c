"""Sources of training data: arrays, datasets of rows and iterables of batches."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

import numpy as np

from pyroflows_common.checks import check_rows
from pyroflows_common.support import outside

# Size of the parts in which numbers are read: data mapped from a file never fills the memory.
CHUNK = 2**20


class SupportsArray(Protocol):
    """An array of a host or of NumPy, or an object that NumPy converts to one."""

    def __array__(self) -> np.ndarray:
        """Return the object as a NumPy array."""


@runtime_checkable
class Dataset(Protocol):
    """A dataset with a length, which returns a row for an index, as PyTorch's do."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, index: int, /) -> Any:
        """Return a row as x, (x,) or (x, context)."""


class HostArray(SupportsArray, Protocol):
    """What sources of data use of an array, of a host or of NumPy."""

    @property
    def dtype(self) -> Any:
        """Type of its numbers."""

    @property
    def ndim(self) -> int:
        """Number of its dimensions."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return some rows."""


# The data of `fit`: an array, arrays (x, context) or (x, context, weights), a dataset, or an
# iterable of batches, each of them x, (x,) or (x, context).
Pair = tuple[SupportsArray, SupportsArray]
Triple = tuple[SupportsArray, SupportsArray | None, SupportsArray]
Data = SupportsArray | Pair | Triple | Dataset | Iterable[SupportsArray | Sequence[SupportsArray]]

# Events, and their contexts and weights if any.
Batch = tuple[HostArray, HostArray | None, np.ndarray | None]


@dataclass(frozen=True)
class Arrays(ABC):
    """The input that a flow takes, and functions of arrays, which each wing implements.

    Args:
        event_shape: shape of the flow's events.
        context_dim: size of its context.
        augmented: whether batches are augmented before they reach the flow.
        dtype: name of the flow's dtype.
        support: the host's constraint on the flow's events; None if all real events are allowed.
    """

    event_shape: tuple[int, ...]
    context_dim: int
    augmented: bool
    dtype: str
    support: Any = None

    array_maker: ClassVar[str]  # function that messages suggest to users who pass lists

    @abstractmethod
    def is_array(self, value: object) -> TypeGuard[SupportsArray]:
        """Return whether a value is an array of the host or of NumPy."""

    @abstractmethod
    def as_array(self, value: SupportsArray) -> HostArray:
        """Return an array of the host or of NumPy, without a copy."""

    @abstractmethod
    def kind(self, x: HostArray) -> str:
        """Return NumPy's letter for the kind of the array's dtype, such as f for floats."""

    @abstractmethod
    def finite(self, x: HostArray) -> np.ndarray:
        """Return for each row whether it is finite in the flow's dtype."""

    @abstractmethod
    def inside(self, x: HostArray) -> np.ndarray:
        """Return for each row whether it lies inside the support in the flow's dtype."""

    @abstractmethod
    def numbers(self, x: HostArray) -> np.ndarray:
        """Return an array as NumPy's, in double precision."""

    @abstractmethod
    def take(self, x: HostArray, index: np.ndarray) -> HostArray:
        """Return the rows of an array with these indices."""

    @abstractmethod
    def stack(self, rows: Sequence[HostArray]) -> HostArray:
        """Return rows as one array."""

    @abstractmethod
    def as_bytes(self, x: HostArray) -> bytes:
        """Return the numbers of an array as bytes."""

    def check(self, x: HostArray, context: HostArray | None, name: str) -> None:
        """Check that rows suit the flow; the message calls them by `name`."""
        if x.ndim == 0 or not len(x):
            raise ValueError(f"{name} of shape {tuple(x.shape)} has no rows")
        kind = self.kind(x)
        if kind not in "fiub":
            raise TypeError(f"{name} has dtype {x.dtype}, expected floating-point numbers")
        if not self.augmented:
            if kind != "f":
                raise TypeError(
                    f"{name} has dtype {x.dtype}, expected floating-point numbers; convert whole "
                    "numbers by `augment`, for instance by adding uniform noise"
                )
            self.check_shape(x, name)
        self.check_finite(x, name)
        if not self.augmented:
            self.check_support(x, name)
        if context is None:
            if self.context_dim:
                raise ValueError(
                    f"{name} has no context, but the flow was built with "
                    f"context_dim={self.context_dim}"
                )
            return
        if not self.context_dim:
            raise ValueError(
                f"{name} has a context, but the flow was built without (context_dim=0)"
            )
        if tuple(context.shape) != (len(x), self.context_dim):
            raise ValueError(
                f"`context` of {name} has shape {tuple(context.shape)}, expected "
                f"{(len(x), self.context_dim)}: a row for each row of x"
            )
        if self.kind(context) not in "fiub":
            raise TypeError(f"`context` of {name} has dtype {context.dtype}, expected numbers")
        self.check_finite(context, f"`context` of {name}")

    def check_shape(self, x: HostArray, name: str) -> None:
        """Check that `x` is a batch of events with one batch dimension."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but this flow transforms events of shape "
                f"{self.event_shape}: expected (n, {', '.join(map(str, self.event_shape))})"
            )

    def check_finite(self, x: HostArray, name: str) -> None:
        """Check that all rows are finite in the flow's dtype."""
        if self.kind(x) != "f":
            return
        cast = "" if str(x.dtype).removeprefix("torch.") == self.dtype else f" as {self.dtype}"
        check_rows(np.concatenate(list(map(self.finite, parts(x)))), name, f"with NaN or inf{cast}")

    def check_support(self, x: HostArray, name: str) -> None:
        """Check that all rows lie inside the support."""
        if self.support is not None:
            within = np.concatenate(list(map(self.inside, parts(x))))
            check_rows(within, name, outside(self.support))


class Rows:
    """The rows of an array, which may be mapped from a file."""

    def __init__(
        self,
        arrays: Arrays,
        x: HostArray,
        context: HostArray | None,
        weights: HostArray | None,
        name: str,
    ) -> None:
        arrays.check(x, context, name)
        self.arrays, self.x, self.context = arrays, x, context
        self.weights = None if weights is None else as_weights(arrays, weights, len(x), name)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: np.ndarray) -> Batch:
        """Return the rows with these indices."""
        context = None if self.context is None else self.arrays.take(self.context, index)
        weights = None if self.weights is None else self.weights[index]
        return self.arrays.take(self.x, index), context, weights

    def describe(self) -> list[Any]:
        """Return a description that identifies the data: shapes, and a digest of some rows."""
        digest = hashlib.sha256()
        some = np.unique(np.linspace(0, len(self) - 1, 1000).astype(int))
        for part in self.take(some):
            if part is not None:
                digest.update(self.arrays.as_bytes(part))
        return ["rows", list(self.x.shape), str(self.x.dtype), digest.hexdigest()]


class Items:
    """The rows of a dataset."""

    def __init__(self, arrays: Arrays, data: Dataset, name: str) -> None:
        if not len(data):
            raise ValueError(f"{name} has no rows")
        self.arrays, self.data, self.name = arrays, data, name
        if arrays.support is not None and not arrays.augmented:
            self._check_support()

    def __len__(self) -> int:
        return len(self.data)

    def take(self, index: np.ndarray) -> Batch:
        """Return the rows with these indices."""
        rows = [as_pair(self.arrays, self.data[int(i)], f"a row of {self.name}") for i in index]
        events, contexts = zip(*rows, strict=True)
        x = self.arrays.stack(events)
        context = None if contexts[0] is None else self.arrays.stack(contexts)
        self.arrays.check(x, context, f"a batch of {self.name}")
        return x, context, None

    def _check_support(self) -> None:
        """Check that all rows lie inside the support, before any training."""
        size = rows_at_once(self.arrays.event_shape)
        for start in range(0, len(self), size):
            self.take(np.arange(start, min(start + size, len(self))))

    def describe(self) -> list[Any]:
        """Return a description that identifies the data as far as possible."""
        return ["items", len(self)]


class Batches:
    """The batches of an iterable."""

    def __init__(self, arrays: Arrays, data: Iterable[Any], name: str) -> None:
        self.arrays, self.data, self.name = arrays, data, name

    def checked(self, batch: object, number: int) -> Batch:
        """Check that a batch suits the flow, and return it as a pair."""
        name = f"batch {number} of {self.name}"
        x, context = as_pair(self.arrays, batch, name)
        if tuple(x.shape) == self.arrays.event_shape and not self.arrays.augmented:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, which is one event, expected a batch of "
                "events; a DataLoader makes batches of rows"
            )
        self.arrays.check(x, context, name)
        return x, context, None

    def describe(self) -> list[Any]:
        """Return a description that identifies the data as far as possible."""
        return ["batches"]


Source = Rows | Items | Batches


def as_source(
    arrays: Arrays,
    data: object,
    context: object = None,
    weights: object = None,
    name: str = "`data`",
) -> Source:
    """Check that data suits the flow, and return it as a source of batches.

    Args:
        arrays: the input that the flow takes.
        data: an array, arrays (x, context) or (x, context, weights), a dataset of rows or an
            iterable of batches.
        context: contexts of the rows of an array.
        weights: weights of the rows of an array.
        name: name of the data in messages.

    Raises:
        TypeError: if the data is none of these, or its numbers are not real.
        ValueError: if the data does not suit the flow.
    """
    if isinstance(data, tuple) and len(data) == 3 and arrays.is_array(data[0]):
        if not (context is None and weights is None):
            raise ValueError(f"{name} is (x, context, weights): pass neither of them again")
        data, context, weights = data
    if isinstance(data, tuple):
        if context is not None and len(data) == 2:
            raise ValueError(f"`context` was given, but {name} is a pair that already has one")
        data, paired = as_pair(arrays, data, name)
        context = paired if context is None else context
    if arrays.is_array(data):
        context = None if context is None else _as_array(arrays, context, "`context`")
        weights = None if weights is None else _as_array(arrays, weights, "`weights`")
        return Rows(arrays, _as_array(arrays, data, name), context, weights, name)
    if context is not None:
        raise ValueError(
            f"`context` goes with an array, but {name} is a {type(data).__name__}: it "
            "must yield pairs (x, context)"
        )
    if weights is not None:
        raise ValueError(f"`weights` go with an array, but {name} is a {type(data).__name__}")
    _check_not_numbers(arrays, data, name)
    if not isinstance(data, str | bytes | Mapping):
        if isinstance(data, Iterable):
            return Batches(arrays, data, name)
        if isinstance(data, Dataset):
            return Items(arrays, data, name)
    raise TypeError(
        f"{name} is a {type(data).__name__}, expected an array, a dataset or an iterable of batches"
    )


def as_weights(arrays: Arrays, weights: HostArray, rows: int, name: str) -> np.ndarray:
    """Check the weights of rows, and return them."""
    if tuple(weights.shape) != (rows,):
        raise ValueError(
            f"`weights` of {name} have shape {tuple(weights.shape)}, expected {(rows,)}: a weight "
            "for each row"
        )
    if arrays.kind(weights) not in "fiub":
        raise TypeError(f"`weights` of {name} have dtype {weights.dtype}, expected numbers")
    numbers = arrays.numbers(weights)
    good = np.isfinite(numbers) & (numbers >= 0)
    check_rows(good, f"`weights` of {name}", "that are negative, NaN or inf")
    return numbers


def as_pair(arrays: Arrays, value: object, name: str) -> tuple[HostArray, HostArray | None]:
    """Return `x`, `(x,)` or `(x, context)` as a pair of events and contexts, if any."""
    if isinstance(value, tuple | list):
        if len(value) not in (1, 2) or isinstance(value[0], Number):
            _check_not_numbers(arrays, value, name)
            raise TypeError(
                f"{name} is a {type(value).__name__} of {len(value)} items, expected x, (x,) or "
                "(x, context)"
            )
        x, context = (*value, None)[:2]
        events = _as_array(arrays, x, name)
        return events, None if context is None else _as_array(arrays, context, "`context`")
    return _as_array(arrays, value, name), None


def parts(x: HostArray, numbers: int | None = None) -> Iterator[HostArray]:
    """Yield all rows in parts of about so many numbers; of CHUNK by default."""
    size = max(1, (numbers or CHUNK) // max(1, math.prod(x.shape[1:])))
    for start in range(0, len(x), size):
        yield x[start : start + size]


def rows_at_once(shape: Sequence[int]) -> int:
    """Return the number of rows of this shape to read at once."""
    return max(1, CHUNK // max(1, math.prod(shape)))


def _as_array(arrays: Arrays, value: object, name: str) -> HostArray:
    if not arrays.is_array(value):
        _check_not_numbers(arrays, value, name)
        raise TypeError(f"{name} is a {type(value).__name__}, expected an array")
    return arrays.as_array(value)


def _check_not_numbers(arrays: Arrays, value: object, name: str) -> None:
    """Check that a value is not a list of numbers, nested or not."""
    inner = value
    while isinstance(inner, tuple | list) and inner:
        inner = inner[0]
    if isinstance(inner, Number) and inner is not value:
        raise TypeError(
            f"{name} is a {type(value).__name__} of numbers, expected an array or tensor of rows: "
            f"{arrays.array_maker} makes one"
        )
