"""Preparation of a batch of data for the flow: its dtype, device and augmentation."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from numpyro_flows.rng import RandomKey
from numpyro_flows.training.sources import AnyArray, Arrays
from pyroflows_common.rows import Batch, HostArray

# Events, and their contexts and weights if any.
Prepared = tuple[
    Float[AnyArray, "n ..."], Float[AnyArray, "n context_dim"] | None, Float[AnyArray, " n"] | None
]
# An array of rows, or none.
Rows = TypeVar("Rows", AnyArray, AnyArray | None)


class Preparation:
    """A function that casts batches to the dtype of an array, augments and checks them."""

    def __init__(
        self,
        arrays: Arrays,
        augment: Callable[[Array, RandomKey], Array] | None,
        like: Array,
        key: RandomKey,
    ) -> None:
        self.arrays, self.dtype = arrays, like.dtype
        self.augment = augment and jax.jit(
            lambda x, *stream: augment(x, functools.reduce(jax.random.fold_in, stream, key))
        )

    def __call__(self, batch: Batch, *stream: int) -> Prepared:
        """Return events, contexts and weights; the stream determines the random numbers."""
        rows, *rest = batch
        x = self.arrays.as_array(rows)
        if self.arrays.kind(x) == "f":
            x = self._cast(x)
        elif isinstance(x, np.ndarray):  # JAX supports the native byte order only
            x = x.astype(x.dtype.newbyteorder("="), copy=False)
        if self.augment is not None:
            x = self.augment(x, *stream)
            if not hasattr(x, "dtype") or self.arrays.kind(x) != "f":
                kind = x.dtype if hasattr(x, "dtype") else type(x).__name__
                raise TypeError(f"`augment` gave {kind}, expected a floating-point jax.Array")
            self.arrays.check_shape(x, "what `augment` gave")
            self.arrays.check_support(x, "a batch of `data` after `augment`")
        context, weights = (None if part is None else self._cast(part) for part in rest)
        return self._cast(x), context, weights

    def _cast(self, rows: HostArray) -> AnyArray:
        x = self.arrays.as_array(rows)
        return x if x.dtype == self.dtype else x.astype(self.dtype)


def filled(x: Rows, size: int) -> Rows:
    """Return rows with the last one repeated until there are `size` of them."""
    if x is None or len(x) == size:
        return x
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])
