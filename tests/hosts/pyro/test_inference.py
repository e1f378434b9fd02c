"""Flows inside Pyro's inference: densities, priors, guides and random weights."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch.func import vmap
from torch.testing import assert_close

from pyroflows import (
    AffineCoupling,
    flow_distribution,
    realnvp,
)
from tests.hosts.pyro.flows import FLOWS, IMAGES, make


def skewed(rows=300):
    z = torch.randn(rows, 3)
    return torch.stack([z[:, 0], z[:, 0] ** 2 + 0.3 * z[:, 1], 2 + 0.5 * z[:, 2]], -1)


def learn(model, guide, steps=60, rate=1e-2, loss=None):
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": rate}), loss or Trace_ELBO())
    return np.array([svi.step() for _ in range(steps)])


@pytest.mark.parametrize(("name", "batch_size"), [("nice", 50), ("realnvp", None), ("glow", 50)])
def test_svi_learns_a_density_in_a_plate(name, batch_size):
    flow, data = FLOWS[name](), skewed()

    def model():
        pyro.module("flow", flow)
        with pyro.plate("data", len(data), subsample_size=batch_size) as rows:
            pyro.sample("x", flow_distribution(flow), obs=data[rows])

    losses = learn(model, lambda: None)
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()
    learned = flow_distribution(flow).log_prob(data).mean().detach()
    assert learned > flow_distribution(FLOWS[name]()).log_prob(data).mean()
    stored = set(pyro.get_param_store())
    assert {f"flow$$${key}" for key, _ in flow.named_parameters()} <= stored


@pytest.mark.parametrize(("name", "particles"), [("nice", 1), ("realnvp", 3), ("glow", 1)])
def test_svi_learns_a_guide(name, particles):
    loss = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    flow, target = FLOWS[name](), dist.Normal(torch.tensor([1.0, -2.0, 0.5]), 0.3).to_event(1)

    def model():
        pyro.sample("z", target)

    def guide():
        pyro.module("flow", flow)
        density = flow_distribution(flow)
        assert density.has_rsample
        pyro.sample("z", density)

    losses = learn(model, guide, steps=250, rate=3e-2, loss=loss)
    assert losses[-20:].mean() < 0.2 * losses[:5].mean()
    assert_close(flow_distribution(flow).sample((500,)).mean(0), target.mean, atol=0.4, rtol=0)


def test_an_amortised_guide_learns_through_its_context():
    flow = realnvp(2, layers=2, hidden=(16,), context_dim=2)
    encoder = torch.nn.Linear(2, 2)
    data = 3.0 * torch.randn(64, 2)

    def model():
        with pyro.plate("rows", 64):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.3).to_event(1), obs=data)

    def guide():
        pyro.module("flow", flow)
        pyro.module("encoder", encoder)
        with pyro.plate("rows", 64):
            pyro.sample("z", flow_distribution(flow, context=encoder(data)))

    losses = learn(model, guide, steps=200, rate=2e-2)
    assert losses[-10:].mean() < 0.3 * losses[:5].mean()
    z = flow_distribution(flow, context=encoder(data)).sample()
    assert np.corrcoef(z.flatten(), data.flatten())[0, 1] > 0.9


def test_predictive_and_condition():
    flow = make("realnvp")

    def model():
        return pyro.sample("x", flow_distribution(flow))

    draws = Predictive(model, num_samples=7)()["x"]
    assert draws.shape == (7, 3)
    trace = poutine.trace(pyro.condition(model, {"x": draws[0]})).get_trace()
    assert_close(trace.log_prob_sum(), flow_distribution(flow).log_prob(draws[0]))


def test_nuts_with_a_frozen_flow_as_prior():
    flow = make("realnvp").requires_grad_(False)

    def model():
        z = pyro.sample("z", flow_distribution(flow))
        pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=torch.tensor([0.5, -0.5, 1.0]))

    mcmc = MCMC(NUTS(model), num_samples=30, warmup_steps=30, disable_progbar=True)
    mcmc.run()
    samples = mcmc.get_samples()["z"]
    assert_close(samples.mean(0), torch.tensor([0.5, -0.5, 1.0]), atol=0.15, rtol=0)
    assert samples.std(0).max() < 0.3


def test_as_an_attribute_of_a_pyro_module():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = realnvp(3, layers=2, hidden=(8,))

        def forward(self, data):
            with pyro.plate("rows", len(data)):
                return pyro.sample("x", flow_distribution(self.flow), obs=data)

    model, data = Model(), skewed()
    losses = learn(lambda: model(data), lambda data=None: None)
    assert losses[-5:].mean() < losses[:5].mean()
    assert any(key.startswith("flow") for key in pyro.get_param_store())


@pytest.mark.parametrize("name", ["glow"])
def test_a_prior_over_images(name):
    """A noisy image, explained by one of the flow's: SVI and a plate."""
    flow = IMAGES[name]().requires_grad_(False)
    for parameter in flow.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    density = flow_distribution(flow)
    seen = density.sample((6,)) + 0.1

    def model():
        with pyro.plate("images", 6):
            image = pyro.sample("image", density)
            pyro.sample("noisy", dist.Normal(image, 0.5).to_event(3), obs=seen)

    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = np.array([svi.step() for _ in range(60)])
    assert np.isfinite(losses).all()
    assert losses[-5:].mean() < losses[:5].mean()
    with pyro.validation_enabled(False):
        vmapped = vmap(density.log_prob)(seen)
    assert_close(vmapped, density.log_prob(seen), rtol=1e-4, atol=1e-4)


