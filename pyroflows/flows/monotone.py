"""A flexible bijection of one number, which no coupling can transform."""

from collections.abc import Sequence

from pyroflows.layers.chain import Chain
from pyroflows.layers.linear import LowerTriangular
from pyroflows.layers.tails import SinhArcsinh
from pyroflows.transform import TransformModule
from pyroflows_common.recipe import Recipe


def monotone(event_shape: int | Sequence[int] = 1) -> TransformModule:
    """Build a learned monotone function of one number, initially the identity.

    Args:
        event_shape: 1 or `(1,)`.
    """
    flow = Chain([layer for _ in range(4) for layer in (SinhArcsinh(1), LowerTriangular(1))])
    flow.recipe = Recipe("monotone", (("event_shape", (1,)),))
    return flow
