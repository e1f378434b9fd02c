"""Laws of NUTS in the coordinates of a guide."""

import math
import warnings

import arviz as az
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pyroflows_common.arviz import ArviZ
from pyroflows_common.neutra import (
    Gradients,
    Sampled,
    check_sampled,
    plan,
    quality,
    warn_of_draws,
)
from tests.wings.hosts import HOSTS, of_density, small

Y = np.random.default_rng(0).normal(1.0, 1.0, 20)
# Mean and standard deviation of the posterior of the mean of `Y`.
SD = (20 + 1 / 4) ** -0.5
EXACT = SD**2 * Y.sum()
SHORT = {"steps": 60, "warmup": 120, "draws": 300, "chains": 2, "progress": False}


def conjugate(host, y=Y):
    """A mean with a normal prior, a number apart from it, and a deterministic site."""

    def model():
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), host.array(2.0)))
        host.sample("scale", host.dist.LogNormal(host.array(0.0), host.array(0.5)))
        host.deterministic("twice", 2 * mean)
        with host.plate("data", len(y)):
            host.sample("y", host.dist.Normal(mean, host.array(1.0)), obs=host.array(y))

    return model


def sampled(host, guide, **options):
    """A result without its warnings, which short runs have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return host.sample_neutra(guide, **{**SHORT, **options})


@pytest.fixture(scope="module")
def result(wing):
    """One run for several laws."""
    host = HOSTS[wing.name]
    host.clear()
    return sampled(host, small(host, conjugate(host)), seed=1)


def test_the_posterior_is_right(result):
    mean, log_scale = result.samples["mean"], np.log(result.samples["scale"])
    assert mean.shape == (2, 300)
    error = 4 / max(result.ess, 60) ** 0.5
    assert mean.mean() == pytest.approx(EXACT, abs=error * SD)
    assert mean.std() == pytest.approx(SD, rel=error)
    assert log_scale.mean() == pytest.approx(0.0, abs=error * 0.5)
    assert log_scale.std() == pytest.approx(0.5, rel=error)
    np.testing.assert_allclose(result.samples["twice"], 2 * mean, rtol=1e-5)


def test_counts_and_quality_are_those_of_the_draws(result):
    counted = result.gradients
    assert counted.search == 0
    assert counted.total == counted.training + counted.warmup + counted.sampling
    assert counted.sampling >= 600
    assert counted.warmup >= 240
    latent = [result.samples[name] for name in ("mean", "scale")]
    assert result.ess == pytest.approx(min(float(az.ess(x, method="bulk")) for x in latent))
    assert result.rhat == pytest.approx(max(float(az.rhat(x)) for x in latent))
    assert result.ess_per_1000 == pytest.approx(1000 * result.ess / counted.total)
    assert result.divergences == result.diverging.sum()
    assert f"ess={result.ess:.0f}" in repr(result)
    data = result.to_arviz()
    assert_array_equal(data.posterior["mean"].values, result.samples["mean"])
    assert data.sample_stats["diverging"].values.shape == (2, 300)


def test_runs_with_the_same_seed_are_the_same(host, result):
    host.clear()
    again = sampled(host, small(host, conjugate(host)), seed=1)
    assert_array_equal(again.samples["mean"], result.samples["mean"])
    assert again.gradients == result.gradients


def test_a_guide_that_is_fitted(host):
    """It is taken as it is, and its search and training are counted."""
    guide = small(host, conjugate(host))
    fitted = host.package.fit_guide(guide, steps=30, progress=False)
    assert fitted.gradients == 16 * 30
    result = sampled(host, guide, fitted=fitted)
    assert result.gradients.training == fitted.gradients
    assert result.gradients.search > 100
    assert result.samples["mean"].mean() == pytest.approx(EXACT, abs=0.3 * SD)
    again = sampled(host, guide)  # trains anew, without the search
    assert again.gradients.search == 0
    with pytest.raises(ValueError, match="another guide"):
        host.sample_neutra(small(host, conjugate(host)), fitted=fitted, **SHORT)


def test_draws_that_are_not_to_be_trusted_are_told():
    """Divergences, chains that disagree, and too few draws."""
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.standard_normal((2, 100)), 1)
    diverging = np.arange(200).reshape(2, 100) % 50 == 0
    ess, rhat = quality({"x": x}, ArviZ("test"))
    bad = Sampled({"x": x}, Gradients(0, 0, 0, 1), diverging, ess, rhat)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_draws(bad)
    told = [str(warning.message) for warning in caught]
    for message, start in zip(
        told, ("4 of 200 draws end a trajectory that diverged", "the chains disagree", "the draws"),
        strict=True,
    ):  # fmt: skip
        assert message.startswith(start)
    good = rng.standard_normal((2, 1000))
    calm = Sampled({"x": good}, bad.gradients, good > 9, *quality({"x": good}, ArviZ("test")))
    warn_of_draws(calm)  # a warning would fail the test


@pytest.mark.parametrize("chains", range(1, 9))
def test_each_training_has_draws(chains):
    shortest = max(60, math.ceil(160 / chains))
    stages = plan(shortest, 8, chains, fitted=False).stages
    assert all(stage.kept * chains >= 10 for stage in stages)
    assert sum(stage.lost + stage.kept for stage in stages) < shortest


@pytest.mark.parametrize("draws", [100, 101])
def test_a_single_chain_is_compared_with_itself(draws):
    """The halves of a chain that drifts disagree."""
    rng = np.random.default_rng(0)
    still, moving = rng.standard_normal((1, draws)), np.linspace(0, 5, draws)[None]
    assert quality({"x": still}, ArviZ("test"))[1] < 1.05
    assert quality({"x": still + moving}, ArviZ("test"))[1] > 1.5


def test_mixtures_are_refused():
    class Guide:
        pass

    class Mixture(Guide):
        pass

    with pytest.raises(ValueError, match="a mixture of guides has no transform"):
        check_sampled(Mixture(), Guide, Mixture, None, int)


def test_sites_that_the_guide_leaves_out_are_refused(host):
    def model():
        host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        host.sample("y", host.dist.Normal(host.array(0.0), host.array(1.0)))

    guide = small(host, host.block(model, hide=["y"]))
    with pytest.raises(ValueError, match=r"does not draw the sites \['y'\]"):
        host.sample_neutra(guide, **SHORT)


def test_local_sites_are_refused(host):
    def model():
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), host.array(1.0)))
        with host.plate("rows", 6):
            host.sample("z", host.dist.Normal(mean, host.array(1.0)))

    with pytest.raises(ValueError, match="has local sites"):
        host.sample_neutra(small(host, model, local="rows"), **SHORT)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"warmup": 59, "chains": 4}, ValueError, "`warmup` is 59, expected .* at least 60"),
        ({"warmup": 159, "chains": 1}, ValueError, "`warmup` is 159, expected .* at least 160"),
        ({"draws": 0}, ValueError, "`draws` is 0"),
        ({"chains": 0}, ValueError, "`chains` is 0"),
        ({"fitted": 3}, TypeError, "`fitted` is a int"),
        ({"target_accept_prob": 1.0}, ValueError, "`target_accept_prob` is 1.0"),
        ({"target_accept_prob": 0.0}, ValueError, "`target_accept_prob` is 0.0"),
    ],
)
def test_bad_arguments(host, options, kind, match):
    with pytest.raises(kind, match=match):
        host.sample_neutra(small(host, conjugate(host)), **{**SHORT, **options})
    with pytest.raises(TypeError, match="expected an AutoFlow"):
        host.sample_neutra(lambda: None, of_density(host, lambda np, x: 0.0))
