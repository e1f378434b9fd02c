"""A flexible bijection of one number, which no coupling can transform."""

from collections.abc import Sequence

from numpyro_flows.layers.chain import Chain
from numpyro_flows.layers.linear import LowerTriangular
from numpyro_flows.layers.tails import SinhArcsinh
from numpyro_flows.rng import RandomKey
from numpyro_flows.transform import TransformModule
from numpyro_flows.tree import replace
from pyroflows_common.recipe import Recipe


def monotone(
    event_shape: int | Sequence[int] = 1, *, key: RandomKey | None = None
) -> TransformModule:
    """Build a learned monotone function of one number, initially the identity.

    Args:
        event_shape: 1 or `(1,)`.
        key: without use; all builders take one.
    """
    layers = [layer for _ in range(4) for layer in (SinhArcsinh(1), LowerTriangular(1))]
    return replace(Chain(layers), recipe=Recipe("monotone", (("event_shape", (1,)),)))
