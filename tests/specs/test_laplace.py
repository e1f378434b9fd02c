"""Laws on rows by adaptive quadrature, and on the search for the Gaussian of the global numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import optimize, special, stats

from pyroflows_common import laplace
from pyroflows_common.laplace import (
    NODES,
    Derived,
    Gaussian,
    Marginal,
    blocks,
    fitted,
    followed,
    located,
    quadrature,
    responses,
)

WIDE = 1.5  # standard deviation of the global numbers' prior
# `fitted` adds a millionth to each variance.
CLOSE = 2e-6


class Normal:
    """Rows y ~ N(A z, s² I), for z ~ N(μ, τ² I), whose distributions are all known.

    The global numbers are μ, and log τ and log s unless these are zero.
    """

    def __init__(self, size=20, width=1, scales=True, seed=0):
        rng = np.random.default_rng(seed)
        self.width, self.numbers = width, width + 2 * scales
        self.matrix = rng.normal(size=(width + 2, width))
        z = 0.7 + 1.2 * rng.normal(size=(size, width))
        self.y = z @ self.matrix.T + 0.8 * rng.normal(size=(size, width + 2))

    def parts(self, x):
        scales = np.exp(x[..., self.width :]) if self.numbers > self.width else [1.0, 1.0]
        return x[..., : self.width], *np.moveaxis(
            np.broadcast_to(scales, (*x.shape[:-1], 2)), -1, 0
        )

    def derive(self, x, z, rows):
        mu, tau, s = (np.expand_dims(part, 1) for part in self.parts(x))
        rest = self.y[rows] - z @ self.matrix.T
        value = stats.norm.logpdf(rest, 0, s[..., None]).sum(-1)
        value += stats.norm.logpdf(z, mu, tau[..., None]).sum(-1)
        slope = rest @ self.matrix / s[..., None] ** 2 - (z - mu) / tau[..., None] ** 2
        square, eye = self.matrix.T @ self.matrix, np.eye(self.width)
        curvature = square / s[..., None, None] ** 2 + eye / tau[..., None, None] ** 2
        curvature = np.broadcast_to(curvature, (*z.shape, self.width))
        return Derived(self.prior(x), value, slope, curvature)

    def values(self, x, z, rows):
        return self.derive(x, z, rows).value

    def prior(self, x):
        return stats.norm.logpdf(x, 0, WIDE).sum(-1)

    def exact(self, x):
        """Return means, covariance and log-densities of all rows at one point."""
        mu, tau, s = self.parts(x)
        covariance = np.linalg.inv(self.matrix.T @ self.matrix / s**2 + np.eye(self.width) / tau**2)
        means = (self.y @ self.matrix / s**2 + mu / tau**2) @ covariance
        wide = tau**2 * self.matrix @ self.matrix.T + s**2 * np.eye(len(self.matrix))
        heights = stats.multivariate_normal.logpdf(self.y, self.matrix @ mu, wide)
        return means, covariance, heights

    def marginal(self, x):
        return self.exact(x)[2].sum() + self.prior(x)

    def posterior(self, weights):
        """Return mean and covariance of μ, where the scales are one and rows count so much."""
        wide = self.matrix @ self.matrix.T + np.eye(len(self.matrix))
        gain = np.linalg.solve(wide, self.matrix)
        precision = weights.sum() * self.matrix.T @ gain + np.eye(self.width) / WIDE**2
        return np.linalg.solve(precision, gain.T @ (weights @ self.y)), np.linalg.inv(precision)


class Binary:
    """Rows of binary data with log-odds T z, for z ~ N(μ, τ² I); global numbers μ and log τ."""

    def __init__(self, size, width, count=4, seed=0):
        rng = np.random.default_rng(seed)
        self.design = 1.5 * rng.normal(size=(count, width)) + 0.5
        odds = 1.0 + rng.normal(size=(size, width)) @ self.design.T
        self.y = rng.uniform(size=odds.shape) < special.expit(odds)

    def values(self, x, z, rows):
        odds, mu, tau = z @ self.design.T, x[:, :1, None], np.exp(x[:, 1:, None])
        signed = np.where(self.y[rows], odds, -odds)
        return special.log_expit(signed).sum(-1) + stats.norm.logpdf(z, mu, tau).sum(-1)

    def derive(self, x, z, rows):
        chance = special.expit(z @ self.design.T)
        mu, tau = x[:, :1, None], np.exp(x[:, 1:, None])
        slope = (self.y[rows] - chance) @ self.design - (z - mu) / tau**2
        curvature = np.einsum("...m,mi,mj->...ij", chance * (1 - chance), self.design, self.design)
        curvature = curvature + np.eye(z.shape[-1]) / tau[..., None] ** 2
        return Derived(np.zeros(len(x)), self.values(x, z, rows), slope, curvature)


class Counts:
    """Rows of one Poisson count, whose rate is Gamma(a, b); global numbers log a and log b."""

    def __init__(self, y):
        self.y = np.asarray(y)

    def values(self, x, z, rows):
        a, b, y, z = np.exp(x[:, :1]), np.exp(x[:, 1:]), self.y[rows], z[..., 0]
        gamma = a * np.log(b) - special.gammaln(a) + a * z
        return gamma + y * z - special.gammaln(y + 1) - (1 + b) * np.exp(z.clip(max=700))

    def derive(self, x, z, rows):
        a, b, rate = np.exp(x[:, :1]), np.exp(x[:, 1:]), np.exp(z[..., 0].clip(max=700))
        slope = self.y[rows] + a - (1 + b) * rate
        curvature = (1 + b) * rate
        value = self.values(x, z, rows)
        return Derived(np.zeros(len(x)), value, slope[..., None], curvature[..., None, None])


class Broken:
    """The rows of a model, of which some have another density wherever z is."""

    def __init__(self, model, broken, value):
        self.model, self.broken, self.value = model, broken, value

    def derive(self, x, z, rows):
        found = self.model.derive(x, z, rows)
        return found._replace(value=self.put(found.value, rows))

    def values(self, x, z, rows):
        return self.put(self.model.values(x, z, rows), rows)

    def put(self, value, rows):
        return np.where(np.isin(rows, self.broken), self.value, value)


class Torn:
    """Rows of z ~ N(0, 1) that end at 1.5."""

    def values(self, x, z, rows):
        return np.where(z[..., 0] < 1.5, stats.norm.logpdf(z[..., 0]), -np.inf)

    def derive(self, x, z, rows):
        slope = np.where(z < 1.5, -z, np.nan)
        return Derived(np.zeros(len(x)), self.values(x, z, rows), slope, np.ones((*z.shape, 1)))


def covariances(factor):
    return factor @ factor.swapaxes(-1, -2)


def starts(count, rows, width, far=0.0):
    z = np.random.default_rng(1).normal(size=(count, rows, width))
    return far * z


def dense(model, x, row, centre, factor, points=60):
    """Return log-integral, mean, covariance and skewnesses of a row, on a grid of ±8 deviations."""
    width = len(centre)
    line = np.linspace(-8, 8, points)
    grid = np.stack(np.meshgrid(*[line] * width, indexing="ij"), -1).reshape(-1, width)
    z = centre + grid @ factor.T
    logs = model.values(x[None], z[None], np.full((1, len(z)), row))[0]
    cell = width * np.log(line[1] - line[0]) + np.log(np.abs(np.linalg.det(factor)))
    height = special.logsumexp(logs) + cell
    shares = np.exp(logs - height + cell)
    mean = shares @ z
    covariance = np.einsum("m,mi,mj->ij", shares, z - mean, z - mean)
    units = np.linalg.solve(np.linalg.cholesky(covariance), (z - mean).T)
    return height, mean, covariance, units**3 @ shares


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@given(seed=st.integers(0, 10**6))
def test_normal_rows_are_exact(width, seed):
    """Wherever they start, whatever their order, at several points at once."""
    model = Normal(width=width, seed=seed)
    rng = np.random.default_rng(seed)
    x = 0.6 * rng.normal(size=(3, model.numbers))
    rows = rng.permuted(np.tile(np.arange(20), (3, 1)), axis=1)[:, :7]
    found = fitted(model, x, starts(3, 7, width, far=30.0), rows)
    assert_allclose(found.whole, model.prior(x))
    for p in range(3):
        means, covariance, heights = model.exact(x[p])
        deviation = np.sqrt(np.diag(covariance))
        assert_allclose(found.loc[p] / deviation, means[rows[p]] / deviation, atol=1e-6)
        assert_allclose(found.mode[p] / deviation, means[rows[p]] / deviation, atol=1e-6)
        assert_allclose(found.height[p], heights[rows[p]], atol=1e-6)
        factor = np.linalg.cholesky(covariance)
        assert_allclose(found.factor[p], np.tile(factor, (7, 1, 1)), rtol=CLOSE, atol=1e-7)
        assert_allclose(found.skewness[p], 0.0, atol=1e-6)


@pytest.mark.parametrize(("a", "error"), [(3.0, 3e-4), (10.0, 1.5e-5)])
def test_counts(a, error):
    """The logarithm of a Gamma variable is skewed; counts are negative binomial."""
    y, b = np.array([0, 1, 4, 30, 1000]), 1.5
    x = np.log([[a, b]])
    found = fitted(Counts(y), x, starts(1, 5, 1, far=3.0), np.arange(5)[None])
    heights = stats.nbinom.logpmf(y, a, b / (1 + b))
    variance = special.polygamma(1, a + y)
    mean = special.digamma(a + y) - np.log(1 + b)
    skewness = special.polygamma(2, a + y) / variance**1.5
    assert_allclose(found.mode[0, :, 0], np.log((a + y) / (1 + b)), atol=1e-4)
    assert_allclose(found.height[0], heights, atol=error)
    assert_allclose((found.loc[0, :, 0] - mean) / np.sqrt(variance), 0.0, atol=10 * error)
    assert_allclose(found.factor[0, :, 0, 0] ** 2, variance, rtol=40 * error)
    assert_allclose(found.skewness[0, :, 0], skewness, atol=150 * error)
    assert found.skewness[0, 0, 0] < -0.25


def test_skewness_is_bounded(monkeypatch):
    monkeypatch.setattr(laplace, "SKEWEST", 0.2)
    x = np.log([[3.0, 1.0]])
    found = fitted(Counts([0]), x, np.zeros((1, 1, 1)), np.zeros((1, 1), int))
    assert_array_equal(found.skewness, -0.2)


@pytest.mark.parametrize(("width", "error"), [(1, 1e-5), (2, 2e-4), (3, 1e-3)])
def test_binary_rows_agree_with_dense_integration(width, error):
    model, x = Binary(6, width), np.array([0.5, 0.1])
    found = fitted(model, x[None], starts(1, 6, width), np.arange(6)[None])
    for row in range(6):
        mode, factor = found.mode[0, row], found.factor[0, row]
        height, mean, covariance, skewness = dense(model, x, row, mode, factor)
        assert_allclose(found.height[0, row], height, atol=error)
        assert_allclose(np.linalg.solve(factor, found.loc[0, row] - mean), 0.0, atol=5 * error)
        inner = np.linalg.solve(factor, np.linalg.cholesky(covariance))
        assert_allclose(inner, np.eye(width), atol=10 * error)
        assert_allclose(found.skewness[0, row], skewness, atol=100 * error)
    assert np.abs(found.skewness).max() > 0.1
    assert_array_equal(found.factor, np.tril(found.factor))
    assert (np.diagonal(found.factor, axis1=-2, axis2=-1) > 0).all()


def test_more_than_three_numbers_take_laplace():
    model, x = Binary(4, 4), np.array([[0.5, 0.1]])
    found = fitted(model, x, starts(1, 4, 4), np.arange(4)[None])
    assert_array_equal(found.loc, found.mode)
    assert_array_equal(found.skewness, 0.0)

    def down(z, one):
        return -model.values(x, z[None, None], one)[0, 0]

    for row in range(4):
        one = np.full((1, 1), row)
        least = optimize.minimize(down, np.zeros(4), args=(one,), options={"gtol": 1e-7})
        curvature = model.derive(x, least.x[None, None], one).curvature[0, 0]
        assert_allclose(found.mode[0, row], least.x, atol=1e-3)
        covariance = covariances(found.factor[0, row])
        assert_allclose(covariance, np.linalg.inv(curvature), rtol=1e-3, atol=1e-4)
        height = -least.fun + 2 * np.log(2 * np.pi) - np.linalg.slogdet(curvature)[1] / 2
        assert_allclose(found.height[0, row], height, atol=1e-4)


def without(model, kept, x, width):
    return fitted(model, x, starts(2, len(kept), width), np.tile(kept, (2, 1)))


@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_rows_that_are_not_finite_harm_only_themselves(width, value):
    model = Normal(width=width)
    x = np.stack([np.zeros(model.numbers), np.full(model.numbers, 0.3)])
    rows, kept = np.arange(5), np.array([0, 2, 3])
    found = without(Broken(model, [1, 4], value), rows, x, width)
    expected = without(model, kept, x, width)
    assert_array_equal(found.height[:, [1, 4]], -np.inf)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert_allclose(one[:, kept], other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_rows_that_are_not_finite_have_a_start_all_the_same(width, value):
    model = Broken(Normal(width=width), [1], value)
    found = without(model, np.arange(3), np.zeros((2, width + 2)), width)
    for part in found[2:]:
        assert np.isfinite(part).all()


def test_a_row_may_end():
    """Neither a step nor a node beyond the end does harm."""
    z = np.array([-40.0, 1.4])[None, :, None]
    found = fitted(Torn(), np.zeros((1, 1)), z, np.zeros((1, 2), int))
    assert_allclose(found.mode, 0.0, atol=1e-3)
    assert_allclose(found.height, stats.norm.logcdf(1.5), atol=0.1)
    assert (found.loc < -0.05).all()
    assert (found.factor < 0.97).all()


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_rule_integrates_polynomials(width):
    nodes, log_weights = quadrature(width)
    weights = np.exp(log_weights)
    assert nodes.shape == (NODES[width] ** width, width)
    assert_allclose(weights.sum(), 1.0)
    for power in range(1, 2 * NODES[width]):
        moment = stats.norm.moment(power)
        assert_allclose(weights @ nodes**power, moment, rtol=1e-9, atol=1e-6)
    assert_allclose(weights @ np.prod(nodes**2, 1), 1.0)


def test_there_is_no_rule_of_four_numbers():
    assert quadrature(4) is None


@pytest.mark.parametrize("most", [laplace.MANY, 1])
def test_the_marginal_is_the_sum_over_rows(monkeypatch, most):
    """However many are evaluated at once, and wherever they start."""
    monkeypatch.setattr(laplace, "MANY", most)
    model = Normal(size=11, width=2)
    points = 0.5 * np.random.default_rng(0).normal(size=(4, model.numbers))
    marginal = Marginal(model, *blocks(11, 3), np.array([50.0, -50.0]))
    expected = [model.marginal(point) for point in points]
    assert_allclose(marginal(points), expected, atol=1e-4)
    marginal.settle(points[0])
    assert_allclose(marginal.z.reshape(-1, 2)[:11], model.exact(points[0])[0], atol=1e-4)
    assert_allclose(marginal(points), expected, atol=1e-4)


def test_the_marginal_counts_rows_by_their_weights():
    model, weights = Normal(size=6), np.array([[0.0, 2.0, 0.5], [1.0, 3.0, 0.0]])
    x = np.array([0.2, -0.3, 0.1])
    marginal = Marginal(model, np.array([[0, 1, 2], [5, 4, 3]]), weights, np.zeros(1))
    heights = model.exact(x)[2]
    expected = heights[[1, 2, 5, 4]] @ [2.0, 0.5, 1.0, 3.0] + model.prior(x)
    assert_allclose(marginal(x[None]), expected, atol=1e-5)


def test_the_marginal_is_minus_infinity_where_it_is_not_finite():
    """Also where a row that is not finite fills a block, without weight."""
    model = Broken(Normal(size=4, width=4), [0], np.nan)
    assert_array_equal(Marginal(model, *blocks(4, 3), np.zeros(4))(np.zeros((2, 6))), -np.inf)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_a_normal_posterior_is_found_exactly(width):
    """From afar, with its correlations and its height."""
    model = Normal(size=40, width=width, scales=False)
    points = np.random.default_rng(0).normal(size=(4, width)) * 100
    found = located(model, points, np.zeros(width), 0.1, (40, 7), follow=True)
    mean, covariance = model.posterior(np.ones(40))
    deviation = np.sqrt(np.diag(covariance))
    assert_allclose((found.loc - mean) / deviation, 0.0, atol=1e-3)
    scaled = covariances(found.factor) / np.outer(deviation, deviation)
    assert_allclose(scaled, covariance / np.outer(deviation, deviation), atol=1e-3)
    assert_allclose(found.value, model.marginal(mean), atol=1e-3)


@pytest.mark.parametrize("width", [1, 2])
def test_the_mode_of_means_and_scales_is_found(width):
    """The posterior is not normal, and curvatures are those on its scale."""
    model = Normal(size=60, width=width)
    points = np.vstack([np.full(model.numbers, 4.0), np.full(model.numbers, -5.0)])
    found = located(model, points, np.zeros(width), 1.0, (60, 60), follow=True)
    least = optimize.minimize(lambda x: -model.marginal(x), np.zeros(model.numbers))
    whitened = np.linalg.solve(found.factor, found.loc - least.x)
    assert np.linalg.norm(whitened) < 0.15
    assert_allclose(found.value, -least.fun, atol=0.02)
    inner = np.linalg.solve(found.factor, np.linalg.solve(found.factor, least.hess_inv).T)
    assert_allclose(inner, np.eye(model.numbers), atol=0.35)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_factor_is_symmetric_up_to_scales(width):
    model = Normal(size=30, width=width)
    points = np.zeros((1, model.numbers))
    found = located(model, points, np.zeros(width), 1.0, (30, 10), follow=True)
    deviation = np.linalg.norm(found.factor, axis=1)
    root = found.factor / deviation[:, None]
    assert_allclose(root, root.T, atol=1e-12)
    assert (np.linalg.eigvalsh(root) > 0).all()


def test_of_many_global_numbers_correlations_are_left_out(monkeypatch):
    """Each deviation is that of one number where the others are fixed."""
    width = 3
    monkeypatch.setattr(laplace, "JOINT", width - 1)
    model = Normal(size=60, width=width, scales=False)
    found = located(model, np.ones((1, width)), np.zeros(width), 0.3, (60, 60), follow=True)
    mean, covariance = model.posterior(np.ones(60))
    assert_allclose(found.factor, np.diag(np.diag(found.factor)), atol=1e-8)
    fixed = 1 / np.sqrt(np.diag(np.linalg.inv(covariance)))
    assert_allclose(np.diag(found.factor), fixed, rtol=1e-2)
    below = model.marginal(mean) - found.value
    assert -1e-3 < below < model.marginal(mean) - model.marginal(np.ones(width))


def test_the_search_sets_out_from_the_two_best():
    """Of two modes, each where points lie, the higher one is found, not that of the best point."""

    class Two:
        def derive(self, x, z, rows):
            curvature = np.ones((*z.shape, 1))
            return Derived(self.whole(x), -0.5 * z[..., 0] ** 2, -z, curvature)

        def values(self, x, z, rows):
            return -0.5 * z[..., 0] ** 2

        def whole(self, x):
            low, high = stats.norm.logpdf(x[:, 0], -20, 1), stats.norm.logpdf(x[:, 0], 20, 1)
            return np.logaddexp(low, high + 3.0)

    points = np.array([[-20.0], [16.0], [100.0], [-70.0]])
    for order in ([0, 1, 2, 3], [3, 1, 2, 0]):
        found = located(Two(), points[order], np.zeros(1), 1.0, (3, 3), follow=True)
        assert_allclose(found.loc, 20.0, atol=1e-3)
        assert_allclose(found.factor, 1.0, rtol=1e-3)


def test_nothing_is_located_where_nothing_is_finite():
    class Nothing(Normal):
        def prior(self, x):
            return np.full(len(x), np.nan)

    points = np.zeros((3, 3))
    assert located(Nothing(), points, np.zeros(1), 1.0, (20, 5), follow=True) is None


def test_points_where_nothing_is_finite_are_passed_over():
    class Bounded(Normal):
        def prior(self, x):
            return np.where(np.abs(x).max(-1) < 4, super().prior(x), -np.inf)

    model = Bounded(size=40, scales=False)
    points = np.array([[9.0], [3.9], [-9.0]])
    found = located(model, points, np.zeros(1), 1.0, (40, 10), follow=True)
    mean, covariance = model.posterior(np.ones(40))
    assert_allclose(found.loc, mean, atol=1e-3)
    assert_allclose(found.factor**2, covariance, rtol=1e-2)


def test_some_rows_lead_the_way_and_more_place_the_mode(monkeypatch):
    monkeypatch.setattr(laplace, "SOME", 15)
    monkeypatch.setattr(laplace, "ENOUGH", 60)
    model = Normal(size=200, width=2, scales=False)
    found = located(model, np.full((1, 2), 30.0), np.zeros(2), 1.0, (200, 10), follow=True)
    rows, each = blocks(200, 10, 60)
    weights = np.bincount(rows.ravel(), each.ravel(), minlength=200)
    mean, covariance = model.posterior(weights)
    assert_allclose(found.loc, mean, atol=1e-4)
    assert_allclose(covariances(found.factor), covariance, rtol=1e-2, atol=1e-6)
    assert_allclose(covariance, model.posterior(np.ones(200))[1])


def test_rows_that_cannot_be_chosen_are_one_block():
    """It counts for all rows, whatever its indices."""

    class Taken(Normal):
        def derive(self, x, z, rows):
            assert rows.shape[1] == 8
            return super().derive(x, z, np.broadcast_to(np.arange(3, 11), rows.shape))

    model = Taken(size=30, scales=False)
    found = located(model, np.zeros((1, 1)), np.zeros(1), 1.0, (30, 8), follow=False)
    weights = np.where((np.arange(30) >= 3) & (np.arange(30) < 11), 30 / 8, 0.0)
    mean, covariance = model.posterior(weights)
    assert_allclose(found.loc, mean, atol=1e-4)
    assert_allclose(found.factor**2, covariance, rtol=1e-3)


@given(st.integers(1, 60), st.integers(1, 70))
def test_blocks_hold_each_row_once(size, taken):
    rows, weights = blocks(size, taken)
    assert rows.shape == weights.shape == (math.ceil(size / taken), taken)
    assert_array_equal(np.bincount(rows.ravel(), weights.ravel(), minlength=size), 1.0)
    assert_array_equal(rows.ravel()[:size], np.arange(size))


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 80))
def test_blocks_of_some_rows_count_for_all(size, taken, most):
    rows, weights = blocks(size, taken, most)
    counted = rows[weights > 0]
    assert rows.shape[1] == taken
    assert len(set(counted)) == len(counted) == min(math.ceil(most / taken) * taken, size)
    assert ((rows >= 0) & (rows < size)).all()
    assert_allclose(weights.sum(), size)
    assert_allclose(weights[weights > 0], size / len(counted))


def test_some_rows_are_random_ones():
    rows, _ = blocks(10_000, 100, 1000)
    assert 4000 < rows.mean() < 6000
    assert_array_equal(rows, blocks(10_000, 100, 1000)[0])


@pytest.mark.parametrize("most", [laplace.MANY, 8])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_responses_of_normal_rows_are_exact(monkeypatch, width, most):
    """Differences over a standard deviation each way, for rows in order, all of them once."""
    monkeypatch.setattr(laplace, "MANY", most)
    model = Normal(size=23, width=width)
    rng = np.random.default_rng(0)
    root = 0.1 * rng.normal(size=(model.numbers, model.numbers))
    start = Gaussian(0.2 * rng.normal(size=model.numbers), root, 0.0)
    found = responses(model, 23, 4, start, np.full(width, 20.0))
    means, covariance, heights = model.exact(start.loc)
    factor = np.linalg.cholesky(covariance)
    assert_allclose(found.loc, means, atol=1e-4)
    assert_allclose(found.factor, np.tile(factor, (23, 1, 1)), rtol=1e-5, atol=1e-7)
    assert_allclose(found.skewness, 0.0, atol=1e-5)
    assert_allclose(found.height[:, 0], heights, atol=1e-5)
    for k in range(model.numbers):
        up, down = (model.exact(start.loc + sign * root[:, k]) for sign in (1, -1))
        slope = np.linalg.solve(factor, (up[0] - down[0]).T / 2).T
        assert_allclose(found.slope[..., k], slope, atol=1e-4)
        logs = [np.log(np.diag(np.linalg.cholesky(side[1]))) for side in (up, down)]
        log_slope = np.tile((logs[0] - logs[1]) / 2, (23, 1))
        assert_allclose(found.log_slope[..., k], log_slope, atol=1e-5)
        assert_allclose(found.height[:, 1 + k], (up[2] - down[2]) / 2, atol=1e-4)


def test_slopes_of_means_are_derivatives():
    """Where all is normal, differences are derivatives: of z's mean, H⁻¹ / τ² by μ."""
    model = Normal(size=9, width=2, scales=False)
    mean, covariance = model.posterior(np.ones(9))
    start = Gaussian(mean, np.linalg.cholesky(covariance), 0.0)
    found = responses(model, 9, 9, start, np.zeros(2))
    _, inside, _ = model.exact(mean)
    expected = np.linalg.solve(np.linalg.cholesky(inside), inside @ start.factor)
    assert_allclose(found.slope, np.tile(expected, (9, 1, 1)), atol=1e-4)
    assert_allclose(found.log_slope, 0.0, atol=1e-5)
    # The slopes of all rows and of the prior cancel at the mode.
    prior = -mean / WIDE**2 @ start.factor
    assert_allclose(found.height[:, 1:].sum(0) + prior, 0.0, atol=1e-4)


def test_too_many_slopes_are_left_out(monkeypatch):
    assert followed(100, 3, 5) == 5
    monkeypatch.setattr(laplace, "SLOPES", 2 * 100 * 3 * 5)
    assert followed(100, 3, 5) == 5
    assert followed(101, 3, 5) == followed(100, 4, 5) == followed(100, 3, 6) == 0


def test_rows_without_slopes_have_the_rest(monkeypatch):
    monkeypatch.setattr(laplace, "SLOPES", 1)
    model = Normal(size=5, width=2)
    found = responses(model, 5, 2, Gaussian(np.zeros(4), np.eye(4), 0.0), np.zeros(2))
    assert found.slope.shape == found.log_slope.shape == (5, 2, 0)
    assert found.height.shape == (5, 1)
    assert_allclose(found.loc, model.exact(np.zeros(4))[0], atol=1e-4)
