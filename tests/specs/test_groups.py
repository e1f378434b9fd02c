"""Laws of guides with local sites: groups in a plate that takes a part of them."""

import functools
import inspect
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

import numpyro_flows
import pyroflows
from pyroflows_common.local import Site, layout_of
from tests.wings.hosts import HOSTS, small

N, SEEN, BATCH = 30, 3, 10
NOISE = 0.8  # of one datum
Y = (
    1.0
    + np.random.default_rng(0).normal(size=(N, 1))
    + 0.8 * np.random.default_rng(1).normal(size=(N, SEEN))
)


def groups(host, y=Y, dim=-1, given=None):
    """Centred normal groups, whose plate takes some of its rows.

    Args:
        given: whether the data of the rows that are taken come as they are, not by their indices.
    """

    def model(y, batch=None):
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), 2.0))
        scale = host.sample("scale", host.dist.HalfNormal(host.array(1.5)))
        with host.plate("group", N, subsample_size=batch, dim=dim) as rows:
            theta = host.sample("theta", host.dist.Normal(mean, scale))
            seen = y if given else y[rows]
            with host.plate("datum", SEEN, dim=-1 if dim == -2 else -2):
                host.sample("y", host.dist.Normal(theta, NOISE), obs=seen if dim == -2 else seen.T)

    return model


def log_joint(mean, log_scale):
    """The log-density of the model without its groups, and of the change to log-scales."""
    scale = np.exp(log_scale)
    prior = stats.norm(0, 2).logpdf(mean) + stats.halfnorm(0, 1.5).logpdf(scale) + log_scale
    spread = scale[..., None] ** 2 + NOISE**2 / SEEN
    means = stats.norm(mean[..., None], np.sqrt(spread)).logpdf(Y.mean(1)).sum(-1)
    rest = ((Y - Y.mean(1, keepdims=True)) ** 2).sum() / NOISE**2
    inner = -0.5 * rest - N * (SEEN - 1) * math.log(NOISE * math.sqrt(2 * math.pi))
    return prior + means + inner - 0.5 * N * math.log(SEEN)


@functools.cache
def exact():
    """Evidence, and mean and deviation of both global numbers and of each group."""
    mean, log_scale = np.meshgrid(np.linspace(0, 2, 200), np.linspace(-0.8, 0.8, 200))
    step = 2 / 199 * 1.6 / 199
    density = log_joint(mean, log_scale)
    top = density.max()
    weights = np.exp(density - top)
    evidence = top + np.log(weights.sum() * step)
    weights /= weights.sum()
    kept = np.exp(2 * log_scale) / (np.exp(2 * log_scale) + NOISE**2 / SEEN)
    means = kept[..., None] * Y.mean(1) + (1 - kept[..., None]) * mean[..., None]
    variances = (kept * NOISE**2 / SEEN)[..., None]
    group = np.einsum("ij,ijn->n", weights, means)
    spread = np.einsum("ij,ijn->n", weights, variances + means**2) - group**2
    found = {"theta": (group, np.sqrt(spread))}
    for name, value in (("mean", mean), ("scale", np.exp(log_scale))):
        centre = (weights * value).sum()
        found[name] = centre, math.sqrt((weights * (value - centre) ** 2).sum())
    return evidence, found


@functools.cache
def fitted(name, batch=BATCH, local=None, dim=-1, steps=30, **options):
    """A guide that has hardly been trained: its start is what counts."""
    host = HOSTS[name]
    host.clear()
    guide = small(host, groups(host, dim=dim), local=local, **options)
    data = host.array(Y)
    return host.package.fit_guide(
        guide,
        args=(data,),
        kwargs={"batch": batch},
        steps=steps,
        learning_rate=1e-4,
        progress=False,
    )


def arviz(host, result, draws=1000, **options):
    options = {"args": (host.array(Y),), "params": getattr(result, "params", None), **options}
    return host.to_arviz(result.guide, draws=draws, **options)


@pytest.mark.parametrize(
    ("batch", "local", "dim"), [(BATCH, None, -1), (None, "group", -1), (BATCH, None, -2)]
)
def test_guides_start_at_the_posterior(host, batch, local, dim):
    """In the global numbers and in each group, however many are taken."""
    evidence, expected = exact()
    data = arviz(host, fitted(host.name, batch, local, dim))
    assert data.attrs["pareto_k"] < 0.7
    assert data.attrs["log_evidence"] == pytest.approx(evidence, abs=0.05)
    for name, (centre, deviation) in expected.items():
        draws = np.asarray(data.posterior[name])[0].reshape(1000, -1)
        error = (draws.mean(0) - centre) / deviation
        assert np.abs(error).max() < (0.35 if name == "theta" else 0.15)
        assert_allclose(draws.std(0) / deviation, 1.0, atol=0.25 if name == "theta" else 0.12)


