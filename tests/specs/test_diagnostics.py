"""What the user's ArviZ gets, and what `to_arviz` refuses."""

import copy
import importlib
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

import numpyro_flows
from tests.specs.registry import case
from tests.wings.conjugate import (
    MEAN,
    PRECISION,
    SCALE,
    Y,
    by_hand,
    conjugate,
    normal,
    only,
    weighed,
)
from tests.wings.hosts import HOSTS

matplotlib.use("Agg")


# What ArviZ gets


def schools(host):
    """Plates, nested plates, an event, a deterministic site, observations of either kind."""

    def model(y, pairs=None):
        mean = host.sample("outer/mean", normal(host, 0.0, 1.0))
        three = host.dist.Normal(host.array(np.zeros(3)), host.array(1.0)).to_event(1)
        with host.plate("school", 4, dim=-1):
            host.sample("slopes", three)
            effect = host.sample("effect", normal(host, 0.0, 1.0))
            host.deterministic("theta", mean + effect)
        with host.plate("row", 4, dim=-2), host.plate("column", 2, dim=-1):
            host.sample("cell", normal(host, 0.0, 1.0))
        with host.plate("pupil", 6, dim=-2), host.plate("school_", 4, dim=-1):
            host.sample("y", host.dist.Normal(mean + effect, 1.0), obs=y)
        both = host.dist.Normal(host.np.stack([mean, mean]), host.array(1.0)).to_event(1)
        with host.plate("pair", 5):
            host.sample("pairs", both, obs=pairs)

    return model


def test_names_and_shapes(host):
    rng = np.random.default_rng(0)
    y, pairs = rng.standard_normal((6, 4)), rng.standard_normal((5, 2))
    guide = host.guides.AutoNormal(schools(host))
    inputs = (host.array(y), host.array(pairs))
    data = host.to_arviz(
        guide,
        params=host.params(guide, *inputs),
        args=inputs[:1],
        kwargs={"pairs": inputs[1]},
        draws=30,
        posterior_predictive=True,
        coords={"school": list("abcd"), "slope": ["x", "y", "z"]},
        dims={"slopes": ["school", "slope"]},
    )
    dims = {
        "posterior": {
            "outer.mean": (),
            "slopes": ("school", "slope"),
            "effect": ("school",),
            "cell": ("row", "column"),
            "theta": ("school",),
        },
        "log_likelihood": {"y": ("pupil", "school_"), "pairs": ("pair",)},
        "posterior_predictive": {"y": ("pupil", "school_"), "pairs": ("pair", "pairs_dim_1")},
        "sample_stats": {"lp": (), "log_importance_ratio": (), "log_weight": ()},
    }
    for group, variables in dims.items():
        assert set(data[group].data_vars) == set(variables)
        for name, expected in variables.items():
            assert data[group][name].dims == ("chain", "draw", *expected)
            assert data[group][name].shape[:2] == (1, 30)
    assert list(np.asarray(data["posterior"]["school"])) == list("abcd")
    assert data["observed_data"]["pairs"].dims == ("pair", "pairs_dim_1")
    assert_allclose(data["observed_data"]["y"], y)
    assert_allclose(data["observed_data"]["pairs"], pairs)
    theta = only(data, "posterior", "outer.mean")[:, None] + only(data, "posterior", "effect")
    assert_allclose(only(data, "posterior", "theta"), theta, rtol=1e-5, atol=1e-6)
    for attrs in (data.attrs, data["posterior"].attrs):
        assert attrs["inference_library"] == host.name
        assert {"pareto_k", "elbo", "importance_ess", "verdict"} <= set(attrs)


def test_observations_without_a_plate(host):
    """They are simulated in the shape of the data, each by itself."""

    def model(y):
        mean = host.sample("mean", normal(host, 0.0, 1.0))
        host.sample("y", host.dist.Normal(mean, 1.0), obs=y)

    options = {"args": (host.array(Y),), "draws": 400, "posterior_predictive": True}
    data = host.to_arviz(normal(host, MEAN, SCALE), model, **options)
    noise = only(data, "posterior_predictive", "y") - only(data, "posterior", "mean")[:, None]
    assert_allclose(np.cov(noise.T), np.eye(len(Y)), atol=0.25)
    assert data["log_likelihood"]["y"].shape == data["posterior_predictive"]["y"].shape


