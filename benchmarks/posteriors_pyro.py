"""The models of `posteriors.py` in Pyro. `posteriors_numpyro.py` has the same ones.

All of them run on many particles at once: `Trace_ELBO(num_particles=16, vectorize_particles=True)`.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from plates import GROUPS
from pyro import sample
from pyro.distributions import constraints
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor


class PositiveNormal(dist.Normal):
    """A normal distribution cut off below zero, which Pyro lacks."""

    support = constraints.positive

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - torch.special.log_ndtr(self.loc / self.scale)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        u = torch.rand(self._extended_shape(sample_shape)).to(self.loc).clamp(min=1e-7)
        # Upside down, since the tail that is left is the one that single precision resolves.
        z = -torch.special.ndtri(u * torch.special.ndtr(self.loc / self.scale))
        return (self.loc + self.scale * z).clamp(min=torch.finfo(u.dtype).tiny)

    sample = rsample


def eight_schools_centered(sigma, y=None):
    mu = sample("mu", dist.Normal(0, 5))
    tau = sample("tau", dist.HalfCauchy(5))
    with pyro.plate("school", len(sigma)):
        theta = sample("theta", dist.Normal(mu, tau))
        sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(sigma, y=None):
    mu = sample("mu", dist.Normal(0, 5))
    tau = sample("tau", dist.HalfCauchy(5))
    with pyro.plate("school", len(sigma)):
        eta = sample("eta", dist.Normal(0, 1))
        sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def logistic(x, y=None):
    intercept = sample("intercept", dist.Normal(0, 20))
    slopes = sample("slopes", dist.Normal(0, 10).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(x)):
        sample("y", dist.Bernoulli(logits=intercept + (x * slopes).sum(-1)), obs=y)


def horseshoe(x, y=None):
    dim = x.shape[1]
    sigma = sample("sigma", dist.HalfNormal(2))
    global_scale = sample("global_scale", dist.HalfCauchy(0.1))
    slab = sample("slab", dist.InverseGamma(2, 8))
    local_scale = sample("local_scale", dist.HalfCauchy(1).expand([dim]).to_event(1))
    z = sample("z", dist.Normal(0, 1).expand([dim]).to_event(1))
    scale = global_scale[..., None] * local_scale
    slopes = z * scale / torch.sqrt(1 + scale**2 / slab[..., None])
    with pyro.plate("data", len(x)):
        sample("y", dist.Normal((x * slopes).sum(-1), sigma), obs=y)


def funnel():
    v = sample("v", dist.Normal(0, 3))
    with pyro.plate("dim", 9):
        sample("x", dist.Normal(0, torch.exp(v / 2)))


def trend(year, y=None):
    intercept = sample("intercept", dist.Normal(9.3, 100))
    slope = sample("slope", dist.Normal(0, 0.03))
    sigma = sample("sigma", dist.HalfNormal(5))
    with pyro.plate("data", len(year)):
        sample("y", dist.Normal(intercept + slope * year, sigma), obs=y)


def scales(x, y=None):
    intercept = sample("intercept", dist.Normal(0, 100))
    slopes = sample("slopes", dist.Normal(0, 1e4).expand([x.shape[1]]).to_event(1))
    sigma = sample("sigma", dist.HalfNormal(10))
    with pyro.plate("data", len(x)):
        sample("y", dist.Normal(intercept + (x * slopes).sum(-1), sigma), obs=y)


def groups(group, x, y=None):
    mu = sample("mu", dist.Normal(0, 5))
    tau = sample("tau", dist.HalfNormal(1))
    slope = sample("slope", dist.Normal(0, 2))
    sigma = sample("sigma", dist.HalfNormal(2))
    with pyro.plate("group", GROUPS):
        intercept = sample("intercept", dist.Normal(mu, tau))
    with pyro.plate("data", len(x)):
        sample("y", dist.Normal(intercept[..., group] + slope * x, sigma), obs=y)


def mixture(y):
    # The first mean and the logarithm of the distance to the second one.
    base = dist.Normal(torch.tensor([-1.0, 0.5]), torch.tensor([1.5, 1.0])).to_event(1)
    means = sample("means", dist.TransformedDistribution(base, [OrderedTransform()]))
    sigma = sample("sigma", dist.HalfNormal(2).expand([2]).to_event(1))
    weight = sample("weight", dist.Beta(5, 5))  # of the first
    weights = dist.Categorical(probs=torch.stack([weight, 1 - weight], -1))
    with pyro.plate("data", len(y)):
        sample("y", dist.MixtureSameFamily(weights, dist.Normal(means, sigma)), obs=y)


def squared_exponential(x, length, scale, diagonal) -> Tensor:
    """Return scale^2 exp(-d^2 / (2 length^2)), and `diagonal` added to its diagonal."""
    length, scale, diagonal = (a[..., None, None] for a in (length, scale, diagonal))
    distance = (x[:, None] - x) / length
    return scale**2 * torch.exp(-(distance**2) / 2) + diagonal * torch.eye(len(x)).to(x)


def gp_regression(x, y=None):
    length = sample("length", dist.InverseGamma(5, 5))
    scale = sample("scale", dist.HalfNormal(2))
    sigma = sample("sigma", dist.HalfNormal(1))
    covariance = squared_exponential(x, length, scale, sigma**2 + 1e-6)
    sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)


def gp_poisson(x, y=None):
    length = sample("length", dist.InverseGamma(5, 5))
    scale = sample("scale", dist.HalfNormal(2))
    level = sample("level", dist.Normal(0, 2))
    z = sample("z", dist.Normal(0, 1).expand([len(x)]).to_event(1))
    # A diagonal that grows with the scale keeps single precision safe wherever a guide looks.
    factor = torch.linalg.cholesky(squared_exponential(x, length, scale, 1e-5 * scale**2))
    log_rate = level[..., None] + (factor @ z[..., None])[..., 0]
    sample("y", dist.Poisson(torch.exp(log_rate)).to_event(1), obs=y)


def autoregression(x, y=None):
    intercept = sample("intercept", dist.Normal(0, 10))
    weights = sample("weights", dist.Normal(0, 10).expand([x.shape[1]]).to_event(1))
    sigma = sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(x)):
        sample("y", dist.Normal(intercept + (x * weights).sum(-1), sigma), obs=y)


def garch(y):
    mu = sample("mu", dist.Normal(0, 2))
    variance = sample("variance", dist.LogNormal(0, 1))  # in the long run
    # Of the variance in the long run, the last shock and the last variance.
    weights = sample("weights", dist.Dirichlet(torch.ones(3)))
    long_run, last_shock, last_variance = weights.unbind(-1)
    now, variances = variance, []
    for value in y:
        variances.append(now)
        now = long_run * variance + last_shock * (value - mu) ** 2 + last_variance * now
    scale = torch.stack(variances, -1).sqrt()
    sample("y", dist.Normal(mu[..., None], scale).to_event(1), obs=y)


def volatility(y):
    mu = sample("mu", dist.Normal(0, 2))
    phi = sample("phi", dist.Beta(20, 1.5))
    sigma = sample("sigma", dist.HalfNormal(0.5))
    z = sample("z", dist.Normal(0, 1).expand([len(y)]).to_event(1))
    first, *rest = z.unbind(-1)
    states = [sigma / torch.sqrt(1 - phi**2) * first]
    for shock in rest:
        states.append(phi * states[-1] + sigma * shock)
    log_variance = mu[..., None] + torch.stack(states, -1)
    sample("y", dist.Normal(0, torch.exp(log_variance / 2)).to_event(1), obs=y)


STEPS = 5  # of Runge and Kutta's method, in a year


def lotka_volterra(y):
    # Rates and priors of the Stan case study (Carpenter, 2018).
    alpha = sample("alpha", PositiveNormal(1, 0.5))
    beta = sample("beta", PositiveNormal(0.05, 0.05))
    gamma = sample("gamma", PositiveNormal(1, 0.5))
    delta = sample("delta", PositiveNormal(0.05, 0.05))
    start = sample("start", dist.LogNormal(math.log(10), 1).expand([2]).to_event(1))
    sigma = sample("sigma", dist.LogNormal(-1, 1).expand([2]).to_event(1))
    growth = torch.stack([alpha, -gamma], -1)
    encounter = torch.stack([-beta, delta], -1)

    def slope(state):  # of the logarithms of both populations
        return growth + encounter * torch.exp(state).flip(-1)

    def step(state):
        h = 1 / STEPS
        k1 = slope(state)
        k2 = slope(state + h / 2 * k1)
        k3 = slope(state + h / 2 * k2)
        k4 = slope(state + h * k3)
        return state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    state = torch.log(start)
    states = [state]
    for _ in range(len(y) - 1):
        for _ in range(STEPS):
            state = step(state)
        states.append(state)
    sample("y", dist.LogNormal(torch.stack(states, -2), sigma[..., None, :]).to_event(2), obs=y)
