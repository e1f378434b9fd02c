"""Amortised inference in NumPyro: conditional flows fitted to pairs, and in guides."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO

from numpyro_flows import fit, flow_distribution, realnvp

KEY = jax.random.key(0)

# Three noisy readings of two latent variables, whose posterior is normal and correlated.
READS = np.array([[1.0, 0.5], [0.5, 1.0], [1.0, 0.2]], np.float32)
NOISE = 0.5
COVARIANCE = np.linalg.inv(np.eye(2, dtype=np.float32) + READS.T @ READS / NOISE**2)
GAIN = COVARIANCE @ READS.T / NOISE**2
# How far posteriors may be off, in root mean squares over rows.
BOUNDS = {"mean": 0.2, "deviation": 0.1, "correlation": 0.1}


def rows(count, key=KEY):
    key, noise = jax.random.split(key)
    z = jax.random.normal(key, (count, 2))
    return z, z @ READS.T + NOISE * jax.random.normal(noise, (count, 3))


def model(y, batch_size=None):
    with numpyro.plate("rows", len(y), subsample_size=batch_size) as index:
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(z @ READS.T, NOISE).to_event(1), obs=y[index])


def amortised(new_encoder, new_flow):
    def guide(y, batch_size=None):
        encoder = eqx_module("encoder", new_encoder)
        flow = eqx_module("flow", new_flow)
        with numpyro.plate("rows", len(y), subsample_size=batch_size) as index:
            context = jax.vmap(encoder)(y[index])
            numpyro.sample("z", flow_distribution(flow, context=context))

    return guide


def check_posterior(density_of):
    """Compare the posteriors of new rows with the exact ones, in exact standard deviations."""
    _, y = rows(100, jax.random.key(7))
    z = density_of(y).sample(jax.random.key(8), (2000,))
    deviation = jnp.sqrt(jnp.diag(COVARIANCE))
    centred = z - z.mean(0)
    correlation = (centred[..., 0] * centred[..., 1]).mean(0) / deviation.prod()
    errors = {
        "mean": (z.mean(0) - y @ GAIN.T) / deviation,
        "deviation": z.std(0) / deviation - 1,
        "correlation": correlation - COVARIANCE[0, 1] / deviation.prod(),
    }
    found = {name: jnp.sqrt(jnp.square(error).mean()).item() for name, error in errors.items()}
    assert all(found[name] < bound for name, bound in BOUNDS.items()), found


def elbo(encoder, flow, y):
    """Return minus the ELBO as a function of the guide's parameters, always of the same draw."""
    guide = amortised(encoder, flow)
    sites = handlers.trace(handlers.seed(guide, KEY)).get_trace(y).values()
    params = {site["name"]: site["value"] for site in sites if site["type"] == "param"}
    return jax.jit(lambda params: Trace_ELBO().loss(KEY, params, model, guide, y)), params


def test_the_context_of_a_guide_gets_the_gradient_of_the_elbo():
    """All of it, told by steps along each of the encoder's parameters."""
    _, y = rows(6)
    encoder = eqx.nn.Linear(3, 4, key=jax.random.key(1))
    size = {"layers": 2, "activation": "tanh", "context_dim": 4}
    flow = realnvp(2, **size, init_scale=0.3, key=jax.random.key(2))
    loss, params = elbo(encoder, flow, y)
    assert set(params) == {"encoder$params", "flow$params"}
    start, put_back = ravel_pytree(params["encoder$params"])
    found, _ = ravel_pytree(jax.grad(loss)(params)["encoder$params"])

    def moved(step):
        return loss({**params, "encoder$params": put_back(start + step)})

    steps = 1e-2 * np.eye(16, dtype=np.float32)
    expected = np.array([(moved(step) - moved(-step)) / 2e-2 for step in steps])
    assert abs(expected).max() > 5.0
    assert_allclose(found, expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("scale", [0.0, 0.01])
def test_a_new_flow_passes_nothing_on_to_its_context(scale):
    """Why the tutorial starts its guide a little off the identity."""
    _, y = rows(6)
    encoder = eqx.nn.Linear(3, 4, key=jax.random.key(1))
    flow = realnvp(2, context_dim=4, init_scale=scale, key=jax.random.key(2))
    loss, params = elbo(encoder, flow, y)
    found = jax.tree.leaves(jax.grad(loss)(params)["encoder$params"])
    assert (max(jnp.abs(leaf).max() for leaf in found) == 0) == (scale == 0)


def test_a_guide_under_a_subsampled_plate_learns_every_posterior():
    _, y = rows(2000)
    encoder = eqx.nn.MLP(3, 4, width_size=16, depth=1, key=jax.random.key(1))
    flow = realnvp(2, layers=4, hidden=(32,), context_dim=4, init_scale=0.01, key=jax.random.key(2))
    steps = 400
    rate = optax.exponential_decay(2e-2, steps, 0.05)
    svi = SVI(model, amortised(encoder, flow), optax.adam(rate), Trace_ELBO())
    params = svi.run(KEY, steps, y, 200, progress_bar=False).params
    encoder = eqx.combine(params["encoder$params"], encoder)
    flow = eqx.combine(params["flow$params"], flow)
    check_posterior(lambda y: flow_distribution(flow, context=jax.vmap(encoder)(y)))


def test_a_flow_fitted_to_pairs_learns_every_posterior():
    z, y = rows(10_000)
    flow = realnvp(2, layers=4, hidden=(32,), context_dim=3, key=jax.random.key(2))
    settings = {"batch_size": 512, "learning_rate": 1e-2, "schedule": "cosine", "progress": False}
    flow = fit(flow, z, context=y, steps=500, **settings).flow
    check_posterior(lambda y: flow_distribution(flow, context=y))
