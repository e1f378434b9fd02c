"""Laws of the importance weights and of the verdict."""

import math
import re

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from pyroflows_common import verdict
from pyroflows_common.arviz import ArviZ
from tests.wings.conjugate import (
    EVIDENCE,
    MEAN,
    SCALE,
    Y,
    by_hand,
    conjugate,
    normal,
    only,
    weighed,
)


def test_the_exact_posterior(host):
    data = weighed(host, MEAN, SCALE)
    assert data.attrs["pareto_k"] <= 0.3
    assert data.attrs["elbo"] == pytest.approx(EVIDENCE, abs=1e-3)
    assert data.attrs["importance_ess"] == pytest.approx(1000)
    assert ": good; the draws can be used as they are; " in data.attrs["verdict"]
    assert_allclose(only(data, "sample_stats", "log_weight"), -math.log(1000))


@pytest.mark.parametrize("make", ["AutoNormal", "AutoMultivariateNormal"])
def test_an_exact_guide(host, make):
    """Jacobians of constrained sites are those of the guide."""

    def model():
        host.sample("scale", host.dist.LogNormal(host.array(0.0), host.array(1.0)))
        with host.plate("group", 3):
            host.sample("effect", normal(host, 0.0, 1.0))
        two = host.dist.Normal(host.array(np.zeros(2)), host.array(1.0)).to_event(1)
        host.sample("slopes", two)

    start = {"scale": 1.0, "effect": np.zeros(3), "slopes": np.zeros(2)}
    start = {name: host.array(value) for name, value in start.items()}
    make = getattr(host.guides, make)
    guide = make(model, init_scale=1.0, init_loc_fn=host.init_to_value(values=start))
    data = host.to_arviz(guide, params=host.params(guide))
    assert_allclose(only(data, "sample_stats", "log_importance_ratio"), 0.0, atol=1e-4)
    assert stats.kstest(only(data, "posterior", "scale"), stats.lognorm(1).cdf).pvalue > 1e-3
    assert stats.kstest(only(data, "posterior", "effect").ravel(), "norm").pvalue > 1e-3


def test_a_guide_by_hand(host):
    data = host.to_arviz(by_hand(host), conjugate(host), args=(host.array(Y),), draws=50)
    draws = only(data, "posterior", "mean")
    lp = stats.norm.logpdf(draws) + stats.norm.logpdf(Y[:, None], draws).sum(0)
    assert_allclose(only(data, "sample_stats", "lp"), lp, rtol=1e-6)
    ratio = lp - stats.norm.logpdf(draws, 0.1, 0.3)
    assert_allclose(only(data, "sample_stats", "log_importance_ratio"), ratio, rtol=1e-5, atol=1e-5)
    likelihood = stats.norm.logpdf(Y, draws[:, None])
    assert_allclose(only(data, "log_likelihood", "y"), likelihood, rtol=1e-6)
    assert data.attrs["elbo"] == pytest.approx(ratio.mean(), rel=1e-5)


def test_the_weights_are_smoothed_and_normalised(host):
    data = weighed(host, MEAN + 0.1, 1.2 * SCALE)
    log_weight = only(data, "sample_stats", "log_weight")
    ratio = only(data, "sample_stats", "log_importance_ratio")
    assert np.exp(log_weight).sum() == pytest.approx(1.0)
    assert (np.diff(log_weight[np.argsort(ratio)]) >= -1e-9).all()
    assert data.attrs["importance_ess"] == pytest.approx(1 / np.exp(2 * log_weight).sum())
    assert np.log(np.exp(ratio).mean()) == pytest.approx(EVIDENCE, abs=0.02)
    assert data.attrs["pareto_k"] < 0.5


@pytest.mark.parametrize("loc", [MEAN, MEAN + 1.0])
def test_a_guide_that_is_too_narrow(host, loc):
    data = weighed(host, loc, 0.3 * SCALE)
    assert data.attrs["pareto_k"] > 0.7
    assert "do not trust: above 0.67, the limit for 1000 draws" in data.attrs["verdict"]


