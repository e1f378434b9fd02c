"""Random keys and initial weights."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Key, UInt32

from numpyro_flows.tree import rearranged

RandomKey = Key[Array, ""] | UInt32[Array, "2"]  # new style, old style

# JAX compiles a program for each shape that is drawn. With its default generator, element i of a
# draw depends on the key and i alone, so the beginning of a long draw is the short one: draws of
# few lengths serve all shapes.
KEYS, NUMBERS = 64, 4096


def check_key(key: object) -> None:
    """Check that `key` is a random key."""
    if not isinstance(key, RandomKey):
        raise TypeError(f"`key` is {key!r}, expected one of jax.random.key")


def seed_of(key: RandomKey) -> int:
    """Return an integer seed for NumPy's generators."""
    return int.from_bytes(np.asarray(jax.random.key_data(key)).tobytes(), "big")


def split(key: RandomKey, count: int) -> list[RandomKey]:
    """Return `count` keys, by default those of `jax.random.split`."""
    keys = jax.random.split(key, _rounded(count, KEYS))
    return [keys[i] for i in range(count)]


def uniform(key: RandomKey, shape: Sequence[int], bound: float) -> Float[Array, "..."]:
    """Draw weights from U(−bound, bound)."""
    return _drawn(lambda n: jax.random.uniform(key, (n,), minval=-bound, maxval=bound), shape)


def weight_and_bias(key: RandomKey, shape: Sequence[int]) -> tuple[Array, Array]:
    """Draw PyTorch's initial weight `(outputs, inputs, …)` and bias of a layer."""
    bound = 1.0 / math.sqrt(max(math.prod(shape[1:]), 1))
    weight_key, bias_key = split(key, 2)
    return uniform(weight_key, shape, bound), uniform(bias_key, shape[:1], bound)


def normal(key: RandomKey, shape: Sequence[int], std: float = 1.0) -> Float[Array, "..."]:
    """Draw weights from N(0, std²)."""
    return _drawn(lambda n: std * jax.random.normal(key, (n,)), shape)


def _drawn(draw: Callable[[int], Array], shape: Sequence[int]) -> Array:
    size = math.prod(shape)
    return rearranged(lambda _, long: long[:size].reshape(shape), draw(_rounded(size, NUMBERS)))


def _rounded(count: int, least: int) -> int:
    """Round up to a power of two that is at least `least`."""
    return max(least, 1 << (count - 1).bit_length())
