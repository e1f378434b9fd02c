"""The order in which `fit` sees its data: held-out rows, epochs, and passes over an iterable."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from pyroflows_common.rows import Arrays, Batch, Batches, Items, Rows, Source, as_source

# The fraction that is held out by default, where the data can be divided.
HELD_OUT = 0.1

# What random numbers are drawn for: each use has a stream of its own.
SPLIT, SHUFFLE, AUGMENT, AUGMENT_VALIDATION, AUGMENT_ALL = range(5)


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of a source at some places, or all of it.

    Args:
        source: where the rows are.
        places: which they are; None for all.
    """

    source: Source
    places: np.ndarray | None = None

    def in_order(self, size: int) -> Iterator[Batch]:
        """Yield all batches once."""
        if isinstance(self.source, Batches):
            for number, batch in enumerate(self.source.data):
                yield self.source.checked(batch, number)
        else:
            places = self._places(self.source)
            for start in range(0, len(places), size):
                yield self.source.take(places[start : start + size])

    def feed(self, size: int, seed: int) -> "Shuffled | Streamed":
        """Return endless batches to train on."""
        if isinstance(self.source, Batches):
            return Streamed(self.source)
        return Shuffled(self.source, self._places(self.source), size, seed)

    def describe(self) -> list[Any]:
        """Return what tells this data from other data."""
        return [*self.source.describe(), None if self.places is None else len(self.places)]

    def _places(self, source: Rows | Items) -> np.ndarray:
        return np.arange(len(source)) if self.places is None else self.places


def divide(
    arrays: Arrays, data: Any, context: Any, validation: Any, seed: int
) -> tuple[Part, Part | None]:
    """Return what to train on and what is held out.

    Args:
        arrays: what the flow takes.
        data: as `fit`'s, as is `context`.
        context: contexts that go with an array.
        validation: fraction of the rows to hold out, or data to validate on, or None.
        seed: of the rows that are held out.
    """
    source = as_source(arrays, data, context)
    if getattr(validation, "shape", None) == ():  # a number of NumPy's, or an array of one
        validation = validation.item()
    if not (validation is None or isinstance(validation, int | float)):
        held_out = as_source(arrays, validation, name="`validation`")
        if isinstance(validation, Iterator):
            raise ValueError(
                "`validation` is an iterator, which can be read only once: pass an array or a list"
            )
        return Part(source), Part(held_out)
    fraction = float(validation or 0.0)
    if not 0 <= fraction < 1:
        raise ValueError(
            f"`validation` is {validation}, expected a fraction from 0 to below 1, data or None"
        )
    if isinstance(source, Batches):
        if fraction not in (0.0, HELD_OUT):
            raise ValueError(
                f"`validation` is {validation}, but no fraction of an iterable of batches can be "
                "held out: pass the data to validate on"
            )
        return Part(source), None
    kept, held = split(len(source), fraction, seed)
    return Part(source, kept), Part(source, held) if len(held) else None


def split(size: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the rows to train on and of those held out, drawn at random."""
    held = max(1, round(fraction * size)) if fraction else 0
    if held >= size:
        raise ValueError(
            f"`validation` is {fraction}, but of {size} rows in `data` none would be left to "
            "train on; pass validation=None"
        )
    order = np.random.default_rng((seed, SPLIT)).permutation(size) if held else np.arange(size)
    return np.sort(order[held:]), np.sort(order[:held])


class Shuffled:
    """Endless batches of rows, in a fresh order each epoch, that can start from any place.

    The last rows of an order that do not fill a batch wait for another epoch.

    Attributes:
        resumes: whether a run can be resumed from any place, or from the end of a pass alone.
        epoch: number of the epoch.
        position: number of batches given in this epoch.
    """

    resumes = True

    def __init__(self, source: Rows | Items, index: np.ndarray, size: int, seed: int) -> None:
        self.source, self.index, self.size, self.seed = source, index, size, seed
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
        """Go on from where another run was."""
        self.epoch, self.position = epoch, position

    def _take(self, epoch: int, position: int) -> Batch:
        if self._order[0] != epoch:
            generator = np.random.default_rng((self.seed, SHUFFLE, epoch))
            self._order = (epoch, generator.permutation(self.index))
        return self.source.take(self._order[1][position * self.size : (position + 1) * self.size])


class Streamed:
    """The batches of an iterable, pass after pass for as long as it can be iterated anew.

    A run resumes at the end of a pass, and repeats what the iterable gave only if the iterable
    can: what it draws at random must come from a generator that it seeds, or that `fit` restores.

    Attributes:
        resumes: whether a run can be resumed from any place, or from the end of a pass alone.
        epoch: number of the pass.
        position: number of batches given in this pass.
    """

    resumes = False

    def __init__(self, source: Batches) -> None:
        self.source = source
        self.epoch, self.position = 0, 0
        self._iterator: Iterator[Any] | None = None
        self._ahead: Any = None
        self._open()

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
            if not self._open() or self._peek() is None:
                return None
            self.epoch, self.position = self.epoch + 1, 0
        batch = self.source.checked(self._ahead, self.position)
        self._ahead = None
        self.position += 1
        return batch

    def seek(self, epoch: int, position: int) -> None:
        """Go on from where another run was, at the end of a pass."""
        self.epoch, self.position = epoch, position
        self._iterator, self._ahead = iter(()), None

    def _open(self) -> bool:
        """Begin a pass; false where the iterable is an iterator that has had its only one."""
        iterator = iter(self.source.data)
        if iterator is self.source.data and self._iterator is not None:
            return False
        self._iterator, self._ahead = iterator, None
        return True

    def _peek(self) -> Any:
        if self._ahead is None:
            self._ahead = next(self._iterator, None)  # type: ignore[arg-type]
        return self._ahead
