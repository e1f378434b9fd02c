"""Flows as priors in Pyro's models, and NUTS in a guide's coordinates."""

import copy

import jax
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam, TransformReparam
from torch.testing import assert_close

import numpyro_flows
from pyroflows import AutoRealNVP, fit_prior, flow_distribution, load, realnvp

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")

SIZE = {"layers": 2, "hidden": (8,), "activation": "silu"}
FIX, ERROR = torch.tensor([0.5, 1.0]), 0.7


def bent():
    """A flow far from the identity, with a standardisation; its determinant varies much."""
    torch.manual_seed(1)
    flow = realnvp(2, **SIZE)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.8 * torch.randn_like(parameter))
    flow.layers[-1].standardize(1.0 + torch.randn(100, 2) * torch.tensor([0.5, 2.0]))
    return flow


def located(flow):
    """The model of a place that has the flow as its prior, and a fix."""

    def model():
        place = pyro.sample("place", flow_distribution(flow))
        pyro.sample("fix", dist.Normal(place, ERROR).to_event(1), obs=FIX)

    return model


@torch.no_grad()
def integrated(flow):
    """Mean and deviation of the place, integrated over the base: no inverse and no determinant."""
    side = torch.linspace(-5.0, 5.0, 400)
    z = torch.cartesian_prod(side, side)
    places = flow(z)
    joint = dist.Normal(places, ERROR).to_event(1).log_prob(FIX) - (z**2).sum(-1) / 2.0
    weights = joint.softmax(0)
    mean = weights @ places
    return mean, (weights @ (places - mean) ** 2).sqrt()


def sampled(model, draws=200, warmup=60):
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()


@pytest.mark.parametrize("reparametrised", [False, True])
def test_nuts_agrees_with_integration(reparametrised):
    """Over the flow's events, and over its base by the host's `TransformReparam`."""
    flow = bent().requires_grad_(False)
    model = located(flow)
    if reparametrised:
        model = poutine.reparam(model, {"place": TransformReparam()})
    (draws,) = sampled(model).values()
    places = flow(draws) if reparametrised else draws
    mean, sd = integrated(flow)
    prior = flow_distribution(flow).sample((2000,))
    assert ((mean - prior.mean(0)) / sd).abs().max() > 0.5  # the fix has a say, and the prior
    assert ((mean - FIX) / sd).abs().max() > 0.5
    assert_allclose((places.mean(0) - mean) / sd, np.zeros(2), atol=0.35)
    assert_allclose(places.std(0) / sd, np.ones(2), rtol=0.25)


def test_nuts_with_a_learned_prior():
    """Compiled; the values of the latent vectors have the posterior of the fix, and no more."""
    flow = bent().requires_grad_(False)
    places = flow_distribution(flow).sample((2000,)).clamp(-5, 5)
    size = {"steps": 300, "learning_rate": 5e-3, "progress": False}
    prior = fit_prior({"place": places}, supports={"place": dist.constraints.real}, **size)

    def model():
        pyro.sample("fix", dist.Normal(prior()["place"], ERROR).to_event(1), obs=FIX)

    latent = sampled(model)["prior"]
    found = prior.values(latent)["place"]
    mean, sd = integrated(prior.flow)
    assert_allclose((found.mean(0) - mean) / sd, np.zeros(2), atol=0.35)
    assert_allclose(found.std(0) / sd, np.ones(2), rtol=0.25)


def test_a_frozen_prior_stays_as_it_is():
    """No site and no parameter of the host's, no gradient, no change."""
    flow = bent().requires_grad_(False)
    before = copy.deepcopy(flow.state_dict())
    sites = poutine.trace(located(flow)).get_trace().nodes
    assert {name for name in sites if not name.startswith("_")} == {"place", "fix"}
    sampled(located(flow), draws=5, warmup=5)
    assert not pyro.get_param_store().keys()
    assert all(parameter.grad is None for parameter in flow.parameters())
    assert_close(dict(flow.state_dict()), dict(before), rtol=0, atol=0)


