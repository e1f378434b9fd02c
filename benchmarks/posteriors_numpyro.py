"""The models of `posteriors.py` in NumPyro. `posteriors_pyro.py` has the same ones."""

import math

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import sample
from numpyro.distributions.transforms import OrderedTransform
from plates import GROUPS


def eight_schools_centered(sigma, y=None):
    mu = sample("mu", dist.Normal(0, 5))
    tau = sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(sigma)):
        theta = sample("theta", dist.Normal(mu, tau))
        sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(sigma, y=None):
    mu = sample("mu", dist.Normal(0, 5))
    tau = sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(sigma)):
        eta = sample("eta", dist.Normal(0, 1))
        sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def logistic(x, y=None):
    intercept = sample("intercept", dist.Normal(0, 20))
    slopes = sample("slopes", dist.Normal(0, 10).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("data", len(x)):
        sample("y", dist.Bernoulli(logits=intercept + (x * slopes).sum(-1)), obs=y)


def horseshoe(x, y=None):
    dim = x.shape[1]
    sigma = sample("sigma", dist.HalfNormal(2))
    global_scale = sample("global_scale", dist.HalfCauchy(0.1))
    slab = sample("slab", dist.InverseGamma(2, 8))
    local_scale = sample("local_scale", dist.HalfCauchy(1).expand([dim]).to_event(1))
    z = sample("z", dist.Normal(0, 1).expand([dim]).to_event(1))
    scale = global_scale * local_scale
    slopes = z * scale / jnp.sqrt(1 + scale**2 / slab)
    with numpyro.plate("data", len(x)):
        sample("y", dist.Normal((x * slopes).sum(-1), sigma), obs=y)


def funnel():
    v = sample("v", dist.Normal(0, 3))
    with numpyro.plate("dim", 9):
        sample("x", dist.Normal(0, jnp.exp(v / 2)))


def trend(year, y=None):
    intercept = sample("intercept", dist.Normal(9.3, 100))
    slope = sample("slope", dist.Normal(0, 0.03))
    sigma = sample("sigma", dist.HalfNormal(5))
    with numpyro.plate("data", len(year)):
        sample("y", dist.Normal(intercept + slope * year, sigma), obs=y)


def scales(x, y=None):
    intercept = sample("intercept", dist.Normal(0, 100))
    slopes = sample("slopes", dist.Normal(0, 1e4).expand([x.shape[1]]).to_event(1))
    sigma = sample("sigma", dist.HalfNormal(10))
    with numpyro.plate("data", len(x)):
        sample("y", dist.Normal(intercept + (x * slopes).sum(-1), sigma), obs=y)


def groups(group, x, y=None):
    mu = sample("mu", dist.Normal(0, 5))
    tau = sample("tau", dist.HalfNormal(1))
    slope = sample("slope", dist.Normal(0, 2))
    sigma = sample("sigma", dist.HalfNormal(2))
    with numpyro.plate("group", GROUPS):
        intercept = sample("intercept", dist.Normal(mu, tau))
    with numpyro.plate("data", len(x)):
        sample("y", dist.Normal(intercept[..., group] + slope * x, sigma), obs=y)


def mixture(y):
    # The first mean and the logarithm of the distance to the second one.
    base = dist.Normal(jnp.array([-1.0, 0.5]), jnp.array([1.5, 1.0])).to_event(1)
    means = sample("means", dist.TransformedDistribution(base, OrderedTransform()))
    sigma = sample("sigma", dist.HalfNormal(2).expand([2]).to_event(1))
    weight = sample("weight", dist.Beta(5, 5))  # of the first
    weights = dist.Categorical(probs=jnp.stack([weight, 1 - weight], -1))
    with numpyro.plate("data", len(y)):
        sample("y", dist.MixtureSameFamily(weights, dist.Normal(means, sigma)), obs=y)


def squared_exponential(x, length, scale, diagonal) -> Array:
    """Return scale^2 exp(-d^2 / (2 length^2)), and `diagonal` added to its diagonal."""
    length, scale, diagonal = (a[..., None, None] for a in (length, scale, diagonal))
    distance = (x[:, None] - x) / length
    return scale**2 * jnp.exp(-(distance**2) / 2) + diagonal * jnp.eye(len(x))


def gp_regression(x, y=None):
    length = sample("length", dist.InverseGamma(5, 5))
    scale = sample("scale", dist.HalfNormal(2))
    sigma = sample("sigma", dist.HalfNormal(1))
    covariance = squared_exponential(x, length, scale, sigma**2 + 1e-6)
    sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance), obs=y)


