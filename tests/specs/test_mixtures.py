"""Laws of mixtures of guides, one for each mode."""

import functools
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

import numpyro_flows.guides.fit
import pyroflows.guides.fit
from pyroflows_common.mixture import bound_of, weights_of
from pyroflows_common.search import MODES, separate, warn_of_many
from tests.wings.conjugate import MEAN, SCALE, Y, conjugate, normal
from tests.wings.evidence import near
from tests.wings.hosts import HOSTS, gaussian, small
from tests.wings.targets import log_normal

# Two modes of unlike shapes: shares, locations and deviations.
SHARES = 0.7, 0.3
LOCS = (-8.0, 0.0), (8.0, 3.0)
SCALES = (1.0, 0.5), (0.5, 1.0)
CONSTANT = 2.0  # of the density


def two(xp, x):
    """The log-density of the two modes."""
    parts = [
        math.log(share) + sum(log_normal(xp, x[..., i], loc[i], scale[i]) for i in range(2))
        for share, loc, scale in zip(SHARES, LOCS, SCALES, strict=True)
    ]
    return CONSTANT + xp.logaddexp(*parts)


def mixed(host, model, degrees_of_freedom=None):
    """A mixture whose parts are as they start."""
    guide = small(host, model, degrees_of_freedom=degrees_of_freedom)
    return host.package.fit_mixture(guide, steps=1, learning_rate=1e-9, progress=False)


def two_modes(host):
    """The model of the two modes, under a wide prior."""

    def model():
        wide = host.dist.Normal(host.array(np.zeros(2)), host.array(6.0)).to_event(1)
        x = host.sample("x", wide)
        host.factor("density", two(host.np, x) - wide.log_prob(x))

    return model


@functools.cache
def of_two(name):
    host = HOSTS[name]
    return mixed(host, two_modes(host))


def params(result):
    return getattr(result, "params", None)


def test_parts_get_the_shares_of_their_modes(host):
    result = of_two(host.name)
    assert sorted(result.weights) == pytest.approx(sorted(SHARES), abs=0.03)
    assert sum(result.weights) == pytest.approx(1.0)
    assert result.loss == pytest.approx(-CONSTANT, abs=0.05)
    assert [len(part.losses) for part in result.parts] == [1, 1]
    for part in result.parts:  # each knows its own mode only
        assert part.loss > result.loss + 0.2


def test_the_density_of_a_mixture(host):
    """It is that of its draws, and the weighted sum of the parts' densities."""
    result = of_two(host.name)
    x, log_q = host.drawn(result.guide, result)
    assert_allclose(log_q, two(np, x) - CONSTANT, atol=0.3)
    parts = [np.exp(host.density_at(part, x)) for part in result.parts]
    assert_allclose(log_q, np.log(result.weights @ parts), atol=1e-5)
    right = (x[:, 0] > 0).mean()
    assert right == pytest.approx(min(result.weights), abs=0.06)


def test_what_takes_a_guide_takes_a_mixture(host):
    result = of_two(host.name)
    options = {"params": params(result), "draws": 1000}
    data = host.to_arviz(result.guide, **options)
    assert data.attrs["pareto_k"] < 0.5
    assert data.attrs["elbo"] == pytest.approx(CONSTANT, abs=0.05)
    assert data.attrs["verdict"].endswith("no draw tells of modes that were missed")
    assert near(host.log_evidence(result.guide, **options), CONSTANT)
    x = data["posterior"]["x"].values[0]
    samples = {"x": x.reshape(2, 500, 2)}
    found = host.log_evidence(result.guide, samples=samples, **options)
    assert near(found, CONSTANT)
    low, middle, high = host.quantiles(result, [0.05, 0.5, 0.95])["x"][:, 0]
    assert middle == pytest.approx(-7.4, abs=0.5)
    assert low == pytest.approx(-9.5, abs=0.5)
    assert high == pytest.approx(8.5, abs=0.5)


def test_training_goes_on(host):
    """The host's SVI trains the parts, and leaves the weights."""
    result = of_two(host.name)
    again = host.package.fit_guide(
        result.guide, steps=50, learning_rate=1e-3, progress=False, **host.going_on(result)
    )
    assert again.loss == pytest.approx(-CONSTANT, abs=0.1)
    x, log_q = host.drawn(result.guide, again)
    assert_allclose(log_q, two(np, x) - CONSTANT, atol=0.5)


def test_one_mode_is_left_to_the_guide(host):
    """And is fitted as ever."""
    model, args = conjugate(host), (host.array(Y),)
    guide = small(host, model, layers=2)
    options = {"args": args, "steps": 20, "progress": False}
    result = host.package.fit_mixture(guide, starts=4, **options)
    assert result.guide is guide
    assert result.weights.tolist() == [1.0]
    assert result.loss == result.parts[0].loss
    assert params(result) == params(result.parts[0])
    single = host.package.fit_guide(small(host, model, layers=2, **host.named("single")), **options)
    assert result.loss == pytest.approx(single.loss, abs=0.05)


