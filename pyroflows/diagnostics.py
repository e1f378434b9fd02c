"""Diagnostics: the round-trip error of a flow in floating point."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyroflows.inputs import check_event, check_finite
from pyroflows.transform import TransformModule
from pyroflows_common.invertibility import Invertibility


@torch.no_grad()
def check_invertible(flow: TransformModule, x: Float[Tensor, "..."]) -> Invertibility:
    """Measure the round-trip error of a flow in floating point.

    Args:
        flow: the flow or layer; a conditional one as `flow.condition(context)`.
        x: data `(*batch, *event_shape)`.

    Returns:
        The largest errors over all rows; infinity if the flow gives a NaN.

    Raises:
        ValueError: if `x` has the wrong shape, no rows or non-finite rows.
        TypeError: if `flow` is not a `TransformModule` or `x` not a floating-point tensor.

    Examples:
        >>> import torch
        >>> from pyroflows import check_invertible, realnvp
        >>> check_invertible(realnvp(2), torch.linspace(-9, 9, 20).reshape(10, 2)).error < 1e-4
        True
    """
    if not isinstance(flow, TransformModule):
        raise TypeError(f"`flow` is a {type(flow).__name__}, expected a TransformModule")
    check_event(x, flow.event_shape)
    check_finite(x, flow.event_shape)
    z, inverse_ladj = flow.inverse_and_ladj(x)
    back, ladj = flow.forward_and_ladj(z)
    rows, error = (a.abs().reshape(-1, math.prod(flow.event_shape)).amax(-1) for a in (x, x - back))
    errors = error / rows.clamp(min=1), (ladj + inverse_ladj).abs()
    worst = (float(error.max()) for error in errors)
    return Invertibility(*(math.inf if math.isnan(error) else error for error in worst))
