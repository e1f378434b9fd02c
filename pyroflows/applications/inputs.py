"""What the applications are given: a flow, events, and their contexts."""

from jaxtyping import Float
from torch import Tensor

from pyroflows.inputs import check_event
from pyroflows.transform import Conditioned, Context, TransformModule


def joined(
    flow: TransformModule, x: Float[Tensor, "..."], context: Context, name: str = "x"
) -> tuple[TransformModule, Float[Tensor, "..."], Context]:
    """Check a flow, events and contexts, and give events and contexts one batch shape.

    A flow with a fixed context comes back as the flow and the context.
    """
    if not isinstance(flow, TransformModule):
        raise TypeError(f"`flow` is a {type(flow).__name__}, expected a TransformModule")
    if isinstance(flow, Conditioned):
        if context is not None:
            raise ValueError("`context` was given, but `flow` has its context already")
        flow, context = flow.flow, flow.context
    check_event(x, flow.event_shape, name)
    x, context = flow._entry(x.detach(), context)
    if context is not None:
        batch = x.shape[: x.ndim - len(flow.event_shape)]
        context = context.expand(*batch, flow.context_dim)
    return flow, x, context
