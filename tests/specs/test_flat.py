"""Laws on guides for models that say little or nothing about some of their latent numbers."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from tests.wings.conjugate import only
from tests.wings.hosts import gaussian, small


def test_what_the_data_say_nothing_of_does_not_mislead_the_start(host):
    """Improper coordinates stay where they were, others have their priors, in any direction."""

    def model():
        normal = host.dist.Normal(host.array(np.zeros(3)), host.array([1.0, 1e3, 1e3]))
        x = host.sample("a", normal.to_event(1))
        mean = host.np.stack([x[..., 0], x[..., 1] + x[..., 2]], -1)
        y = host.array([1.8, 3.0])
        host.sample("y", host.dist.Normal(mean, 1 / 3).to_event(1), obs=y)
        host.sample("b", host.dist.Normal(host.array(np.zeros(2)), 1.0).to_event(1).mask(False))
        with host.mask(mask=False):
            host.sample("c", host.dist.HalfNormal(host.array(1.0)))
            host.sample("d", host.dist.Uniform(host.array(0.0), host.array(1.0)))
        host.sample("e", host.dist.Laplace(host.array(50.0), host.array(1.0)))

    x, _ = gaussian(host, model).draws()
    known, first, second, *free, bounded, kinked = x.T
    proper = [
        (known, 1.62, 0.1**0.5),
        (first + second, 3.0, 1 / 3),
        (first - second, 0.0, 2e6**0.5),
    ]
    proper += [(bounded, 0.0, 1.8), (kinked, 50.0, 1.25)]  # those two are not normal
    for draws, mean, deviation in proper:
        assert_allclose((draws.mean() - mean) / deviation, 0.0, atol=0.15)
        assert_allclose(draws.std() / deviation, 1.0, rtol=0.25)
    assert_allclose(known.std() ** 2, 0.1, rtol=0.1)
    for draws in free:
        assert abs(draws.mean()) < 2.1
        assert_allclose(draws.std(), 1.0, rtol=0.1)


def test_a_plateau_is_no_freedom(host):
    """No proper coordinate is taken for one that the model does not depend on."""

    def model():
        x = host.sample("x", host.dist.Normal(host.array(np.zeros(2)), 1.0).to_event(1).mask(False))
        outside = host.np.where(abs(x) > 3.0, abs(x) - 3.0, 0.0 * x)
        host.factor("edge", -(outside**2).sum(-1))

    guide = small(host, model)
    result = host.package.fit_guide(guide, progress=False, steps=300, learning_rate=2e-2)
    data = host.to_arviz(guide, params=getattr(result, "params", None), draws=4000)
    evidence = 2 * np.log(6 + np.pi**0.5)
    ratio = only(data, "sample_stats", "log_importance_ratio")
    assert np.log(np.exp(ratio).mean()) == pytest.approx(evidence, abs=0.1)


def test_missing_responses(host):
    """A regression whose responses are missing in part is that of the others, trained or not."""
    random = np.random.default_rng(0)
    x = random.normal(size=8)
    rows = np.stack([np.ones(8), x], 1)
    seen = np.arange(8) % 4 != 3
    y = np.where(seen, rows @ [1.0, -2.0] + 0.5 * random.normal(size=8), -999.0)

    def model(y):
        slopes = host.sample("slopes", host.dist.Normal(host.array([0.0, 0.0]), 10.0).to_event(1))
        loc = slopes[..., 0] + slopes[..., 1] * host.array(x)
        with host.plate("rows", 8):
            host.sample("y", host.dist.Normal(loc, 0.5), obs=y, obs_mask=host.bools(seen))

    args = (host.array(y),)
    guide = small(host, model)
    result = host.package.fit_guide(guide, args=args, progress=False, steps=200, learning_rate=1e-2)
    data = host.to_arviz(guide, args=args, params=getattr(result, "params", None))
    covariance = np.linalg.inv(np.eye(2) / 100 + rows[seen].T @ rows[seen] / 0.25)
    mean = covariance @ rows[seen].T @ y[seen] / 0.25
    deviations = np.sqrt(np.diag(covariance))
    slopes = only(data, "posterior", "slopes")
    assert_allclose((slopes.mean(0) - mean) / deviations, 0.0, atol=0.1)
    assert_allclose(slopes.std(0) / deviations, 1.0, rtol=0.1)
    noise = 0.25 * np.eye(6) + 100 * rows[seen] @ rows[seen].T
    evidence = stats.multivariate_normal.logpdf(y[seen], cov=noise)
    assert data.attrs["elbo"] == pytest.approx(evidence, abs=0.1)
    assert ": good; the draws can be used as they are; " in data.attrs["verdict"]
