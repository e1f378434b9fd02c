"""Draws of initial weights: those of JAX, from programs of few lengths."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from numpyro_flows.rng import NUMBERS, normal, split, uniform

KEYS = [jax.random.key(3), jax.random.PRNGKey(3)]
every_key = pytest.mark.parametrize("key", KEYS, ids=["new", "old"])


@every_key
@pytest.mark.parametrize("count", [1, 3, 100])
def test_keys(key, count):
    found = np.stack([jax.random.key_data(one) for one in split(key, count)])
    assert_array_equal(found, jax.random.key_data(jax.random.split(key, count)))


@every_key
@pytest.mark.parametrize("shape", [(), (0,), (3, 2), (NUMBERS + 1,)], ids=str)
def test_numbers(key, shape):
    expected = jax.random.uniform(key, shape, minval=-0.3, maxval=0.3)
    assert_array_equal(uniform(key, shape, 0.3), expected)
    assert_array_equal(normal(key, shape), jax.random.normal(key, shape))
    assert_array_equal(jax.jit(lambda key: normal(key, shape))(key), normal(key, shape))
