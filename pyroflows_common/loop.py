"""The loop of `fit`: steps, validations, checkpoints and the progress bar, on either host."""

import contextlib
import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sized
from typing import Any, Generic, TypeVar

from pyroflows_common.batches import AUGMENT, AUGMENT_ALL, AUGMENT_VALIDATION, Part
from pyroflows_common.checkpoint import Checkpoint
from pyroflows_common.history import History, Settings
from pyroflows_common.progress import bar
from pyroflows_common.rows import Batch, Batches, rows_at_once

# Number of skipped steps in a row after which training stops.
HOPELESS = 50


A = TypeVar("A", bound=Sized)  # array of the host
P = TypeVar("P")  # parameters and state of a flow


class Loop(ABC, Generic[A, P]):
    """One run of `fit`; each wing adds the computations of its host.

    Args:
        settings: settings of the run.
        train: data to train on.
        held_out: data to validate on, if any.
        checkpoint: file of the run's state, if any.
        progress: whether to show a bar, or a function that formats a loss.
        seed: seed of the order of the rows.

    Raises:
        ValueError: if there is a patience, but no data to validate on.
    """

    # Makes events, contexts and weights from a batch and the numbers of its random stream.
    prepare: Callable[..., tuple[A, A | None, A | None]]

    def __init__(
        self,
        settings: Settings,
        train: Part,
        held_out: Part | None,
        checkpoint: Checkpoint | None,
        progress: bool | Callable[[float], str],
        seed: int,
    ) -> None:
        if settings.patience is not None and held_out is None:
            raise ValueError("`patience` needs data to validate on: pass `validation`")
        self.settings, self.train, self.held_out = settings, train, held_out
        self.checkpoint, self.progress = checkpoint, bool(progress)
        self.format = progress if callable(progress) else "{:.3f}".format
        self.history = History()
        self.feed = train.feed(settings.batch_size, seed)
        # The parameters to return: those of the best validation or, before there is one, the last
        # with a finite loss. `last` is the batch that had this loss.
        self.best: P | None = None
        self.last: tuple[A, A | None, A | None] | None = None

    @abstractmethod
    def start(self) -> None:
        """Initialise the data-dependent layers."""

    @abstractmethod
    def checked(self, batch: Batch, *stream: int) -> tuple[A, A | None, A | None]:
        """Return a batch for initialisation, checked to be finite."""

    @abstractmethod
    def learn(self, x: A, context: A | None, weights: A | None) -> None:
        """Take one step and record it; skip it if the loss or its gradient is not finite."""

    @abstractmethod
    def total_loss(self, x: A, context: A | None, weights: A | None) -> float:
        """Return the weighted sum of the losses of a batch of validation data."""

    @abstractmethod
    def parameters_now(self) -> P:
        """Return the current parameters, which later steps do not change."""

    @abstractmethod
    def is_finite(self, x: A, context: A | None, weights: A | None) -> bool:
        """Return whether the loss of a training batch is finite under the current parameters."""

    @abstractmethod
    def state_now(self) -> dict[str, Any]:
        """Return the arrays of the run for a checkpoint."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Take the arrays of the run from a checkpoint."""

    def begin(self) -> None:
        """Restore the checkpoint, or initialise the flow from data."""
        state = None if self.checkpoint is None else self.checkpoint.load()
        if state is None:
            self.start()
            return
        history = History(**state["history"])
        if history.stopped is None:
            self.feed.seek(*state["place"])
        self.restore(state)
        self.history = history

    def parts(self, first: A) -> Iterator[tuple[A, A | None]]:
        """Yield all rows and their weights in parts, or the first batch of an iterable."""
        source = self.train.source
        if isinstance(source, Batches):
            yield first, None
        else:
            for i, part in enumerate(self.train.in_order(rows_at_once(source.arrays.event_shape))):
                x, _, weights = self.checked(part, AUGMENT_ALL, i)
                yield x, weights

    def train_to_the_end(self) -> None:
        """Train until the run stops or Ctrl-C is pressed."""
        try:
            self.begin()
            with self._bar() as self.bar:
                if not self.history.step:
                    self._validate()  # the start, so that no run returns a worse flow
                while self.history.stopped is None:
                    self._advance()
        except KeyboardInterrupt:
            self.history.stopped = "interrupted"
            if self.history.made:
                with contextlib.suppress(KeyboardInterrupt):  # pressed again: skip this
                    self._validate()
                    self._prove()

    @property
    def untouched(self) -> bool:
        """Whether nothing was learned, so that the flow must stay unchanged."""
        return not self.history.made and self.history.stopped in (None, "interrupted")

    def _advance(self) -> None:
        """Take a step; validate and save if due."""
        history, settings = self.history, self.settings
        batch = self.feed.next()
        if batch is None:
            history.stopped = "data exhausted"
        else:
            self.learn(*self.prepare(batch, AUGMENT, history.step))
            if history.skipped_in_row == HOPELESS:
                history.stopped = "not finite"
            elif history.step == settings.steps:
                history.stopped = "steps"
        if history.stopped and history.skipped == history.step:
            history.stopped = "not finite"
        every = settings.validate_every
        due = history.step % every == 0 if every else self.feed.at_end
        if history.stopped or due:
            self._validate()
        save = self.checkpoint is not None and (due if self.feed.resumes else self.feed.at_end)
        if history.stopped or save:
            self._prove()
            if self.checkpoint is not None:
                place = [self.feed.epoch, self.feed.position]
                state = {"history": dataclasses.asdict(history), "place": place}
                self.checkpoint.save({**state, **self.state_now()})
        self._show()

    def record(self, loss: float, skipped: bool) -> None:
        """Record one step."""
        history = self.history
        history.skipped += skipped
        history.skipped_in_row = history.skipped_in_row + 1 if skipped else 0
        history.losses.append(loss)
        history.step += 1

    def _validate(self) -> None:
        """Compute the loss on the validation data; keep the parameters if it is the lowest."""
        history = self.history
        if self.held_out is None or history.step in history.validation_steps[-1:]:
            return
        total, rows = 0.0, 0.0
        for number, batch in enumerate(self.held_out.in_order(self.settings.batch_size)):
            x, context, weights = self.prepare(batch, AUGMENT_VALIDATION, number)
            total += self.total_loss(x, context, weights)
            rows += len(x) if batch[2] is None else float(batch[2].sum())
        if not rows:
            raise ValueError("`validation` has no batches")
        history.validation_losses.append(total / rows)
        history.validation_steps.append(history.step)
        history.since_best += history.step > 0
        if total / rows < history.best_loss:
            history.best_loss, history.best_step = total / rows, history.made
            history.since_best = 0
            self.best, self.last = self.parameters_now(), None
        if not history.stopped and history.since_best == self.settings.patience:
            history.stopped = "patience"

    def _prove(self) -> None:
        """Before any validation, keep the current parameters if the last batch's loss is finite."""
        if self.last is not None:
            if self.is_finite(*self.last):
                self.best, self.history.best_step = self.parameters_now(), self.history.made
            self.last = None

    def _bar(self) -> Any:
        self.shown = 0.0
        steps, initial = self.settings.steps, self.history.step
        return bar(steps, title="fit", unit="step", initial=initial, shown=self.progress)

    def _show(self) -> None:
        """Update the bar; its text changes at most ten times a second, because that is slow."""
        history = self.history
        self.bar.update(history.step - self.bar.n)
        if self.progress and (history.stopped or time.monotonic() - self.shown > 0.1):
            self.shown = time.monotonic()
            last = history.losses[-20:]
            text = {"loss": self.format(sum(last) / len(last))}
            if history.validation_losses:
                text["validation"] = self.format(history.validation_losses[-1])
            if history.skipped:
                text["skipped"] = str(history.skipped)
            self.bar.set_postfix(text, refresh=False)
