"""Training data in JAX and NumPy arrays."""

from collections.abc import Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_flows.support import inside
from pyroflows_common import rows
from pyroflows_common.rows import HostArray, SupportsArray

# Both are input to JAX: it moves a NumPy array to its device when a function is called.
AnyArray = Array | np.ndarray


class Arrays(rows.Arrays):
    """The input that a flow takes, and functions of JAX and NumPy arrays."""

    array_maker = "numpy.array"

    def is_array(self, value: object) -> TypeGuard[SupportsArray]:
        """Return whether a value is a JAX array, or an object that NumPy converts to an array."""
        return isinstance(value, Array) or hasattr(value, "__array__")

    def as_array(self, value: SupportsArray) -> AnyArray:
        """Return a JAX or NumPy array, without a copy."""
        return value if isinstance(value, Array) else np.asarray(value)

    def kind(self, x: HostArray) -> str:
        """Return NumPy's letter for the kind of the array's dtype, such as f for floats."""
        return "f" if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype.kind

    def finite(self, x: HostArray) -> np.ndarray:
        """Return for each row whether it is finite in the flow's dtype."""
        return np.isfinite(self._cast(x).reshape(len(x), -1)).all(1)

    def inside(self, x: HostArray) -> np.ndarray:
        """Return for each row whether it lies inside the support in the flow's dtype."""
        return np.asarray(inside(jnp.asarray(self._cast(x)), self.support))

    def numbers(self, x: HostArray) -> np.ndarray:
        """Return an array as NumPy's, in double precision."""
        return np.asarray(x, float)

    def take(self, x: HostArray, index: np.ndarray) -> AnyArray:
        """Return the rows of an array with these indices."""
        return _taken(x, index) if isinstance(x, Array) else np.asarray(x[index])

    def stack(self, rows: Sequence[HostArray]) -> np.ndarray:
        """Return rows as one array."""
        return np.stack([np.asarray(row) for row in rows])

    def as_bytes(self, x: HostArray) -> bytes:
        """Return the numbers of an array as bytes."""
        return np.asarray(x).tobytes()

    def _cast(self, x: HostArray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(jnp.dtype(self.dtype))


@jax.jit
def _taken(x: Array, index: Array) -> Array:
    return x[index]
