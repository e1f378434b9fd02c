"""Partitions: which coordinates of an event a coupling looks at, and which it transforms."""

import operator
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


class Partition:
    """A split of a vector's coordinates into part `a`, which conditions, and part `b`.

    A coupling leaves `a` as it is and transforms `b` given `a`. Two partitions are equal when
    their masks are.

    Args:
        mask: one boolean per coordinate; true where the coordinate belongs to `a` (the ones of
            the binary mask b in RealNVP, section 3.4).

    Raises:
        ValueError: where the mask is not one-dimensional or leaves one of the parts empty.

    Examples:
        >>> import torch
        >>> from pyroflows import Partition
        >>> partition = Partition([True, False, True])
        >>> partition.split(torch.arange(3.0))
        (tensor([0., 2.]), tensor([1.]))
        >>> partition.swap.mask
        (False, True, False)
    """

    def __init__(self, mask: Sequence[bool]) -> None:
        mask = getattr(mask, "tolist", lambda: list(mask))()
        if any(isinstance(seen, list) for seen in mask) or not set(mask) <= {0, 1}:
            raise ValueError("`mask` must be a one-dimensional sequence of booleans")
        self.mask = tuple(bool(seen) for seen in mask)
        if len(set(self.mask)) < 2:
            raise ValueError(
                f"`mask` of length {len(self.mask)} leaves one part empty, but a coupling needs a "
                "part to look at and a part to transform"
            )
        self._slices_a, self._slices_b = _slices(self.mask, True), _slices(self.mask, False)
        self._interleaved = len(self.mask) > 2 and all(map(operator.ne, self.mask, self.mask[1:]))
        # Not a cached_property: in Python 3.11 that takes a lock, which torch.compile cannot trace.
        self._swap: Partition | None = None

    @property
    def swap(self) -> "Partition":
        """The partition with the two parts exchanged; `p.swap.swap is p`."""
        if self._swap is None:
            self._swap = Partition([not seen for seen in self.mask])
            self._swap._swap = self
        return self._swap

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of coordinates in part `a` and in part `b`."""
        return sum(self.mask), len(self.mask) - sum(self.mask)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split events `(*batch, D)` into the parts `(*batch, D_a)` and `(*batch, D_b)`."""
        return _take(x, self._slices_a), _take(x, self._slices_b)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """Put two parts together again: the inverse of `split`."""
        pieces = []
        starts = {True: 0, False: 0}
        if self._interleaved:
            first, second = (a, b) if self.mask[0] else (b, a)
            even = torch.stack([first[..., : second.shape[-1]], second], dim=-1).flatten(-2)
            return torch.cat([even, first[..., second.shape[-1] :]], dim=-1)
        for seen, run in groupby(self.mask):
            part, start, length = (a if seen else b), starts[seen], len(list(run))
            pieces.append(part[..., start : start + length])
            starts[seen] = start + length
        return torch.cat(pieces, dim=-1)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Partition) and self.mask == other.mask)

    def __hash__(self) -> int:
        return hash(self.mask)

    def __repr__(self) -> str:
        return f"Partition({''.join('ab'[not seen] for seen in self.mask)})"


def halves(event_shape: int | Sequence[int], swap: bool = False) -> Partition:
    """The first half of the coordinates conditions, the second is transformed.

    Args:
        event_shape: the size D, or `(D,)`; `a` has `D // 2` coordinates.
        swap: whether to exchange the two parts.
    """
    size = vector_size(event_shape)
    partition = Partition([i < size // 2 for i in range(size)])
    return partition.swap if swap else partition


def alternating(event_shape: int | Sequence[int], swap: bool = False) -> Partition:
    """The even coordinates condition, the odd ones are transformed (NICE, section 5.1).

    Args:
        event_shape: the size D, or `(D,)`.
        swap: whether to exchange the two parts.
    """
    partition = Partition([i % 2 == 0 for i in range(vector_size(event_shape))])
    return partition.swap if swap else partition


PARTITIONS = {"halves": halves, "alternating": alternating}


def as_partition(partition: Any, event_shape: int | Sequence[int]) -> Partition:
    """Turn a name, a mask or a `Partition` into the `Partition` of an event of this shape."""
    size = vector_size(event_shape)
    if isinstance(partition, str):
        if partition not in PARTITIONS:
            raise ValueError(
                f"`partition` is {partition!r}, expected one of {sorted(PARTITIONS)}, "
                "a Partition or a boolean mask"
            )
        return PARTITIONS[partition](size)
    if not isinstance(partition, Partition):
        partition = Partition(partition)
    if len(partition.mask) != size:
        raise ValueError(
            f"`partition` has {len(partition.mask)} coordinates, but the event has {size}"
        )
    return partition


def vector_size(event_shape: int | Sequence[int]) -> int:
    """Return the D of an event shape `D` or `(D,)` that a coupling can split."""
    shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
    if len(shape) != 1:
        raise ValueError(f"`event_shape` is {shape}, expected an int or (D,): a vector")
    if shape[0] < 2:
        raise ValueError(
            f"`event_shape` is {shape}, but a coupling needs at least two coordinates: one to look "
            "at and one to transform. For a one-dimensional event use DiagonalScaling or ActNorm, "
            "or append an independent normal coordinate to it"
        )
    return int(shape[0])


def _slices(mask: tuple[bool, ...], part: bool) -> list[slice]:
    """Write a part's coordinates as one strided slice if they are regular, else as runs."""
    index = [i for i, seen in enumerate(mask) if seen is part]
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


def _take(x: Tensor, slices: list[slice]) -> Tensor:
    pieces = [x[..., piece] for piece in slices]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
