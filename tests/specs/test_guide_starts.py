"""Laws on where guides start."""

import re

import jax
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import stats
from torch.autograd.function import once_differentiable

from tests.wings.hosts import DRAWS, gaussian, of_density, started
from tests.wings.targets import banana, correlated, funnel, log_correlated, log_normal, log_ratio

KINDS = ("AutoNICE", "AutoRealNVP", "AutoGlow")

# The Gaussian at the mode with the curvature there.
LAPLACE = {
    "banana": (banana, [0.0, 0.0, 0.0], [1.0, 0.1, 1.0]),
    "funnel": (funnel, [-9.0, 0.0, 0.0], [3.0, np.exp(-4.5), np.exp(-4.5)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_gaussian_posterior_is_met_at_the_start(host, kind):
    """Whatever its units, correlations and location."""
    fitted = started(host, correlated(host), kind=kind, degrees_of_freedom=None)
    ratio = log_ratio(fitted, log_correlated)
    assert abs(ratio.mean()) < 0.05
    assert ratio.std() < 0.1


def test_the_start_in_more_dimensions_than_hessians_are_for(host):
    """Diagonal plus low rank: near a posterior of unlike scales without correlations."""
    scales = np.random.default_rng(0).permutation(np.geomspace(1e-2, 1e2, 300))

    def model():
        host.sample("x", host.dist.Normal(host.array(10 * scales), host.array(scales)).to_event(1))

    fitted = gaussian(host, model)
    ratio = log_ratio(fitted, lambda _, x: stats.norm.logpdf(x, 10 * scales, scales).sum(-1))
    assert ratio.mean() > -1.0


@pytest.mark.parametrize("others", [3, 299])
def test_a_guide_for_some_sites_starts_at_their_marginal(host, others):
    """Found through the handler that hides from it all other sites, and the data."""

    def model():
        unit = host.dist.Normal(host.array(np.zeros(others)), host.array(1.0))
        other = host.sample("other", unit.to_event(1))
        mine = host.sample("mine", host.dist.Normal(host.array([5.0, -5.0]), 2.0).to_event(1))
        scales = host.array([0.5, 100.0])
        likelihood = host.dist.Normal(mine + other[..., :2], scales).to_event(1)
        host.sample("y", likelihood, obs=host.array([7.0, 0.0]))

    fitted = gaussian(host, host.block(model, expose=["mine"]))
    x, _ = fitted.draws()
    noise = np.array([0.5, 100.0]) ** 2 + 1.0
    variances = 1 / (1 / 4.0 + 1 / noise)
    means = variances * (np.array([5.0, -5.0]) / 4.0 + np.array([7.0, 0.0]) / noise)
    assert_allclose(x.mean(0), means, atol=0.15)
    assert_allclose(x.std(0), np.sqrt(variances), rtol=0.1)


@pytest.mark.parametrize("name", LAPLACE)
def test_the_start_is_better_than_laplace(host, name):
    """Modes can be bad centres, and the curvature there a bad measure."""
    log_density, mode, scales = LAPLACE[name]
    ratio = log_ratio(gaussian(host, of_density(host, log_density)), log_density)
    x = mode + scales * np.random.default_rng(0).normal(size=(DRAWS, 3))
    laplace = log_density(np, x) - stats.norm.logpdf(x, mode, scales).sum(-1)
    assert ratio.mean() > max(laplace.mean(), -2.0)


def test_a_mode_that_only_the_prior_tells_of(host):
    """Far from the origin, and from where the model starts, which has a mode of its own."""

    def log_density(xp, x):
        near = log_normal(xp, x, 0.0, 0.5).sum(-1) + np.log(0.001)
        far = log_normal(xp, x, 50.0, 8.0).sum(-1) + np.log(0.999)
        return xp.logaddexp(near, far)

    def model():
        prior = host.dist.Normal(host.array(50.0 * np.ones(3)), host.array(10.0))
        x = host.sample("x", prior.to_event(1))
        prior = log_normal(host.np, x, 50.0, 10.0).sum(-1)
        host.factor("density", log_density(host.np, x) - prior)

    init = host.init_to_value(values={"x": host.array(np.zeros(3))})
    ratio = log_ratio(gaussian(host, model, init_loc_fn=init), log_density)
    assert abs(ratio.mean()) < 0.05


def test_a_prior_that_cannot_be_drawn_from(host):
    """The search sets out from random points in place of its draws."""

    def model():
        real = host.dist.constraints.real
        x = host.sample("x", host.dist.ImproperUniform(real, (), (2,)))
        host.sample("y", host.dist.Normal(x, 0.5).to_event(1), obs=host.array([3.0, -4.0]))

    init = host.init_to_value(values={"x": host.array(np.zeros(2))})
    x, _ = gaussian(host, model, init_loc_fn=init).draws()
    assert_allclose(x.mean(0), [3.0, -4.0], atol=0.1)
    assert_allclose(x.std(0), 0.5, rtol=0.1)


@pytest.mark.filterwarnings("ignore:the search for a start found 2 separate modes")
def test_the_best_start_may_be_a_poor_one_before_it_is_refined(host):
    """The Gaussian at the mode of five bananas, beside a small and exact Gaussian."""

    def log_density(xp, x):
        firsts, seconds = x[..., :5], x[..., 5:]
        bent = log_normal(xp, seconds, firsts**2, 0.3) + log_normal(xp, firsts, 0.0, 1.0)
        far = log_normal(xp, x, 12.0, 1.0).sum(-1)
        return xp.logaddexp(bent.sum(-1), far - 7.0)

    init = host.init_to_value(values={"x": host.array(12.0 * np.ones(10))})
    model = of_density(host, log_density, size=10)
    ratio = log_ratio(gaussian(host, model, init_loc_fn=init), log_density)
    assert ratio.mean() > -5.5


@pytest.mark.parametrize("size", [1, 3])
def test_separate_modes_are_told(host, size):
    """With a bound for each: half of the evidence."""

    def log_density(xp, x):
        left, right = (log_normal(xp, x[..., 0], loc, 0.5) for loc in (-1.5, 2.5))
        rest = log_normal(xp, x[..., 1:], 0.0, 1.0).sum(-1)
        return xp.logaddexp(left, right) - np.log(2.0) + rest

    with host.eager(), pytest.warns(UserWarning, match="found 2 separate modes") as caught:
        gaussian(host, of_density(host, log_density, size))
    (warning,) = caught
    bounds = re.search(r"bounds (.*?):", str(warning.message)).group(1)
    assert_allclose([float(bound) for bound in bounds.split(", ")], -np.log(2.0), atol=0.25)


@pytest.mark.parametrize("weight", [1e-4, 0.0])
def test_modes_that_hold_nothing_are_not_told(host, weight):
    """Nor those that a Gaussian covers together."""

    def log_density(xp, x):
        left, right = (log_normal(xp, x[..., 0], loc, 0.5) for loc in (-1.5, 2.5))
        if not weight:
            right = log_normal(xp, x[..., 0], 0.0, 0.5)
        other = right + np.log(weight or 1.0)
        return xp.logaddexp(left, other) + log_normal(xp, x[..., 1:], 0.0, 1.0).sum(-1)

    with host.eager():
        gaussian(host, of_density(host, log_density))


def test_rounding_errors_are_no_evidence(host):
    """Far out, where the density of a funnel is highest, they are of any size and sign."""

    def narrowing(xp, x):
        rest = log_normal(xp, x[..., 1:], 0.0, xp.exp(-x[..., :1] / 2)).sum(-1)
        return log_normal(xp, x[..., 0], 0.0, 4.0) + rest

    def log_density(xp, x):
        far = xp.exp(x[..., 0])
        return narrowing(xp, x) + (far * 1.1 / 1.1 - far)  # nothing

    ratio = log_ratio(gaussian(host, of_density(host, log_density, size=10)), narrowing)
    assert ratio.mean() > -10.0


def test_starts_outside_of_the_support_are_passed_over(host):
    """Where the density is zero, or neither it nor its gradient a number."""

    def log_density(xp, x):
        inside = log_normal(xp, x, 5.0, 0.5).sum(-1) + 0 * xp.log(x[..., 0])
        return xp.where(x[..., 1] > 0, inside, -np.inf)

    init = host.init_to_value(values={"x": host.array([0.1, 9.0, -9.0])})
    fitted = gaussian(host, of_density(host, log_density), init_loc_fn=init)
    ratio = log_ratio(fitted, log_density)
    assert abs(ratio.mean()) < 0.05
    assert ratio.std() < 0.1


def test_models_that_raise_errors_far_from_their_data(host):
    """At its prior's draws this one's rates are no longer positive: only around zero they are."""
    x = 1e7 * np.array([-4.0, -1.0, 2.0, 5.0])

    def model():
        slope = host.sample("slope", host.dist.Normal(host.array(0.0), host.array(5.0)))
        rates = host.np.exp(host.array(x) * slope)
        host.sample("y", host.dist.Exponential(rates).to_event(1), obs=host.array(np.ones(4)))

    with host.validation():
        draws, _ = gaussian(host, model).draws()
    grid = np.linspace(-2e-7, 2e-7, 4001)
    log_density = (x * grid[:, None] - np.exp(x * grid[:, None])).sum(1)
    weights = np.exp(log_density - log_density.max())
    mean = np.average(grid, weights=weights)
    sd = np.sqrt(np.average((grid - mean) ** 2, weights=weights))
    assert_allclose(draws.mean(), mean, atol=0.3 * sd)
    assert_allclose(draws.std(), sd, rtol=0.3)


@pytest.mark.filterwarnings("ignore:the search for a start found no")
def test_models_that_are_wrong_everywhere(host):
    """Theirs is the error that tells what is wrong, as for the host's own guides."""

    def model():
        scale = host.sample("scale", host.dist.HalfNormal(host.array(1.0)))
        host.sample("y", host.dist.Normal(0.0, -scale), obs=host.array(1.0))

    with host.validation(), pytest.raises(ValueError, match="scale"):
        gaussian(host, model)


def test_a_start_without_a_search(host):
    """It is where the host's guides start."""
    loc = [1.0, -2.0, 30.0]
    init = host.init_to_value(values={"x": host.array(loc)})
    options = {"init": "location", "init_loc_fn": init, "init_scale": 0.5}
    x, log_q = gaussian(host, of_density(host, banana), **options).draws()
    assert_allclose(log_q, stats.norm.logpdf(x, loc, 0.5).sum(-1), rtol=1e-6)
    assert stats.kstest((x - loc).ravel() / 0.5, "norm").pvalue > 1e-3


@pytest.mark.filterwarnings("ignore:the model takes one point at a time")  # torch's square
def test_a_model_without_second_derivatives(host):
    """The search takes differences of slopes, says so, and is as good."""
    square = {"pyro": TorchSquare.apply, "numpyro": jax_square}[host.name]

    def log_density(xp, x):
        return -0.5 * square((x - 7.0) / 0.1).sum(-1)

    with pytest.warns(UserWarning, match="has no second derivatives"):
        fitted = gaussian(host, of_density(host, log_density))
    ratio = log_ratio(fitted, lambda _, x: stats.norm.logpdf(x, 7.0, 0.1).sum(-1))
    assert abs(ratio.mean()) < 0.05
    assert ratio.std() < 0.1


class TorchSquare(torch.autograd.Function):
    """A square whose derivative has none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * gradient * x


@jax.custom_vjp
def jax_square(x):
    """As torch's."""
    return x**2


def jax_square_slope(x, gradient):
    double = jax.pure_callback(lambda x: 2 * np.asarray(x), x, x, vmap_method="sequential")
    return (gradient * double,)


jax_square.defvjp(lambda x: (x**2, x), jax_square_slope)


def test_no_start_at_all(host):
    """A posterior without density leaves the guide where the model starts, with a warning."""
    values = {"x": host.array(np.ones(3))}

    def log_density(xp, x):
        return xp.where((x == 1.0).all(-1), -0.0 * (x**2).sum(-1), -np.inf)

    init = host.init_to_value(values=values)
    warning = "no Gaussian with a finite evidence lower bound"
    with host.eager(), pytest.warns(UserWarning, match=warning):
        fitted = gaussian(host, of_density(host, log_density), init_loc_fn=init)
    x, log_q = fitted.draws()
    assert_allclose(log_q, stats.norm.logpdf(x, 1.0, 0.1).sum(-1), rtol=1e-6)
