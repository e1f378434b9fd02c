"""The loop of `fit`: steps, validations, checkpoints, and what is left at the end."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tqdm.auto import tqdm

from numpyro_flows.batches import (
    AUGMENT,
    AUGMENT_ALL,
    AUGMENT_VALIDATION,
    Part,
    Preparation,
    filled,
    seed_of,
)
from numpyro_flows.chain import Chain
from numpyro_flows.checkpoint import Checkpoint, collected, numbered
from numpyro_flows.data import Batch, Batches, Rules, check_finite, rows_at_once
from numpyro_flows.image import MultiScale
from numpyro_flows.normalization import Standardization
from numpyro_flows.pixels import Logit
from numpyro_flows.settings import History, Settings
from numpyro_flows.step import Plan, losses_of, step
from numpyro_flows.transform import TransformModule
from numpyro_flows.tree import replace

# Steps in a row whose loss or gradient is not finite, after which training gives up.
HOPELESS = 50

# One object for all runs, so that their steps are compiled once.
ADAM = optax.scale_by_adam()


class Run:
    """One run of `fit`."""

    def __init__(
        self,
        flow: TransformModule,
        base: Any,
        rules: Rules,
        settings: Settings,
        train: Part,
        held_out: Part | None,
        checkpoint: Checkpoint | None,
        progress: bool | Callable[[float], str],
    ) -> None:
        self.flow, self.settings, self.train, self.held_out = flow, settings, train, held_out
        self.checkpoint, self.progress = checkpoint, bool(progress)
        self.written = progress if callable(progress) else "{:.3f}".format
        self.history = History()
        self.feed = train.feed(settings.batch_size, seed_of(settings.key))
        optimizer, self.rate = ADAM, -settings.learning_rate
        if settings.optimizer is not None:
            optimizer, self.rate = settings.optimizer, 1.0
        self.plan = Plan(flow, base, optimizer, bool(settings.penalty))
        self.base = jax.tree.leaves(base)
        self.parameters, self.state = self.plan.split(flow)
        # A copy, since it is given away while an optimiser may have kept the parameters in it.
        self.memory = jax.tree.map(jnp.copy, optimizer.init(self.parameters))
        self.prepare = Preparation(rules, settings.augment, self.parameters[0], settings.key)
        # What is left in the end: the parameters of the best validation or, until there is one,
        # the last whose loss was finite; and the batch that they had it on.
        self.best: tuple[list[Array], list[Array]] | None = None
        self.last: tuple[Any, Any] | None = None
        self.widest = 0

    def run(self, base: str) -> History:
        """Train to the end, whatever it is, and keep the flow with the best parameters.

        Where it is Ctrl-C before the first step, the flow stays as it was.
        """
        try:
            self._begin()
            with self._bar() as self.bar:
                while self.history.stopped is None:
                    self._advance()
        except KeyboardInterrupt:
            self.history.stopped = "interrupted"
            if self.history.made:
                with contextlib.suppress(KeyboardInterrupt):  # pressed again: then without
                    self._validate()
                    self._prove()
        if self.history.made or self.history.stopped != "interrupted":
            flow = self.plan.join(*(self.best or (self.parameters, self.state)))
            self.flow = replace(flow, base=base)
        return self.history

    def _begin(self) -> None:
        """Go on from the checkpoint, or start from data."""
        saved = None if self.checkpoint is None else self.checkpoint.load()
        if saved is not None:
            self._restore(*saved)
            return
        flow = self.flow
        first = self._checked(self.feed.first(), AUGMENT, 0)
        if self.settings.standardize:
            layer, behind = standardization(flow)
            new = layer.standardize(self._encoded(behind, first[0]))
            flow = eqx.tree_at(lambda flow: standardization(flow)[0], flow, new)
        flow = flow.initialize(*first)
        for old, new in zip(jax.tree.leaves(self.flow), jax.tree.leaves(flow), strict=True):
            if _finite(old) and not _finite(new):
                raise ValueError(
                    "`data` does not suit `flow`: layers that start from it would not be finite"
                )
        self.parameters, self.state = self.plan.split(flow)

    def _checked(self, batch: Batch, *stream: int) -> tuple[Any, Any]:
        """Return a batch that a layer may start from."""
        x, context = self.prepare(batch, *stream)
        check_finite(x, "a batch of `data` after `augment`", x.dtype)
        return x, context

    def _encoded(self, behind: list[TransformModule], first: Any) -> Iterator[Array]:
        """Yield all rows, or of an iterable the first batch, as some layers have encoded them."""
        if isinstance(self.train.source, Batches):
            parts = iter([first])
        else:
            chunks = self.train.in_order(rows_at_once(self.flow.event_shape))
            parts = (self._checked(part, AUGMENT_ALL, i)[0] for i, part in enumerate(chunks))
        for rows in parts:
            for outer in behind:
                rows = outer.inverse_and_ladj(jnp.asarray(rows))[0]
                check_finite(rows, f"a batch of `data` behind {type(outer).__name__}", rows.dtype)
            yield jnp.asarray(rows)

    def _advance(self) -> None:
        """Take a step; validate and save where it is time to."""
        history, settings = self.history, self.settings
        batch = self.feed.next()
        if batch is None:
            history.stopped = "data exhausted"
        else:
            self._learn(*self.prepare(batch, AUGMENT, history.step))
            if history.skipped_in_row == HOPELESS:
                history.stopped = "not finite"
            elif history.step == settings.steps:
                history.stopped = "steps"
        if history.stopped and history.skipped == history.step:
            history.stopped = "not finite"
        every = settings.validate_every
        if history.stopped or (history.step % every == 0 if every else self.feed.at_end):
            self._validate()
            if history.stopped or self.checkpoint is not None:
                self._prove()
            if self.checkpoint is not None:
                self.checkpoint.save(*self._state())
        self._show()

    def _learn(self, x: Array, context: Array | None) -> None:
        """Take one step, and note down how it went."""
        history, before = self.history, self.parameters
        rate = self.rate * self.settings.factor(history.step)
        self.parameters, self.state, self.memory, numbers = self._step(x, context, rate)
        value, size = np.asarray(numbers).tolist()
        if math.isfinite(value) and math.isfinite(size):
            if not history.validated:
                self.best, history.best_step = (before, self.state), history.made
                self.last = x, context
            history.skipped_in_row = 0
        else:
            history.skipped += 1
            history.skipped_in_row += 1
        history.losses.append(value)
        history.step += 1

    def _step(self, x: Array, context: Array | None, rate: float) -> tuple[Any, Any, Any, Array]:
        return step(
            self.plan,
            self.parameters,
            self.state,
            self.memory,
            self.base,
            x,
            context,
            rate,
            self.settings.clip_norm or math.inf,
            self.settings.penalty,
        )

    def _validate(self) -> None:
        """Take the loss on the held-out data, and keep the parameters where it is the lowest."""
        history = self.history
        if self.held_out is None or history.step in history.validation_steps[-1:]:
            return
        total, rows = 0.0, 0
        for number, batch in enumerate(self.held_out.in_order(self.settings.batch_size)):
            x, context = self.prepare(batch, AUGMENT_VALIDATION, number)
            # Another shape would be compiled anew: a shorter batch is filled up and cut off again.
            self.widest, size = max(self.widest, len(x)), len(x)
            x, context = (filled(part, self.widest) for part in (x, context))
            losses = losses_of(self.plan, self.parameters, self.state, self.base, x, context)
            total += float(np.asarray(losses, dtype=float)[:size].sum())
            rows += size
        if not rows:
            raise ValueError("`validation` has no batches")
        history.validation_losses.append(total / rows)
        history.validation_steps.append(history.step)
        history.since_best += 1
        if total / rows < history.best_loss:
            history.best_loss, history.best_step = total / rows, history.made
            history.since_best = 0
            self.best, self.last = (self.parameters, self.state), None
        if not history.stopped and history.since_best == self.settings.patience:
            history.stopped = "patience"

    def _prove(self) -> None:
        """Where nothing is validated: keep the last parameters if their loss is finite."""
        if self.last is None:
            return
        # A step, for it is compiled already, of which nothing but the loss is used.
        memory = jax.tree.map(jnp.copy, self.memory)
        numbers = self._step(*self.last, 0.0)[-1]
        self.memory = memory
        if jnp.isfinite(numbers[0]):
            self.best, self.history.best_step = (self.parameters, self.state), self.history.made
        self.last = None

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        state = {
            "history": dataclasses.asdict(self.history),
            "place": [self.feed.epoch, self.feed.position],
        }
        return state, {
            **numbered("flow", (self.parameters, self.state)),
            **numbered("best", self.best),
            **numbered("optimizer", self.memory),
        }

    def _restore(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        history = History(**state["history"])
        if history.stopped is None:
            self.feed.seek(*state["place"])
        like = self.parameters, self.state
        self.best = collected("best", arrays, like) if "best/0" in arrays else None
        self.parameters, self.state = collected("flow", arrays, like)
        self.memory = collected("optimizer", arrays, self.memory)
        self.history = history

    def _bar(self) -> tqdm:
        self.shown = 0.0
        return tqdm(
            total=self.settings.steps,
            initial=self.history.step,
            disable=not self.progress,
            desc="fit",
            unit="step",
        )

    def _show(self) -> None:
        """Move the bar; its text changes ten times a second at most, for that takes time."""
        history = self.history
        self.bar.update(history.step - self.bar.n)
        if self.progress and (history.stopped or time.monotonic() - self.shown > 0.1):
            self.shown = time.monotonic()
            last = history.losses[-20:]
            text = {"loss": self.written(sum(last) / len(last))}
            if history.validation_losses:
                text["validation"] = self.written(history.validation_losses[-1])
            if history.skipped:
                text["skipped"] = str(history.skipped)
            self.bar.set_postfix(text, refresh=False)


def _finite(leaf: Any) -> bool:
    return not eqx.is_inexact_array(leaf) or bool(np.isfinite(np.asarray(leaf)).all())


def standardization(flow: TransformModule) -> tuple[Standardization, list[TransformModule]]:
    """Return the layer that `standardize` sets and those behind it, or say that there is none."""
    behind: list[TransformModule] = []
    for layer in _from_data(flow):
        if isinstance(layer, Standardization):
            return layer, behind
        behind.append(layer)
        if not isinstance(layer, Logit):
            break
    raise ValueError(
        f"`standardize` is true, but the flow ends in {type(behind[0]).__name__}: append "
        f"Standardization({flow.event_shape})"
    )


def _from_data(flow: TransformModule) -> Iterator[TransformModule]:
    """Go through the layers from the data's end."""
    if isinstance(flow, MultiScale):
        yield from _from_data(flow.levels[-1])
    elif isinstance(flow, Chain):
        for layer in reversed(flow.layers):
            yield from _from_data(layer)
    else:
        yield flow
