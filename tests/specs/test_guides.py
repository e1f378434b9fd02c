"""Laws on guides: where they start, what they learn, and what their gradients are."""

import jax
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import stats
from torch.autograd.function import once_differentiable

from tests.wings.hosts import DRAWS, gaussian, of_density, started

KINDS = ("AutoNICE", "AutoRealNVP", "AutoGlow")


def log_ratio(fitted, log_density):
    """The log-density of a target over that of a guide, at the guide's draws."""
    x, log_q = fitted.draws()
    return log_density(np, x) - log_q


# Targets whose density integrates to one: the log ratio is zero where the guide is exact.

LOC = np.array([500.0, -20.0, 3e6])
SCALES = np.array([1e-3, 1.0, 1e4])
CORRELATION = np.array([[1.0, 0.9, -0.3], [0.9, 1.0, 0.1], [-0.3, 0.1, 1.0]])


def correlated(host):
    """A Gaussian far away, on scales from 1e-3 to 1e4."""
    cholesky = host.array(SCALES[:, None] * np.linalg.cholesky(CORRELATION))

    def model():
        host.sample("x", host.dist.MultivariateNormal(host.array(LOC), scale_tril=cholesky))

    return model


def log_correlated(xp, x):
    z = (x - LOC) / SCALES
    return stats.multivariate_normal(np.zeros(3), CORRELATION).logpdf(z) - np.log(SCALES).sum()


def log_normal(xp, x, loc, scale):
    scale = scale + 0 * x  # an array of the same kind
    return -0.5 * ((x - loc) / scale) ** 2 - xp.log(scale) - 0.5 * np.log(2 * np.pi)


def banana(xp, x):
    bent = log_normal(xp, x[..., 1], x[..., 0] ** 2, 0.1)
    return log_normal(xp, x[..., 0], 0.0, 1.0) + bent + log_normal(xp, x[..., 2], 0.0, 1.0)


def funnel(xp, x):
    width = xp.exp(x[..., 0] / 2)
    narrow = log_normal(xp, x[..., 1], 0.0, width) + log_normal(xp, x[..., 2], 0.0, width)
    return log_normal(xp, x[..., 0], 0.0, 3.0) + narrow


# The Gaussian at the mode with the curvature there.
LAPLACE = {
    "banana": (banana, [0.0, 0.0, 0.0], [1.0, 0.1, 1.0]),
    "funnel": (funnel, [-9.0, 0.0, 0.0], [3.0, np.exp(-4.5), np.exp(-4.5)]),
}


# Where a guide starts


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


@pytest.mark.filterwarnings("default:the model takes one point at a time")  # torch's square
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


# What a guide learns


def test_training_bends_a_guide(host):
    """From the best Gaussian towards a posterior that is none."""
    fitted = started(host, of_density(host, banana), layers=4, hidden=(8,))
    before = log_ratio(fitted, banana).mean()
    fitted.train(200, rate=3e-2, particles=32)
    assert log_ratio(fitted, banana).mean() > before + 0.2


def test_a_posterior_of_one_number(host):
    """Couplings take two: a monotone function learns in their place."""
    gamma = stats.gamma(0.5)

    def model():
        host.sample("x", host.dist.Gamma(host.array(0.5), host.array(1.0)))

    def log_density(_, x):
        return gamma.logpdf(np.exp(x[..., 0])) + x[..., 0]

    fitted = started(host, model)
    before = log_ratio(fitted, log_density).mean()
    fitted.train(200, rate=3e-2)
    assert log_ratio(fitted, log_density).mean() > 0.5 * before
    levels = [0.25, 0.5, 0.75]
    assert_allclose(fitted.quantiles(levels)["x"], gamma.ppf(levels), rtol=0.2)


def test_sites_on_parts_of_the_real_line(host):
    """The start fits them with their Jacobians; medians and quantiles are in their shapes."""
    shapes = {"rate": (), "factor": (2, 2), "weights": (2, 3, 2)}

    def model():
        host.sample("rate", host.dist.Gamma(host.array(3.0), host.array(2.0)))
        host.sample("factor", host.dist.LKJCholesky(2, host.array(2.0)))
        with host.plate("columns", 3, dim=-1), host.plate("rows", 2, dim=-2):
            host.sample("weights", host.dist.Dirichlet(host.array(np.full(2, 4.0))))

    fitted = started(host, model)
    medians, levels = fitted.median(), [0.1, 0.9]
    quantiles = fitted.quantiles(levels)
    assert {name: value.shape for name, value in medians.items()} == shapes
    assert {name: value.shape[1:] for name, value in quantiles.items()} == shapes
    assert_allclose(quantiles["rate"], stats.gamma(3.0, scale=0.5).ppf(levels), rtol=0.2)
    assert_allclose(medians["weights"], np.full((2, 3, 2), 1 / 2), rtol=0.1)
    assert_allclose(medians["factor"], np.eye(2), atol=0.2)


Y = np.random.default_rng(0).normal([2.0, -1.0, 0.0], 1.0, (40, 3))


