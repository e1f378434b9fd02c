"""The order in which `fit` sees its data, and what it makes of a batch."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.data import (
    Batch,
    Batches,
    Items,
    Rows,
    Rules,
    Source,
    as_tensor,
    check_rows,
    kind_of,
)

# What random numbers are drawn for: each use has a stream of its own.
SPLIT, SHUFFLE, AUGMENT, AUGMENT_VALIDATION, AUGMENT_ALL, PASS = range(6)


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
            return Streamed(self.source, seed)
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

    What the iterable draws from PyTorch's global generator, as a shuffling DataLoader does, it
    draws from a stream of its own, so that a pass can be repeated.

    Attributes:
        epoch: number of the pass.
        position: batches that it has given so far.
    """

    def __init__(self, source: Batches, seed: int) -> None:
        self.source, self.seed = source, seed
        self.epoch, self.position = 0, 0
        self._iterator: Iterator[Any] | None = None
        self._ahead: Any = None
        self._open(0)

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
            if not self._open(self.epoch + 1) or self._peek() is None:
                return None
            self.epoch, self.position = self.epoch + 1, 0
        batch = self.source.checked(self._ahead, self.position)
        self._ahead = None
        self.position += 1
        return batch

    def seek(self, epoch: int, position: int) -> None:
        """Go on from where another run was: what it has used up is read and dropped."""
        if epoch and not self._open(epoch):
            raise ValueError(f"{self.source.name} is an iterator, which cannot resume pass {epoch}")
        for passed in range(position):
            if self._peek() is None:
                raise ValueError(
                    f"{self.source.name} has {passed} batches, but the checkpoint was written "
                    f"after batch {position}"
                )
            self._ahead = None
        self.epoch, self.position = epoch, position

    def _open(self, epoch: int) -> bool:
        """Begin a pass; false where the iterable is an iterator that has had its only one."""
        self._state = generator_for((self.seed, PASS, epoch), "cpu").get_state()
        with self._own_numbers():
            iterator = iter(self.source.data)
        if iterator is self.source.data and self._iterator is not None:
            return False
        self._iterator, self._ahead = iterator, None
        return True

    def _peek(self) -> Any:
        if self._ahead is None:
            with self._own_numbers():
                self._ahead = next(self._iterator, None)  # type: ignore[arg-type]
        return self._ahead

    @contextlib.contextmanager
    def _own_numbers(self) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self._state)
        try:
            yield
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(outside)


class Preparation:
    """How a batch becomes what the flow takes: its device and dtype, augmented, checked.

    Args:
        rules: what the flow takes.
        augment: function of a batch and a `torch.Generator`; None for none.
        like: a tensor of the flow's device and dtype.
        seed: the run's seed.
    """

    def __init__(
        self, rules: Rules, augment: Callable[..., Any] | None, like: Tensor, seed: int
    ) -> None:
        self.rules, self.augment, self.seed = rules, augment, seed
        self.device, self.dtype = like.device, like.dtype

    def __call__(self, batch: Batch, *stream: int) -> tuple[Tensor, Tensor | None]:
        """Return events and contexts; equal streams get equal random numbers."""
        x, context = batch
        x = self._moved(x, keep=kind_of(x) != "f")
        if self.augment is not None:
            x = self.augment(x, generator_for((self.seed, *stream), self.device))
            if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"`augment` gave {kind}, expected a floating-point torch.Tensor")
            check_rows(x, self.rules.event_shape, "what `augment` gave")
            x = self._moved(x)
        return x, None if context is None else self._moved(context)

    def _moved(self, x: Any, keep: bool = False) -> Tensor:
        x = as_tensor(x)
        dtype = x.dtype if keep else self.dtype
        # The other way round, whoever reads the copy would have to wait for it.
        return x.to(self.device, dtype, non_blocking=self.device.type == "cuda")


def generator_for(stream: tuple[int, ...], device: Any) -> torch.Generator:
    """Return a generator whose numbers depend on the stream only."""
    (seed,) = np.random.SeedSequence(stream).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))
