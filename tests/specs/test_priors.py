"""Laws of priors that are learned from draws."""

import functools
import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from pyroflows_common import archive, priors
from pyroflows_common.draws import held_out
from tests.wings.hosts import HOSTS, small

DRAWS = 400


def dist_of(host):
    return host.dist.constraints


def supports_of(host):
    """A site of every kind."""
    kinds = dist_of(host)
    return {
        "real": kinds.real,
        "positive": kinds.positive,
        "bounded": kinds.interval(-1.0, 3.0),
        "columns": [kinds.real, kinds.less_than(2.0), kinds.unit_interval],
        "simplex": kinds.simplex,
        "ordered": kinds.ordered_vector,
        "cholesky": kinds.corr_cholesky,
    }


def draws_of_every_kind(draws=DRAWS, seed=0):
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-1.0, 1.0, draws)
    cholesky = np.zeros((draws, 2, 2))
    cholesky[:, 0, 0], cholesky[:, 1, 0] = 1.0, np.sin(angles)
    cholesky[:, 1, 1] = np.cos(angles)
    return {
        "real": rng.standard_normal((draws, 2, 2)),
        "positive": np.exp(rng.standard_normal(draws)),
        "bounded": -1.0 + 4.0 * rng.beta(2.0, 3.0, (draws, 3)),
        "columns": np.stack(
            [rng.standard_normal(draws), 2.0 - rng.gamma(2.0, size=draws), rng.beta(2, 2, draws)], 1
        ),
        "simplex": rng.dirichlet(np.ones(3), (draws, 2)),
        "ordered": np.sort(rng.standard_normal((draws, 3)), 1),
        "cholesky": cholesky,
    }


def arrays(host, draws):
    return {name: host.array(value) for name, value in draws.items()}


def learned(host, draws, **options):
    """A prior that has hardly been trained, of a small flow."""
    build = functools.partial(host.package.nice, layers=2, hidden=(4,))
    options = {"build": build, "steps": 1, "learning_rate": 1e-9, "progress": False, **options}
    return host.package.fit_prior(draws, **options)


def numbers(x):
    return np.asarray(x.detach() if hasattr(x, "detach") else x, float)


@pytest.fixture(scope="module")
def every(wing):
    host = HOSTS[wing.name]
    draws = draws_of_every_kind()
    return host, draws, learned(host, arrays(host, draws), supports=supports_of(host))


def test_values_and_latent_vectors_are_inverse(every):
    host, draws, prior = every
    z, ladj = prior.inverse_and_ladj(arrays(host, draws))
    assert z.shape == (DRAWS, 4 + 1 + 3 + 3 + 2 * 2 + 3 + 1)
    assert ladj.shape == (DRAWS,)
    for name, values in prior.values(z).items():
        assert_allclose(numbers(values), draws[name], atol=2e-5)


@pytest.mark.parametrize("batch", [(), (1,), (3, 1)])
def test_batches(every, batch):
    """Also those of size one, which plates of sites do not take."""
    host, _, prior = every
    z = host.array(np.random.default_rng(0).standard_normal((*batch, 19)))
    values = prior.values(z)
    for site in prior.sites:
        assert tuple(values[site.name].shape) == (*batch, *site.shape)
    assert prior.log_prob(values).shape == batch


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_precision_is_that_of_the_draws(host, dtype):
    x = np.random.default_rng(0).standard_normal((DRAWS, 2)).astype(dtype)
    prior = learned(host, {"x": x}, supports={"x": dist_of(host).real})
    if host.name == "numpyro":  # where it is that of the new flow
        dtype = "float64"
    assert str(prior.log_prob({"x": host.np.asarray(x)}).dtype).endswith(dtype)


