"""One run of `fit` in JAX: its start, its state and its end."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from jax import Array
from jaxtyping import Float

from numpyro_flows.inputs import check_finite
from numpyro_flows.rng import RandomKey, check_key, seed_of
from numpyro_flows.storage.checkpoint import Checkpoint, collected, numbered
from numpyro_flows.support import is_real, support_of
from numpyro_flows.training.preparation import Preparation, Prepared, filled
from numpyro_flows.training.sources import AnyArray, Arrays
from numpyro_flows.training.step import Plan, losses_of, step
from numpyro_flows.transform import TransformModule
from numpyro_flows.tree import replace
from pyroflows_common import history
from pyroflows_common.batches import AUGMENT, Part
from pyroflows_common.history import History
from pyroflows_common.loop import Loop
from pyroflows_common.rows import Batch
from pyroflows_common.support import no_density

# One object for all runs, so that they share compiled steps.
ADAM = optax.scale_by_adam()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(history.Settings):
    """Arguments of `fit` that are numbers or functions."""

    key: RandomKey

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


class Run(Loop[AnyArray, tuple[list[Array], list[Array]]]):
    """One run of `fit`."""

    settings: Settings

    def __init__(
        self,
        flow: TransformModule,
        base: dist.Distribution,
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
        self.base, self.support = jax.tree.leaves(base), support_of(base)
        self.parameters, self.state = self.plan.split(flow)
        self.memory = self.new_memory()
        self.prepare = Preparation(arrays, settings.augment, self.parameters[0], settings.key)
        self.widest = 0

    def run(self, base: str) -> History:
        """Train to the end, and keep the flow with the best parameters.

        After Ctrl-C before the first step, the flow is unchanged.
        """
        self.train_to_the_end()
        if not self.untouched:
            self.flow = replace(self.plan.join(*(self.best or self.parameters_now())), base=base)
        return self.history

    def start(self) -> None:
        """Initialise the data-dependent layers."""
        flow, (x, context, _) = self.flow, self.checked(self.feed.first(), AUGMENT, 0)
        if self.settings.standardize:
            flow, left = flow._standardize(self.parts(x))
            if left is not None:
                raise ValueError(
                    "`standardize` is true, but the flow has no Standardization at the data's end"
                )
        flow = flow.initialize(x, context)
        for before, after in zip(jax.tree.leaves(self.flow), jax.tree.leaves(flow), strict=True):
            if _finite(before) and not _finite(after):
                raise ValueError(
                    "`data` does not suit `flow`: layers initialised from it would not be finite"
                )
        self.parameters, self.state = self.plan.split(flow)
        if not is_real(self.support) and not np.isfinite(self.losses(x, context)).any():
            raise ValueError(no_density(self.support))

    def checked(self, batch: Batch, *stream: int) -> Prepared:
        """Return a batch for initialisation, checked to be finite."""
        x, context, weights = jax.tree.map(jnp.asarray, self.prepare(batch, *stream))
        check_finite(x, self.flow.event_shape, "a batch of `data` after `augment`")
        return x, context, weights

    def learn(self, x: AnyArray, context: AnyArray | None, weights: AnyArray | None) -> None:
        """Take one step; skip it if the loss or its gradient is not finite."""
        before = self.parameters
        rate = self.rate * self.settings.factor(self.history.step)
        self.parameters, self.state, self.memory, numbers = self._step(x, context, weights, rate)
        loss, size = np.asarray(numbers).tolist()
        good = math.isfinite(loss) and math.isfinite(size)
        if good and not self.history.validated:
            self.best, self.history.best_step = (before, self.state), self.history.made
            self.last = x, context, weights
        self.record(loss, skipped=not good)

    def _step(
        self, x: AnyArray, context: AnyArray | None, weights: AnyArray | None, rate: float
    ) -> tuple[list[Array], list[Array], Any, Float[Array, "2"]]:
        run = (self.plan, self.parameters, self.state, self.memory, self.base)
        limit, penalty = self.settings.clip_norm or math.inf, self.settings.penalty
        return step(*run, x, context, weights, rate, limit, penalty)

    def new_memory(self) -> Any:
        """Return the initial state of the optimiser."""
        # A copy: a step donates this memory, and an optimiser may have put the parameters into it.
        return jax.tree.map(jnp.copy, self.plan.optimizer.init(self.parameters))

    def total_loss(self, x: AnyArray, context: AnyArray | None, weights: AnyArray | None) -> float:
        """Return the weighted sum of the losses of a batch of validation data."""
        # A shorter batch is filled up, because another shape would have to be compiled.
        self.widest, size = max(self.widest, len(x)), len(x)
        rows, contexts = filled(x, self.widest), filled(context, self.widest)
        losses = self.losses(rows, contexts)[:size]
        return float((losses if weights is None else np.asarray(weights) * losses).sum())

    def losses(self, x: AnyArray, context: AnyArray | None) -> Float[np.ndarray, " n"]:
        """Return the loss of each row under the current parameters."""
        losses = losses_of(self.plan, self.parameters, self.state, self.base, x, context)
        return np.asarray(losses, dtype=float)

    def is_finite(self, x: AnyArray, context: AnyArray | None, weights: AnyArray | None) -> bool:
        """Return whether the loss of a training batch is finite under the current parameters."""
        # The loss comes from a step at rate 0, because that function is already compiled, and with
        # new memory, because a step that Ctrl-C interrupts may have taken that of the run with it.
        memory, self.memory = self.memory, self.new_memory()
        numbers = self._step(x, context, weights, 0.0)[-1]
        self.memory = memory
        return bool(jnp.isfinite(numbers[0]))

    def parameters_now(self) -> tuple[list[Array], list[Array]]:
        """Return the parameters and the other arrays, which are immutable."""
        return self.parameters, self.state

    def state_now(self) -> dict[str, Any]:
        """Return the arrays of the run for a checkpoint."""
        flow, best = numbered("flow", self.parameters_now()), numbered("best", self.best)
        return {"arrays": {**flow, **best, **numbered("optimizer", self.memory)}}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the arrays of the run from a checkpoint."""
        arrays, like = state["arrays"], self.parameters_now()
        if "best/0" in arrays:
            self.best = collected("best", arrays, like)
        self.parameters, self.state = collected("flow", arrays, like)
        self.memory = collected("optimizer", arrays, self.memory)


def _finite(leaf: object) -> bool:
    return not eqx.is_inexact_array(leaf) or bool(np.isfinite(np.asarray(leaf)).all())
