"""Laws of guides for supports that depend on other latent sites."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from tests.wings.conjugate import only
from tests.wings.hosts import started


def nested(host):
    """Below and above b, the site a has two parts: independent, each with an exponential prior."""

    def model():
        a = host.sample("a", host.dist.Gamma(host.array(2.0), host.array(1.0)))
        b = host.sample("b", host.dist.Uniform(host.array(0.0), a))
        host.sample("y", host.dist.Normal(b, 1.0), obs=host.array(0.7))
        host.sample("w", host.dist.Normal(a - b, 1.0), obs=host.array(2.0))

    return model


def in_a_plate(host):
    """Three sites below one bound."""

    def model():
        a = host.sample("a", host.dist.Gamma(host.array(4.0), host.array(1.0)))
        with host.plate("three", 3):
            b = host.sample("b", host.dist.Uniform(0.0 * a, a))
            host.sample("y", host.dist.Normal(b, 1.0), obs=host.array([0.5, 1.0, 2.0]))

    return model


def below_a_sum(host):
    """The bound depends on all entries of a vector, but on those of no other draw."""

    def model():
        a = host.sample("a", host.dist.Gamma(host.array([2.0, 2.0]), 1.0).to_event(1))
        b = host.sample("b", host.dist.Uniform(host.array(0.0), a.sum()))
        host.sample("y", host.dist.Normal(b, 1.0), obs=host.array(1.0))

    return model


def by_quadrature_of_a_sum():
    """The sum has a Gamma distribution, and its halves have the same mean."""
    bound = np.linspace(0.0, 40.0, 40001)[1:]
    mass = stats.norm.cdf(bound - 1.0) - stats.norm.cdf(-1.0)
    first = mass + stats.norm.pdf(-1.0) - stats.norm.pdf(bound - 1.0)
    weight = stats.gamma(4).pdf(bound) / bound * mass
    total = weight.sum()
    mean = (weight * bound).sum() / total / 2
    return np.log(total * 1e-3), np.array([mean, mean]), (weight * first / mass).sum() / total


def by_parts():
    """Return the evidence, and means of a and b."""
    parts = [stats.truncnorm(1 - y, np.inf, loc=y - 1) for y in (0.7, 2.0)]
    below, above = (part.mean() for part in parts)
    evidence = sum(0.5 - y + stats.norm.logcdf(y - 1) for y in (0.7, 2.0))
    return evidence, below + above, below


def by_quadrature():
    """As above; the likelihood of each b is integrated up to the bound."""
    bound = np.linspace(0.0, 30.0, 30001)[1:, None]
    y = np.array([0.5, 1.0, 2.0])
    mass = stats.norm.cdf(bound - y) - stats.norm.cdf(-y)
    first = y * mass + stats.norm.pdf(-y) - stats.norm.pdf(bound - y)
    weight = stats.gamma(4).pdf(bound[:, 0]) / bound[:, 0] ** 3 * mass.prod(1)
    evidence = weight.sum() * 1e-3
    means = (weight[:, None] * first / mass).sum(0) / weight.sum()
    return np.log(evidence), (weight * bound[:, 0]).sum() / weight.sum(), means


TARGETS = {
    "nested": (nested, by_parts),
    "in a plate": (in_a_plate, by_quadrature),
    "below a sum": (below_a_sum, by_quadrature_of_a_sum),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_support_follows_the_sites_it_depends_on(host, name):
    """Draws, densities, weights and quantiles agree, and no value is out of reach."""
    make, exact = TARGETS[name]
    fitted = started(host, make(host))
    params = getattr(fitted, "params", None)
    data = host.to_arviz(fitted.guide, params=params, draws=4000)
    evidence, mean_a, mean_b = exact()
    weights = np.exp(only(data, "sample_stats", "log_weight"))
    a, b = only(data, "posterior", "a"), only(data, "posterior", "b")
    ratio = only(data, "sample_stats", "log_importance_ratio")
    assert np.isfinite(ratio).all()
    assert np.log(np.exp(ratio).mean()) == pytest.approx(evidence, abs=0.05)
    assert_allclose(weights @ a, mean_a, rtol=0.1)
    assert_allclose(weights @ b, mean_b, rtol=0.1)
    levels = [0.1, 0.5, 0.9]
    for site, draws in {"a": a, "b": b}.items():
        quantiles = fitted.quantiles(levels)[site]
        assert_allclose(quantiles, np.quantile(draws, levels, axis=0), rtol=0.2)
    if name != "below a sum":  # which takes one draw at a time
        losses = fitted.train(30, rate=1e-6)
        assert losses.mean() == pytest.approx(-data.attrs["elbo"], abs=0.2)


def test_a_support_that_depends_on_sites_of_no_guide(host):
    """No guide can follow it: it says so, and what to do."""
    part = host.block(nested(host), expose=["b"])
    with host.eager(), pytest.raises(ValueError, match="support of site 'b' depends on latent"):
        started(host, part)
