"""Flows inside NumPyro's inference: densities, priors, guides and random weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.module import eqx_module, random_eqx_module
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

from numpyro_flows import (
    flow_distribution,
    glow,
    realnvp,
)
from tests.hosts.numpyro.flows import FLOWS, KEY, make, normal, perturbed


def skewed(rows=300):
    z = normal((rows, 3))
    return jnp.stack([z[:, 0], z[:, 0] ** 2 + 0.3 * z[:, 1], 2 + 0.5 * z[:, 2]], -1)


def learn(model, guide, steps=60, rate=1e-2, loss=None):
    svi = SVI(model, guide, optax.adam(rate), loss or Trace_ELBO())
    return svi.run(jax.random.key(3), steps, progress_bar=False)


@pytest.mark.parametrize(("name", "batch_size"), [("realnvp", None), ("glow", 50)])
def test_svi_learns_a_density_in_a_plate(name, batch_size):
    flow, data = FLOWS[name](), skewed()

    def model():
        learned = eqx_module("flow", flow)
        with numpyro.plate("data", len(data), subsample_size=batch_size) as rows:
            numpyro.sample("x", flow_distribution(learned), obs=data[rows])

    result = learn(model, lambda: None)
    assert result.losses[-5:].mean() < 0.9 * result.losses[:5].mean()
    with handlers.seed(rng_seed=0), handlers.substitute(data=result.params):
        learned = eqx_module("flow", flow)
    after = flow_distribution(learned).log_prob(data).mean()
    assert after > flow_distribution(flow).log_prob(data).mean() + 0.1


@pytest.mark.parametrize(("name", "particles"), [("realnvp", 3), ("glow", 1)])
def test_svi_learns_a_guide(name, particles):
    flow, target = FLOWS[name](), dist.Normal(jnp.array([1.0, -2.0, 0.5]), 0.3).to_event(1)

    def model():
        numpyro.sample("z", target)

    def guide():
        density = flow_distribution(eqx_module("flow", flow))
        assert density.has_rsample
        numpyro.sample("z", density)

    result = learn(model, guide, steps=250, rate=3e-2, loss=Trace_ELBO(num_particles=particles))
    assert result.losses[-20:].mean() < 0.2 * result.losses[:5].mean()
    z = Predictive(guide, params=result.params, num_samples=300)(jax.random.key(1))["z"]
    assert_allclose(z.mean(0), target.mean, atol=0.4)


def test_an_amortised_guide_learns_through_its_context():
    flow = realnvp(2, layers=2, hidden=(16,), context_dim=2, key=KEY)
    encoder = eqx.nn.Linear(2, 2, key=KEY)
    data = 3.0 * normal((64, 2))

    def model():
        with numpyro.plate("rows", 64):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 3.0).to_event(1))
            numpyro.sample("x", dist.Normal(z, 0.3).to_event(1), obs=data)

    def guide():
        learned, net = eqx_module("flow", flow), eqx_module("encoder", encoder)
        with numpyro.plate("rows", 64):
            numpyro.sample("z", flow_distribution(learned, context=jax.vmap(net)(data)))

    result = learn(model, guide, steps=200, rate=2e-2)
    assert result.losses[-10:].mean() < 0.3 * result.losses[:5].mean()
    z = Predictive(guide, params=result.params, num_samples=1)(jax.random.key(1))["z"][0]
    assert np.corrcoef(z.flatten(), data.flatten())[0, 1] > 0.9


def test_random_module():
    """Priors on all weights, by the host's own means."""
    flow, x = FLOWS["realnvp"](), normal((5, 3))

    def model():
        lifted = random_eqx_module("flow", flow, prior=dist.Normal(0.0, 0.3))
        with numpyro.plate("rows", 5):
            numpyro.sample("x", flow_distribution(lifted), obs=x)

    trace = handlers.trace(handlers.seed(model, 0)).get_trace()
    drawn = [site for key, site in trace.items() if key.startswith("flow/")]
    assert any(site["type"] == "sample" for site in drawn)
    total, _ = log_density(handlers.seed(model, 0), (), {}, {})
    assert jnp.isfinite(total)
    other, _ = log_density(handlers.seed(model, 1), (), {}, {})
    assert abs(total - other) > 1e-3


def test_predictive_and_condition():
    flow = make("realnvp")

    def model():
        return numpyro.sample("x", flow_distribution(flow))

    draws = Predictive(model, num_samples=7)(KEY)["x"]
    assert draws.shape == (7, 3)
    total, _ = log_density(model, (), {}, {"x": draws[0]})
    assert_allclose(total, flow_distribution(flow).log_prob(draws[0]), rtol=1e-5)


def test_nuts_with_a_flow_as_prior():
    flow = make("realnvp")

    def model():
        z = numpyro.sample("z", flow_distribution(flow))
        numpyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=jnp.array([0.5, -0.5, 1.0]))

    mcmc = MCMC(NUTS(model), num_samples=100, num_warmup=100, progress_bar=False)
    mcmc.run(jax.random.key(0))
    samples = mcmc.get_samples()["z"]
    assert_allclose(samples.mean(0), [0.5, -0.5, 1.0], atol=0.15)
    assert samples.std(0).max() < 0.3


def test_a_prior_over_images():
    """A noisy image, explained by one of the flow's: SVI and a plate."""
    flow = glow((1, 2, 4), levels=1, steps=1, channels=3, key=KEY)
    density = flow_distribution(perturbed(flow, scale=0.1))
    seen = density.sample(KEY, (6,)) + 0.1

    def model():
        with numpyro.plate("images", 6):
            image = numpyro.sample("image", density)
            numpyro.sample("noisy", dist.Normal(image, 0.5).to_event(3), obs=seen)

    svi = SVI(model, AutoNormal(model), optax.adam(1e-2), Trace_ELBO())
    result = svi.run(KEY, 60, progress_bar=False)
    assert jnp.isfinite(result.losses).all()
    assert result.losses[-5:].mean() < result.losses[:5].mean()
    assert density.log_prob(seen).shape == (6,)
    vmapped = jax.vmap(density.log_prob)(seen)
    assert_allclose(vmapped, density.log_prob(seen), rtol=1e-4, atol=1e-4)
    assert_allclose(jax.jit(density.log_prob)(seen), vmapped, rtol=1e-4, atol=1e-4)
