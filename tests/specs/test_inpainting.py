"""Inpainting: modes and draws of the unknown part of an event given the known part."""

import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import optimize, stats

from tests.specs.registry import case

SIZE = 4
# What is known of each of three rows: some, another part, nothing.
MASK = np.array([[1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=bool)


def gaussian(wing):
    """A flow that is a correlated Gaussian on unlike scales, its mean and its covariance."""
    flow = wing.cast(wing.new("LowerTriangular", SIZE), "float64")
    rng = np.random.default_rng(0)
    state = {
        "loc": 10 * rng.standard_normal(SIZE),
        "lower": rng.standard_normal((SIZE, SIZE)),
        "log_diagonal": np.array([-2.0, 0.0, 1.0, 3.0]),
    }
    factor = np.tril(state["lower"], -1) + np.diag(np.exp(state["log_diagonal"]))
    return wing.load(flow, state), state["loc"], factor @ factor.T


def conditional(mean, covariance, x, known):
    """Mean and standard deviations of the unknown part of a Gaussian, in closed form."""
    unknown = ~known
    gain = covariance[np.ix_(unknown, known)] @ np.linalg.pinv(covariance[np.ix_(known, known)])
    rest = covariance[np.ix_(unknown, unknown)] - gain @ covariance[np.ix_(known, unknown)]
    return mean[unknown] + gain @ (x[known] - mean[known]), np.sqrt(np.diag(rest))


def rows(mean, covariance):
    rng = np.random.default_rng(1)
    x = rng.multivariate_normal(mean, covariance, len(MASK))
    return x, np.where(MASK, x, np.nan)


def test_the_mode_of_a_gaussian_is_its_conditional_mean(wing):
    flow, mean, covariance = gaussian(wing)
    x, given = rows(mean, covariance)
    found, again = (wing.apply("inpaint", flow, given, MASK, steps=300) for _ in range(2))
    assert_array_equal(found, again)
    assert_array_equal(found[MASK], x[MASK])
    latent = wing.apply("inpaint", flow, given, MASK, steps=300, space="latent")
    assert_array_equal(latent[MASK], x[MASK])
    for row, known, got, other in zip(x, MASK, found, latent, strict=True):
        expected, deviation = conditional(mean, covariance, row, known)
        assert_allclose((got[~known] - expected) / deviation, 0.0, atol=0.02)
        assert_allclose((other[~known] - expected) / deviation, 0.0, atol=0.1)


def test_draws_of_a_gaussian_are_from_its_conditional(wing):
    flow, mean, covariance = gaussian(wing)
    x, given = rows(mean, covariance)
    options = {"num_samples": 6000, "num_warmup": 150, "chains": 100}
    draws = wing.apply("inpaint_draws", flow, given, MASK, **options)
    assert draws.shape == (6000, *x.shape)
    assert_array_equal(draws[:, MASK], np.broadcast_to(x[MASK], (6000, MASK.sum())))
    for i, known in enumerate(MASK):
        expected, deviation = conditional(mean, covariance, x[i], known)
        z = (draws[:, i][:, ~known] - expected) / deviation
        assert_allclose(z.mean(0), 0.0, atol=0.05)
        assert_allclose(z.std(0), 1.0, atol=0.05)


def test_bounded_numbers(wing):
    """y = exp(x) and sigmoid(x) of independent normals: the mode in y, and draws of x."""
    support = ((0.0, None), (0.0, 1.0), (None, 2.0))
    flow = wing.cast(wing.new("BijectTo", 3, support), "float64")
    x = np.array([np.nan, np.nan, 1.5])
    known = ~np.isnan(x)
    found = wing.apply("inpaint", flow, x, known, steps=300)
    normal = stats.norm.logpdf
    logit_mode = optimize.minimize_scalar(
        lambda z: -normal(z) + np.log(1 / (1 + np.exp(-z)) / (1 + np.exp(z))), (-3, -2)
    ).x
    assert_allclose(found[0], np.exp(-1), rtol=0.02)
    at = 1 / (1 + np.exp(-logit_mode))
    assert min(abs(found[1] - at), abs(found[1] - (1 - at))) < 0.02  # one of two equal modes
    assert found[2] == 1.5
    options = {"num_samples": 4000, "num_warmup": 100, "chains": 100}
    draws = wing.apply("inpaint_draws", flow, x, known, **options)
    z = np.stack([np.log(draws[:, 0]), np.log(draws[:, 1] / (1 - draws[:, 1]))])
    assert_allclose(z.mean(1), 0.0, atol=0.08)
    assert_allclose(z.std(1), 1.0, atol=0.08)


def test_a_support_narrower_than_the_flows(wing):
    """A normal flow, cut off to an interval that leaves its mode outside."""
    flow = wing.new("Standardization", 2)
    support = [(1.0, 3.0), (None, None)]
    x = np.array([np.nan, 0.5], np.float32)
    found = wing.apply("inpaint", flow, x, ~np.isnan(x), support=support, steps=300)
    assert_allclose(found, [1.0, 0.5], atol=0.01)
    draws = wing.apply(
        "inpaint_draws", flow, x, ~np.isnan(x), support=support, num_samples=2000,
        num_warmup=100, chains=100,
    )  # fmt: skip
    cut = stats.truncnorm(1, 3)
    assert draws[:, 0].min() >= 1
    assert_allclose(draws[:, 0].mean(), cut.mean(), atol=4 * cut.std() / 2000**0.5)


FLOWS = [
    case("realnvp", 3, context_dim=2),
    case("glow", (1, 2, 2), levels=1, steps=1, channels=3, logit=0.05),
]


@pytest.mark.parametrize("case", FLOWS, ids=str)
def test_inpainting_raises_the_density_of_any_flow(wing, case):
    """Above that of draws, of every row, and with what is known left to the bit."""
    flow = wing.build(case, dtype="float32")
    x, context = case.points(3, dtype="float32"), case.context(3, dtype="float32")
    known = np.random.default_rng(0).random(x.shape) < 0.5
    options = {} if context is None else {"context": context}
    found = wing.apply("inpaint", flow, x, known, steps=50, restarts=2, **options)
    assert_array_equal(found[known], x[known])
    density = wing.density(flow, context=context)
    best = wing.log_prob(density, found)
    assert (best > wing.log_prob(density, x)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few draws need not agree
        options |= {"num_samples": 9, "num_warmup": 5, "chains": 2, "max_tree_depth": 3}
        draws = wing.apply("inpaint_draws", flow, x, known, **options)
    assert draws.shape == (9, *x.shape)
    assert_array_equal(draws[:, known], np.broadcast_to(x[known], (9, known.sum())))
    assert (wing.log_prob(density, draws).mean(0) < best).all()


def test_all_known_is_all_returned(wing):
    flow, x = wing.new("Standardization", 3), np.ones((2, 3), np.float32)
    known = np.array(True)
    assert_array_equal(wing.apply("inpaint", flow, x, known, steps=3), x)
    draws = wing.apply("inpaint_draws", flow, x, known, num_samples=5)
    assert_array_equal(draws, np.broadcast_to(x, (5, 2, 3)))


def test_of_two_modes_the_higher(wing):
    """A base with a high and a low peak: the best of several starts is at the high one."""
    flow = wing.new("Standardization", 1)
    base = wing.two_peaks(-3.0, 3.0, weights=(0.3, 0.7))
    x = np.full((20, 1), np.nan, np.float32)
    found = wing.apply("inpaint", flow, x, np.array([False]), base=base, restarts=8, steps=100)
    assert_allclose(found, 3.0, atol=0.1)


def test_chains_that_disagree_are_reported(wing):
    flow = wing.new("Standardization", 1)
    base = wing.two_peaks(-30.0, 30.0, weights=(0.5, 0.5))
    x = np.full(1, np.nan, np.float32)
    options = {"base": base, "num_samples": 200, "num_warmup": 30, "chains": 8}
    with pytest.warns(UserWarning, match="chains disagree on 1 of 1 unknown numbers .R-hat"):
        wing.apply("inpaint_draws", flow, x, np.array([False]), **options)


def test_the_latent_mode_of_bounded_numbers(wing):
    """y = exp(x) and sigmoid(x): latents are most likely at 0, whatever else is in the batch."""
    support = ((0.0, None), (0.0, 1.0), (0.0, None))
    flow = wing.cast(wing.new("BijectTo", 3, support), "float64")
    x = np.full((2, 3), np.nan)
    x[:, 2] = [1e-8, 1e8]
    known = ~np.isnan(x)
    found = wing.apply("inpaint", flow, x, known, space="latent", steps=300)
    assert_allclose(found, np.where(known, x, [1.0, 0.5, 0.0]), rtol=0.02)
    near = np.array([[1e-12, 1e-12, np.nan]])
    found = wing.apply("inpaint", flow, near, ~np.isnan(near), space="latent", steps=300)
    assert_allclose(found, [[1e-12, 1e-12, 1.0]], rtol=0.02)


@pytest.mark.parametrize("space", ["data", "latent"])
def test_what_is_impossible_is_refused(wing, space):
    flow = wing.new("Standardization", 2)
    base = wing.uniform_base((2,), -1.0, 1.0)
    x = np.array([[0.5, np.nan], [15.0, np.nan]], np.float32)
    options = {"base": base, "space": space, "steps": 20}
    with pytest.raises(ValueError, match="1 of 2 rows to which the flow gives no density"):
        wing.apply("inpaint", flow, x, ~np.isnan(x), **options)
    edge = np.array([0.0, np.nan], np.float32)
    bounded = wing.new("BijectTo", 2, ((0.0, 1.0),))
    with pytest.raises(ValueError, match="on the edge of the flow's support where `known`"):
        wing.apply("inpaint", bounded, edge, ~np.isnan(edge), space=space, steps=5)


def test_chains_start_where_there_is_a_density(wing):
    """A base with bounds, so narrow that many searches end beyond them."""
    flow, base = wing.new("Standardization", 2), wing.uniform_base((2,), -1.0, 1.0)
    x = np.array([0.5, np.nan], np.float32)
    options = {"base": base, "num_samples": 2000, "num_warmup": 50, "chains": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = wing.apply("inpaint_draws", flow, x, ~np.isnan(x), **options)
    assert np.isfinite(draws).all()
    assert abs(draws[:, 1]).max() <= 1
    assert_allclose(draws[:, 1].std(), 3**-0.5, rtol=0.2)


ERRORS = {
    "mask": (np.array([True, False]), {}, ValueError, r"`known` has shape \(2,\)"),
    "dtype": (np.ones(3), {}, TypeError, "`known` has dtype float64, expected a mask"),
    "nan": (np.array([True, True, False]), {}, ValueError, "2 of 2 rows with NaN or inf where"),
    "support": (
        np.array([False, True, True]), {"support": [(None, None), (0.0, 1.0), (0.0, 9.0)]},
        ValueError, "1 of 2 rows outside the support where `known`",
    ),
    "simplex": (np.array([False, True, True]), {"support": "ordered_vector"}, ValueError, "alone"),
    "space": (np.array([False, True, True]), {"space": "base"}, ValueError, "`space` is 'base'"),
    "steps": (np.array([False, True, True]), {"steps": 0}, ValueError, "`steps` is 0"),
    "context": (
        np.array([False, True, True]), {"context": np.ones(2, np.float32)}, ValueError,
        "takes none",
    ),
    "base": (np.array([False, True, True]), {"base": "cauchy"}, ValueError, "`base` is 'cauchy'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(wing, name):
    known, options, kind, message = ERRORS[name]
    x = np.array([[np.nan, 0.5, 0.5], [np.nan, 2.0, 3.0]], np.float32)
    with pytest.raises(kind, match=message):
        wing.apply("inpaint", wing.new("Standardization", 3), x, known, **options)


def test_errors_of_the_flow(wing):
    x = np.ones((2, 3), np.float32)
    with pytest.raises(TypeError, match="`flow` is a str"):
        wing.apply("inpaint", "flow", x, x > 0)
    with pytest.raises(ValueError, match=r"`x` has shape \(2, 3\)"):
        wing.apply("inpaint", wing.new("Standardization", 4), x, x > 0)
    with pytest.raises(TypeError, match="`known` is a list"):
        wing.apply("inpaint", wing.new("Standardization", 3), x, [True, True, False])
    base, known = wing.uniform_base((3,), 0.0, 1.0), np.array([True, False, False])
    options = {"base": base, "steps": 5}
    with pytest.raises(ValueError, match="2 of 2 rows to which the flow gives no density"):
        wing.apply("inpaint", wing.new("Standardization", 3), 5 * x, known, **options)