def test_subsamples_of_the_data(host):
    """Each step sees some rows, and the guide learns from all of them."""

    def model(y):
        wide = host.dist.Normal(host.array(np.zeros(3)), host.array(10.0))
        mean = host.sample("mean", wide.to_event(1))
        with host.plate("people", len(Y), subsample_size=20) as index:
            host.sample("y", host.dist.Normal(mean, host.array(1.0)).to_event(1), obs=y[index])

    fitted = gaussian(host, model, host.array(Y))
    fitted.train(200, rate=3e-2, particles=4)
    deviation = len(Y) ** -0.5
    assert_allclose(fitted.median()["mean"], Y.mean(0), atol=deviation)
    low, high = fitted.quantiles([0.16, 0.84])["mean"]
    assert_allclose(high - low, 2 * deviation, rtol=0.4)


def test_at_the_exact_posterior(host):
    """The path gradient of each single draw is zero, quantiles are those of the posterior."""
    fitted = gaussian(host, correlated(host))
    assert abs(fitted.gradient()).max() < 1e-4
    fitted.guide.path_gradient = False
    assert abs(fitted.gradient()).max() > 0.1
    levels = [0.05, 0.5, 0.95]
    found = fitted.quantiles(levels)["x"]
    expected = stats.norm.ppf(levels)[:, None] * np.ones(3)
    assert_allclose((found - LOC) / SCALES, expected, atol=0.1)
    fitted.draws()
    assert_allclose(fitted.quantiles(levels)["x"], found, rtol=0)
    assert_allclose(fitted.median()["x"], found[1])


def test_the_path_gradient_is_unbiased(host):
    """Over many particles it is the usual one, as long as no draw exceeds the limit."""

    def log_density(xp, x):
        return -xp.log(1 + x[..., 0] ** 2 + (x[..., 1] - x[..., 0]) ** 2 + x[..., 2] ** 2)

    options = {"init": "location", "init_scale": 0.5}
    init = host.init_to_value(values={"x": host.array([0.3, -0.2, 0.1])})
    fitted = gaussian(host, of_density(host, log_density), init_loc_fn=init, **options)
    found = []
    for fitted.guide.path_gradient in (True, False):
        found.append(fitted.gradient(particles=20_000))
    ours, theirs = found
    assert 0 < np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


def test_one_draw_cannot_outweigh_all_others(host):
    """What it contributes is limited, and nothing where the model's gradient is not finite."""

    def log_density(xp, x):
        steep = -1e9 * (x[..., 0] ** 2 + x[..., 1] ** 2)
        return steep + 0 * xp.sqrt(xp.where(x[..., 2] > 0, x[..., 2], 0 * x[..., 2]))

    init = host.init_to_value(values={"x": host.array([5.0, 5.0, 0.05])})
    options = {"init": "location", "init_loc_fn": init}
    fitted = gaussian(host, of_density(host, log_density), **options)
    gradient = fitted.gradient(particles=64)
    assert 1.0 < abs(gradient).max() < 1e4


# Bad input


BAD = [
    ("AutoRealNVP", {"preset": "low_dim"}, "`preset` is 'low_dim', expected 'high_dim'"),
    ("AutoRealNVP", {"init": "prior"}, "`init` is 'prior', expected 'search' or 'location'"),
    ("AutoNICE", {"init_scale": 0.0}, "`init_scale` is 0.0, expected a positive number"),
    ("AutoNICE", {"init_scale": "wide"}, "`init_scale` is 'wide', expected a positive number"),
    ("AutoGlow", {"degrees_of_freedom": -1}, "`degrees_of_freedom` is -1, expected a positive"),
    ("AutoGlow", {"degrees_of_freedom": np.inf}, "`degrees_of_freedom` is inf, expected a pos"),
    ("AutoNICE", {"layers": 0}, "`layers` is 0, expected a whole number, at least 1"),
    ("AutoRealNVP", {"layers": 2.5}, "`layers` is 2.5, expected a whole number"),
    ("AutoGlow", {"layers": "many"}, "`layers` is 'many', expected a whole number"),
    ("AutoNICE", {"hidden": 8}, "`hidden` is 8, expected a sequence of positive ints"),
    ("AutoRealNVP", {"hidden": (0,)}, r"`hidden` is \(0,\), expected a sequence of positive ints"),
    ("AutoGlow", {"activation": "step"}, "`activation` is 'step', expected one of"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD)
def test_bad_arguments_name_themselves(host, kind, options, message):
    """At the latest when the guide is set up."""
    with pytest.raises(ValueError, match=message):
        started(host, of_density(host, banana), kind=kind, **options)


def test_a_flow_that_does_not_fit(host):
    """What `build` returns has to be a flow of as many numbers as the model has."""
    model = of_density(host, banana)
    with pytest.raises(TypeError, match="`build` is a list, expected a function"):
        host.package.AutoFlow(model, [])
    with pytest.raises(TypeError, match="`build` is a Permutation, expected a function"):
        host.package.AutoFlow(model, host.package.Permutation([1, 0, 2]))
    with pytest.raises(TypeError, match="`init_loc_fn` is a int, expected one of"):
        host.package.AutoNICE(model, init_loc_fn=3)
    for build, error, message in [
        (lambda size, **key: None, TypeError, "NoneType"),
        (lambda size, **key: host.straight(size + 1, **key), ValueError, r"\(4,\).* \(3,\)"),
    ]:
        with pytest.raises(error, match=message):
            host.Fitted(model, host.package.AutoFlow(model, build, init="location"))
