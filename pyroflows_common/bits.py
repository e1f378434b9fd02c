"""Bits per dimension of pixels."""

import math
from collections.abc import Sequence
from typing import Any

from pyroflows_common.checks import as_event_shape


def bits_per_dim(log_prob: Any, event_shape: int | Sequence[int], *, levels: int = 256) -> Any:
    r"""Turn log-densities of dequantised pixels into bits for each dimension.

    $$\mathrm{bits} = \log_2 \mathrm{levels} - \frac{\log p(y)}{D \log 2}$$

    with p the density of the pixels scaled to the unit interval, as `dequantize` gives them: each
    value of a pixel has an interval of width `1 / levels` of it.

    Args:
        log_prob: log-densities in nats, of any shape.
        event_shape: shape of an event; D is the number of its dimensions.
        levels: number of values that a pixel can have.

    Returns:
        Bits per dimension, in the shape of `log_prob`.

    Examples:
        >>> from pyroflows_common.bits import bits_per_dim
        >>> bits_per_dim(0.0, (3, 32, 32))
        8.0
    """
    size = math.prod(as_event_shape(event_shape))
    return math.log2(levels) - log_prob / (size * math.log(2))