# Random weights


class BayesianNet(PyroModule):
    """A conditioner whose weights are random variables."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](n_in, n_out, bias=False)
        self.linear.weight = PyroSample(dist.Normal(0.0, 0.5).expand([n_out, n_in]).to_event(2))

    def forward(self, x):
        return torch.tanh(self.linear(x))


def test_random_weights_never_go_stale():
    flow = AffineCoupling(4, network=BayesianNet(2, 4)).requires_grad_(False)
    density = flow_distribution(flow)
    z, weights = torch.randn(5, 4), 0.5 * torch.randn(2, 4, 2)
    given = [{"linear.weight": weight} for weight in weights]

    def encode(x):
        return flow.inv(x), density.log_prob(x)

    kept = pyro.condition(flow, given[0])(z)
    same, other = (pyro.condition(encode, values)(kept) for values in given)
    assert_close(same[0], z)
    for ours, theirs in zip(other, pyro.condition(encode, given[1])(kept.clone()), strict=True):
        assert_close(ours, theirs)
    assert abs(same[1] - other[1]).min() > 1e-4
    assert abs(density.log_prob(kept) - density.log_prob(kept)).max() > 1e-4


@pytest.mark.filterwarnings("ignore:.*random_module:FutureWarning")
def test_random_module():
    """Priors on all weights, by the host's own means."""
    flow, x = FLOWS["realnvp"](), torch.randn(5, 3)

    def prior(name, parameter):
        return dist.Normal(torch.zeros_like(parameter), 0.3).to_event(parameter.ndim)

    priors = {name: prior(name, value) for name, value in flow.named_parameters()}

    def bayesian():
        lifted = pyro.random_module("flow", flow, priors)()
        with pyro.plate("rows", 5):
            pyro.sample("x", flow_distribution(lifted), obs=x)

    trace = poutine.trace(bayesian).get_trace()
    drawn = {name: trace.nodes[f"flow$$${name}"]["value"] for name in dict(flow.named_parameters())}
    updated = copy.deepcopy(flow)
    updated.load_state_dict(drawn, strict=False)
    trace.compute_log_prob()
    expected = flow_distribution(updated).log_prob(x)
    assert_close(trace.nodes["x"]["log_prob"], expected, rtol=1e-4, atol=1e-4)


def test_priors_on_weights():
    flow = realnvp(2, layers=2, hidden=(4,))
    to_pyro_module_(flow)
    for module in flow.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = parameter.shape
            prior = dist.Normal(torch.zeros(shape), torch.ones(shape)).to_event(len(shape))
            delattr(module, name)
            setattr(module, name, PyroSample(prior))
    x = torch.randn(5, 2)

    def model():
        pyro.sample("x", flow_distribution(flow, "normal").to_event(0), obs=x)

    values = {float(pyro.poutine.trace(model).get_trace().log_prob_sum()) for _ in range(3)}
    assert len(values) == 3
