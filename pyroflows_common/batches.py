"""The order of the data in `fit`: held-out rows, epochs, and passes over an iterable."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pyroflows_common.rows import (
    CHUNK,
    Arrays,
    Batch,
    Batches,
    Data,
    Items,
    Rows,
    Source,
    SupportsArray,
    as_source,
    parts,
)

# Fraction of the rows that is held out by default.
HELD_OUT = 0.1

# Uses of random numbers, each with its own stream.
SPLIT, SHUFFLE, AUGMENT, AUGMENT_VALIDATION, AUGMENT_ALL = range(5)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of a source, or all of it.

    Args:
        source: the source.
        index: indices of the rows; None for all.
    """

    source: Source
    index: np.ndarray | None = None

    def in_order(self, size: int) -> Iterator[Batch]:
        """Yield all batches once."""
        if isinstance(self.source, Batches):
            for number, batch in enumerate(self.source.data):
                yield self.source.checked(batch, number)
        else:
            index = self._index(self.source)
            for start in range(0, len(index), size):
                yield self.take(index[start : start + size])

    def take(self, index: np.ndarray) -> Batch:
        """Return the rows with these indices, with weights that average one over this part."""
        assert not isinstance(self.source, Batches)
        x, context, weights = self.source.take(index)
        return x, context, None if weights is None else weights / self.mean_weight

    @functools.cached_property
    def mean_weight(self) -> float:
        """Mean weight of the rows; 1 without weights."""
        if not isinstance(self.source, Rows) or self.source.weights is None:
            return 1.0
        return float(self.source.weights[self._index(self.source)].mean())

    def feed(self, size: int, seed: int) -> "Shuffled | Streamed":
        """Return the batches to train on, without end where possible."""
        if isinstance(self.source, Batches):
            return Streamed(self.source)
        return Shuffled(self.take, self._index(self.source), size, seed)

    def describe(self) -> list[Any]:
        """Return a description that identifies the data."""
        return [*self.source.describe(), None if self.index is None else len(self.index)]

    def warning(self) -> str | None:
        """Return a warning if a coordinate of an array holds whole numbers only."""
        source = self.source
        if not isinstance(source, Rows) or source.arrays.augmented:
            return None
        image = len(source.arrays.event_shape) > 1
        whole = np.ones(1 if image else source.arrays.event_shape, dtype=bool)
        for part in parts(source.x, CHUNK // 16):  # most data show it at once
            numbers = abs(source.arrays.numbers(part).reshape(-1, *whole.shape))
            # Larger numbers are whole in single precision.
            whole &= (numbers % 1 == 0).all(0) & (numbers.max(0) < 2**23)
            if not whole.any():
                return None
        where = "" if image else f" in columns {np.flatnonzero(whole).tolist()}"
        return (
            f"`data` holds whole numbers only{where}: a density can grow there without bound. Pass "
            "an `augment` that adds uniform noise to them, or pass categories as a context."
        )

    def _index(self, source: Rows | Items) -> np.ndarray:
        return np.arange(len(source)) if self.index is None else self.index


def divide(
    arrays: Arrays,
    data: Data,
    context: SupportsArray | None,
    weights: SupportsArray | None,
    validation: Data | float | None,
    seed: int,
) -> tuple[Part, Part | None]:
    """Return the data to train on and the data to validate on, if any.

    Args:
        arrays: the input that the flow takes.
        data: data, as `fit` takes it.
        context: contexts of the rows of an array.
        weights: weights of the rows of an array.
        validation: fraction of the rows to hold out, or data to validate on, or None.
        seed: seed of the choice of held-out rows.
    """
    source = as_source(arrays, data, context, weights)
    if getattr(validation, "shape", None) == ():  # a scalar of NumPy, or an array of one number
        validation = validation.item()  # type: ignore[union-attr]
    if not (validation is None or isinstance(validation, int | float)):
        held_out = as_source(arrays, validation, name="`validation`")
        if isinstance(validation, Iterator):
            raise ValueError(
                "`validation` is an iterator, which can be read only once: pass an array or a list"
            )
        return _weighty(Part(source)), _weighty(Part(held_out))
    fraction = float(validation or 0.0)
    if not 0 <= fraction < 1:
        raise ValueError(
            f"`validation` is {validation}, expected a fraction from 0 to below 1, data or None"
        )
    if isinstance(source, Batches):
        if fraction not in (0.0, HELD_OUT):
            raise ValueError(
                f"`validation` is {validation}, but no fraction of an iterable of batches can be "
                "held out: pass data to validate on"
            )
        return Part(source), None
    kept, held = split(len(source), fraction, seed)
    train = _weighty(Part(source, kept))
    return train, _weighty(Part(source, held)) if len(held) else None


def _weighty(part: Part) -> Part:
    """Check that some row of a part has a weight."""
    if not part.mean_weight > 0:
        raise ValueError(
            "`weights` are 0 for all rows to train on, or for all held-out ones: pass rows that "
            "weigh something, and `validation`"
        )
    return part


def split(size: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the rows to train on and of held-out rows, chosen at random."""
    held = max(1, round(fraction * size)) if fraction else 0
    if held >= size:
        raise ValueError(
            f"`validation` is {fraction}, which leaves none of {size} rows in `data` to train on; "
            "pass validation=None"
        )
    order = np.random.default_rng((seed, SPLIT)).permutation(size) if held else np.arange(size)
    return np.sort(order[held:]), np.sort(order[:held])


class Shuffled:
    """Endless batches of rows, in a new order in each epoch, which can start at any position.

    The last rows of an epoch that do not fill a batch are left out.

    Attributes:
        resumes: whether a run can resume at any position, or only at the end of a pass.
        epoch: number of the epoch.
        position: number of batches taken from this epoch.
    """

    resumes = True

    def __init__(
        self, take: Callable[[np.ndarray], Batch], index: np.ndarray, size: int, seed: int
    ) -> None:
        self.take, self.index, self.size, self.seed = take, index, size, seed
        self.length = max(1, len(index) // size)
        self.epoch, self.position = 0, 0
        self._order: tuple[int, np.ndarray] = (-1, index)

    @property
    def at_end(self) -> bool:
        """Whether the epoch is over."""
        return self.position == self.length

    def first(self) -> Batch:
        """Return the next batch without moving on."""
        return self._take(self.epoch, self.position)

    def next(self) -> Batch | None:
        """Return the next batch; None after the last."""
        if self.at_end:
            self.epoch, self.position = self.epoch + 1, 0
        batch = self._take(self.epoch, self.position)
        self.position += 1
        return batch

    def seek(self, epoch: int, position: int) -> None:
        """Move to the position of another run."""
        self.epoch, self.position = epoch, position

    def _take(self, epoch: int, position: int) -> Batch:
        if self._order[0] != epoch:
            generator = np.random.default_rng((self.seed, SHUFFLE, epoch))
            self._order = (epoch, generator.permutation(self.index))
        return self.take(self._order[1][position * self.size : (position + 1) * self.size])


class Streamed:
    """The batches of an iterable, in one pass after another for as long as it can be iterated.

    A run resumes at the end of a pass. Its numbers are those of an uninterrupted run only if the
    iterable repeats its batches: a random iterable must draw from a generator that it seeds, or
    that `fit` restores.

    Attributes:
        resumes: whether a run can resume at any position, or only at the end of a pass.
        epoch: number of the pass.
        position: number of batches taken from this pass.
    """

    resumes = False

    def __init__(self, source: Batches) -> None:
        self.source = source
        self.epoch, self.position = 0, 0
        self._iterator = iter(source.data)
        self._ahead: object = None

    @property
    def at_end(self) -> bool:
        """Whether the pass is over."""
        return self._peek() is None

    def first(self) -> Batch:
        """Return the next batch without moving on."""
        if self._peek() is None:
            raise ValueError(f"{self.source.name} has no batches")
        return self.source.checked(self._ahead, self.position)

    def next(self) -> Batch | None:
        """Return the next batch; None after the last."""
        if self._peek() is None:
            if not self._reopen() or self._peek() is None:
                return None
            self.epoch, self.position = self.epoch + 1, 0
        batch = self.source.checked(self._ahead, self.position)
        self._ahead = None
        self.position += 1
        return batch

    def seek(self, epoch: int, position: int) -> None:
        """Move to the position of another run, at the end of a pass."""
        self.epoch, self.position = epoch, position
        self._iterator, self._ahead = iter(()), None

    def _reopen(self) -> bool:
        """Begin another pass; return False for an iterator, which has only one."""
        iterator = iter(self.source.data)
        if iterator is self.source.data:
            return False
        self._iterator, self._ahead = iterator, None
        return True

    def _peek(self) -> object:
        if self._ahead is None:
            self._ahead = next(self._iterator, None)
        return self._ahead
