"""Partitions: the coordinates that a coupling conditions on, and those that it transforms.

One class serves both hosts: the functions come from the module of the array.
"""

import math
import operator
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

from pyroflows_common.checks import as_event_shape, check_vector

A = TypeVar("A")  # array of a host or of NumPy


class Partition:
    """A split of a vector's coordinates into part `a`, which conditions, and part `b`.

    A coupling leaves `a` unchanged and transforms `b` given `a`. Part `a` may be empty: a coupling
    with a context then transforms all coordinates given the context alone. Two partitions are equal
    if their masks and axes are equal.

    Args:
        mask: one boolean per coordinate, true for the coordinates in `a` (the ones of the binary
            mask b in RealNVP, section 3.4).
        axis: the axis to split, counted from the end: −1 for the coordinates of a vector, −3 for
            the channels of an image.

    Raises:
        ValueError: if the mask is not one-dimensional or leaves part `b` empty.

    Examples:
        >>> import numpy as np
        >>> from pyroflows_common.partition import Partition
        >>> partition = Partition([True, False, True])
        >>> a, b = partition.split(np.arange(3.0))
        >>> a.tolist(), b.tolist()
        ([0.0, 2.0], [1.0])
        >>> partition.swap.mask
        (False, True, False)
    """

    def __init__(self, mask: Sequence[bool], axis: int = -1) -> None:
        mask = getattr(mask, "tolist", lambda: list(mask))()
        if any(isinstance(seen, list) for seen in mask) or not set(mask) <= {0, 1}:
            raise ValueError("`mask` must be a one-dimensional sequence of booleans")
        self.mask = tuple(bool(seen) for seen in mask)
        self.axis = axis
        if all(self.mask):
            raise ValueError(
                f"`mask` of length {len(self.mask)} leaves part b empty, but a coupling needs a "
                "part to transform"
            )
        self._slices_a, self._slices_b = _slices(self.mask, True), _slices(self.mask, False)
        self._pieces = _pieces(self.mask)
        self._interleaved = len(self.mask) > 2 and all(map(operator.ne, self.mask, self.mask[1:]))
        # Not a cached_property: its lock in Python 3.11 cannot be traced by torch.compile.
        self._swap: Partition | None = None

    @property
    def swap(self) -> "Partition":
        """The partition with the two parts exchanged; `p.swap.swap is p`.

        A partition with an empty part `a` is its own swap.
        """
        if not any(self.mask):
            return self
        if self._swap is None:
            self._swap = Partition([not seen for seen in self.mask], self.axis)
            self._swap._swap = self
        return self._swap

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of coordinates in part `a` and in part `b`."""
        return sum(self.mask), len(self.mask) - sum(self.mask)

    def split(self, x: A) -> tuple[A, A]:
        """Split events `(*batch, D)` into the parts `(*batch, D_a)` and `(*batch, D_b)`."""
        return self._take(x, self._slices_a), self._take(x, self._slices_b)

    def join(self, a: A, b: A) -> A:
        """Join two parts into events: the inverse of `split`."""
        functions = functions_of(a)
        parts: dict[bool, Any] = {True: a, False: b}
        if self._interleaved:
            first, second = parts[self.mask[0]], parts[not self.mask[0]]
            shape = [*second.shape]
            length = shape[self.axis]
            shape[self.axis] *= 2
            pairs = functions.stack([first[self._at(slice(0, length))], second], axis=self.axis)
            rest = first[self._at(slice(length, None))]
            return functions.concatenate([pairs.reshape(shape), rest], axis=self.axis)
        pieces = [
            parts[seen] if piece is None else parts[seen][self._at(piece)]
            for seen, piece in self._pieces
        ]
        return functions.concatenate(pieces, axis=self.axis)

    def only_b(self, values: A) -> A:
        """Return values for part `b`, with zeros for coordinates outside it."""
        return values

    def _take(self, x: Any, slices: list[slice]) -> Any:
        pieces = [x[self._at(piece)] for piece in slices]
        return (
            pieces[0] if len(pieces) == 1 else functions_of(x).concatenate(pieces, axis=self.axis)
        )

    def _at(self, piece: slice) -> tuple[Any, ...]:
        return (..., piece, *[slice(None)] * (-self.axis - 1))

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Partition) and (self.mask, self.axis) == (other.mask, other.axis)
        )

    def __hash__(self) -> int:
        return hash((self.mask, self.axis))

    def __repr__(self) -> str:
        return f"Partition({''.join('ab'[not seen] for seen in self.mask)}, axis={self.axis})"


class Checkerboard(Partition):
    """A split of an image's pixels by the colours of a checkerboard (RealNVP, section 3.4).

    Both parts are images of full size, with zeros at the pixels of the other part.

    Args:
        event_shape: `(C, H, W)`.
        even: whether part `a` holds the pixels whose row and column have an even sum.

    Examples:
        >>> import numpy as np
        >>> from pyroflows_common.partition import checkerboard
        >>> a, b = checkerboard((1, 2, 2)).split(np.array([[[1.0, 2.0], [3.0, 4.0]]]))
        >>> a.tolist(), b.tolist()
        ([[[1.0, 0.0], [0.0, 4.0]]], [[[0.0, 2.0], [3.0, 0.0]]])
    """

    def __init__(self, event_shape: Sequence[int], even: bool = True) -> None:
        self.event_shape = image_shape(event_shape)
        if self.event_shape[1:] == (1, 1):
            raise ValueError(
                f"`event_shape` is {self.event_shape}, but a checkerboard needs two pixels: for "
                f"one pixel, use vectors of its channels, event_shape={self.event_shape[0]}"
            )
        self.even = even
        self.axis = -3

    @property
    def swap(self) -> "Checkerboard":
        """The partition with the two parts exchanged."""
        return Checkerboard(self.event_shape, not self.even)

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of channels of part `a` and of part `b`."""
        return self.event_shape[0], self.event_shape[0]

    def split(self, x: A) -> tuple[A, A]:
        """Split images `(*batch, C, H, W)` into two images of the same shape."""
        in_a, where = self._in_a(x), functions_of(x).where
        return where(in_a, x, 0.0), where(in_a, 0.0, x)

    def join(self, a: A, b: A) -> A:
        """Join two parts into events: the inverse of `split`."""
        return functions_of(a).where(self._in_a(a), a, b)

    def only_b(self, values: A) -> A:
        """Return values `(*batch, n, H, W)` for part `b`, with zeros at the pixels of part `a`."""
        return functions_of(values).where(self._in_a(values), 0.0, values)

    def _in_a(self, like: Any) -> Any:
        # PyTorch creates an array on the default device, not on that of `like`.
        place = {} if hasattr(like, "__array_namespace__") else {"device": like.device}
        rows, columns = (functions_of(like).arange(n, **place) for n in self.event_shape[1:])
        return (rows[:, None] + columns) % 2 == (0 if self.even else 1)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Checkerboard)
            and (self.event_shape, self.even) == (other.event_shape, other.even)
        )

    def __hash__(self) -> int:
        return hash((self.event_shape, self.even))

    def __repr__(self) -> str:
        return f"Checkerboard({self.event_shape}, even={self.even})"


