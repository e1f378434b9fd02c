"""Small flows for the tests of NumPyro and JAX."""

import equinox as eqx
import jax
import numpy as np
import pytest

from numpyro_flows import glow, nice, realnvp
from numpyro_flows.tree import trainable

KEY = jax.random.key(0)
FLOWS = {
    "nice": lambda **options: nice(3, layers=2, hidden=(8,), key=KEY, **options),
    "realnvp": lambda **options: realnvp(3, layers=2, hidden=(8,), key=KEY, **options),
    "glow": lambda **options: glow(3, layers=2, hidden=(8,), key=KEY, **options),
}
every_flow = pytest.mark.parametrize("name", FLOWS)


def perturbed(flow, seed=1, scale=0.3):
    parameters, state = eqx.partition(flow, trainable(flow))
    leaves, tree = jax.tree.flatten(parameters)
    rng = np.random.default_rng(seed)
    noisy = [(p + scale * rng.standard_normal(p.shape)).astype(p.dtype) for p in leaves]
    noisy = jax.device_put(noisy)
    return eqx.combine(jax.tree.unflatten(tree, noisy), state)


def make(name, **options):
    return perturbed(FLOWS[name](**options))


def normal(shape, seed=2):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype("float32"))