def test_a_prior_of_a_latent_is_trained():
    """Of places with errors: it takes on their mean and loses the errors' share of the variance."""
    flow = realnvp(2, **SIZE, init_scale=0.1)
    places = torch.tensor([2.0, -1.0]) + 0.5 * torch.randn(500, 2)
    fixes = places + torch.randn(500, 2)

    def model():
        pyro.module("flow", flow)
        with pyro.plate("rows", 500):
            place = pyro.sample("place", flow_distribution(flow))
            pyro.sample("fix", dist.Normal(place, 1.0).to_event(1), obs=fixes)

    def guide():  # the posterior, were the prior right
        with pyro.plate("rows", 500):
            loc = (torch.tensor([2.0, -1.0]) / 0.25 + fixes) / 5.0
            pyro.sample("place", dist.Normal(loc, 0.2**0.5).to_event(1))

    state = copy.deepcopy(flow.layers[-1].state_dict())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 2e-2}), Trace_ELBO())
    for _ in range(300):
        svi.step()
    learned = flow_distribution(flow).sample((4000,))
    assert_allclose(learned.mean(0), [2.0, -1.0], atol=0.15)
    assert_allclose(learned.std(0), [0.5, 0.5], atol=0.15)
    assert_close(dict(flow.layers[-1].state_dict()), dict(state))


def test_weights_with_priors():
    """By `poutine.lift`: sites for the parameters alone, and the density is that of the draw."""
    flow, x = bent(), torch.randn(4, 2)
    priors = {
        name: dist.Normal(0.0, 0.5).expand(weight.shape).to_event(weight.dim())
        for name, weight in flow.named_parameters()
    }
    lifted = poutine.lift(pyro.module, prior=priors)

    def model():
        drawn = lifted("flow", copy.deepcopy(flow), update_module_params=True)
        with pyro.plate("rows", 4):
            pyro.sample("x", flow_distribution(drawn), obs=x)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    values = {name: trace.nodes[f"flow$$${name}"]["value"] for name in priors}
    assert {name for name in trace.nodes if name.startswith("flow$$$")} == {
        f"flow$$${name}" for name in values
    }
    assert all((values[name] != weight).any() for name, weight in flow.named_parameters())
    updated = copy.deepcopy(flow)
    updated.load_state_dict(values, strict=False)
    expected = flow_distribution(updated).log_prob(x)
    assert_close(trace.nodes["x"]["log_prob"], expected, rtol=1e-4, atol=1e-4)


def test_a_prior_of_the_other_wing(tmp_path):
    """One that NumPyro has saved: the same potential energy and gradient in both hosts."""
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer.util import potential_energy

    flow = numpyro_flows.realnvp(2, **SIZE, init_scale=0.8, key=jax.random.key(0))
    numpyro_flows.save(flow, tmp_path / "prior.safetensors")
    _, ours, _, _ = initialize_model(located(load(tmp_path / "prior.safetensors")))
    fix = jnp.asarray(FIX.numpy())

    def model():
        place = numpyro.sample("place", numpyro_flows.flow_distribution(flow))
        noise = numpyro.distributions.Normal(place, ERROR).to_event(1)
        numpyro.sample("fix", noise, obs=fix)

    for point in np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32):
        place = torch.tensor(point, requires_grad=True)
        energy = ours({"place": place})
        (slope,) = torch.autograd.grad(energy, place)
        theirs = jax.value_and_grad(lambda p: potential_energy(model, (), {}, {"place": p}))
        value, gradient = theirs(jnp.asarray(point))
        assert_allclose(energy.item(), value, rtol=1e-4)
        assert_allclose(slope, gradient, rtol=1e-3, atol=1e-3)


def test_neutra_is_right_whatever_the_guide():
    """One that is far off: draws come back with the model's moments, on the sites' own supports."""

    def model():
        pyro.sample("level", dist.Normal(1.0, 2.0))
        pyro.sample("rate", dist.Gamma(3.0, 1.0))

    guide = AutoRealNVP(model, layers=2, hidden=(4,))
    guide()
    pyro.set_rng_seed(2)  # a guide whose determinant varies much
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    with torch.no_grad():
        guesses = [guide() for _ in range(200)]
    levels, rates = (torch.stack([g[name] for g in guesses]) for name in ("level", "rate"))
    misses = [(levels.mean() - 1.0) / 2.0, (rates.mean() - 3.0) / 3.0**0.5]
    misses += [levels.std() / 2.0 - 1.0, rates.std() / 3.0**0.5 - 1.0]
    assert max(map(abs, misses)) > 0.3, misses  # the guide itself would not pass
    neutra = NeuTraReparam(guide.requires_grad_(False))
    (z,) = sampled(neutra.reparam(model), draws=400, warmup=100).values()
    assert z.shape == (400, 2)
    draws = neutra.transform_sample(z)
    assert (draws["rate"] > 0).all()
    assert_allclose([draws["level"].mean(), draws["rate"].mean()], [1.0, 3.0], atol=0.4)
    assert_allclose([draws["level"].std(), draws["rate"].std()], [2.0, 3.0**0.5], rtol=0.25)