def halves(event_shape: int | Sequence[int], swap: bool = False) -> Partition:
    """Return the partition in which the first half of a vector conditions the second.

    Args:
        event_shape: the size D, or `(D,)`; `a` has `D // 2` coordinates, none if D is 1.
        swap: whether to exchange the two parts.
    """
    size = check_vector(as_event_shape(event_shape))
    partition = Partition([i < size // 2 for i in range(size)])
    return partition.swap if swap else partition


def alternating(event_shape: int | Sequence[int], swap: bool = False) -> Partition:
    """Return the partition in which even coordinates condition odd ones (NICE, section 5.1).

    Args:
        event_shape: the size D, or `(D,)`; if D is 1, `a` is empty.
        swap: whether to exchange the two parts.
    """
    size = check_vector(as_event_shape(event_shape))
    partition = Partition([i % 2 == 0 and size > 1 for i in range(size)])
    return partition.swap if swap else partition


def checkerboard(event_shape: Sequence[int], swap: bool = False) -> Checkerboard:
    """Return the partition in which even pixels condition odd ones (RealNVP, figure 3).

    Args:
        event_shape: `(C, H, W)`.
        swap: whether to exchange the two parts.
    """
    return Checkerboard(event_shape, not swap)


def channels(event_shape: Sequence[int], swap: bool = False) -> Partition:
    """Return the partition in which the first half of the channels conditions the second.

    Args:
        event_shape: `(C, H, W)`, with at least two channels; `a` has `C // 2` of them.
        swap: whether to exchange the two parts.
    """
    size = image_shape(event_shape)[0]
    if size < 2:
        raise ValueError(
            f"`event_shape` is {tuple(event_shape)}, but an image needs two channels to split: "
            "use checkerboard, or a Squeeze, which turns one channel into four"
        )
    partition = Partition([i < size // 2 for i in range(size)], axis=-3)
    return partition.swap if swap else partition


PARTITIONS = {"halves": halves, "alternating": alternating}
IMAGE_PARTITIONS = {"channels": channels, "checkerboard": checkerboard, "halves": channels}


def as_partition(
    partition: str | Sequence[bool] | Partition,
    event_shape: int | Sequence[int],
    context_dim: int = 0,
) -> Partition:
    """Return the partition of an event that a name, a mask or a partition stands for.

    Without a context, part `a` must not be empty.
    """
    shape = as_event_shape(event_shape)
    image = len(shape) == 3
    named: dict[str, Callable[..., Partition]] = IMAGE_PARTITIONS if image else PARTITIONS
    if not image:
        check_vector(shape)
    check_conditioned(shape, context_dim)
    if isinstance(partition, str):
        if partition not in named:
            raise ValueError(
                f"`partition` is {partition!r}, expected one of {sorted(named)}, "
                "a Partition or a boolean mask"
            )
        return named[partition](shape)
    if isinstance(partition, Checkerboard):
        if partition.event_shape != shape:
            raise ValueError(
                f"`partition` is of images {partition.event_shape}, but the event has shape {shape}"
            )
        return partition
    if not isinstance(partition, Partition):
        partition = Partition(partition, axis=-len(shape))
    if partition.axis != -len(shape) or len(partition.mask) != shape[0]:
        raise ValueError(
            f"`partition` has {len(partition.mask)} {_axis(partition.axis)}, but the event has "
            f"{shape[0]} {_axis(-len(shape))}"
        )
    if not (any(partition.mask) or context_dim):
        raise ValueError(
            "`partition` leaves part a empty, but a coupling without a context needs a part to "
            "condition on"
        )
    return partition


def check_conditioned(event_shape: tuple[int, ...], context_dim: int) -> None:
    """Check that a coupling of one number has a context: it has nothing else to condition on."""
    if math.prod(event_shape) == 1 and not context_dim:
        raise ValueError(
            f"`event_shape` is {event_shape}, but a coupling without a context needs two "
            "coordinates: one to condition on and one to transform. For one number, use a Chain of "
            "SinhArcsinh and LowerTriangular layers, or for its scale alone DiagonalScaling; for "
            "its density given others, use `context_dim`"
        )


def image_shape(event_shape: int | Sequence[int]) -> tuple[int, int, int]:
    """Return the event shape of an image, checked to be `(C, H, W)`."""
    shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
    if len(shape) != 3:
        raise ValueError(f"`event_shape` is {shape}, expected (C, H, W): an image")
    return shape


def functions_of(x: object) -> Any:
    """Return the module whose functions take the array: `torch`, `jax.numpy` or `numpy`."""
    # The way of the array API, which PyTorch's tensors do not support yet.
    return x.__array_namespace__() if hasattr(x, "__array_namespace__") else sys.modules["torch"]


def _axis(axis: int) -> str:
    return {-1: "coordinates", -3: "channels"}[axis]


def _pieces(mask: tuple[bool, ...]) -> list[tuple[bool, slice | None]]:
    """Return the parts whose pieces make up an event, in order, and the pieces; None for all."""
    pieces: list[tuple[bool, slice | None]] = []
    starts = {True: 0, False: 0}
    for seen, run in groupby(mask):
        start, stop = starts[seen], starts[seen] + len(list(run))
        whole = stop - start == mask.count(seen)
        pieces.append((seen, None if whole else slice(start, stop)))
        starts[seen] = stop
    return pieces


def _slices(mask: tuple[bool, ...], part: bool) -> list[slice]:
    """Return a part's coordinates as one strided slice if evenly spaced, else one for each run."""
    index = [i for i, seen in enumerate(mask) if seen is part]
    if not index:
        return [slice(0, 0)]
    steps = set(map(operator.sub, index[1:], index[:-1])) or {1}
    if len(steps) == 1:
        return [slice(index[0], index[-1] + 1, steps.pop())]
    runs, start = [], 0
    for seen, run in groupby(mask):
        stop = start + len(list(run))
        if seen is part:
            runs.append(slice(start, stop))
        start = stop
    return runs