def test_sites_with_slashes(host):
    """ArviZ has dots in their names."""
    xarray = pytest.importorskip("xarray")
    rng = np.random.default_rng(0)
    data = xarray.Dataset({"a.b": (("draw", "chain"), rng.standard_normal((100, 4)))})
    trees = [data, xarray.DataTree.from_dict({"posterior": data})]

    def model():
        host.sample("a/b", host.dist.Normal(host.array(0.0), host.array(1.0)))

    for draws in trees:
        prior = learned(host, draws, model=model)
        assert [site.name for site in prior.sites] == ["a/b"]
        assert prior.check(draws) > 100


def test_the_start_is_the_normal_distribution_of_the_draws(host):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((DRAWS, 3)) @ rng.standard_normal((3, 3)) + 2.0
    draws = {"a": np.exp(x[:, 0]), "b": x[:, 1:]}
    kinds = dist_of(host)
    supports = {"a": kinds.positive, "b": kinds.real}
    prior = learned(host, arrays(host, draws), supports=supports)
    normal = stats.multivariate_normal(x.mean(0), np.cov(x, rowvar=False, ddof=0))
    found = numbers(prior.log_prob(arrays(host, draws)))
    assert_allclose(found, normal.logpdf(x) - x[:, 0], atol=2e-3)
    assert prior.draws == DRAWS


def test_weights_count_as_copies(host):
    rng = np.random.default_rng(2)
    x, weights = rng.standard_normal((DRAWS, 2)), rng.integers(0, 4, DRAWS)
    supports = {"x": dist_of(host).real}
    weighted = learned(host, {"x": host.array(x)}, supports=supports, weights=weights)
    copies = np.repeat(x, weights, axis=0)
    prior = learned(host, {"x": host.array(copies)}, supports=supports)
    at = {"x": host.array(x[:20])}
    assert_allclose(numbers(weighted.log_prob(at)), numbers(prior.log_prob(at)), atol=2e-3)
    assert weighted.draws == pytest.approx(weights.sum() ** 2 / (weights**2).sum())


def test_a_funnel(host):
    """Widths over many orders of magnitude, by the default flow."""
    rng = np.random.default_rng(7)
    v, noise = 2.0 * rng.standard_normal(4000), rng.standard_normal((4000, 2))
    draws = {"v": v, "x": np.exp(v)[:, None] * noise}
    supports = dict.fromkeys(draws, dist_of(host).real)
    options = {"supports": supports, "build": None, "steps": 400, "learning_rate": 5e-3}
    prior = learned(host, arrays(host, draws), **options)
    latent = rng.standard_normal((4000, 3)).astype(np.float32)
    values = {name: numbers(x) for name, x in prior.values(host.np.asarray(latent)).items()}
    assert values["v"].mean() == pytest.approx(0.0, abs=0.3)
    assert values["v"].std() == pytest.approx(2.0, rel=0.1)
    ratio = values["x"] / np.exp(values["v"])[:, None]
    low, high = np.quantile(ratio, [0.16, 0.84])
    assert (low, high) == pytest.approx((-1.0, 1.0), abs=0.3)


