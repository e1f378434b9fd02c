"""From a batch of the data to what the flow takes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from numpyro_flows.training.sources import Arrays
from pyroflows_common.rows import Batch


class Preparation:
    """A batch in the flow's dtype, augmented and checked.

    Args:
        arrays: what the flow takes.
        augment: function of a batch and a key; None for none.
        like: an array of the flow's dtype.
        key: the run's key.
    """

    def __init__(
        self, arrays: Arrays, augment: Callable[..., Any] | None, like: Array, key: Array
    ) -> None:
        self.arrays, self.dtype = arrays, like.dtype
        self.augment = augment and jax.jit(
            lambda x, *stream: augment(x, functools.reduce(jax.random.fold_in, stream, key))
        )

    def __call__(self, batch: Batch, *stream: int) -> tuple[Any, Any]:
        """Return events and contexts; equal streams have equal random numbers."""
        x, context = batch
        if self.arrays.kind(x) == "f":
            x = self._cast(x)
        elif isinstance(x, np.ndarray):  # JAX has the machine's byte order only
            x = x.astype(x.dtype.newbyteorder("="), copy=False)
        if self.augment is not None:
            x = self.augment(x, *stream)
            if not hasattr(x, "dtype") or self.arrays.kind(x) != "f":
                kind = x.dtype if hasattr(x, "dtype") else type(x).__name__
                raise TypeError(f"`augment` gave {kind}, expected a floating-point jax.Array")
            self.arrays.check_shape(x, "what `augment` gave")
        return self._cast(x), None if context is None else self._cast(context)

    def _cast(self, x: Any) -> Any:
        return x if x.dtype == self.dtype else x.astype(self.dtype)


def filled(x: Any, size: int) -> Any:
    """Return a batch with its last row repeated up to a size."""
    if x is None or len(x) == size:
        return x
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])
