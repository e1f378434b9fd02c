"""One step of training, and the losses of one batch: the compiled functions of `fit`."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import optax
from jax import Array
from jaxtyping import Float

from numpyro_flows.networks import RunningMoments
from numpyro_flows.support import log_prob_inside
from numpyro_flows.transform import TransformModule
from numpyro_flows.tree import nodes, select, trainable


class Plan:
    """The static part of a run: the structure of the flow, the base and the optimiser.

    Equal plans share compiled functions. If `penalized`, the loss has the penalty on scales.
    """

    def __init__(
        self,
        flow: TransformModule,
        base: dist.Distribution,
        optimizer: optax.GradientTransformation,
        penalized: bool,
    ) -> None:
        leaves, self.structure = jax.tree.flatten(flow)
        self.trained = tuple(jax.tree.leaves(trainable(flow)))
        self.fixed = tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves)
        self.base_structure = jax.tree.structure(base)
        self.optimizer, self.penalized = optimizer, penalized
        self._parts: tuple[Any, ...] = tuple(vars(self).values())
        self.norms = bool(nodes(flow, lambda node: isinstance(node, RunningMoments)))
        try:
            self._hash = hash(self._parts)
        except TypeError:  # a part of the user's cannot be hashed: the plan equals itself only
            self._parts, self._hash = (object(),), id(self)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Plan) and self._parts == other._parts)

    def split(self, flow: TransformModule) -> tuple[list[Array], list[Array]]:
        """Return the parameters of a flow, and its other arrays."""
        leaves = list(zip(jax.tree.leaves(flow), self.trained, strict=True))
        state = [leaf for leaf, trained in leaves if eqx.is_array(leaf) and not trained]
        return [leaf for leaf, trained in leaves if trained], state

    def join(self, parameters: list[Array], state: list[Array]) -> TransformModule:
        """Return the flow with these parameters and other arrays."""
        trained, rest = iter(parameters), iter(state)
        leaves = [
            next(trained) if is_trained else next(rest) if fixed is None else fixed
            for is_trained, fixed in zip(self.trained, self.fixed, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)


@functools.partial(jax.jit, static_argnums=0)
def losses_of(
    plan: Plan,
    parameters: list[Array],
    state: list[Array],
    base: list[Array],
    x: Float[Array, "n ..."],
    context: Float[Array, "n context_dim"] | None,
    weights: Float[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """Return the negative log-likelihood of each row of a batch, times its weight."""
    z, ladj = plan.join(parameters, state).inverse_and_ladj(x, context)
    losses = -(log_prob_inside(jax.tree.unflatten(plan.base_structure, base), z) + ladj)
    return losses if weights is None else weights * losses


# The optimiser's state is donated. The parameters are not: they may belong to the user, and must
# survive if Ctrl-C interrupts a step.
@functools.partial(jax.jit, static_argnums=0, donate_argnames="memory")
def step(
    plan: Plan,
    parameters: list[Array],
    state: list[Array],
    memory: Any,
    base: list[Array],
    x: Float[Array, "n ..."],
    context: Float[Array, "n context_dim"] | None,
    weights: Float[Array, " n"] | None,
    rate: float,
    clip_norm: float,
    penalty: float,
) -> tuple[list[Array], list[Array], Any, Float[Array, "2"]]:
    """Take a step, and return parameters, state, memory, and the loss and its gradient's norm.

    If the loss or its gradient is not finite, parameters, state and memory are returned unchanged.
    """
    averaged = state
    if plan.norms:
        flow, _ = plan.join(parameters, state)._absorb(x, context, False)
        _, averaged = plan.split(flow)

    def objective(parameters: list[Array]) -> tuple[Array, Array]:
        loss = losses_of(plan, parameters, averaged, base, x, context, weights).mean()
        if plan.penalized:
            return loss + penalty * plan.join(parameters, averaged).scale_penalty(), loss
        return loss, loss

    gradients, loss = jax.grad(objective, has_aux=True)(parameters)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients))
    clipped = [gradient * jnp.minimum(1.0, clip_norm / norm) for gradient in gradients]
    updates, memory_after = plan.optimizer.update(clipped, memory, parameters)
    new = [parameter + rate * update for parameter, update in zip(parameters, updates, strict=True)]
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    after, before = (new, averaged, memory_after), (parameters, state, memory)
    return *select(good, after, before), jnp.stack([loss, norm.astype(loss.dtype)])