def test_an_interruption_is_told(host, monkeypatch):
    """The modes without a guide are left out."""
    where = {"pyro": pyroflows.guides.fit, "numpyro": numpyro_flows.guides.fit}[host.name]

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(where._Ascent, "climb", interrupted)
    with pytest.warns(UserWarning, match="guides of 1 of 2 modes are in the mixture"):
        result = mixed(host, two_modes(host))
    assert result.weights.tolist() == [1.0]


def partly(host):
    """A model of a part of its data."""

    def model():
        x = host.sample("x", normal(host, 0.0, 3.0))
        with host.plate("rows", 6, subsample_size=2):
            host.sample("y", host.dist.Normal(x**2, 0.5), obs=host.array([4.0, 4.1]))

    return model


def blocked(host):
    """A model of which a site is hidden."""

    def model():
        host.sample("x", normal(host, 0.0, 1.0))
        host.sample("other", normal(host, 0.0, 1.0))

    return host.block(model, hide=["other"])


@pytest.mark.parametrize("make", [blocked, partly])
def test_a_refusal_leaves_a_guide_as_it_was(host, make):
    """Whatever is wrong, an argument or the model."""
    model = make(host)
    guide = small(host, model, init="location")
    result = host.package.fit_guide(guide, model, steps=1, progress=False)
    before = host.quantiles(result, [0.1, 0.9])
    fit = functools.partial(host.package.fit_mixture, guide, progress=False)
    for wrong in ({"steps": 0}, {"learning_rate": -1.0}, {"loss": 3}, {"schedule": "flat"}, {}):
        with pytest.raises((TypeError, ValueError)):
            fit(**wrong)
    assert_allclose(host.quantiles(result, [0.1, 0.9])["x"], before["x"])


def test_sites_without_a_posterior(host):
    """They are none of a mode's affair."""

    def model():
        with host.mask(mask=False):
            host.sample("lost", host.dist.HalfNormal(host.array(1.0)))
        x = host.sample("x", normal(host, 0.0, 3.0))
        host.sample("y", host.dist.Normal(x**2, 0.1), obs=host.array(4.0))

    result = mixed(host, model, degrees_of_freedom=10.0)
    grid = np.linspace(-9, 9, 20_001)
    joint = stats.norm.pdf(grid, 0, 3) * stats.norm.pdf(4.0, grid**2, 0.1)
    assert_allclose(result.weights, 0.5, atol=0.03)
    exact = math.log(np.trapezoid(joint, grid))
    assert result.loss == pytest.approx(-exact, abs=0.1)
    assert near(host.log_evidence(result.guide, params=params(result), draws=1000), exact)


def test_supports_that_move(host):
    """A bound that depends on another site, in a plate of two."""

    def model():
        with host.plate("pair", 2):
            top = host.sample("top", host.dist.LogNormal(host.array(0.0), host.array(0.1)))
            part = host.sample("part", host.dist.Uniform(-top, top))
            host.sample("y", host.dist.Normal(part**2, 0.05), obs=host.array([0.2, 0.3]))

    result = mixed(host, model, degrees_of_freedom=5.0)
    assert_allclose(result.weights, np.full(4, 0.25), atol=0.05)
    data = host.to_arviz(result.guide, params=params(result), draws=1000)
    assert data.attrs["pareto_k"] < 0.7


def test_a_mixture_has_no_transform(host):
    result = of_two(host.name)
    wanted = [params(result)] if host.name == "numpyro" else []
    with pytest.raises(ValueError, match="a mixture of guides has no transform"):
        result.guide.get_transform(*wanted)
    with pytest.raises(ValueError, match="a mixture of guides has no transform"):
        host.reparams.NeuTraReparam(result.guide, *wanted).reparam(two_modes(host))()
    draws = {"x": np.random.default_rng(0).normal(size=(100, 2))}
    with pytest.raises(ValueError, match="a mixture of guides has no transform"):
        host.package.fit_guide(result.guide, draws=draws)


def test_guides_that_cannot_be_mixed(host):
    def learning():
        x = host.sample("x", normal(host, 0.0, 1.0))
        scale = host.param("scale", host.array(1.0))
        host.sample("y", host.dist.Normal(x, host.np.exp(scale)), obs=host.array(1.0))

    def pair():
        host.sample("a", normal(host, 0.0, 1.0))
        host.sample("b", normal(host, 0.0, 1.0))

    fit = functools.partial(host.package.fit_mixture, steps=1, progress=False)
    with pytest.raises(TypeError, match="`guide` is a AutoNormal, expected an AutoFlow"):
        fit(host.guides.AutoNormal(pair))
    with pytest.raises(TypeError, match="`guide` is a AutoFlowMixture, expected an AutoFlow"):
        fit(of_two(host.name).guide)
    with pytest.raises(ValueError, match="`starts` is 3"):
        fit(small(host, pair), starts=3)
    with pytest.raises(ValueError, match=r"the model has the parameters \['scale'\]"):
        fit(small(host, learning))
    with pytest.raises(ValueError, match="`guide` draws a part of the model's latent sites only"):
        fit(small(host, host.block(pair, hide=["b"])))
    with pytest.raises(ValueError, match="the model takes a part of its data"):
        fit(small(host, partly(host)))


