"""Laws of guides that are trained on draws of the posterior."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from tests.wings.hosts import small

DRAWS = 1000


def learned(host, guide, draws, **options):
    """A guide that has been trained on draws."""
    options = {"steps": 1, "learning_rate": 1e-9, "progress": False, **options}
    return host.package.fit_guide(guide, draws=draws, **options)


def positive(host):
    """The model of a positive number and of two others."""

    def model():
        zero, one = host.array(0.0), host.array(1.0)
        host.sample("scale", host.dist.LogNormal(zero, one))
        with host.plate("pair", 2):
            host.sample("x", host.dist.Normal(zero, one))

    return model


def correlated(seed=0):
    """Draws that no prior gives, and the normal distribution of their coordinates."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((DRAWS, 3)) @ rng.standard_normal((3, 3)) + 3.0
    normal = stats.multivariate_normal(x.mean(0), np.cov(x, rowvar=False, ddof=0))
    return {"scale": np.exp(x[:, 0]), "x": x[:, 1:]}, normal


def test_a_new_guide_starts_as_the_normal_distribution_of_the_draws(host):
    """Without a search, whatever the model's own posterior is."""
    draws, normal = correlated()
    guide = small(host, positive(host), degrees_of_freedom=None)
    result = learned(host, guide, draws)
    x, log_density = host.drawn(guide, result)
    assert_allclose(log_density, normal.logpdf(x), atol=0.1)
    assert result.loss == pytest.approx(-normal.logpdf(to_rows(draws)[-20:]).mean(), abs=0.5)
    assert result.learning_rate == 1e-9
    assert len(result.losses) == 1


def to_rows(draws):
    return np.concatenate([np.log(draws["scale"])[:, None], draws["x"]], 1)


def test_training_finds_both_modes(host):
    """Which draws have, and an evidence lower bound may miss."""
    rng = np.random.default_rng(1)
    side = np.where(rng.random(DRAWS) < 0.3, -1.0, 1.0)
    x = np.stack([2.5 * side, 0 * side], 1) + 0.5 * rng.standard_normal((DRAWS, 2))
    draws = {"scale": np.exp(0.3 * rng.standard_normal(DRAWS)), "x": x}
    guide = small(host, positive(host), layers=6, hidden=(16, 16))
    result = learned(host, guide, draws, steps=400, learning_rate=[1e-9, 1e-2])
    assert result.learning_rate == 1e-2
    rows, _ = host.drawn(guide, result)
    first = rows[:, 1]
    assert np.mean(first < 0) == pytest.approx(np.mean(side < 0), abs=0.07)
    assert np.mean(abs(first) < 1.0) < 0.1


def test_the_guide_is_that_of_its_result(host):
    """Draws for ArviZ are those of what was learned."""
    draws, _ = correlated(2)
    guide = small(host, positive(host), degrees_of_freedom=None)
    result = learned(host, guide, draws)
    rows = to_rows(draws)
    params = getattr(result, "params", None)
    data = host.to_arviz(guide, params=params, draws=4000)
    log_scale = np.log(np.asarray(data.posterior["scale"]))
    assert log_scale.mean() == pytest.approx(rows[:, 0].mean(), abs=0.1 * rows[:, 0].std() + 0.02)
    assert log_scale.std() == pytest.approx(rows[:, 0].std(), rel=0.1)


def test_training_goes_on(host):
    """From the parameters of an earlier result, or of the guide."""
    draws, _ = correlated(3)
    guide = small(host, positive(host))
    options = {"steps": 50, "learning_rate": 1e-2}
    first = learned(host, guide, draws, **options)
    again = learned(host, guide, draws, **options, **host.going_on(first))
    assert again.loss <= first.loss
    host.clear()
    fresh = learned(host, small(host, positive(host)), draws, **options)
    assert fresh.loss == pytest.approx(first.loss, abs=1e-4)


def test_by_the_bound_after_draws(host):
    """The start is that of the draws: the search is not made again."""
    draws, _ = correlated(4)
    guide = small(host, positive(host), degrees_of_freedom=None)
    first = learned(host, guide, draws)
    before, _ = host.drawn(guide, first)
    options = {"steps": 1, "learning_rate": 1e-9, "progress": False}
    second = host.package.fit_guide(guide, **options, **host.going_on(first))
    after, _ = host.drawn(guide, second)
    assert_allclose(after, before, atol=1e-4)


