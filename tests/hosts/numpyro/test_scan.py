"""Guides of time series that are written with NumPyro's `scan`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.initialization import init_to_value
from scipy import stats

from numpyro_flows import AutoFlow, fit_guide, nice, to_arviz
from tests.wings.conjugate import only

KEY = jax.random.key(0)
STEP, SHIFT, NOISE = 0.5, 0.2, 0.3
Y = np.array([[0.5, 1.5], [-0.2, 0.8], [1.1, 2.1]])  # three times, two rows

# What is seen without noise is Gaussian, and so is what is known of it afterwards.
TIMES = np.minimum.outer([1, 2, 3], [1, 2, 3])
SEEN = 1.0 + np.kron(STEP**2 * TIMES, np.eye(2)) + SHIFT**2 * np.eye(6)
NOISY = SEEN + NOISE**2 * np.eye(6)
MEAN = (SEEN @ np.linalg.solve(NOISY, Y.ravel())).reshape(3, 2)
DEVIATION = np.sqrt(np.diag(SEEN - SEEN @ np.linalg.solve(NOISY, SEEN))).reshape(3, 2)
EVIDENCE = stats.multivariate_normal.logpdf(Y.ravel(), cov=NOISY)


def walks(y=None):
    """Two random walks around one level: sites of each time, in a plate, and one of all times."""
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))

    def step(x, y):
        with numpyro.plate("rows", 2):
            x = numpyro.sample("x", dist.Normal(x, STEP))
            shift = numpyro.sample("shift", dist.Normal(0.0, SHIFT))
            seen = numpyro.deterministic("seen", level + x + shift)
            numpyro.sample("y", dist.Normal(seen, NOISE), obs=y)
        return x, None

    scan(step, jnp.zeros(2), y, length=3)


def straight(size, key):
    """A flow that is the identity at its start, exactly."""
    return nice(size, layers=2, hidden=(4,), init_scale=0.0, key=key)


@functools.cache
def fitted():
    """A guide that the search has made the posterior."""
    guide = AutoFlow(walks, straight, degrees_of_freedom=None)
    return guide, fit_guide(guide, args=(Y,), steps=5, learning_rate=1e-4, progress=False)


def test_the_loss_is_the_evidence_at_the_posterior():
    _, result = fitted()
    assert_allclose(-result.losses, EVIDENCE, atol=0.05)


def test_draws_have_the_moments_of_the_posterior():
    """Those of the guide, of `Predictive` and of ArviZ."""
    guide, result = fitted()
    seen = guide.sample_posterior(KEY, result.params, sample_shape=(1000,))["seen"]
    predicted = Predictive(walks, guide=guide, params=result.params, num_samples=1000)(KEY)["y"]
    options = {"params": result.params, "args": (Y,), "posterior_predictive": True, "key": KEY}
    data = to_arviz(guide, **options)
    draws = {name: only(data, "posterior", name) for name in ("level", "x", "shift", "seen")}
    for values in (seen, draws["seen"]):
        assert_allclose((values.mean(0) - MEAN) / DEVIATION, np.zeros((3, 2)), atol=0.15)
        assert_allclose(values.std(0), DEVIATION, rtol=0.1)
    for values in (predicted, only(data, "posterior_predictive", "y")):
        expected = np.hypot(DEVIATION, NOISE)
        assert_allclose((values.mean(0) - MEAN) / expected, np.zeros((3, 2)), atol=0.15)
        assert_allclose(values.std(0), expected, rtol=0.1)
    level, x, shift, seen = draws.values()
    assert_allclose(seen, level[:, None, None] + x + shift, rtol=1e-4, atol=1e-5)
    likelihood = stats.norm.logpdf(Y, seen, NOISE)
    assert_allclose(only(data, "log_likelihood", "y"), likelihood, rtol=1e-3, atol=1e-3)
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)
    joint = likelihood + stats.norm.logpdf(x, before, STEP) + stats.norm.logpdf(shift, 0, SHIFT)
    joint = joint.sum((1, 2)) + stats.norm.logpdf(level)
    assert_allclose(only(data, "sample_stats", "lp"), joint, rtol=1e-4)
    assert_allclose(only(data, "sample_stats", "log_importance_ratio"), EVIDENCE, atol=0.05)
    assert_allclose(data["observed_data"]["y"], Y, rtol=1e-6)
    assert data["posterior"]["x"].dims[2:] == ("x_dim_0", "rows")


def test_a_step_without_latent_sites():
    """The loss of a Gaussian guide is a sum of squares."""
    y = Y[:, 0]

    def model(y):
        line = numpyro.sample("line", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

        def step(t, y):
            numpyro.sample("y", dist.Normal(line[0] + t * line[1], NOISE), obs=y)
            return t + 1.0, None

        scan(step, 0.0, y)

    options = {"init": "location", "init_scale": 0.1, "degrees_of_freedom": None}
    init = init_to_value(values={"line": jnp.array([0.3, 0.1])})
    svi = SVI(
        model,
        AutoFlow(model, straight, init_loc_fn=init, **options),
        numpyro.optim.Adam(1e-2),
        Trace_ELBO(num_particles=4000),
    )
    found = jax.jit(lambda: svi.evaluate(svi.init(KEY, y), y))()
    t, half = np.arange(3), 0.5 * 0.1**2
    likelihood = stats.norm.logpdf(y, 0.3 + 0.1 * t, NOISE) - half * (1 + t**2) / NOISE**2
    prior = stats.norm.logpdf([0.3, 0.1]) - half
    entropy = 2 * stats.norm(scale=0.1).entropy()
    assert_allclose(-found, likelihood.sum() + prior.sum() + entropy, atol=0.05)


def test_simulated_observations_follow_each_other():
    """Where a step takes the observation before, that of the simulation and not of the data."""

    def model(y):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))

        def step(before, y):
            y = numpyro.sample("y", dist.Normal(level + 0.8 * before, NOISE), obs=y)
            return y, None

        scan(step, 0.0, y)

    options = {"args": (10.0 + Y[:, 0],), "draws": 4000, "posterior_predictive": True, "key": KEY}
    y = only(to_arviz(dist.Normal(0.0, 1e-3), model, **options), "posterior_predictive", "y")
    assert_allclose(y.mean(0), np.zeros(3), atol=0.03)
    assert_allclose(y.std(0), NOISE * np.sqrt([1.0, 1.64, 1.0 + 0.64 + 0.64**2]), rtol=0.05)


def test_simulated_observations_of_a_branch():
    """They are drawn, not those of the data."""

    def model():
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))

        def branch(sign):
            numpyro.sample("y", dist.Normal(sign * mean, 1.0), obs=50.0)

        cond(mean > -100.0, branch, lambda sign: branch(-sign), 1.0)

    data = to_arviz(dist.Normal(2.0, 1e-3), model, draws=4000, posterior_predictive=True, key=KEY)
    y = only(data, "posterior_predictive", "y")
    assert_allclose([y.mean(), y.std()], [2.0, 1.0], atol=0.1)