def test_a_plate_named_as_a_site(host):
    """xarray has no room for both: the dimension gets ArviZ's own name."""

    def model():
        with host.plate("draw", 3):
            host.sample("effect", normal(host, 0.0, 1.0))

    guide = host.guides.AutoNormal(model)
    data = host.to_arviz(guide, params=host.params(guide), draws=30)
    assert data["posterior"]["effect"].dims == ("chain", "draw", "effect_dim_0")


@pytest.mark.filterwarnings("ignore:Shape validation failed")  # by ArviZ 0.2x, of one chain
def test_arviz_works_at_once(host, tmp_path):
    import arviz as az

    def model(y):
        slopes = host.dist.Normal(host.array(np.zeros(2)), host.array(1.0)).to_event(1)
        mean = host.sample("slopes", slopes)[0]
        with host.plate("people", len(y)):
            host.sample("y", host.dist.Normal(mean, 1.0), obs=y)

    density = host.dist.Normal(host.array([MEAN, 0.0]), host.array([SCALE, 1.0])).to_event(1)
    data = host.to_arviz(density, model, args=(host.array(Y),))
    summary = az.summary(data)
    assert list(summary.index) == ["slopes[0]", "slopes[1]"]
    assert float(summary["mean"].iloc[0]) == pytest.approx(MEAN, abs=0.1)
    assert "r_hat" not in summary or summary["r_hat"].astype(float).isna().all()
    loo = az.loo(data)
    expected = [
        stats.norm.logpdf(
            Y[i], (Y.sum() - Y[i]) / (PRECISION - 1), (1 + 1 / (PRECISION - 1)) ** 0.5
        )
        for i in range(len(Y))
    ]
    found = loo.elpd_loo if "elpd_loo" in dir(loo) else loo.elpd
    assert found == pytest.approx(sum(expected), abs=0.1)
    az.plot_pair(data)
    importlib.import_module("matplotlib.pyplot").close("all")
    pytest.importorskip("h5netcdf")
    data.to_netcdf(tmp_path / "draws.nc")
    again = az.from_netcdf(tmp_path / "draws.nc")
    assert again.attrs["verdict"] == data.attrs["verdict"]


def test_a_flow_as_the_density(host, wing):
    def model(y):
        weights = host.dist.Normal(host.array(np.zeros(2)), host.array(1.0)).to_event(1)
        mean = host.sample("weights", weights)[..., 0]
        host.sample("y", host.dist.Normal(mean, 1.0), obs=y)

    flow = wing.build(case("realnvp", 2, layers=2, hidden=(8,), context_dim=1), noise=0.05)
    context = host.array([0.5])
    density = wing.package.flow_distribution(flow, context=context)
    data = host.to_arviz(density, model, args=(host.array(0.5),), draws=50)
    draws = only(data, "posterior", "weights")
    assert draws.shape == (50, 2)
    log_q = wing.log_prob(density, draws)
    ratio = only(data, "sample_stats", "lp") - log_q
    assert_allclose(only(data, "sample_stats", "log_importance_ratio"), ratio, rtol=1e-5, atol=1e-5)


def test_seeds(host):
    args = {"posterior_predictive": True, "resample": True, "draws": 50}
    first, again, other = (weighed(host, 0.5, 0.5, seed=seed, **args) for seed in (0, 0, 1))
    for group, name in [("posterior", "mean"), ("posterior_predictive", "y")]:
        assert_array_equal(only(first, group, name), only(again, group, name))
        assert (only(first, group, name) != only(other, group, name)).any()


# Bad input


def test_arviz_is_missing(host, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"to_arviz needs ArviZ, .* extra pyroflows\[arviz"):
        weighed(host, 0.0, 1.0)


def test_nobody_asks_for_arviz_before_it_is_needed(wing):
    code = f"import sys, {wing.package.__name__}; sys.exit('arviz' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], check=False).returncode


