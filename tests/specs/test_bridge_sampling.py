"""Laws of the evidence by bridge sampling between draws of a guide and of the posterior."""

import math

import arviz
import numpy as np
import pytest
from scipy import stats

from pyroflows_common import verdict
from pyroflows_common.arviz import ArviZ
from pyroflows_common.evidence import bridged
from tests.wings.conjugate import EVIDENCE, MEAN, SCALE, Y, conjugate, normal
from tests.wings.evidence import autocorrelated, evidence, near, peaks, posterior, regression
from tests.wings.hosts import gaussian, of_density


def known(host):
    """A model without data, which automatic guides can fit exactly."""

    def model():
        host.sample("scale", host.dist.LogNormal(host.array(0.0), host.array(1.0)))
        with host.plate("group", 3):
            host.sample("effect", normal(host, 0.0, 1.0))
        two = host.dist.Normal(host.array(np.zeros(2)), host.array(1.0)).to_event(1)
        host.sample("slopes", two)

    return model


def drawn(chains=2, draws=50):
    z = np.random.default_rng(0).normal(size=(chains, draws, 6))
    return {"scale": np.exp(z[..., 0]), "effect": z[..., 1:4], "slopes": z[..., 4:]}


def exact(host, kind):
    model = known(host)
    start = {"scale": 1.0, "effect": np.zeros(3), "slopes": np.zeros(2)}
    start = {name: host.array(value) for name, value in start.items()}
    options = {"init_loc_fn": host.init_to_value(values=start), "init_scale": 1.0}
    if kind == "AutoFlow":
        options |= {"init": "location", "degrees_of_freedom": None}
        return host.package.AutoFlow(model, host.straight, **options)
    if kind == "AutoGuideList":
        guide = host.guides.AutoGuideList(model)
        own = {"prefix": "second"} if host.name == "numpyro" else {}
        part = host.block(model, hide=["scale"])
        guide.append(host.guides.AutoNormal(host.block(model, expose=["scale"]), **options))
        guide.append(host.guides.AutoDiagonalNormal(part, **options, **own))
        return guide
    return getattr(host.guides, kind)(model, **options)


@pytest.mark.parametrize(
    "kind", ["AutoFlow", "AutoNormal", "AutoMultivariateNormal", "AutoGuideList"]
)
def test_an_exact_guide_has_no_error(host, kind):
    """Its density is that of the model at each draw, with the Jacobians of constrained sites."""
    guide = exact(host, kind)
    params = host.params(guide)
    result = host.log_evidence(guide, known(host), params=params, samples=drawn(), draws=100)
    assert result.value == pytest.approx(0.0, abs=1e-6)
    assert result.error < 1e-6


def test_an_exact_guide_by_hand(host):
    """A distribution and a function are scored at the values themselves."""
    mean = MEAN + SCALE * np.random.default_rng(0).normal(size=(2, 50))
    density = normal(host, MEAN, SCALE)
    for guide in (density, lambda y: host.sample("mean", density)):
        options = {"args": (host.array(Y),), "samples": {"mean": mean}, "draws": 100}
        result = host.log_evidence(guide, conjugate(host), **options)
        assert result.value == pytest.approx(EVIDENCE, abs=1e-6)
        assert result.error < 1e-6


def test_supports_that_move(host):
    """Each draw is unconstrained in the support that it has."""

    def model():
        top = host.sample("top", host.dist.LogNormal(host.array(1.0), host.array(0.1)))
        host.sample("part", host.dist.Uniform(0.0 * top, top))

    rng = np.random.default_rng(0)
    top = np.exp(1 + 0.1 * rng.normal(size=(2, 400)))
    samples = {"top": top, "part": top * rng.uniform(size=top.shape)}
    fitted = gaussian(host, model, degrees_of_freedom=5.0)
    params = getattr(fitted, "params", None)
    result = host.log_evidence(fitted.guide, params=params, samples=samples, draws=1000)
    assert near(result, 0.0)
    assert result.error < 0.1


def test_a_regression(host):
    """Of unknown noise, and with a simplex; in each form in which the draws may come."""
    fitted = gaussian(host, regression(host))
    draws = posterior()
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in draws.items()}
    unknown = {**draws, "twice": 2 * draws["precision"]}
    options = {"params": getattr(fitted, "params", None), "draws": 1000}
    forms = [unknown, {n: host.array(v) for n, v in draws.items()}, in_arviz(unknown), flat]
    results = [host.log_evidence(fitted.guide, samples=form, **options) for form in forms]
    assert results[0] == results[1] == results[2]
    assert results[3].value == pytest.approx(results[0].value, abs=0.01)
    for result in results:
        assert near(result, evidence())
        assert result.error < 0.05


def in_arviz(draws):
    """What this ArviZ works with."""
    if arviz.__version__.startswith("0."):
        return arviz.from_dict(posterior=draws)
    return arviz.from_dict({"posterior": draws})


