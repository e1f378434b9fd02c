"""The order in which `fit` sees its data, and what it makes of a batch."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

from numpyro_flows.data import Batch, Batches, Items, Rows, Rules, Source, check_rows, kind_of

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
        epoch: number of the epoch.
        position: batches that it has given so far.
    """

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
        """Return the next batch, and stay where we are."""
        return self._take(self.epoch, self.position)

    def next(self) -> Batch | None:
        """Return the next batch; None where there are no more."""
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

    A resumed run repeats what the iterable gave only if the iterable can: what it draws at random
    must come from a generator that it seeds itself.

    Attributes:
        epoch: number of the pass.
        position: batches that it has given so far.
    """

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
        """Return the next batch, and stay where we are."""
        if self._peek() is None:
            raise ValueError(f"{self.source.name} has no batches")
        return self.source.checked(self._ahead, self.position)

    def next(self) -> Batch | None:
        """Return the next batch; None where there are no more."""
        if self._peek() is None:
            if not self._open() or self._peek() is None:
                return None
            self.epoch, self.position = self.epoch + 1, 0
        batch = self.source.checked(self._ahead, self.position)
        self._ahead = None
        self.position += 1
        return batch

    def seek(self, epoch: int, position: int) -> None:
        """Go on from where another run was: what it has used up is read and dropped."""
        if epoch and not self._open():
            raise ValueError(f"{self.source.name} is an iterator, which cannot resume pass {epoch}")
        for passed in range(position):
            if self._peek() is None:
                raise ValueError(
                    f"{self.source.name} has {passed} batches, but the checkpoint was written "
                    f"after batch {position}"
                )
            self._ahead = None
        self.epoch, self.position = epoch, position

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


class Preparation:
    """How a batch becomes what the flow takes: its dtype, augmented, checked.

    Args:
        rules: what the flow takes.
        augment: function of a batch and a key; None for none.
        like: an array of the flow's dtype.
        key: the run's key.
    """

    def __init__(
        self, rules: Rules, augment: Callable[..., Any] | None, like: Array, key: Array
    ) -> None:
        self.rules, self.dtype = rules, like.dtype
        self.augment = augment and jax.jit(
            lambda x, *stream: augment(x, functools.reduce(jax.random.fold_in, stream, key))
        )

    def __call__(self, batch: Batch, *stream: int) -> tuple[Any, Any]:
        """Return events and contexts; equal streams get equal random numbers."""
        x, context = batch
        if kind_of(x) == "f":
            x = self._cast(x)
        elif isinstance(x, np.ndarray):  # JAX has the machine's byte order only
            x = x.astype(x.dtype.newbyteorder("="), copy=False)
        if self.augment is not None:
            x = self.augment(x, *stream)
            if not hasattr(x, "dtype") or kind_of(x) != "f":
                kind = x.dtype if hasattr(x, "dtype") else type(x).__name__
                raise TypeError(f"`augment` gave {kind}, expected a floating-point jax.Array")
            check_rows(x, self.rules.event_shape, "what `augment` gave")
        return self._cast(x), None if context is None else self._cast(context)

    def _cast(self, x: Any) -> Any:
        return x if x.dtype == self.dtype else x.astype(self.dtype)


def filled(x: Any, size: int) -> Any:
    """Return a batch with its last row repeated up to a size."""
    if x is None or len(x) == size:
        return x
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])


def seed_of(key: Array) -> int:
    """Return a key as a whole number, for NumPy's generators."""
    return int.from_bytes(np.asarray(jax.random.key_data(key)).tobytes(), "big")