def gp_poisson(x, y=None):
    length = sample("length", dist.InverseGamma(5, 5))
    scale = sample("scale", dist.HalfNormal(2))
    level = sample("level", dist.Normal(0, 2))
    z = sample("z", dist.Normal(0, 1).expand([len(x)]).to_event(1))
    # A diagonal that grows with the scale keeps single precision safe wherever a guide looks.
    factor = jnp.linalg.cholesky(squared_exponential(x, length, scale, 1e-5 * scale**2))
    log_rate = level[..., None] + (factor @ z[..., None])[..., 0]
    sample("y", dist.Poisson(jnp.exp(log_rate)).to_event(1), obs=y)


def autoregression(x, y=None):
    intercept = sample("intercept", dist.Normal(0, 10))
    weights = sample("weights", dist.Normal(0, 10).expand([x.shape[1]]).to_event(1))
    sigma = sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("data", len(x)):
        sample("y", dist.Normal(intercept + (x * weights).sum(-1), sigma), obs=y)


def garch(y):
    mu = sample("mu", dist.Normal(0, 2))
    variance = sample("variance", dist.LogNormal(0, 1))  # in the long run
    # Of the variance in the long run, the last shock and the last variance.
    weights = sample("weights", dist.Dirichlet(jnp.ones(3)))

    def step(now, shock):
        after = weights[0] * variance + weights[1] * shock**2 + weights[2] * now
        return after, now

    _, variances = jax.lax.scan(step, variance, y - mu)
    sample("y", dist.Normal(mu, jnp.sqrt(variances)).to_event(1), obs=y)


def volatility(y):
    mu = sample("mu", dist.Normal(0, 2))
    phi = sample("phi", dist.Beta(20, 1.5))
    sigma = sample("sigma", dist.HalfNormal(0.5))
    z = sample("z", dist.Normal(0, 1).expand([len(y)]).to_event(1))

    def step(now, shock):
        after = phi * now + sigma * shock
        return after, after

    first = sigma / jnp.sqrt(1 - phi**2) * z[0]
    _, rest = jax.lax.scan(step, first, z[1:])
    log_variance = mu + jnp.concatenate([first[None], rest])
    sample("y", dist.Normal(0, jnp.exp(log_variance / 2)).to_event(1), obs=y)


STEPS = 5  # of Runge and Kutta's method, in a year


def lotka_volterra(y):
    # Rates and priors of the Stan case study (Carpenter, 2018).
    alpha = sample("alpha", dist.TruncatedNormal(1, 0.5, low=0))
    beta = sample("beta", dist.TruncatedNormal(0.05, 0.05, low=0))
    gamma = sample("gamma", dist.TruncatedNormal(1, 0.5, low=0))
    delta = sample("delta", dist.TruncatedNormal(0.05, 0.05, low=0))
    start = sample("start", dist.LogNormal(math.log(10), 1).expand([2]).to_event(1))
    sigma = sample("sigma", dist.LogNormal(-1, 1).expand([2]).to_event(1))
    growth = jnp.stack([alpha, -gamma], -1)
    encounter = jnp.stack([-beta, delta], -1)

    def slope(state):  # of the logarithms of both populations
        return growth + encounter * jnp.exp(state)[..., ::-1]

    def step(state, _):
        h = 1 / STEPS
        k1 = slope(state)
        k2 = slope(state + h / 2 * k1)
        k3 = slope(state + h / 2 * k2)
        k4 = slope(state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return state, state

    first = jnp.log(start)
    _, rest = jax.lax.scan(step, first, length=STEPS * (len(y) - 1))
    states = jnp.concatenate([first[None], rest[STEPS - 1 :: STEPS]])
    sample("y", dist.LogNormal(states, sigma).to_event(2), obs=y)
