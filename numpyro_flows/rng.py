"""Random keys."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Key, UInt32

RandomKey = Key[Array, ""] | UInt32[Array, "2"]  # new style, old style


def is_key(key: object) -> bool:
    """Return whether a value is a random key, new style or old."""
    if not isinstance(key, Array):
        return False
    new = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0
    return new or (key.dtype == np.uint32 and key.shape == (2,))


def check_key(key: object) -> None:
    """Check that `key` is a random key."""
    if not is_key(key):
        raise TypeError(f"`key` is {key!r}, expected one of jax.random.key")


def seed_of(key: RandomKey) -> int:
    """Return an integer seed for NumPy's generators."""
    return int.from_bytes(np.asarray(jax.random.key_data(key)).tobytes(), "big")