def test_supports_that_depend_on_other_sites(host):
    def model():
        bound = host.sample("bound", host.dist.Gamma(host.array(3.0), host.array(1.0)))
        host.sample("x", host.dist.Uniform(host.array(0.0), bound))

    rng = np.random.default_rng(5)
    bound = rng.gamma(3.0, size=DRAWS)
    share = rng.beta(8.0, 2.0, DRAWS)
    guide = small(host, model, degrees_of_freedom=None)
    result = learned(host, guide, {"bound": bound, "x": share * bound})
    params = getattr(result, "params", None)
    posterior = host.to_arviz(guide, params=params, draws=2000).posterior
    found = np.asarray(posterior["x"] / posterior["bound"])
    assert np.median(found) == pytest.approx(np.median(share), abs=0.03)
    assert ((found > 0) & (found < 1)).all()


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"draws": 3}, TypeError, "`draws` is a int"),
        ({"draws": {"scale": np.ones(50)}}, ValueError, r"`draws` has no \['x'\]"),
        ({"loss": "own"}, ValueError, "`loss` is given, but `draws` take the place"),
        ({"guide": "own"}, TypeError, "expected an AutoFlow to train on `draws`"),
        ({"still": "x"}, ValueError, "'x' a number that is the same in all 1000"),
        ({"negative": "scale"}, ValueError, "`draws` has 1000 of 1000 rows with NaN or inf, out"),
    ],
)
def test_bad_arguments(host, change, kind, match):
    draws, _ = correlated()
    options = {"guide": small(host, positive(host)), "draws": draws, **change}
    if "still" in options:
        draws[options.pop("still")][:] = 1.0
    if "negative" in options:
        draws[options.pop("negative")][:] *= -1.0
    if options.get("loss"):
        options["loss"] = host.bound()
    if options["guide"] == "own":
        options |= {"guide": lambda: None, "model": positive(host)}
    with pytest.raises(kind, match=match):
        learned(host, options.pop("guide"), options.pop("draws"), **options)


@pytest.mark.parametrize("site", ["share", "parts"])
def test_draws_outside_of_bounded_supports(host, site):
    """Some bijections of the hosts would put them on an edge in silence."""

    def model():
        host.sample("share", host.dist.Uniform(host.array(0.0), host.array(1.0)))
        host.sample("parts", host.dist.Dirichlet(host.array(np.ones(3))))

    rng = np.random.default_rng(0)
    draws = {"share": rng.random(50), "parts": rng.dirichlet(np.ones(3), 50)}
    draws[site][7] += 1.0
    with pytest.raises(ValueError, match="`draws` has 1 of 50 rows with NaN or inf, outside"):
        learned(host, small(host, model), draws)


def test_a_refusal_changes_nothing(host):
    """The guide still makes its search, and an earlier one keeps its parameters."""
    draws, _ = correlated()
    first, guide = small(host, positive(host)), small(host, positive(host))
    host.params(first)
    before = host.stored()
    for bad in ({**draws, "x": draws["x"] * np.nan}, {n: v[:5] for n, v in draws.items()}):
        with pytest.raises(ValueError, match="NaN or inf, outside|5 draws, expected at least 10"):
            learned(host, guide, bad)
    assert host.stored() == before
    host.clear()
    x, log_density = host.drawn(guide, host.unfitted(guide))
    assert abs(x[:, 1:].mean()) < 0.2  # where the model is, and not the draws


def test_a_rate_that_diverges_does_not_win(host):
    draws, _ = correlated()
    guide = small(host, positive(host))
    result = learned(host, guide, draws, steps=30, learning_rate=[1e-3, 1e6])
    assert result.learning_rate == 1e-3
    assert np.isfinite(result.loss)


def test_trained_layers_do_not_start_again(host):
    """Those that would start from a batch of data."""
    draws, _ = correlated()
    guide = small(host, positive(host), "AutoGlow", degrees_of_freedom=None)
    first = learned(host, guide, draws, steps=20, learning_rate=1e-2)
    before, _ = host.drawn(guide, first)
    second = learned(host, guide, draws, **host.going_on(first))
    assert_allclose(host.drawn(guide, second)[0], before, atol=1e-4)


def test_weighed_draws_of_arviz(host):
    """Draws of a guide that is too wide, with their weights."""
    y = host.array(np.full(8, 2.0))

    def model():
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), host.array(1.0)))
        host.sample("other", host.dist.Normal(host.array(0.0), host.array(1.0)))
        with host.plate("rows", 8):
            host.sample("y", host.dist.Normal(mean, host.array(1.0)), obs=y)

    def wide():
        host.sample("mean", host.dist.Normal(host.array(1.5), host.array(0.6)))
        host.sample("other", host.dist.Normal(host.array(0.0), host.array(1.0)))

    data = host.to_arviz(wide, model, draws=4000)
    guide = small(host, model, degrees_of_freedom=None)
    rows, _ = host.drawn(guide, learned(host, guide, data))
    assert rows[:, 0].mean() == pytest.approx(16 / 9, abs=0.05)
    assert rows[:, 0].std() == pytest.approx(1 / 3, rel=0.1)