def test_a_guide_that_is_too_wide_is_not_used_as_it_is(host):
    """Its weights are bounded, so that k̂ is low, but its draws are not those of the posterior."""
    data = weighed(host, MEAN, 3 * SCALE)
    assert data.attrs["pareto_k"] < 0.5
    assert "good after importance resampling (resample=True)" in data.attrs["verdict"]


def test_resampling_repairs_a_guide(host):
    loc, scale = MEAN + SCALE, 1.5 * SCALE
    before = weighed(host, loc, scale, draws=4000)
    after = weighed(host, loc, scale, draws=4000, resample=True, posterior_predictive=True)
    draws = only(after, "posterior", "mean")
    assert abs(only(before, "posterior", "mean").mean() - MEAN) > 0.9 * SCALE
    assert abs(draws.mean() - MEAN) < 0.1 * SCALE
    assert draws.std() == pytest.approx(SCALE, rel=0.1)
    assert set(draws) < set(only(before, "posterior", "mean"))
    # Everything follows the draws, and the attributes stay.
    assert_allclose(
        only(after, "log_likelihood", "y"), stats.norm.logpdf(Y, draws[:, None]), rtol=1e-5
    )
    assert_allclose(only(after, "posterior", "twice"), 2 * draws)
    lp = stats.norm.logpdf(draws) + stats.norm.logpdf(Y[:, None], draws).sum(0)
    assert_allclose(only(after, "sample_stats", "lp"), lp, rtol=1e-5)
    ratio = lp - stats.norm.logpdf(draws, loc, scale)
    assert_allclose(only(after, "sample_stats", "log_importance_ratio"), ratio, rtol=1e-4)
    assert_allclose(only(after, "sample_stats", "log_weight"), -math.log(4000))
    residuals = only(after, "posterior_predictive", "y") - draws[:, None]
    assert stats.kstest(residuals.ravel(), "norm").pvalue > 1e-3
    for name in ("pareto_k", "elbo", "importance_ess"):
        assert after.attrs[name] == before.attrs[name]
    assert "good; the draws are resampled by importance; " in after.attrs["verdict"]


def test_systematic_resampling():
    """Each draw is taken as often as its weight says, but for rounding."""
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=50) ** 3 * (rng.uniform(size=50) > 0.3)
    weights[[0, -1]] = 0.0
    weights /= weights.sum()
    with np.errstate(divide="ignore"):
        log_weight = np.log(weights)
    for start in (0.0, 0.4, 1 - 2**-53):
        kept = verdict.resample(log_weight, start)
        counts = np.bincount(kept, minlength=50)
        assert (np.diff(kept) >= 0).all()
        assert (abs(counts - 50 * weights) < 1).all()
        assert not counts[weights == 0].any()


@pytest.mark.parametrize(
    ("k", "ess", "lost", "resampled", "text"),
    [
        (0.123, 950, 0, False, "k̂ = 0.12: good; the draws can be used as they are"),
        (0.123, 600, 0, False, "k̂ = 0.12: good after .*the draws count as 600 of 1000"),
        (0.123, 950, 9, False, "k̂ = 0.12: good after .*; 9 of 1000 draws have no finite ratio"),
        (0.123, 600, 0, True, "k̂ = 0.12: good; the draws are resampled by importance"),
        (0.61, 200, 0, False, r"k̂ = 0.61: usable after importance resampling \(resample=True\)"),
        (0.61, 200, 0, True, "k̂ = 0.61: usable; the draws are resampled by importance"),
        (0.68, 20, 0, False, "k̂ = 0.68: do not trust: above 0.67, the limit for 1000 draws"),
        (0.6668, 20, 0, False, "k̂ = 0.6668: do not trust: above 0.6667, the limit"),
        (0.6665, 200, 0, False, "k̂ = 0.6665: usable after"),
        (0.93, 20, 0, True, "k̂ = 0.93: do not trust"),
        (math.inf, 1, 999, False, "k̂ = inf: do not trust.*; 999 of 1000 draws have no finite"),
        (-math.inf, 1000, 0, False, "k̂ = -inf: good; the draws can be used as they are"),
    ],
)
def test_verdicts(k, ess, lost, resampled, text):
    ratio = np.where(np.arange(1000) < lost, -np.inf, 0.0)
    weights = verdict.Weights(ratio, np.zeros(1000), k, ess)
    found = verdict.verdict(weights, resampled)
    assert re.match(text, found), found