@pytest.mark.parametrize(("draws", "size"), [(10, 3), (40, 300)])
def test_few_draws_give_no_correlations(host, draws, size):
    """The normal distribution of the start then has the deviations only."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((draws, size)) * np.linspace(0.1, 3.0, size) - 1.0
    prior = learned(host, {"x": host.array(x)}, supports={"x": dist_of(host).real})
    found = numbers(prior.log_prob({"x": host.array(x)}))
    expected = stats.norm.logpdf(x, x.mean(0), x.std(0)).sum(1)
    assert_allclose(found, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_the_density_integrates_to_one(host, size):
    """Also after training, over a positive and a bounded number."""
    rng = np.random.default_rng(3)
    draws = {"tau": rng.gamma(2.0, size=DRAWS), "share": rng.beta(2.0, 5.0, DRAWS)}
    kinds = dist_of(host)
    supports = {"tau": kinds.positive, "share": kinds.unit_interval}
    names = list(draws)[:size]
    chosen = arrays(host, {name: draws[name] for name in names})
    prior = learned(host, chosen, supports=supports, sites=names, steps=60, learning_rate=1e-2)
    tau, share = np.exp(np.linspace(-8, 5, 300)), 1 / (1 + np.exp(-np.linspace(-9, 9, 301)))
    grid = np.meshgrid(tau, share, indexing="ij")[:2] if size == 2 else [tau]
    values = {name: host.array(axis.ravel()) for name, axis in zip(names, grid, strict=True)}
    density = np.exp(numbers(prior.log_prob(values))).reshape(grid[0].shape)
    for axis in (share, tau) if size == 2 else (tau,):
        density = np.trapezoid(density, axis)
    assert density == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_data_in_two_halves_are_data_at_once(host, size):
    """Conjugate: the prior from draws of the first posterior, times the second likelihood."""
    rng = np.random.default_rng(4)
    y = 1.0 + rng.standard_normal((2, 8))
    first = stats.norm(y[0].sum() / 9, 9**-0.5)
    draws = {"mean": first.ppf((np.arange(4000) + 0.5) / 4000)[rng.permutation(4000)]}
    if size == 2:
        draws["other"] = rng.standard_normal(4000)
    supports = dict.fromkeys(draws, dist_of(host).real)
    options = {"supports": supports, "steps": 200, "learning_rate": 1e-2}
    prior = learned(host, arrays(host, draws), **options)
    grid = np.linspace(-2, 4, 601)
    values = {"mean": grid, "other": np.zeros_like(grid)}
    density = numbers(prior.log_prob({name: host.array(values[name]) for name in draws}))
    density = density + stats.norm.logpdf(y[1][:, None], grid).sum(0)
    weight = np.exp(density - density.max())
    mean = (weight @ grid) / weight.sum()
    sd = np.sqrt(weight @ (grid - mean) ** 2 / weight.sum())
    exact = y.sum() / 17, 17**-0.5
    assert mean == pytest.approx(exact[0], abs=0.1 * exact[1])
    assert sd == pytest.approx(exact[1], rel=0.1)


def test_in_a_model(every):
    """One latent site of the base's density; the values as deterministic sites."""
    host, _, prior = every
    given = host.array(np.linspace(-1, 1, 19))
    model = host.conditioned(lambda: prior(), {"prior": given})
    log_density, values = host.log_density(model)
    assert log_density == pytest.approx(stats.norm.logpdf(np.linspace(-1, 1, 19)).sum(), rel=1e-5)
    expected = {name: numbers(value) for name, value in prior.values(given).items()}
    assert set(values) == {"prior", *expected}
    for name, value in expected.items():
        assert_allclose(values[name], value, rtol=1e-5, atol=1e-6)


def test_a_guide_takes_the_place_of_the_values(host):
    """Particles in one batch, with plates for values that were in plates."""
    rng = np.random.default_rng(5)
    y = host.array(rng.standard_normal(3))
    zero, one = host.array(0.0), host.array(1.0)

    def first():
        mean = host.sample("mean", host.dist.Normal(zero, one))
        with host.plate("groups", 3):
            host.sample("effect", host.dist.Normal(mean, one))

    draws = {"mean": rng.standard_normal(DRAWS), "effect": rng.standard_normal((DRAWS, 3))}
    prior = learned(host, arrays(host, draws), model=first)
    assert {s.name: (s.shape, s.batch_dim) for s in prior.sites} == {
        "mean": ((), 0),
        "effect": ((3,), 1),
    }

    def second():
        values = prior()
        with host.plate("groups", 3):
            host.sample("y", host.dist.Normal(values["effect"] + values["mean"], one), obs=y)

    guide = small(host, second, init="location")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing takes one particle at a time
        result = host.package.fit_guide(guide, steps=2, progress=False)
    assert np.isfinite(result.losses).all()


