"""JAX's and NumPy's arrays as training data."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pyroflows_common import rows


class Arrays(rows.Arrays):
    """What a flow takes, and functions of JAX and NumPy arrays."""

    array_maker = "numpy.array"

    def is_array(self, value: Any) -> bool:
        """Whether a value is a JAX array, or something that NumPy takes for an array."""
        return isinstance(value, Array) or hasattr(value, "__array__")

    def as_array(self, value: Any) -> Any:
        """Return a JAX or NumPy array; nothing is copied."""
        return value if isinstance(value, Array) else np.asarray(value)

    def kind(self, x: Any) -> str:
        """Return NumPy's letter for the kind of a dtype, such as f for floats."""
        return "f" if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype.kind

    def finite(self, x: Any) -> np.ndarray:
        """Tell for each row whether it is finite as numbers of the flow's dtype."""
        with np.errstate(over="ignore"):
            numbers = np.asarray(x).astype(jnp.dtype(self.dtype))
        return np.isfinite(numbers.reshape(len(x), -1)).all(1)

    def take(self, x: Any, index: np.ndarray) -> Any:
        """Return the rows of an array at some places."""
        return _taken(x, index) if isinstance(x, Array) else np.asarray(x[index])

    def stack(self, rows: Sequence[Any]) -> np.ndarray:
        """Return rows as one array."""
        return np.stack([np.asarray(row) for row in rows])

    def as_bytes(self, x: Any) -> bytes:
        """Return an array's numbers as bytes."""
        return np.asarray(x).tobytes()


@jax.jit
def _taken(x: Array, index: Array) -> Array:
    return x[index]
