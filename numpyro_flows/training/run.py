"""One run of `fit` in JAX: where it starts, its state, and what is left at the end."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from numpyro_flows.rng import check_key, seed_of
from numpyro_flows.storage.checkpoint import Checkpoint, collected, numbered
from numpyro_flows.training.batches import Preparation, filled
from numpyro_flows.training.sources import Arrays
from numpyro_flows.training.step import Plan, losses_of, step
from numpyro_flows.transform import TransformModule, check_finite
from numpyro_flows.tree import replace
from pyroflows_common import history
from pyroflows_common.batches import AUGMENT, AUGMENT_ALL, Part
from pyroflows_common.history import History
from pyroflows_common.loop import Loop
from pyroflows_common.rows import Batch, Batches, rows_at_once

# One object for all runs, so that their steps are compiled once.
ADAM = optax.scale_by_adam()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(history.Settings):
    """The arguments of `fit` that are numbers and functions."""

    key: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        check_key(self.key)
        if not (self.optimizer is None or hasattr(self.optimizer, "update")):
            raise TypeError(
                f"`optimizer` is of type {type(self.optimizer).__name__}, expected an optax "
                "transformation or None"
            )

    def describe(self) -> dict[str, Any]:
        """Return the settings by name."""
        return {**super().describe(), "key": seed_of(self.key)}


class Run(Loop):
    """One run of `fit`."""

    settings: Settings

    def __init__(
        self,
        flow: TransformModule,
        base: Any,
        arrays: Arrays,
        settings: Settings,
        train: Part,
        held_out: Part | None,
        checkpoint: Checkpoint | None,
        progress: bool | Callable[[float], str],
    ) -> None:
        super().__init__(settings, train, held_out, checkpoint, progress, seed_of(settings.key))
        self.flow = flow
        optimizer, self.rate = ADAM, -settings.learning_rate
        if settings.optimizer is not None:
            optimizer, self.rate = settings.optimizer, 1.0
        self.plan = Plan(flow, base, optimizer, bool(settings.penalty))
        self.base = jax.tree.leaves(base)
        self.parameters, self.state = self.plan.split(flow)
        # A copy, since it is given away while an optimiser may have kept the parameters in it.
        self.memory = jax.tree.map(jnp.copy, optimizer.init(self.parameters))
        self.prepare = Preparation(arrays, settings.augment, self.parameters[0], settings.key)
        self.widest = 0

    def run(self, base: str) -> History:
        """Train to the end, and keep the flow with the best parameters.

        After Ctrl-C before the first step, the flow is as it was.
        """
        self.train_to_the_end()
        if not self.untouched:
            self.flow = replace(self.plan.join(*(self.best or self.parameters_now())), base=base)
        return self.history

    def begin(self) -> None:
        """Go on from the checkpoint, or start from data."""
        saved = None if self.checkpoint is None else self.checkpoint.load()
        if saved is None:
            self._start()
        else:
            self._restore(saved)

    def _start(self) -> None:
        """Let the layers that start from data do so."""
        flow, first = self.flow, self._checked(self.feed.first(), AUGMENT, 0)
        if self.settings.standardize:
            flow, left = flow._standardize(self._parts(first[0]))
            if left is not None:
                raise ValueError(
                    "`standardize` is true, but the flow has no Standardization at the data's end"
                )
        flow = flow.initialize(*first)
        for before, after in zip(jax.tree.leaves(self.flow), jax.tree.leaves(flow), strict=True):
            if _finite(before) and not _finite(after):
                raise ValueError(
                    "`data` does not suit `flow`: layers that start from it would not be finite"
                )
        self.parameters, self.state = self.plan.split(flow)

    def _checked(self, batch: Batch, *stream: int) -> tuple[Array, Array | None]:
        """Return a batch that a layer may start from."""
        x, context = self.prepare(batch, *stream)
        x = jnp.asarray(x)
        check_finite(x, self.flow.event_shape, "a batch of `data` after `augment`")
        return x, context

    def _parts(self, first: Array) -> Iterator[Array]:
        """Yield all rows in parts; of an iterable of batches the first one."""
        if isinstance(self.train.source, Batches):
            yield first
        else:
            for i, part in enumerate(self.train.in_order(rows_at_once(self.flow.event_shape))):
                yield self._checked(part, AUGMENT_ALL, i)[0]

    def learn(self, x: Any, context: Any) -> None:
        """Take one step, unless its numbers are not finite: then the flow stays as it is."""
        before = self.parameters
        rate = self.rate * self.settings.factor(self.history.step)
        self.parameters, self.state, self.memory, numbers = self._step(x, context, rate)
        loss, size = np.asarray(numbers).tolist()
        good = math.isfinite(loss) and math.isfinite(size)
        if good and not self.history.validated:
            self.best, self.history.best_step = (before, self.state), self.history.made
            self.last = x, context
        self.record(loss, skipped=not good)

    def _step(self, x: Any, context: Any, rate: float) -> tuple[Any, Any, Any, Array]:
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

    def total_loss(self, x: Any, context: Any) -> float:
        """Return the summed loss of a batch of held-out rows."""
        # Another shape would be compiled anew: a shorter batch is filled up and cut off again.
        self.widest, size = max(self.widest, len(x)), len(x)
        x, context = (filled(part, self.widest) for part in (x, context))
        losses = losses_of(self.plan, self.parameters, self.state, self.base, x, context)
        return float(np.asarray(losses, dtype=float)[:size].sum())

    def last_is_finite(self) -> bool:
        """Whether the loss on the last batch is finite with the parameters of now."""
        # A step, for it is compiled already, of which nothing but the loss is used.
        (x, context), memory = self.last, jax.tree.map(jnp.copy, self.memory)
        numbers = self._step(x, context, 0.0)[-1]
        self.memory = memory
        return bool(jnp.isfinite(numbers[0]))

    def parameters_now(self) -> tuple[list[Array], list[Array]]:
        """Return the parameters and the other arrays, which nothing changes in place."""
        return self.parameters, self.state

    def save(self) -> None:
        """Write the checkpoint."""
        assert self.checkpoint is not None
        self.checkpoint.save(
            {
                "history": dataclasses.asdict(self.history),
                "place": [self.feed.epoch, self.feed.position],
                "arrays": {
                    **numbered("flow", self.parameters_now()),
                    **numbered("best", self.best),
                    **numbered("optimizer", self.memory),
                },
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        history, arrays = History(**state["history"]), state["arrays"]
        if history.stopped is None:
            self.feed.seek(*state["place"])
        like = self.parameters_now()
        if "best/0" in arrays:
            self.best = collected("best", arrays, like)
        self.parameters, self.state = collected("flow", arrays, like)
        self.memory = collected("optimizer", arrays, self.memory)
        self.history = history


def _finite(leaf: Any) -> bool:
    return not eqx.is_inexact_array(leaf) or bool(np.isfinite(np.asarray(leaf)).all())