def test_draws_of_any_kind(host):
    rng = np.random.default_rng(6)
    flat = {"mean": rng.standard_normal(DRAWS), "effect": rng.standard_normal((DRAWS, 2))}
    zero, one = host.array(0.0), host.array(1.0)

    def model():
        host.sample("mean", host.dist.Normal(zero, one))
        host.sample("effect", host.dist.Normal(host.array(np.zeros(2)), one).to_event(1))
        host.sample("unknown", host.dist.Normal(zero, one))

    class Sampler:
        def get_samples(self, group_by_chain):
            assert group_by_chain
            return {**arrays(host, chains), "other": host.array(np.zeros((4, DRAWS // 4)))}

    chains = {name: value.reshape(4, DRAWS // 4, *value.shape[1:]) for name, value in flat.items()}
    arviz = pytest.importorskip("arviz")
    groups = {"posterior": chains}
    old = arviz.__version__.startswith("0.")
    data = arviz.from_dict(**groups) if old else arviz.from_dict(groups)
    given = [arrays(host, flat), arrays(host, chains), flat, Sampler(), data]
    found = [learned(host, draws, model=model, sites=list(flat)) for draws in given]
    with pytest.raises(ValueError, match=r"`draws` has no \['unknown'\], which `model` has"):
        learned(host, flat, model=model)
    at = arrays(host, {name: value[:9] for name, value in flat.items()})
    for prior in found:
        assert [site.name for site in prior.sites] == ["mean", "effect"]
        assert_allclose(numbers(prior.log_prob(at)), numbers(found[0].log_prob(at)), atol=1e-4)


def test_a_guide_is_drawn_from_and_weighed(host):
    """A guide that is too wide gives the posterior all the same."""
    one, y = host.array(1.0), host.array(np.full(8, 2.0))

    def model():
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), one))
        with host.plate("rows", 8):
            host.sample("y", host.dist.Normal(mean, one), obs=y)

    def guide():
        host.sample("mean", host.dist.Normal(host.array(1.5), host.array(0.6)))

    prior = learned(host, guide, model=model)
    at = np.array([1.2, 16 / 9, 2.3])
    exact = stats.norm(16 / 9, 1 / 3).logpdf(at)
    assert_allclose(numbers(prior.log_prob({"mean": host.array(at)})), exact, atol=0.1)
    assert prior.draws < 4000


def test_draws_that_are_not_to_be_trusted(host):
    def model():
        host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))

    def narrow():
        host.sample("x", host.dist.Normal(host.array(0.0), host.array(0.1)))

    with pytest.warns(UserWarning, match="those of a guide.*do not trust"):
        learned(host, narrow, model=model)


def test_files(every, tmp_path):
    host, draws, prior = every
    path = tmp_path / "prior.safetensors"
    host.package.save(prior, path)
    for other in HOSTS.values():
        found = other.package.load(path)
        assert (found.sites, found.draws, found.name) == (prior.sites, prior.draws, prior.name)
        assert_allclose(
            numbers(found.log_prob(arrays(other, draws))),
            numbers(prior.log_prob(arrays(host, draws))),
            atol=1e-3,
        )
        like = other.package.load(path, like=found)
        assert like.sites == found.sites
        other.package.save(found, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_flow_built_by_hand_needs_one_alike(host, tmp_path):
    def build(size, key=None):
        return host.package.Chain([host.package.SinhArcsinh(size)])

    draws = {"x": host.array(np.random.default_rng(0).standard_normal((DRAWS, 2)))}
    supports = {"x": dist_of(host).real}
    prior, other = (learned(host, draws, supports=supports, build=build) for _ in range(2))
    host.package.save(prior, tmp_path / "prior")
    with pytest.raises(ValueError, match="like="):
        host.package.load(tmp_path / "prior")
    found = host.package.load(tmp_path / "prior", like=other)
    assert_allclose(numbers(found.log_prob(draws)), numbers(prior.log_prob(draws)), atol=1e-6)
    host.package.save(host.package.Chain([host.package.ActNorm(2)]), tmp_path / "flow")
    with pytest.raises(ValueError, match="holds a flow, but `like` is a FlowPrior"):
        host.package.load(tmp_path / "flow", like=other)
    with pytest.raises(ValueError, match="holds a FlowPrior .* but `like` is a flow"):
        host.package.load(tmp_path / "prior", like=host.package.Chain([host.package.ActNorm(2)]))


@pytest.mark.parametrize(
    "about",
    [{}, {"sites": 3}, {"sites": [["x", [2], 0, [["a", None]]]], "draws": 3.0, "name": "p"}]
    + [{"sites": [["x", [-2], 0, "simplex"]], "draws": 3.0, "name": "p"}]
    + [{"sites": [["x", [2], 0, "sphere"]], "draws": 3.0, "name": "p"}]
    + [{"sites": [["x", [2], 0, []]], "draws": 3.0, "name": "p"}]
    + [{"sites": [["x", [], 1, [[None, None]]]], "draws": 3.0, "name": "p"}]
    + [{"sites": [["x", [2], 0, [[None, None]] * 3]], "draws": 3.0, "name": "p"}]
    + [{"sites": [["x", [2], 0, [[1.0, 0.0]]]], "draws": 3.0, "name": "p"}]
    + [{"sites": [["x", [], 0, "corr_cholesky"]], "draws": 3.0, "name": "p"}]
    + [{"sites": [["x", [2], 0, [[None, None]]]], "draws": 0.0, "name": "p"}],
)
def test_broken_files(about):
    with pytest.raises(ValueError, match="its prior is"):
        priors.described({"prior": about})


def test_a_file_that_asks_for_a_large_matrix(host):
    """The rank of a preconditioner has to be that of the file's arrays."""
    arrays_ = {"layers.1.basis": np.eye(3, 2)}
    arguments = {"event_shape": 3, "rank": 2}
    assert archive.without_ends(arguments, ["rank"], arrays_)[1] == {"rank": 2}
    for size, rank in [(3, 3), (3, 10**9), (10**9, 2), (3, "two")]:
        with pytest.raises(ValueError, match="its rank is"):
            archive.without_ends({"event_shape": size, "rank": rank}, ["rank"], arrays_)


def test_supports_of_values_are_taken_again(every):
    host, draws, prior = every
    again = learned(host, arrays(host, draws), supports=prior.supports)
    assert {(s.name, s.shape, s.support) for s in again.sites} == {
        (s.name, s.shape, s.support) for s in prior.sites
    }


ERRORS = [
    (dict(draws=3), TypeError, "`draws` is a int, expected a dictionary"),
    (dict(supports=[1]), TypeError, "`supports` is a list"),
    (dict(sites="x"), TypeError, "`sites` is 'x'"),
    (dict(supports=None), ValueError, "none of which has a support"),
    (dict(sites=["x", "n"]), ValueError, r"support of \['n'\] is not known"),
    (dict(supports={"x": "real", "z": "real"}), ValueError, r"`supports` has \['z'\], but `draws`"),
    (dict(supports={"n": "real"}), ValueError, "'n' of int64"),
    (dict(supports={"x": "half"}), ValueError, "site 'x': `support` is 'half'"),
    (dict(supports={"x": [(0.0, 1.0)] * 3}), ValueError, "'x' has 2 numbers, but 3 supports"),
    (
        dict(supports={"t": "simplex"}),
        ValueError,
        r"'t' has shape \(\), but its support is simplex",
    ),
    (
        dict(supports={"x": [(1.0, None)]}),
        ValueError,
        "of site 'x' has .* outside the site's support",
    ),
    (dict(supports={"hole": "real"}), ValueError, "'hole' has 1 of 400 rows with NaN"),
    (dict(supports={"still": "real"}), ValueError, "'still' a number that is the same in all 400"),
    (dict(supports={"x": "real", "short": "real"}), ValueError, "different numbers of draws"),
    (dict(supports={"short": "real"}), ValueError, "has 3 draws, expected at least 10"),
    (dict(weights=np.ones(3)), ValueError, "`weights` has 3 numbers, expected 400"),
    (dict(weights=-np.ones(DRAWS)), ValueError, "`weights` has NaN, inf or negative"),
    (dict(name="x"), ValueError, r"\['x'\] twice"),
    (dict(steps=0), ValueError, "`steps` is 0"),
    (dict(supports={"x": "real", "twice": "real"}), ValueError, "`draws` lie in a plane"),
    (dict(weights=np.eye(DRAWS)[0]), ValueError, "`draws` has 1 draws, expected at least 10"),
    (dict(build=3), TypeError, "`build` is a int"),
]


@pytest.mark.parametrize(("options", "kind", "match"), ERRORS, ids=[m for *_, m in ERRORS])
def test_bad_arguments(host, options, kind, match):
    rng = np.random.default_rng(0)
    draws = {"x": rng.standard_normal((DRAWS, 2)), "n": np.ones(DRAWS, int)}
    draws |= {
        "t": rng.standard_normal(DRAWS),
        "still": np.ones((DRAWS, 2)),
        "short": np.arange(3.0),
    }
    draws["twice"] = 2 * draws["x"]
    draws["hole"] = np.where(np.arange(DRAWS) == 7, np.nan, draws["t"])
    options = {"draws": draws, "supports": {"x": "real"}, **options}
    with pytest.raises(kind, match=match):
        learned(host, **options)


def test_a_support_that_depends_on_another_site(host):
    def model():
        bound = host.sample("bound", host.dist.Gamma(host.array(2.0), host.array(1.0)))
        host.sample("x", host.dist.Uniform(host.array(0.0), bound))

    draws = {"x": np.linspace(0.1, 0.2, DRAWS), "bound": np.linspace(1.0, 2.0, DRAWS)}
    with pytest.raises(ValueError, match="support of site 'x' depends on other sites"):
        learned(host, draws, model=model)
    assert len(learned(host, draws, model=model, sites=["bound"]).sites) == 1


@pytest.mark.parametrize("draws", [10, 11, 19, 20, 99, 100, 101, 999, 4000])
def test_a_tenth_is_held_out(draws):
    """In blocks of neighbours, which are as many as can be up to ten."""
    held = held_out(draws)
    assert held.sum() == pytest.approx(draws / 10, abs=max(1, draws // 20))
    assert 0 < held.sum() < draws / 4
    assert np.diff(held.astype(int), prepend=0).clip(0).sum() == min(10, draws // 10)


@pytest.mark.parametrize(("m", "v"), [(0.0, 1.0), (1.0, 0.5), (-1.5, 0.8), (0.3, 0.05)])
def test_the_number_of_draws_that_count(m, v):
    """Against weights of many draws."""
    rng = np.random.default_rng(0)
    new = m + np.sqrt(v) * rng.standard_normal((200_000, 1))
    old = rng.standard_normal(400_000)
    weight = np.exp(stats.norm(m, np.sqrt(v)).logpdf(old) - stats.norm.logpdf(old))
    expected = 1e4 * weight.mean() ** 2 / (weight**2).mean()
    assert priors.checked_region(new, None, 1e4) == pytest.approx(expected, rel=0.05)


def test_a_posterior_outside_of_the_region(every):
    host, _, prior = every
    rng = np.random.default_rng(0)
    latent = 0.7 * rng.standard_normal((100, 19))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count = prior.check({"prior": host.array(latent)})
        assert count > 100
        assert prior.check({"prior": host.array(latent.reshape(4, 25, 19))}) == count
        assert prior.check(arrays(host, draws_of_every_kind(seed=1))) > 100
    with pytest.warns(UserWarning, match="few draws, effectively .* of 400"):
        assert prior.check({"prior": host.array(latent + np.eye(19)[4] * 4)}) < 10
    for bad, message in [
        (np.full((100, 19), np.nan), "100 of 100 rows with NaN"),
        (latent[:19], "19 draws of 19 numbers, expected more draws than numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            prior.check({"prior": host.array(bad)})
    edge = draws_of_every_kind()
    edge["positive"][3] = 0.0
    with pytest.raises(ValueError, match="1 of 400 rows with NaN or inf, or outside"):
        prior.check(arrays(host, edge))