def test_the_bound_is_as_quiet_as_with_all_groups(host):
    """What the groups that are taken differ from the others has no noise."""
    losses = fitted(host.name).losses
    evidence, _ = exact()
    assert losses.std() < 1.0
    assert losses.mean() == pytest.approx(-evidence, abs=1.0)


def test_the_evidence_is_that_without_the_groups(host):
    evidence, _ = exact()
    result = fitted(host.name)
    options = {"args": (host.array(Y),), "params": getattr(result, "params", None)}
    found = host.log_evidence(result.guide, draws=1000, **options)
    assert found.value == pytest.approx(evidence, abs=max(3 * found.error, 0.02))


def test_quantiles_are_those_of_all_groups(host):
    _, expected = exact()
    low, middle, high = host.quantiles(fitted(host.name), [0.16, 0.5, 0.84])["theta"]
    centre, deviation = expected["theta"]
    assert middle.shape == (N,)
    assert_allclose(middle, centre, atol=0.3 * deviation.max())
    assert_allclose((high - low) / (2 * deviation), 1.0, atol=0.25)


def test_the_verdict_names_what_it_weighs(host):
    data = arviz(host, fitted(host.name), draws=200)
    assert " of the global sites: " in data.attrs["verdict"]
    assert "fit_mixture" not in data.attrs["verdict"]
    assert np.isfinite(data.attrs["pareto_k_joint"])


def test_subsampled_data_are_not_weighed(host):
    with pytest.raises(ValueError, match="plate 'group' takes a subsample, 10 of 30"):
        arviz(host, fitted(host.name), kwargs={"batch": BATCH})


def network(host):
    if host.name == "pyro":
        return lambda x: x.to(x)[..., :2]
    return lambda x: x[:2]


def test_a_guide_with_an_encoder_holds_nothing_of_a_group(host):
    """Apart from the control of their densities, which only the bound takes."""
    options = {"encoder": network(host), "features": host.array(Y)}
    result = fitted.__wrapped__(host.name, **options)
    held = (
        {n: tuple(p.shape) for n, p in result.guide.get_transform().rows.named_parameters()}
        if host.name == "pyro"
        else {n: p.shape for n, p in result.params.items() if "rows" in n}
    )
    assert all(N not in shape for name, shape in held.items() if not name.endswith("control"))
    assert np.isfinite(arviz(host, result, draws=50).attrs["elbo"])
    assert set(host.quantiles(result, [0.5])) == {"mean", "scale"}


def run(host, model, *args, batch=BATCH, **options):
    guide = small(host, model, **options)
    host.clear()
    with host.eager():
        host.package.fit_guide(guide, args=args, kwargs={"batch": batch}, steps=1, progress=False)


def test_data_that_do_not_follow_the_indices_are_refused(host):
    with pytest.raises(ValueError, match="data do not follow the indices of plate 'group'"):
        run(host, groups(host, given=True), host.array(Y[:BATCH]))


def test_rows_that_depend_on_each_other_are_refused(host):
    def chained(batch=None):
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), 1.0))
        with host.plate("group", N, subsample_size=batch):
            theta = host.sample("theta", host.dist.Normal(mean, 1.0))
            others = theta - theta.mean()
            host.sample("y", host.dist.Normal(others, 1.0), obs=host.array(0.0))

    with pytest.raises(ValueError, match="depends on the sites of another"):
        run(host, chained)


def test_sites_outside_that_depend_on_rows_are_refused(host):
    def total(batch=None):
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), 1.0))
        with host.plate("group", N, subsample_size=batch):
            theta = host.sample("theta", host.dist.Normal(mean, 1.0))
        host.sample("y", host.dist.Normal(theta.sum(), 1.0), obs=host.array(0.0))

    with pytest.raises(ValueError, match="a site outside of the plate depends on them"):
        run(host, total)


def test_rows_under_a_mask_are_refused(host):
    def masked(batch=None):
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), 1.0))
        with host.plate("group", N, subsample_size=batch) as rows:
            with host.mask(mask=host.bools(Y[:, 0] > 0)[rows]):
                theta = host.sample("theta", host.dist.Normal(mean, 1.0))
                host.sample("y", host.dist.Normal(theta, 1.0), obs=host.array(Y[:, 0])[rows])

    with pytest.raises(ValueError, match="'theta' lies under a mask"):
        run(host, masked)


