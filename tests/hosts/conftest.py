"""Each test finds the hosts as a user does who has just begun."""

import jax
import pyro
import pytest


@pytest.fixture(autouse=True)
def _fresh():
    """Seeded, with an empty parameter store, and in JAX's own precision."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with jax.enable_x64(False):
        yield
    pyro.clear_param_store()
