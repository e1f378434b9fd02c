"""Laws on what guides learn, what their gradients are, and their arguments."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from pyroflows_common.guides import permutations
from tests.wings.hosts import gaussian, of_density, started
from tests.wings.targets import LOC, SCALES, banana, correlated, log_ratio

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


def test_many_skewed_coordinates(host):
    """Logarithms of exponential variables, as in a simplex: couplings alone learn none of them."""

    def log_density(xp, x):
        return (x - xp.exp(x)).sum(-1)

    model = of_density(host, log_density, size=30)
    fitted = started(host, model, init="location", init_scale=1.0)
    fitted.train(200, rate=2e-2)
    ratio = log_ratio(fitted, log_density)
    assert ratio.mean() > -0.8
    x, _ = fitted.draws()
    assert_allclose(np.exp(x).std(0).mean(), 1.0, rtol=0.15)


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


@pytest.mark.parametrize("count", [1, 2, 5])
def test_permutations_are_undone(count):
    """One after the other, and then by the last: a guide's coordinates keep their order."""
    drawn, undone = permutations(6, count)
    order = np.arange(6)
    for permutation in drawn:
        order = order[permutation]
    assert len(drawn) == count
    assert order.tolist() != list(range(6))
    assert order[undone].tolist() == list(range(6))


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
        (
            lambda size, **key: host.straight(size + 1, **key),
            ValueError,
            r"`build`.*\(4,\).* \(3,\)",
        ),
    ]:
        with pytest.raises(error, match=message):
            host.Fitted(model, host.package.AutoFlow(model, build, init="location"))
