"""Bits per dimension of pixels."""

import math
from collections.abc import Sequence
from typing import Any

from pyroflows_common.checks import as_event_shape


def bits_per_dim(log_prob: Any, event_shape: int | Sequence[int], *, levels: int = 256) -> Any:
    r"""Convert log-densities of dequantised pixels into bits per dimension.

    $$\mathrm{bits} = \log_2 \mathrm{levels} - \frac{\log p(y)}{D \log 2}$$

    Here p is the density of pixels scaled to the unit interval by `dequantize`, where each value
    of a pixel occupies an interval of width `1 / levels`.

    Args:
        log_prob: log-densities in nats, of any shape.
        event_shape: shape of an event, with D dimensions.
        levels: number of values that a pixel can take.

    Returns:
        Bits per dimension, in the shape of `log_prob`.

    Examples:
        >>> from pyroflows_common.bits import bits_per_dim
        >>> bits_per_dim(0.0, (3, 32, 32))
        8.0
    """
    size = math.prod(as_event_shape(event_shape))
    return math.log2(levels) - log_prob / (size * math.log(2))