@pytest.mark.parametrize("seed", range(10))
def test_a_step_is_no_tail(seed):
    """Two parts of a mixture that are nearly perfect, one a hair better than the other."""
    rng = np.random.default_rng(seed)
    ratio = np.where(rng.uniform(size=1000) < 0.1, 0.008, 0.0) + 1e-3 * rng.normal(size=1000)
    weights = verdict.weigh(ArviZ().smooth, ratio, np.zeros(1000))
    assert weights.trusted
    assert weights.ess == pytest.approx(1000)


def test_draws_outside_of_the_support_have_no_weight(host):
    def model():
        host.sample("rate", host.dist.Exponential(host.array(1.0)))

    def guide():
        host.sample("rate", normal(host, 0.0, 2.0))

    before, after = (host.to_arviz(guide, model, resample=r) for r in (False, True))
    draws = only(before, "posterior", "rate")
    ratio = only(before, "sample_stats", "log_importance_ratio")
    assert_array_equal(np.isneginf(ratio), draws < 0)
    assert (only(before, "sample_stats", "log_weight")[draws < 0] == -np.inf).all()
    assert before.attrs["elbo"] == -np.inf
    lost = (draws < 0).sum()
    assert f"; {lost} of 1000 draws have no finite ratio" in before.attrs["verdict"]
    assert (only(after, "posterior", "rate") >= 0).all()
    assert only(after, "posterior", "rate").mean() == pytest.approx(1.0, abs=0.15)


def test_a_joint_density_that_is_not_a_number_has_no_weight(host):
    def model():
        mean = host.sample("mean", normal(host, 0.0, 1.0))
        host.factor("half", 0.0 * host.np.log(mean))

    data = host.to_arviz(normal(host, 0.0, 1.0), model)
    draws = only(data, "posterior", "mean")
    lost = np.isneginf(only(data, "sample_stats", "log_importance_ratio"))
    assert_array_equal(lost, draws < 0)
    # The others are weighed alike, yet the draws must not be used as they are.
    assert data.attrs["importance_ess"] == pytest.approx((draws >= 0).sum())
    assert "good after importance resampling" in data.attrs["verdict"]


def test_scales_masks_and_factors(host):
    def model(y, mask):
        mean = host.sample("mean", normal(host, 0.0, 1.0))
        host.factor("bonus", 2.0 * mean)
        with host.plate("people", len(y)), host.scale(scale=3.0), host.mask(mask=mask):
            host.sample("y", host.dist.Normal(mean, 1.0), obs=y)

    mask = np.array([True, False, True, True, False])
    args = (host.array(Y), host.array(mask) > 0)
    data = host.to_arviz(normal(host, MEAN, SCALE), model, args=args, draws=50)
    draws = only(data, "posterior", "mean")
    each = stats.norm.logpdf(Y, draws[:, None]) * mask
    lp = stats.norm.logpdf(draws) + 2 * draws + 3 * each.sum(-1)
    assert_allclose(only(data, "sample_stats", "lp"), lp, rtol=1e-5)
    assert_allclose(only(data, "log_likelihood", "y"), each, rtol=1e-5)
    assert list(data["log_likelihood"].data_vars) == ["y"]