def test_the_verdict_on_a_single_guide_names_what_looks_for_more(host):
    args = (host.array(Y),)
    data = host.to_arviz(normal(host, MEAN, SCALE), conjugate(host), args=args, draws=100)
    assert data.attrs["verdict"].endswith("modes that were missed")
    fitted = gaussian(host, conjugate(host), *args)
    options = {"args": args, "params": getattr(fitted, "params", None), "draws": 100}
    data = host.to_arviz(fitted.guide, **options)
    assert data.attrs["verdict"].endswith("missed: fit_mixture looks for them")


def densities(x, shares, shifts, scale=1.0):
    """Of a mixture, and of its parts of another width."""
    log_p = [math.log(s) + stats.norm.logpdf(x, m) for s, m in zip(shares, shifts, strict=True)]
    return np.logaddexp.reduce(log_p), np.stack(
        [stats.norm.logpdf(x, m, scale) for m in shifts], -1
    )


@pytest.mark.parametrize("gap", [30.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("constant", [0.0, -700.0])
def test_weights_are_the_shares_of_the_posterior(gap, scale, constant):
    shares, shifts = (0.55, 0.4, 0.05), (0.0, gap, -gap)
    x = np.random.default_rng(0).normal(size=(3, 4000)) * scale + np.array(shifts)[:, None]
    log_p, log_q = densities(x, shares, shifts, scale)
    weights = weights_of(log_p + constant, log_q)
    assert_allclose(weights, shares, atol=0.02)
    lower = bound_of(weights, log_p + constant, log_q)
    assert lower == pytest.approx(constant, abs=0.1)
    assert bound_of(np.array([0.4, 0.4, 0.2]), log_p + constant, log_q) < lower


def test_parts_that_are_alike_share_a_mode():
    x = np.random.default_rng(0).normal(size=(3, 4000)) + np.array([0.0, 0.0, 20.0])[:, None]
    log_p = densities(x, (0.8, 0.2), (0.0, 20.0))[0]
    weights = weights_of(log_p, densities(x, (1.0, 1.0, 1.0), (0.0, 0.0, 20.0))[1])
    assert_allclose([weights[0] + weights[1], weights[2]], [0.8, 0.2], atol=0.02)


def test_a_part_without_weight():
    """One whose draws are outside of the posterior, and none with any."""
    x = np.random.default_rng(0).normal(size=(2, 1000)) + np.array([0.0, 50.0])[:, None]
    log_p, log_q = densities(x, (1.0,), (0.0,))[0], densities(x, (1.0, 1.0), (0.0, 50.0))[1]
    log_p[1] = -np.inf
    weights = weights_of(log_p, log_q)
    assert_allclose(weights, [1.0, 0.0], atol=1e-6)
    assert bound_of(weights, log_p, log_q) == pytest.approx(0.0, abs=0.01)
    with pytest.raises(ValueError, match="none of the guides"):
        weights_of(np.full((2, 1000), -np.inf), log_q)


def test_uncertain_weights_are_told():
    """A draw of the one part that is worth more than all others decides nothing."""
    x = np.random.default_rng(0).normal(size=(2, 1000)) + np.array([0.0, 20.0])[:, None]
    log_p, log_q = densities(x, (0.5, 0.5), (0.0, 20.0))[0], densities(x, (1, 1), (0.0, 20.0))[1]
    log_p[0, 7] += 30.0
    with pytest.warns(UserWarning, match="2000 draws of their guides count as .* train longer"):
        weights = weights_of(log_p, log_q)
    assert weights[1] > 0.0
    log_p[0, 7] -= 23.0  # worth a thousand others, of which a few dozen count
    assert_allclose(weights_of(log_p, log_q), 0.5, atol=0.05)


def test_draws_without_a_density():
    """They count for no part, and the others as ever."""
    x = np.random.default_rng(0).normal(size=(3, 1000)) + np.array([0.0, 20.0, 40.0])[:, None]
    log_p, log_q = densities(x, (0.6, 0.4), (0.0, 20.0))[0], densities(x, (1,) * 3, (0, 20, 40))[1]
    log_p[0, :5], log_p[1, :5], log_p[2] = -np.inf, np.nan, -np.inf
    log_q[..., 2] = np.nan
    weights = weights_of(log_p, log_q)
    assert_allclose(weights, [0.6, 0.4, 0.0], atol=0.03)
    assert bound_of(weights, log_p, log_q) == pytest.approx(0.0, abs=0.01)


def test_as_many_modes_as_are_kept():
    with pytest.warns(UserWarning, match=f"found {MODES} modes, and keeps no more"):
        warn_of_many(MODES)
    warn_of_many(MODES - 1)


def test_which_modes_are_separate():
    """Far from all that are kept, and no lower than the gap."""
    apart = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]], dtype=bool)
    assert separate([0.0, -1.0, -2.0, -3.0], apart, 7.0) == [0, 2, 3]
    assert separate([0.0, -1.0, -2.0, -30.0], apart, 7.0) == [0, 2]
    assert separate([0.0], apart[:1, :1], 7.0) == [0]
