"""Flows as priors in NumPyro's models, and NUTS in a guide's coordinates."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import torch
from jax.tree_util import keystr, tree_leaves_with_path
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from numpyro.contrib.module import eqx_module, random_eqx_module
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.reparam import NeuTraReparam, TransformReparam
from numpyro.infer.util import potential_energy

import pyroflows
from numpyro_flows import AutoRealNVP, fit_prior, flow_distribution, load, realnvp
from numpyro_flows.tree import trainable

SIZE = {"layers": 2, "hidden": (8,), "activation": "silu"}
FIX, ERROR = np.array([0.5, 1.0], np.float32), 0.7


def noisy(tree, seed, scale):
    """The arrays of a tree, each with noise."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


def bent():
    """A flow far from the identity, with a standardisation; its determinant varies much."""
    flow = realnvp(2, **SIZE, key=jax.random.key(0))
    x = 1.0 + jax.random.normal(jax.random.key(1), (100, 2)) * jnp.array([0.5, 2.0])
    flow = eqx.tree_at(lambda f: f.layers[-1], flow, flow.layers[-1].standardize(x))
    parameters, state = eqx.partition(flow, trainable(flow))
    return eqx.combine(noisy(parameters, 1, 1.2), state)


def located(flow):
    """The model of a place that has the flow as its prior, and a fix."""

    def model():
        place = numpyro.sample("place", flow_distribution(flow))
        numpyro.sample("fix", dist.Normal(place, ERROR).to_event(1), obs=FIX)

    return model


@jax.jit
def integrated(flow):
    """Mean and deviation of the place, integrated over the base: no inverse and no determinant."""
    side = jnp.linspace(-5.0, 5.0, 400)
    z = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
    places = flow(z)
    joint = dist.Normal(places, ERROR).to_event(1).log_prob(FIX) - (z**2).sum(-1) / 2.0
    weights = jax.nn.softmax(joint)
    mean = weights @ places
    return mean, jnp.sqrt(weights @ (places - mean) ** 2)


def sampled(model, draws=1500, warmup=300):
    mcmc = MCMC(NUTS(model), num_samples=draws, num_warmup=warmup, progress_bar=False)
    mcmc.run(jax.random.key(3))
    return mcmc.get_samples()


def test_nuts_with_a_learned_prior():
    """The prior as an argument of the model; its values have the posterior of the fix."""
    places = flow_distribution(bent()).sample(jax.random.key(0), (2000,)).clip(-5, 5)
    size = {"steps": 300, "learning_rate": 5e-3, "progress": False}
    supports = {"place": dist.constraints.real}
    prior = fit_prior({"place": places}, supports=supports, **size)

    def model(prior):
        numpyro.sample("fix", dist.Normal(prior()["place"], ERROR).to_event(1), obs=FIX)

    options = {"jit_model_args": True, "progress_bar": False}
    mcmc = MCMC(NUTS(model), num_samples=1500, num_warmup=300, **options)
    mcmc.run(jax.random.key(3), prior)
    found = mcmc.get_samples()["place"]
    mean, sd = integrated(prior.flow)
    assert_allclose((found.mean(0) - mean) / sd, np.zeros(2), atol=0.2)
    assert_allclose(found.std(0) / sd, np.ones(2), rtol=0.15)


@pytest.mark.parametrize("reparametrised", [False, True])
def test_nuts_agrees_with_integration(reparametrised):
    """Over the flow's events, and over its base by the host's `TransformReparam`."""
    flow = bent()
    model = located(flow)
    if reparametrised:
        model = handlers.reparam(model, {"place": TransformReparam()})
    draws = sampled(model)
    assert draws.keys() == ({"place", "place_base"} if reparametrised else {"place"})
    places = draws["place"]
    mean, sd = integrated(flow)
    prior = flow_distribution(flow).sample(jax.random.key(4), (2000,))
    assert abs((mean - prior.mean(0)) / sd).max() > 0.5  # the fix has a say, and the prior
    assert abs((mean - FIX) / sd).max() > 0.5
    assert_allclose((places.mean(0) - mean) / sd, np.zeros(2), atol=0.2)
    assert_allclose(places.std(0) / sd, np.ones(2), rtol=0.15)


def test_a_frozen_prior_is_no_site():
    """Nor are its arrays parameters of the host's."""
    model = handlers.seed(located(bent()), 0)
    assert handlers.trace(model).get_trace().keys() == {"place", "fix"}