def test_supports_of_single_rows_are_refused(host):
    def bounded(batch=None):
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), 1.0))
        with host.plate("group", N, subsample_size=batch) as rows:
            least = host.array(np.full(BATCH, 1.0))
            theta = host.sample("theta", host.dist.Pareto(least, 2.0))
            host.sample("y", host.dist.Normal(theta - mean, 1.0), obs=host.array(Y[:, 0])[rows])

    with pytest.raises(ValueError, match="'theta' has a bound for each row"):
        run(host, bounded)


def test_one_plate_at_two_dimensions_is_refused():
    sites = [Site("a", (3,), 0, {"p": -1}), Site("b", (3, 1), 0, {"p": -2}), Site("m", (), 0, {})]
    with pytest.raises(ValueError, match="plate 'p' has the dimensions"):
        layout_of(sites, {"p": (9, 3)}, None)


def test_plates_on_both_sides_of_the_groups(host):
    """Many particles at once are as many one after the other."""

    def crossed(batch=None):
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), 1.0))
        rows = host.plate("group", N, subsample_size=batch, dim=-2)
        left, right = host.plate("left", 3, dim=-3), host.plate("right", 2, dim=-1)
        y = host.array(np.random.default_rng(2).normal(size=(3, N, 2)))
        with rows as index:
            theta = host.sample("theta", host.dist.Normal(mean, 1.0))
            with left, right:
                each = host.sample("each", host.dist.Normal(theta, 1.0))
                host.sample("y", host.dist.Normal(each, 1.0), obs=y[:, index])

    host.clear()
    guide = small(host, crossed)
    options = {"steps": 40, "learning_rate": 1e-9, "progress": False, "kwargs": {"batch": BATCH}}
    result = host.package.fit_guide(guide, **options)
    params = {"params": result.params} if host.name == "numpyro" else {}
    data = host.to_arviz(guide, draws=200, **params)
    assert np.asarray(data.posterior["each"]).shape == (1, 200, 3, N, 2)
    # The joint bound: that of the global sites less what the rows' draws lack.
    assert np.mean(result.losses) == pytest.approx(-data.attrs["elbo"], abs=6.0)


def test_models_without_global_sites_are_refused(host):
    def alone(batch=None):
        with host.plate("group", N, subsample_size=batch):
            host.sample("theta", host.dist.Normal(host.array(0.0), 1.0))

    with pytest.raises(ValueError, match="all latent sites are local"):
        run(host, alone)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"local": "theta"}, ValueError, "`local` is 'theta', expected the name of a plate"),
        ({"local": 1}, TypeError, "`local` is a int"),
        ({"encoder": abs}, ValueError, "`encoder` is given without `features`"),
        ({"features": np.ones(3)}, ValueError, "`features` is given without `encoder`"),
        ({"encoder": 1, "features": 1}, TypeError, "`encoder` is a int"),
    ],
)
def test_bad_options(host, options, error, message):
    with pytest.raises(error, match=message):
        run(host, groups(host), host.array(Y), **options)


def test_an_encoder_without_local_sites_is_refused(host):
    with pytest.raises(ValueError, match="the model has no local sites"):
        run(host, groups(host), host.array(Y), batch=None, encoder=abs, features=np.ones((N, 2)))


def test_what_takes_no_local_sites_says_so(host):
    guide = fitted(host.name).guide
    options = {"args": (host.array(Y),), "kwargs": {"batch": BATCH}, "progress": False}
    draws = {"mean": np.ones(30), "scale": np.ones(30), "theta": np.ones((30, N))}
    with pytest.raises(ValueError, match="leave `draws` out"):
        host.package.fit_guide(guide, draws=draws, **options)
    with pytest.raises(ValueError, match="modes are not told apart|does not tell the modes"):
        host.package.fit_mixture(small(host, groups(host)), **options)


def test_another_number_of_groups_is_refused(host):
    def model(y, size, batch=None):
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), 1.0))
        with host.plate("group", size, subsample_size=batch) as rows:
            theta = host.sample("theta", host.dist.Normal(mean, 1.0))
            host.sample("y", host.dist.Normal(theta, 1.0), obs=y[rows])

    host.clear()
    guide = small(host, model)
    y = host.array(Y[:, 0])
    options = {"steps": 1, "progress": False}
    result = host.package.fit_guide(guide, args=(y, N), kwargs={"batch": BATCH}, **options)
    params = {"params": result.params} if host.name == "numpyro" else {}
    with pytest.raises(ValueError, match="has 40 rows, but the guide has learned 30"):
        host.to_arviz(guide, args=(host.array(np.ones(40)), 40), draws=50, **params)


def test_the_names_are_the_same():
    for package in (pyroflows, numpyro_flows):
        assert {"local", "encoder", "features"} <= set(
            inspect.signature(package.AutoFlow).parameters
        )