@pytest.mark.parametrize(("shift", "width"), [(0.0, 0.3), (2.0, 1.0), (0.0, 3.0)])
def test_guides_that_fit_badly(host, shift, width):
    """Those whose weights cannot be trusted, too."""
    guide = normal(host, MEAN + shift * SCALE, width * SCALE)
    samples = {"mean": MEAN + SCALE * autocorrelated(2, 1000, 1)[..., 0]}
    options = {"args": (host.array(Y),), "samples": samples, "draws": 1000}
    result = host.log_evidence(guide, conjugate(host), **options)
    assert (result.pareto_k < 0.7) == (width == 3.0)
    assert near(result, EVIDENCE)
    assert 1e-3 < result.error < 0.2


def test_a_mode_that_the_guide_has_missed(host):
    """It counts, as the draws of the posterior are there; importance sampling cannot tell."""
    guide = host.dist.Normal(host.array([9.0]), host.array(1.1)).to_event(1)
    rng = np.random.default_rng(0)
    x = rng.choice([-9.0, 9.0], size=(1, 2000, 1)) + rng.normal(size=(1, 2000, 1))
    options = {"samples": {"x": x}, "draws": 2000}
    with pytest.warns(UserWarning, match="the guide has missed a part of the posterior"):
        result = host.log_evidence(guide, of_density(host, peaks, size=1), **options)
    assert near(result, math.log(2) + 0.5 * math.log(2 * math.pi))
    assert result.error < 0.1


def test_coordinates_without_a_posterior(host):
    """What MCMC says of them, anything or nothing, does not count."""

    def model(y):
        mean = host.sample("mean", normal(host, 0.0, 1.0))
        base = host.dist.Normal(host.array(np.zeros(2)), host.array(1.0))
        host.sample("half", base.mask(host.bools([True, False])).to_event(1))
        with host.mask(mask=False):
            host.sample("lost", host.dist.HalfNormal(host.array(1.0)))
        with host.plate("people", len(y)):
            host.sample("y", host.dist.Normal(mean, 1.0), obs=y)

    args = (host.array(Y),)
    fitted = gaussian(host, model, *args, degrees_of_freedom=10.0)
    rng = np.random.default_rng(0)
    half = np.stack([rng.normal(size=(2, 500)), rng.uniform(-1e3, 1e3, (2, 500))], -1)
    samples = {"mean": MEAN + SCALE * rng.normal(size=(2, 500)), "half": half}
    options = {"args": args, "params": getattr(fitted, "params", None), "draws": 1000}
    for more in ({}, {"lost": rng.uniform(0, 1e3, (2, 500))}):
        result = host.log_evidence(fitted.guide, samples={**samples, **more}, **options)
        assert near(result, EVIDENCE)
        assert result.error < 0.05


@pytest.mark.parametrize("rho", [0.0, 0.9])
@pytest.mark.parametrize(
    ("size", "shift", "scale"), [(1, 3.0, 1.0), (10, 0.0, 0.5), (10, 0.0, 2.0)]
)
def test_errors_are_those_that_occur(rho, size, shift, scale):
    """Where guide and posterior hardly overlap, and where the draws are autocorrelated."""
    adapter, results = ArviZ(), []

    def densities(x):
        return stats.norm.logpdf(x).sum(-1), stats.norm.logpdf(x, shift, scale).sum(-1)

    for seed in range(60):
        x = shift + scale * np.random.default_rng(1000 + seed).normal(size=(2000, size))
        weights = verdict.weigh(adapter.smooth, *densities(x))
        chains = autocorrelated(4, 500, size, rho, seed)
        results.append(bridged(weights, *densities(chains), adapter.effective))
    values, errors = (np.array([getattr(r, n) for r in results]) for n in ("value", "error"))
    assert np.mean([near(result, 0.0, 2.0) for result in results]) >= 0.9
    assert abs(values.mean()) < 0.5 * values.std()
    assert 0.7 < errors.mean() / values.std() < 1.4


def test_draws_of_the_guide_without_weight():
    """They count as draws where the posterior is not."""
    adapter, rng = ArviZ(), np.random.default_rng(0)
    x = rng.normal(size=4000)
    weights = verdict.weigh(
        adapter.smooth, np.where(x > 2, stats.norm.logpdf(x), -np.inf), stats.norm.logpdf(x)
    )
    there = stats.truncnorm(2, np.inf).rvs((2, 500), random_state=rng)
    log_p = stats.norm.logpdf(there)
    result = bridged(weights, log_p, log_p, adapter.effective)
    assert near(result, stats.norm.logsf(2))


def test_too_little_overlap_is_refused(host):
    guide = normal(host, MEAN + 9 * SCALE, SCALE)
    samples = {"mean": MEAN + SCALE * autocorrelated(2, 500, 1)[..., 0]}
    options = {"args": (host.array(Y),), "samples": samples, "draws": 1000}
    with pytest.raises(ValueError, match="overlap too little: .* expected at least 25 of each"):
        host.log_evidence(guide, conjugate(host), **options)