@pytest.mark.parametrize("draws", [0, 24, -1, 30.5, "many", True])
def test_bad_draws(host, draws):
    with pytest.raises(ValueError, match=f"`draws` is {draws!r}, expected a whole .*at least 25"):
        weighed(host, 0.0, 1.0, draws=draws)


def test_a_missing_model(host):
    for posterior in (normal(host, 0.0, 1.0), by_hand(host)):
        with pytest.raises(ValueError, match="`model` is missing: only an automatic guide"):
            host.to_arviz(posterior)


def test_what_is_neither_guide_nor_model_nor_arguments(host):
    with pytest.raises(TypeError, match="`posterior` is a list, expected a guide or a dist"):
        host.to_arviz([1.0], conjugate(host))
    with pytest.raises(TypeError, match="`model` is a tuple, expected a function"):
        host.to_arviz(by_hand(host), (1.0,))
    with pytest.raises(TypeError, match="`args` is a .*, expected a tuple"):
        host.to_arviz(by_hand(host), conjugate(host), args=host.array(Y))


def test_sites_that_do_not_match(host):
    args = (host.array(Y),)

    def guide(*args):
        host.sample("another", normal(host, 0.0, 1.0))

    with pytest.raises(ValueError, match=r"`posterior` does not draw the latent sites \['mean'\]"):
        host.to_arviz(guide, conjugate(host), args=args)

    def guide(*args):
        host.sample("mean", normal(host, 0.0, 1.0))
        host.sample("another", normal(host, 0.0, 1.0))

    with pytest.raises(ValueError, match=r"draws the sites \['another'\], .*is_auxiliary"):
        host.to_arviz(guide, conjugate(host), args=args)

    def guide(*args):
        host.sample("mean", normal(host, np.zeros(len(Y)), np.ones(len(Y))))

    message = r"draws site 'mean' with shape \(5,\), but in `model` it has shape \(\)"
    with pytest.raises(ValueError, match=message):
        host.to_arviz(guide, conjugate(host), args=args)
    density = normal(host, np.zeros(3), np.ones(3)).to_event(1)
    message = r"events of shape \(3,\), but site 'mean' of `model` has shape \(\)"
    with pytest.raises(ValueError, match=message):
        host.to_arviz(density, conjugate(host), args=args)


def test_forgotten_data(host):
    """The observation becomes a latent site, and the message says why."""

    def model(y=None):
        mean = host.sample("mean", normal(host, 0.0, 1.0))
        host.sample("y", host.dist.Normal(mean, 1.0), obs=y)

    for posterior in (by_hand(host), normal(host, 0.0, 1.0)):
        with pytest.raises(ValueError, match=r"'y'\].* data by `args` or `kwargs`"):
            host.to_arviz(posterior, model)


