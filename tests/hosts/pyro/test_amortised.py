"""Amortised inference in Pyro: conditional flows fitted to pairs, and in guides."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.testing import assert_close

from pyroflows import fit, flow_distribution, realnvp

# Three noisy readings of two latent variables, whose posterior is normal and correlated.
READS = torch.tensor([[1.0, 0.5], [0.5, 1.0], [1.0, 0.2]])
NOISE = 0.5
COVARIANCE = torch.linalg.inv(torch.eye(2) + READS.T @ READS / NOISE**2)
GAIN = COVARIANCE @ READS.T / NOISE**2
# How far posteriors may be off, in root mean squares over rows.
BOUNDS = {"mean": 0.2, "deviation": 0.1, "correlation": 0.1}


def rows(count):
    z = torch.randn(count, 2)
    return z, z @ READS.T + NOISE * torch.randn(count, 3)


def model(y, batch_size=None):
    with pyro.plate("rows", len(y), subsample_size=batch_size) as index:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ READS.T, NOISE).to_event(1), obs=y[index])


def amortised(encoder, flow):
    def guide(y, batch_size=None):
        pyro.module("encoder", encoder)
        pyro.module("flow", flow)
        with pyro.plate("rows", len(y), subsample_size=batch_size) as index:
            pyro.sample("z", flow_distribution(flow, context=encoder(y[index])))

    return guide


def check_posterior(density_of):
    """Compare the posteriors of new rows with the exact ones, in exact standard deviations."""
    _, y = rows(100)
    with torch.no_grad():
        z = density_of(y).sample((2000,))
    deviation = COVARIANCE.diag().sqrt()
    centred = z - z.mean(0)
    correlation = (centred[..., 0] * centred[..., 1]).mean(0) / deviation.prod()
    errors = {
        "mean": (z.mean(0) - y @ GAIN.T) / deviation,
        "deviation": z.std(0) / deviation - 1,
        "correlation": correlation - COVARIANCE[0, 1] / deviation.prod(),
    }
    found = {name: error.square().mean().sqrt().item() for name, error in errors.items()}
    assert all(found[name] < bound for name, bound in BOUNDS.items()), found


def test_the_context_of_a_guide_gets_the_gradient_of_the_elbo():
    _, y = rows(6)
    encoder, flow = torch.nn.Linear(3, 4), realnvp(2, layers=2, context_dim=4, init_scale=0.3)
    pyro.set_rng_seed(1)
    Trace_ELBO().differentiable_loss(model, amortised(encoder, flow), y).backward()
    found = [p.grad.clone() for p in encoder.parameters()]

    pyro.set_rng_seed(1)
    base = torch.distributions.Normal(torch.zeros(6, 2), 1.0)
    noise = base.sample()
    z, ladj = flow.condition(encoder(y)).forward_and_ladj(noise)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
    likelihood = torch.distributions.Normal(z @ READS.T, NOISE).log_prob(y).sum()
    loss = base.log_prob(noise).sum() - ladj.sum() - prior - likelihood
    expected = torch.autograd.grad(loss, list(encoder.parameters()))
    assert min(gradient.norm() for gradient in expected) > 0.1
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_new_flow_passes_nothing_on_to_its_context():
    """Why the tutorial starts its guide a little off the identity."""
    _, y = rows(6)
    for scale in (0.0, 0.01):
        encoder, flow = torch.nn.Linear(3, 4), realnvp(2, context_dim=4, init_scale=scale)
        Trace_ELBO().differentiable_loss(model, amortised(encoder, flow), y).backward()
        norm = sum(p.grad.norm() for p in encoder.parameters())
        assert (norm == 0) == (scale == 0)


def test_a_guide_under_a_subsampled_plate_learns_every_posterior():
    _, y = rows(2000)
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    flow = realnvp(2, layers=4, hidden=(32,), context_dim=4, init_scale=0.01)
    guide, steps = amortised(encoder, flow), 400
    rate = {"lr": 2e-2, "lrd": 0.05 ** (1 / steps), "clip_norm": np.inf}
    svi = SVI(model, guide, pyro.optim.ClippedAdam(rate), Trace_ELBO())
    for _ in range(steps):
        svi.step(y, 200)
    check_posterior(lambda y: flow_distribution(flow, context=encoder(y)))


def test_a_flow_fitted_to_pairs_learns_every_posterior():
    z, y = rows(10_000)
    flow = realnvp(2, layers=4, hidden=(32,), context_dim=3)
    settings = {"batch_size": 512, "learning_rate": 1e-2, "schedule": "cosine", "progress": False}
    fit(flow, z, context=y, steps=500, **settings)
    check_posterior(lambda y: flow_distribution(flow, context=y))
