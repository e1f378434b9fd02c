"""What the applications are given: a flow, events, and their contexts."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from numpyro_flows.inputs import Events, check_event
from numpyro_flows.transform import Conditioned, Context, TransformModule


def joined(
    flow: TransformModule, x: Events, context: Context, name: str = "x"
) -> tuple[TransformModule, Float[Array, "..."], Context]:
    """Check a flow, events and contexts, and give events and contexts one batch shape.

    A flow with a fixed context comes back as the flow and the context.
    """
    if not isinstance(flow, TransformModule):
        raise TypeError(f"`flow` is a {type(flow).__name__}, expected a TransformModule")
    if isinstance(flow, Conditioned):
        if context is not None:
            raise ValueError("`context` was given, but `flow` has its context already")
        flow, context = flow.flow, flow.context
    x, context = flow._entry(check_event(x, flow.event_shape, name), context)
    if context is not None:
        batch = x.shape[: x.ndim - len(flow.event_shape)]
        context = jnp.broadcast_to(context, (*batch, flow.context_dim))
    return flow, x, context
