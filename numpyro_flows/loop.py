"""The loop of `fit`: steps, validations, checkpoints, and what is left at the end."""

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Iterator
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
    seed_of,
)
from numpyro_flows.chain import Chain
from numpyro_flows.checkpoint import Checkpoint
from numpyro_flows.data import Rules
from numpyro_flows.image import MultiScale
from numpyro_flows.normalization import BatchNorm, Standardization
from numpyro_flows.pixels import Logit
from numpyro_flows.settings import History, Settings
from numpyro_flows.transform import TransformModule, trainable

# Steps in a row whose loss or gradient is not finite, after which training gives up.
HOPELESS = 50

# One object for all runs, so that their steps are compiled once.
ADAM = optax.scale_by_adam()


class Plan:
    """All of a run's arithmetic that is not an array: how the flow, the base and a step are built.

    Equal plans share what has been compiled.

    Args:
        flow: the flow.
        base: the base distribution.
        optimizer: makes updates of gradients.
        penalized: whether the penalty on scales is part of the loss.
    """

    def __init__(
        self,
        flow: TransformModule,
        base: Any,
        optimizer: optax.GradientTransformation,
        penalized: bool,
    ) -> None:
        leaves, self.structure = jax.tree.flatten(flow)
        self.trained = tuple(jax.tree.leaves(trainable(flow)))
        self.fixed = tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves)
        self.base_structure = jax.tree.structure(base)
        self.optimizer, self.penalized = optimizer, penalized
        nodes = jax.tree.leaves(flow, is_leaf=lambda node: isinstance(node, BatchNorm))
        self.norms = any(isinstance(node, BatchNorm) for node in nodes)
        self._parts: tuple[Any, ...] = (
            self.structure,
            self.trained,
            self.fixed,
            self.base_structure,
            optimizer,
            penalized,
        )
        try:
            self._hash = hash(self._parts)
        except TypeError:  # something of the user's; the plan is then equal to itself only
            self._parts, self._hash = (object(),), id(self)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Plan) and self._parts == other._parts)

    def split(self, flow: TransformModule) -> tuple[list[Array], list[Array]]:
        """Return a flow's parameters, and its other arrays."""
        leaves = list(zip(jax.tree.leaves(flow), self.trained, strict=True))
        state = [leaf for leaf, trained in leaves if eqx.is_array(leaf) and not trained]
        return [leaf for leaf, trained in leaves if trained], state

    def join(self, parameters: list[Array], state: list[Array]) -> TransformModule:
        """Return the flow with these arrays."""
        trained, rest = iter(parameters), iter(state)
        leaves = [
            next(trained) if is_trained else next(rest) if fixed is None else fixed
            for is_trained, fixed in zip(self.trained, self.fixed, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)

    def losses(self, flow: TransformModule, base: list[Any], x: Array, context: Any) -> Array:
        """Return the negative log-likelihood of each row."""
        event, ladj = flow._inverse_event(flow._entry(x, context))
        return -(jax.tree.unflatten(self.base_structure, base).log_prob(event.whole()) + ladj)


@functools.partial(jax.jit, static_argnums=0)
def _losses(
    plan: Plan, parameters: Any, state: Any, base: Any, x: Array, context: Array | None
) -> Array:
    return plan.losses(plan.join(parameters, state), base, x, context)


# The optimiser's state is given away. The parameters are not, for they may be the user's own, and
# must be there when Ctrl-C cuts off a step.
@functools.partial(jax.jit, static_argnums=0, donate_argnames="memory")
def _step(
    plan: Plan,
    parameters: Any,
    state: Any,
    memory: Any,
    base: Any,
    x: Array,
    context: Array | None,
    rate: float,
    clip_norm: float,
    penalty: float,
) -> tuple[Any, Any, Any, Array]:
    """Take a step, unless its numbers are not finite: then give back what came."""
    moved = state
    if plan.norms:
        event = plan.join(parameters, state)._entry(x, context)
        moved = plan.split(plan.join(parameters, state)._absorb(event, False)[0])[1]

    def objective(parameters: Any) -> tuple[Array, Array]:
        flow = plan.join(parameters, moved)
        loss = plan.losses(flow, base, x, context).mean()
        return loss + penalty * flow.scale_penalty() if plan.penalized else loss, loss

    gradients, loss = jax.grad(objective, has_aux=True)(parameters)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients))
    clipped = [gradient * jnp.minimum(1.0, clip_norm / norm) for gradient in gradients]
    updates, memory_after = plan.optimizer.update(clipped, memory, parameters)
    new = [parameter + rate * update for parameter, update in zip(parameters, updates, strict=True)]
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    after, before = (new, moved, memory_after), (parameters, state, memory)
    kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), after, before)
    return *kept, jnp.stack([loss, norm.astype(loss.dtype)])


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
        progress: bool,
    ) -> None:
        self.flow, self.settings, self.train, self.held_out = flow, settings, train, held_out
        self.checkpoint, self.progress = checkpoint, progress
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
        self.best: tuple[list[Array], list[Array]] | None = None
        self.widest = 0

    def begin(self) -> None:
        """Go on from the checkpoint, or start from the first batch."""
        first = self.prepare(self.feed.first(), AUGMENT, 0)
        saved = None if self.checkpoint is None else self.checkpoint.load()
        if saved is not None:
            self._restore(*saved)
            return
        flow = self.flow
        if self.settings.standardize:
            everything = self.train.all()
            rows = first[0] if everything is None else self.prepare(everything, AUGMENT_ALL, 0)[0]
            layer, behind = standardization(flow)
            for outer in behind:
                rows = outer.inverse_and_ladj(jnp.asarray(rows))[0]
            new = layer.standardize(rows)
            flow = eqx.tree_at(lambda flow: standardization(flow)[0], flow, new)
        self.parameters, self.state = self.plan.split(flow.initialize(*first))

    def finish(self) -> History:
        """Train to the end, whatever it is, and keep the best parameters."""
        history = self.history
        try:
            with self._bar() as self.bar:
                while history.stopped is None:
                    self._advance()
        except KeyboardInterrupt:
            history.stopped = "interrupted"
        self.flow = self.plan.join(*(self.best or (self.parameters, self.state)))
        if self.best is None:
            history.best_step = history.step
        if history.stopped == "not finite":
            warnings.warn(
                f"training stopped at step {history.step}: loss or gradient was not finite for "
                f"{history.skipped_in_row} steps in a row. The flow has the parameters of step "
                f"{history.best_step}. A smaller learning_rate or a clip_norm may help.",
                stacklevel=3,
            )
        return history

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
            if self.checkpoint is not None:
                self.checkpoint.save(*self._state())
        self._show()

    def _learn(self, x: Array, context: Array | None) -> None:
        """Take one step, and note down how it went."""
        history, settings = self.history, self.settings
        self.parameters, self.state, self.memory, numbers = _step(
            self.plan,
            self.parameters,
            self.state,
            self.memory,
            self.base,
            x,
            context,
            self.rate * settings.factor(history.step),
            settings.clip_norm or math.inf,
            settings.penalty,
        )
        value, size = np.asarray(numbers).tolist()
        if math.isfinite(value) and math.isfinite(size):
            history.skipped_in_row = 0
        else:
            history.skipped += 1
            history.skipped_in_row += 1
        history.losses.append(value)
        history.step += 1

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
            x, context = (_filled(part, self.widest) for part in (x, context))
            losses = _losses(self.plan, self.parameters, self.state, self.base, x, context)
            total += float(np.asarray(losses, dtype=float)[:size].sum())
            rows += size
        if not rows:
            raise ValueError("`validation` has no batches")
        history.validation_losses.append(total / rows)
        history.validation_steps.append(history.step)
        history.since_best += 1
        if total / rows < history.best_loss:
            history.best_loss, history.best_step = total / rows, history.step
            history.since_best = 0
            self.best = self.parameters, self.state
        if not history.stopped and history.since_best == self.settings.patience:
            history.stopped = "patience"

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        state = {
            "history": dataclasses.asdict(self.history),
            "place": [self.feed.epoch, self.feed.position],
        }
        return state, {
            **_numbered("flow", (self.parameters, self.state)),
            **_numbered("best", self.best),
            **_numbered("optimizer", self.memory),
        }

    def _restore(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        self.history = History(**state["history"])
        if self.history.stopped is None:
            self.feed.seek(*state["place"])
        like = self.parameters, self.state
        if self.history.best_step:
            self.best = _collected("best", arrays, like)
        self.parameters, self.state = _collected("flow", arrays, like)
        self.memory = _collected("optimizer", arrays, self.memory)

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
            text = {"loss": f"{sum(last) / len(last):.3f}"}
            if history.validation_losses:
                text["validation"] = f"{history.validation_losses[-1]:.3f}"
            if history.skipped:
                text["skipped"] = str(history.skipped)
            self.bar.set_postfix(text, refresh=False)


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
        "`standardize` is true, but the flow's last layer is a "
        f"{type(behind[0]).__name__}: append Standardization({flow.event_shape})"
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


def _filled(x: Any, size: int) -> Any:
    """Return a batch with its last row repeated up to a size."""
    if x is None or len(x) == size:
        return x
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])


# A checkpoint holds the arrays of a tree by their numbers; random keys as the words they are.


def _numbered(name: str, tree: Any) -> dict[str, np.ndarray]:
    return {
        f"{name}/{number}": np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for number, leaf in enumerate(jax.tree.leaves(tree))
    }


def _collected(name: str, arrays: dict[str, Any], like: Any) -> Any:
    leaves: list[Any] = jax.tree.leaves(like)
    found = [arrays[f"{name}/{number}"] for number in range(len(leaves))]
    restored = [
        # NumPy's files know no bfloat16: it comes back as bytes.
        jax.random.wrap_key_data(a) if _is_key(leaf) else jnp.asarray(a.view(leaf.dtype))
        for a, leaf in zip(found, leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