def test_discrete_sites_have_to_be_summed_out(host):
    def model(y):
        mean = host.sample("mean", normal(host, 0.0, 1.0))
        sign = host.sample("sign", host.dist.Bernoulli(host.array(0.5)))
        host.sample("y", host.dist.Normal(mean * sign, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"latent sites \['sign'\].*sum discrete ones out"):
        host.to_arviz(by_hand(host), model, args=(host.array(0.5),))


def test_models_that_a_density_does_not_fit(host):
    def two():
        host.sample("a", normal(host, 0.0, 1.0))
        host.sample("b", normal(host, 0.0, 1.0))

    with pytest.raises(ValueError, match=r"has the latent sites \['a', 'b'\]: expected one"):
        host.to_arviz(normal(host, 0.0, 1.0), two)

    def positive():
        host.sample("rate", host.dist.Exponential(host.array(1.0)))

    with pytest.raises(ValueError, match="real line, but site 'rate' .* has the support .*guide"):
        host.to_arviz(normal(host, 0.0, 1.0), positive)
    with pytest.raises(ValueError, match=r"batch of densities of shape \(2,\), expected one"):
        weighed(host, np.zeros(2), np.ones(2))


def test_points_have_no_density(host):
    guide = host.guides.AutoDelta(conjugate(host))
    args = (host.array(Y),)
    with pytest.raises(ValueError, match="gives site 'mean' the same value in all 1000 draws"):
        host.to_arviz(guide, params=host.params(guide, *args), args=args)


def test_subsamples(host):
    def model(y):
        mean = host.sample("mean", normal(host, 0.0, 1.0))
        with host.plate("people", len(y), subsample_size=3) as index:
            host.sample("y", host.dist.Normal(mean, 1.0), obs=y[index])

    with pytest.raises(ValueError, match="plate 'people' takes a subsample, 3 of 5"):
        host.to_arviz(normal(host, 0.0, 1.0), model, args=(host.array(Y),))


def test_nothing_to_weigh(host):
    def model():
        host.sample("rate", host.dist.Exponential(host.array(1.0)))

    def guide():
        host.sample("rate", normal(host, -90.0, 1.0))

    with pytest.raises(ValueError, match="none of 1000 has a finite density ratio"):
        host.to_arviz(guide, model)


# What only one host can test


def test_pyro_leaves_the_global_generator_alone():
    host = HOSTS["pyro"]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    weighed(host, 0.5, 0.5, draws=50, posterior_predictive=True, resample=True)
    assert_array_equal(torch.rand(2), expected)
    assert not host.array(1.0).requires_grad


def test_pyro_evaluates_one_draw_at_a_time_what_it_cannot_evaluate_at_once():
    host = HOSTS["pyro"]

    def branching(y):
        mean = host.sample("mean", normal(host, 0.0, 1.0))
        loc = mean if mean > -1000.0 else -mean  # data-dependent control flow
        with host.plate("people", len(y)):
            host.sample("y", host.dist.Normal(loc, 1.0), obs=y)

    args = (host.array(Y),)
    data = host.to_arviz(normal(host, 0.5, 0.5), branching, args=args, draws=50)
    plain = weighed(host, 0.5, 0.5, draws=50)
    for name in ("lp", "log_importance_ratio", "log_weight"):
        expected = only(plain, "sample_stats", name)
        assert_allclose(only(data, "sample_stats", name), expected, rtol=1e-6)
    assert_allclose(only(data, "log_likelihood", "y"), only(plain, "log_likelihood", "y"))


def test_pyro_draws_from_its_own_guides_at_once():
    host, calls = HOSTS["pyro"], []

    def model(y):
        calls.append("model")
        schools(host)(y, host.array(np.zeros((5, 2))))

    class Guide(host.guides.AutoDiagonalNormal):
        def forward(self, *args, **kwargs):
            calls.append("guide")
            return super().forward(*args, **kwargs)

    args = (host.array(np.zeros((6, 4))),)
    guide = Guide(model)
    guide(*args)
    calls.clear()
    host.to_arviz(guide, args=args, draws=300)
    assert calls.count("guide") <= 2
    assert calls.count("model") <= 5


def test_pyro_forgets_the_model_of_a_guide_that_is_copied():
    host = HOSTS["pyro"]
    guide, args = host.guides.AutoNormal(conjugate(host)), (host.array(Y),)
    guide(*args)
    copy.deepcopy(guide)
    with pytest.raises(ValueError, match="`model` is missing: .* forgets it when it is copied"):
        host.to_arviz(guide, args=args)
    assert host.to_arviz(guide, conjugate(host), args=args, draws=50).attrs["verdict"]


def test_numpyro_parameters():
    host = HOSTS["numpyro"]
    guide = host.guides.AutoNormal(conjugate(host))
    args = (host.array(Y),)
    with host.eager():
        params = host.params(guide, *args)
    for wrong in ({}, None, {"mean_auto_loc": params["mean_auto_loc"]}):
        with pytest.raises(ValueError, match=r"`params` has no \[.*'mean_auto_scale'\]"):
            host.to_arviz(guide, params=wrong, args=args)
    with pytest.raises(TypeError, match="`params` is a tuple, expected a dictionary such as svi"):
        host.to_arviz(guide, params=(params,), args=args)
    with pytest.raises(TypeError, match="`key` is 0, expected one of jax.random.key"):
        numpyro_flows.to_arviz(guide, params=params, args=args, key=0)