def test_a_prior_of_a_latent_is_trained():
    """Of places with errors: it takes on their mean and loses the errors' share of the variance."""
    start = realnvp(2, **SIZE, init_scale=0.1, key=jax.random.key(0))
    centre = jnp.array([2.0, -1.0])
    places = centre + 0.5 * jax.random.normal(jax.random.key(1), (500, 2))
    fixes = places + jax.random.normal(jax.random.key(2), (500, 2))

    def model():
        flow = eqx_module("flow", start)
        with numpyro.plate("rows", 500):
            place = numpyro.sample("place", flow_distribution(flow))
            numpyro.sample("fix", dist.Normal(place, 1.0).to_event(1), obs=fixes)

    def guide():  # the posterior, were the prior right
        with numpyro.plate("rows", 500):
            loc = (centre / 0.25 + fixes) / 5.0
            numpyro.sample("place", dist.Normal(loc, 0.2**0.5).to_event(1))

    svi = SVI(model, guide, numpyro.optim.Adam(2e-2), Trace_ELBO())
    run = svi.run(jax.random.key(3), 300, progress_bar=False)
    flow = eqx.combine(run.params["flow$params"], start)
    learned = flow_distribution(flow).sample(jax.random.key(4), (4000,))
    assert_allclose(learned.mean(0), centre, atol=0.15)
    assert_allclose(learned.std(0), [0.5, 0.5], atol=0.15)
    assert_array_equal(flow.layers[-1].loc, start.layers[-1].loc)


def test_weights_with_priors():
    """By name: sites for the parameters alone, and the density is that of the draw."""
    flow, x = bent(), jax.random.normal(jax.random.key(5), (4, 2))
    leaves = tree_leaves_with_path(eqx.filter(flow, trainable(flow)))
    priors = {keystr(path)[1:]: dist.Normal(0.0, 0.5) for path, _ in leaves}

    def model():
        drawn = random_eqx_module("flow", flow, prior=priors)
        with numpyro.plate("rows", 4):
            numpyro.sample("x", flow_distribution(drawn), obs=x)

    trace = handlers.trace(handlers.seed(model, 0)).get_trace()
    drawn = {name for name, site in trace.items() if site["type"] == "sample"}
    assert drawn == {"x"} | {f"flow/{name}" for name in priors}
    values = [trace[f"flow/{keystr(path)[1:]}"]["value"] for path, _ in leaves]
    parameters, state = eqx.partition(flow, trainable(flow))
    updated = eqx.combine(jax.tree.unflatten(jax.tree.structure(parameters), values), state)
    expected = flow_distribution(updated).log_prob(x)
    assert abs(expected - flow_distribution(flow).log_prob(x)).min() > 1e-3
    assert_allclose(trace["x"]["fn"].log_prob(x), expected, rtol=1e-4, atol=1e-4)


def test_a_prior_of_the_other_wing(tmp_path):
    """One that Pyro has saved: the same potential energy and gradient in both hosts."""
    import pyro
    from pyro.infer.mcmc.util import initialize_model

    torch.manual_seed(0)
    flow = pyroflows.realnvp(2, **SIZE, init_scale=0.8)
    pyroflows.save(flow, tmp_path / "prior.safetensors")
    model = located(load(tmp_path / "prior.safetensors"))
    fix = torch.tensor(FIX)

    def theirs():
        place = pyro.sample("place", pyroflows.flow_distribution(flow))
        pyro.sample("fix", pyro.distributions.Normal(place, ERROR).to_event(1), obs=fix)

    _, energy, _, _ = initialize_model(theirs)
    ours = jax.value_and_grad(lambda p: potential_energy(model, (), {}, {"place": p}))
    for point in np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32):
        place = torch.tensor(point, requires_grad=True)
        expected = energy({"place": place})
        (slope,) = torch.autograd.grad(expected, place)
        value, gradient = ours(jnp.asarray(point))
        assert_allclose(value, expected.item(), rtol=1e-4)
        assert_allclose(gradient, slope, rtol=1e-3, atol=1e-3)


def test_neutra_is_right_whatever_the_guide():
    """One that is far off: draws come back with the model's moments, on the sites' own supports."""

    def model():
        numpyro.sample("level", dist.Normal(1.0, 2.0))
        numpyro.sample("rate", dist.Gamma(3.0, 1.0))

    guide = AutoRealNVP(model, layers=2, hidden=(4,), init="location")
    svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0)))
    params = noisy(params, 2, 0.3)
    guess = Predictive(guide, params=params, num_samples=500)(jax.random.key(2))
    misses = [guess["level"].std() / 2.0 - 1.0, guess["rate"].std() / 3.0**0.5 - 1.0]
    assert max(map(abs, misses)) > 0.3, misses  # the guide itself would not pass
    neutra = NeuTraReparam(guide, params)
    draws = sampled(neutra.reparam(model))
    (z,) = (value for name, value in draws.items() if name.endswith("shared_latent"))
    assert z.shape == (1500, 2)
    draws = neutra.transform_sample(z)
    assert (draws["rate"] > 0).all()
    assert_allclose([draws["level"].mean(), draws["rate"].mean()], [1.0, 3.0], atol=0.3)
    assert_allclose([draws["level"].std(), draws["rate"].std()], [2.0, 3.0**0.5], rtol=0.15)