def test_samples_where_the_guide_has_no_density(host):
    """All of them, as where a guide is for other data."""

    def model():
        host.sample("rate", host.dist.Exponential(host.array(1.0)))

    guide = host.dist.Uniform(host.array(0.0), host.array(1.0))
    rate = 2.0 + np.arange(100) / 10
    with pytest.raises(ValueError, match="overlap counts as .* and 0 of `samples`"):
        host.log_evidence(lambda: host.sample("rate", guide), model, samples={"rate": rate})


def bad_samples():
    good = np.random.default_rng(0).normal(size=(2, 50))
    missing = np.where(good == good[0, 7], np.nan, good)
    return [
        ([good], TypeError, "`samples` is a list, expected a dictionary such as"),
        (good, TypeError, "`samples` is a ndarray"),
        ({"other": good}, ValueError, r"`samples` has no \['mean'\]: expected all latent sites"),
        ({"mean": good[..., None]}, ValueError, r"shape \(2, 50, 1\), but in `model` .* \(\)"),
        ({"mean": good[0, 0]}, ValueError, r"site 'mean' with shape \(\)"),
        ({"mean": missing}, ValueError, "NaN or inf at site 'mean': 1 numbers"),
        ({"mean": 0 * good}, ValueError, "same value of site 'mean' in all draws"),
        ({"mean": good[:, :12]}, ValueError, "2 chains of 12 draws, expected at least 25 draws"),
        ({"mean": good.reshape(50, 2)}, ValueError, "50 chains of 2 draws, .* and 4 in each chain"),
        (in_arviz({"other": good}), ValueError, r"`samples` has no \['mean'\]"),
    ]


@pytest.mark.parametrize(("samples", "error", "message"), bad_samples())
def test_samples_that_do_not_fit(host, samples, error, message):
    options = {"args": (host.array(Y),), "draws": 100}
    with pytest.raises(error, match=message):
        host.log_evidence(normal(host, MEAN, SCALE), conjugate(host), samples=samples, **options)


def test_sites_of_different_numbers_of_draws(host):
    samples = drawn()
    samples["effect"] = samples["effect"][:, 1:]
    guide = exact(host, "AutoNormal")
    with pytest.raises(ValueError, match="different numbers of chains and draws by site: .*49"):
        host.log_evidence(guide, known(host), params=host.params(guide), samples=samples)


def test_draws_of_a_guide_are_no_samples(host):
    """Also after importance resampling: it would repeat what the guide says."""
    options = {"args": (host.array(Y),)}
    density = normal(host, MEAN, SCALE)
    data = host.to_arviz(density, conjugate(host), resample=True, draws=50, **options)
    with pytest.raises(ValueError, match="`samples` are draws of a guide by to_arviz"):
        host.log_evidence(density, conjugate(host), samples=data, **options)


def test_samples_of_another_model(host):
    """The model gives some of them no density."""

    def model():
        host.sample("rate", host.dist.Exponential(host.array(1.0)))

    def guide():
        host.sample("rate", host.dist.Exponential(host.array(1.1)))

    rate = np.where(np.arange(100) < 10, 1.0, -1.0) * (1 + np.arange(100))
    with pytest.raises(ValueError, match="90 of 100 draws without a finite .* first is draw 10"):
        host.log_evidence(guide, model, samples={"rate": rate}, draws=100)


def test_guides_whose_density_is_not_known(host):
    """It would be an integral over auxiliary sites."""

    def guide(y):
        auxiliary = {"infer": {"is_auxiliary": True}}
        inner = host.sample("inner", normal(host, MEAN, SCALE), **auxiliary)
        host.sample("mean", host.dist.Normal(inner, 0.1))

    samples = {"mean": MEAN + SCALE * np.random.default_rng(0).normal(size=100)}
    options = {"args": (host.array(Y),), "samples": samples, "draws": 100}
    with pytest.raises(ValueError, match=r"auxiliary sites \['inner'\]: its density at `samples`"):
        host.log_evidence(guide, conjugate(host), **options)


@pytest.mark.parametrize(("loc", "scale"), [(2.0, 1.0), (0.0, 2.5), (4.0, 0.2)])
def test_samples_of_another_posterior(host, loc, scale):
    """The guide's own weights tell, where they can be trusted."""
    rng = np.random.default_rng(0)
    samples = {"mean": MEAN + SCALE * (loc + scale * rng.normal(size=(2, 1000)))}
    guide = normal(host, MEAN, 1.2 * SCALE)
    with pytest.warns(UserWarning, match="with `samples` and .* without: either the guide"):
        host.log_evidence(guide, conjugate(host), args=(host.array(Y),), samples=samples)
