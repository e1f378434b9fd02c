"""Laws of the evidence by importance sampling, and what `log_evidence` refuses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pyroflows_common import verdict
from pyroflows_common.arviz import ArviZ
from pyroflows_common.evidence import weighed
from tests.wings import conjugate as one
from tests.wings.conjugate import EVIDENCE, MEAN, SCALE, Y, by_hand, normal
from tests.wings.evidence import ROWS, evidence, near, peaks, posterior, regression
from tests.wings.hosts import HOSTS, of_density, small

REFUSED = "importance sampling gives no evidence, k̂ = .*: do not trust: .* as `samples`"


def found(host, loc, scale, **options):
    """The evidence of the conjugate model by a normal density."""
    options = {"args": (host.array(Y),), **options}
    return host.log_evidence(normal(host, loc, scale), one.conjugate(host), **options)


@pytest.mark.parametrize("name", HOSTS)
@settings(max_examples=6)
@given(data=st.data())
def test_conjugate_models(name, data):
    """Of any prior, noise and number of data, with guides that are exact, shifted or wide."""
    host = HOSTS[name]
    count = data.draw(st.integers(1, 20), "count")
    prior, noise = (data.draw(st.floats(0.1, 10.0)) for _ in range(2))
    shift = data.draw(st.sampled_from([0.0, 0.3]), "shift")
    width = data.draw(st.sampled_from([1.0, 1.5, 3.0]), "width")
    y = np.random.default_rng(count).normal(prior, noise, count)
    deviation = (prior**-2 + count * noise**-2) ** -0.5
    mean = deviation**2 * y.sum() / noise**2

    def model():
        m = host.sample("m", normal(host, 0.0, prior))
        with host.plate("people", count):
            host.sample("y", host.dist.Normal(m, noise), obs=host.array(y))

    guide = normal(host, mean + shift * (width - 1) * deviation, width * deviation)
    result = host.log_evidence(guide, model, draws=1000)
    exact = stats.multivariate_normal.logpdf(y, cov=noise**2 * np.eye(count) + prior**2)
    assert near(result, exact)
    assert (result.error < 1e-6) == (width == 1.0)
    assert result.error < 0.1
    assert type(result).__name__ == "Evidence"
    assert all(type(number) is float for number in result)


def test_a_guide_that_is_too_narrow_is_refused(host):
    with pytest.raises(ValueError, match=REFUSED):
        found(host, MEAN, 0.3 * SCALE, draws=1000)
    with pytest.raises(ValueError, match="limit for 10000 draws"):
        found(host, MEAN, 0.3 * SCALE)


def test_twenty_seeds(host):
    """The interval of two errors holds the truth in eighteen of them, at least."""
    guide, options = (MEAN + 0.3 * SCALE, 0.9 * SCALE), {"draws": 1000}
    results = [found(host, *guide, seed=seed, **options) for seed in range(20)]
    assert len({result.value for result in results}) == 20
    assert sum(near(result, EVIDENCE, 2.0) for result in results) >= 18
    assert max(result.error for result in results) < 0.1
    assert found(host, *guide, seed=3, **options) == results[3]


@pytest.mark.parametrize(
    ("size", "scale", "share"), [(1, 1.5, 0.9), (1, 0.7, 0.9), (1, 0.62, 0.85), (20, 0.9, 0.9)]
)
def test_errors_hold_where_the_largest_weights_have_not_occurred(size, scale, share):
    """The mean of the fitted tail has no such bias as the mean of its smoothed weights."""
    rng, smooth = np.random.default_rng(0), ArviZ().smooth
    results = []
    for _ in range(100):
        z = rng.normal(size=(4000, size))
        log_q = stats.norm.logpdf(z).sum(1) - size * math.log(scale)
        weights = verdict.weigh(smooth, stats.norm.logpdf(scale * z).sum(1), log_q)
        results.append(weighed(weights))
    trusted = [result for result in results if not math.isnan(result.value)]
    assert len(trusted) > 60
    assert np.mean([near(result, 0.0, 2.0) for result in trusted]) >= share
    values, errors = (np.array([getattr(r, n) for r in trusted]) for n in ("value", "error"))
    assert abs(values.mean()) < 0.5 * values.std()
    assert 0.9 < np.mean(errors) / values.std() < 3.5


def test_draws_without_weight_count():
    """As draws of weight zero."""
    log_q = np.zeros(4000)
    log_p = np.where(np.arange(4000) % 4 == 0, 1.0, -np.inf)
    result = weighed(verdict.weigh(ArviZ().smooth, log_p, log_q))
    assert result.value == pytest.approx(1.0 - math.log(4))
    assert result.error == pytest.approx((3 / 4000) ** 0.5, rel=1e-3)


def test_scales_of_all_sizes(host):
    """Of log-densities far from zero, as of many data."""
    model = of_density(host, lambda xp, x: -0.5 * (x**2).sum(-1) - 1e5, size=1)
    guide = host.dist.Normal(host.array([0.1]), host.array(1.2)).to_event(1)
    result = host.log_evidence(guide, model, draws=1000)
    assert near(result, 0.5 * math.log(2 * math.pi) - 1e5)


def test_constrained_sites(host):
    """A precision and a simplex: Jacobians are those of the guide."""
    guide = small(host, regression(host), degrees_of_freedom=5.0)
    settings = {"steps": 1, "learning_rate": 1e-9, "progress": False}
    result = host.package.fit_guide(guide, draws=posterior(), **settings)
    params = getattr(result, "params", None)
    result = host.log_evidence(guide, regression(host), params=params, draws=4000)
    assert near(result, evidence())
    assert result.error < 0.05


def test_the_density_counts_as_it_stands(host):
    """With scales and factors, and without what a mask leaves out."""
    mask = np.array([True, False, True, True, False])

    def model(y):
        mean = host.sample("mean", normal(host, 0.0, 1.0))
        host.factor("bonus", 0 * mean + 2.0)
        with host.plate("people", len(y)), host.scale(scale=3.0), host.mask(mask=host.bools(mask)):
            host.sample("y", host.dist.Normal(mean, 1.0), obs=y)

    result = host.log_evidence(normal(host, 0.5, 0.5), model, args=(host.array(Y),), draws=2000)
    grid = np.linspace(-10, 10, 100_001)
    each = stats.norm.logpdf(grid) + 2 + 3 * stats.norm.logpdf(Y[mask, None], grid).sum(0)
    assert near(result, np.log(np.exp(each).sum() * (grid[1] - grid[0])))


def test_attributes_of_arviz(host):
    """They are NaN where the weights cannot be trusted."""
    data = one.weighed(host, MEAN, 1.3 * SCALE)
    value, error = (data.attrs[name] for name in ("log_evidence", "log_evidence_error"))
    assert 0 < error < 0.05
    assert abs(value - EVIDENCE) < 4 * error
    resampled = one.weighed(host, MEAN, 1.3 * SCALE, resample=True)
    assert resampled.attrs["log_evidence"] == value
    refused = one.weighed(host, MEAN, 0.3 * SCALE)
    assert math.isnan(refused.attrs["log_evidence"])
    assert math.isnan(refused["posterior"].attrs["log_evidence_error"])


def test_what_does_not_fit(host):
    """The checks are those of `to_arviz`."""
    args = (host.array(Y),)
    for options, error, message in [
        ({"draws": 24}, ValueError, "`draws` is 24, expected a whole number, at least 25"),
        ({"args": "data"}, TypeError, "`args` is a str"),
        ({"model": None}, ValueError, "`model` is missing"),
        ({"model": lambda y: None}, ValueError, "`model` has no latent sites"),
        ({"posterior": lambda y: None}, ValueError, r"does not draw the latent sites \['mean'\]"),
        ({"posterior": 3}, TypeError, "`posterior` is a int"),
    ]:
        given = {"posterior": by_hand(host), "model": one.conjugate(host), "args": args, **options}
        with pytest.raises(error, match=message):
            host.log_evidence(given.pop("posterior"), given.pop("model"), **given)


def test_a_missed_mode_is_not_noticed(host):
    """This is why the documentation warns of it."""
    guide = host.dist.Normal(host.array([9.0]), host.array(1.1)).to_event(1)
    result = host.log_evidence(guide, of_density(host, peaks, size=1), draws=1000)
    assert near(result, 0.5 * math.log(2 * math.pi))


def test_the_exact_draws_are_those_of_the_posterior():
    """Moments of the draws that other laws take for those of MCMC."""
    drawn = posterior(chains=4, draws=20_000)
    variance = 1 / drawn["precision"]
    inverse = np.linalg.inv(0.1 * np.eye(2) + ROWS.T @ ROWS)
    slopes = drawn["slopes"].reshape(-1, 2)
    assert np.allclose(np.cov(slopes.T), variance.mean() * inverse, rtol=0.05, atol=1e-3)
