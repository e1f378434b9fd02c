"""Guides inside NumPyro's inference, in JAX's own default precision."""

import functools
import pickle
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from numpyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.autoguide import AutoGuideList, AutoNormal
from numpyro.infer.initialization import init_to_value
from numpyro.infer.reparam import NeuTraReparam
from scipy import stats

from numpyro_flows import AutoFlow, AutoRealNVP, fit_guide, nice

KEY = jax.random.key(0)
SMALL = {"layers": 2, "hidden": (4,), "degrees_of_freedom": None}  # quick to compile
ADAM = numpyro.optim.Adam(1e-2)

# A line through five points: posterior and evidence are known.
TIMES = np.linspace(-1.0, 1.0, 5)
Y = np.array([4.1, 5.2, 4.9, 5.3, 6.4])
NOISE = 0.5
DESIGN = np.stack([np.ones(5), TIMES], -1)
COVARIANCE = np.linalg.inv(np.eye(2) / 100.0 + DESIGN.T @ DESIGN / NOISE**2)
MEAN = COVARIANCE @ DESIGN.T @ Y / NOISE**2
SCALE = np.sqrt(np.diag(COVARIANCE))
EVIDENCE = stats.multivariate_normal.logpdf(Y, cov=100 * DESIGN @ DESIGN.T + NOISE**2 * np.eye(5))


def line(y=None):
    level = numpyro.sample("level", dist.Normal(0.0, 10.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 10.0))
    trend = numpyro.deterministic("trend", level + slope * TIMES)
    with numpyro.plate("times", 5):
        return numpyro.sample("y", dist.Normal(trend, NOISE), obs=y)


def straight(size, key):
    """A flow that is the identity at its start, exactly."""
    return nice(size, layers=2, hidden=(4,), init_scale=0.0, key=key)


def initial(guide, *args, seed=0):
    """The parameters that a guide starts with."""
    trace = handlers.trace(handlers.seed(guide, jax.random.key(seed))).get_trace(*args)
    return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}


def compiled(guide, *args, seed=0):
    """The same, as one program."""
    return jax.jit(lambda: initial(guide, *args, seed=seed))()


def medians(guide, *args):
    """The medians of a guide at its start."""
    return jax.jit(lambda: guide.median(initial(guide, *args)))()


@functools.cache
def stepped():
    """A guide, its parameters at the start and after a step."""
    guide = quick()
    svi = SVI(line, guide, ADAM, Trace_ELBO())
    state = svi.init(KEY, Y)
    return guide, *(svi.get_params(one) for one in (state, jax.jit(svi.update)(state, Y)[0]))


@functools.cache
def exact():
    """A guide that is the posterior of the line, and its parameters."""
    guide = AutoFlow(line, straight, degrees_of_freedom=None)
    return guide, initial(guide, Y)


def quick(model=line, **options):
    """A guide without a search."""
    return AutoRealNVP(model, init="location", **{**SMALL, **options})


LOSSES = {
    "particles": Trace_ELBO(num_particles=3),
    "one by one": Trace_ELBO(num_particles=3, vectorize_particles=False),
    "mean field": TraceMeanField_ELBO(num_particles=2),
    "graph": TraceGraph_ELBO(num_particles=2),
    "renyi": RenyiELBO(alpha=0.0, num_particles=3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_bound_is_the_evidence_at_the_posterior(name):
    """Without noise, and so is the gradient zero without noise."""
    guide, params = exact()
    svi = SVI(line, guide, numpyro.optim.SGD(1.0), LOSSES[name])
    state, loss = jax.jit(svi.update)(svi.init(KEY, Y, init_params=params), Y)
    assert_allclose(-loss, EVIDENCE, rtol=1e-3)
    for new, old in zip(*map(jax.tree.leaves, (svi.get_params(state), params)), strict=True):
        assert_allclose(new, old, atol=1e-2)


def test_predictive():
    """By guide and parameters, and of the guide's own draws."""
    guide, params = exact()
    draws = Predictive(guide, params=params, num_samples=500)(KEY)
    assert_allclose(draws["level"].mean(), MEAN[0], atol=0.2 * SCALE[0])
    assert_allclose(draws["slope"].std(), SCALE[1], rtol=0.2)
    predicted = Predictive(line, guide=guide, params=params, num_samples=500)(KEY)
    assert predicted["y"].shape == (500, 5)
    assert_allclose(predicted["y"].mean(0), DESIGN @ MEAN, atol=0.2)


def test_draws_of_the_posterior():
    """With deterministic sites, in any shape; unconstrained they have a density."""
    guide, params = exact()
    draws = guide.sample_posterior(KEY, params, sample_shape=(20, 30))
    assert {n: v.shape for n, v in draws.items()} == {
        "level": (20, 30), "slope": (20, 30), "trend": (20, 30, 5),
    }  # fmt: skip
    assert_allclose(draws["slope"].mean(), MEAN[1], atol=0.2 * SCALE[1])
    posterior = guide.get_posterior(params)
    x = posterior.sample(KEY, (3,))
    expected = stats.multivariate_normal.logpdf(x, MEAN, COVARIANCE)
    assert_allclose(posterior.log_prob(x), expected, atol=1e-2)
    z = guide.get_transform(params).inv(x)
    assert_allclose(guide.get_base_dist().log_prob(z), stats.norm.logpdf(z).sum(-1), rtol=1e-4)


def test_parameters_are_kept_without_the_guide(tmp_path):
    """Pickled, or as NumPy's arrays, they give a new guide the same draws."""
    guide, _, params = stepped()
    new = quick()
    compiled(new, Y, seed=1)
    np.savez(tmp_path / "params.npz", **params)
    read = dict(np.load(tmp_path / "params.npz"))
    draws = [
        one.sample_posterior(KEY, values, sample_shape=(3,))
        for one, values in [(guide, params), (new, pickle.loads(pickle.dumps(params))), (new, read)]
    ]
    for name, value in draws[0].items():
        for again in draws[1:]:
            assert_array_equal(again[name], value)


def test_parameters_are_named_arrays():
    """Each by its place; the start as one."""
    guide, _, params = stepped()
    assert all(isinstance(value, jax.Array) for value in params.values())
    inner, start = guide.get_transform(params).layers
    assert_array_equal(params["auto_flow.layers[2].loc"], inner.layers[2].loc)
    assert_array_equal(params["auto_start"][:2], start.loc)


def test_parameters_of_another_guide_are_refused():
    """All of a guide's, and in its shapes, or none."""
    guide, _, params = stepped()
    name = "auto_flow.layers[2].loc"
    fewer = {key: value for key, value in params.items() if key != name}
    for wrong, message in [
        ({}, r"`params` has no \['auto_start', "),
        (fewer, rf"`params` has no \['{re.escape(name)}'\]: expected all"),
        ({**params, name: jnp.zeros(3)}, r"loc' of shape \(3,\), but in this guide .* \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            guide.get_transform(wrong)
        with pytest.raises(ValueError, match=message):
            guide.median(wrong)
    with pytest.raises(ValueError, match=r"`params` has no \['auto_flow"):
        SVI(line, guide, ADAM, Trace_ELBO()).init(KEY, Y, init_params=fewer)


def test_a_guide_is_pickled():
    guide, params = exact()
    copied = pickle.loads(pickle.dumps(guide))
    assert_array_equal(copied.median(params)["level"], guide.median(params)["level"])


def test_nuts_in_the_base_space():
    """A bent geometry straightened, by NeuTra."""
    guide, params = exact()
    neutra = NeuTraReparam(guide, params)
    mcmc = MCMC(NUTS(neutra.reparam(line)), num_warmup=50, num_samples=150, progress_bar=False)
    mcmc.run(KEY, Y)
    z = mcmc.get_samples()["auto_shared_latent"]
    assert_allclose(z.mean(0), np.zeros(2), atol=0.4)
    assert_allclose(z.std(0), np.ones(2), rtol=0.4)
    draws = neutra.transform_sample(z)
    assert_allclose(draws["level"].mean(), MEAN[0], atol=0.4 * SCALE[0])


def test_beside_other_guides():
    """One of the host's and another flow, in a list; prefixes keep them apart."""

    def model():
        for name in "abc":
            numpyro.sample(name, dist.Normal(0.0, 1.0))

    guide = AutoGuideList(model)
    guide.append(quick(handlers.block(model, expose=["a"]), prefix="one"))
    guide.append(quick(handlers.block(model, expose=["b"]), prefix="two"))
    guide.append(AutoNormal(handlers.block(model, expose=["c"])))
    svi = SVI(model, guide, ADAM, Trace_ELBO())
    state, loss = jax.jit(svi.update)(jax.jit(svi.init)(KEY))
    assert np.isfinite(loss)
    params = svi.get_params(state)
    rest = {name for name in params if not name.startswith(("one_flow.", "two_flow."))}
    assert rest == {"one_start", "two_start", "c_auto_loc", "c_auto_scale"}
    found = guide.quantiles(params, [0.1, 0.9])
    assert {name: value.shape for name, value in found.items()} == dict.fromkeys("abc", (2,))


def test_a_guide_for_some_sites_starts_where_the_data_are():
    """Also where the model shows it nothing but these sites, and so no data."""
    guide = AutoRealNVP(handlers.block(line, expose=["level"]), **SMALL)
    levels = jax.jit(lambda: guide.quantiles(initial(guide, Y), [0.16, 0.84]))()
    low, high = levels["level"]
    assert high - low < 5.0  # a priori 20


def test_each_start_is_that_of_its_data():
    """Also of a guide that has started with others before, and of one for some sites."""
    for model in (line, handlers.scale(handlers.block(line, expose=["level"]), 1.0)):
        guide = AutoRealNVP(model, **SMALL)
        for shift in (0.0, 100.0):
            params = initial(guide, Y + shift)
            assert_allclose(jax.jit(guide.median)(params)["level"], MEAN[0] + shift, rtol=0.1)


def test_a_start_in_plain_numbers():
    """As the host takes them."""
    init = init_to_value(values={"level": 5.0, "slope": 1.0})
    guide = AutoRealNVP(line, init_loc_fn=init, **SMALL)
    assert_allclose(medians(guide, Y)["level"], MEAN[0], atol=0.2 * SCALE[0])


def test_rounding_errors_are_no_evidence():
    """In single precision they outweigh all else in a beta density of large parameters."""
    counts = jnp.array([3.0, 5.0, 2.0, 6.0, 4.0, 1.0, 5.0, 3.0, 2.0, 4.0, 6.0, 3.0])

    def model():
        mean = numpyro.sample("mean", dist.Beta(1.0, 1.0))
        size = numpyro.sample("size", dist.Pareto(1.0, 1.5))
        with numpyro.plate("groups", len(counts)):
            rate = numpyro.sample("rate", dist.Beta(mean * size, (1 - mean) * size))
            numpyro.sample("y", dist.Binomial(25, rate), obs=counts)

    guide = AutoFlow(model, straight, degrees_of_freedom=None)
    assert medians(guide)["size"] < 1e4


def test_a_model_without_a_finite_density_around_the_origin():
    """The search starts from the medians."""

    def model():
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.1))
        years = 2000.0 * numpyro.sample("slope", dist.Normal(0.0, 1e-3))
        numpyro.sample("y", dist.Poisson(rate * jnp.exp(years)), obs=3)

    guide = AutoRealNVP(model, **SMALL)
    assert abs(medians(guide)["slope"]) < 1e-3
    named = AutoRealNVP(model, init_loc_fn=init_to_value(values={"slope": 1.0}), **SMALL)
    with pytest.raises(RuntimeError, match="Cannot find valid initial parameters"):
        initial(named)


CLUSTERS = np.array([-5.1, -4.9, -5.3, 5.2, 4.8])


def mixture():
    centres = numpyro.sample("centres", dist.Normal(jnp.zeros(2), 10.0).to_event(1))
    with numpyro.plate("rows", len(CLUSTERS)):
        which = numpyro.sample("which", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(centres[which], 1.0), obs=CLUSTERS)


@pytest.mark.parametrize("way", [{"hide": ["which"]}, {"expose": ["centres"]}])
def test_discrete_sites_are_enumerated(way):
    """Hidden from the guide, which starts where both clusters are."""
    init = init_to_value(values={"centres": jnp.array([-1.0, 1.0])})
    guide = AutoRealNVP(handlers.block(mixture, **way), init_loc_fn=init, **SMALL)
    centres = np.sort(medians(guide)["centres"])
    assert_allclose(centres, [-5.1, 5.0], atol=0.5)


@pytest.mark.filterwarnings("ignore:Currently, SVI with Trace_ELBO")  # and so the host warns
def test_fit_guide_refuses_discrete_sites():
    """Which none of the host's bounds sums out for an automatic guide."""
    guide = quick(handlers.block(mixture, hide=["which"]))
    with pytest.raises(ValueError, match=r"does not draw the sites \['which'\]"):
        fit_guide(guide, progress=False)


def test_a_guide_of_a_discrete_site_that_does_not_move():
    """It has no gradient in the site, and ends as it began."""

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=0.3)

    def guide():
        logits = numpyro.param("logits", 0.0)
        numpyro.sample("z", dist.Bernoulli(logits=logits))

    result = fit_guide(
        guide, model, steps=4, schedule=lambda _: 0.0, loss=TraceGraph_ELBO(), progress=False
    )
    assert (result.stopped, result.skipped) == ("steps", 0)


def test_discrete_sites_without_funsor(monkeypatch):
    """The guide starts as the host's would."""
    monkeypatch.setitem(sys.modules, "numpyro.contrib.funsor", None)
    init = init_to_value(values={"centres": jnp.array([-1.0, 1.0])})
    guide = AutoRealNVP(handlers.block(mixture, hide=["which"]), init_loc_fn=init, **SMALL)
    with pytest.warns(UserWarning, match="cannot follow the model"):
        params = initial(guide)
    assert_allclose(guide.median(params)["centres"], [-1.0, 1.0], atol=0.05)


def test_local_sites_are_set_up_outside_of_jit():
    def model():
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 20, subsample_size=5) as rows:
            x = numpyro.sample("x", dist.Normal(mean, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=jnp.arange(20.0)[rows])

    svi = SVI(model, quick(model), ADAM, Trace_ELBO())
    with pytest.raises(ValueError, match="cannot be set up inside of jit"):
        jax.jit(svi.init)(KEY)
    state, loss = jax.jit(svi.update)(svi.init(KEY))
    assert np.isfinite(loss)


def test_set_up_while_it_is_compiled():
    """The guide keeps nothing of a compiled set-up that it needs later."""
    guide = AutoRealNVP(line, **SMALL)
    svi = SVI(line, guide, ADAM, Trace_ELBO())
    state, loss = jax.jit(svi.update)(jax.jit(svi.init)(KEY, Y), Y)
    assert np.isfinite(loss)
    params = svi.get_params(state)
    assert guide.median(params)["trend"].shape == (5,)
    assert guide.get_posterior(params).sample(KEY).shape == (2,)


def test_under_leak_checks():
    """As far as the host's own guides."""
    with jax.checking_leaks():
        guide = quick()
        svi = SVI(line, guide, ADAM, Trace_ELBO())
        state, _ = jax.jit(svi.update)(svi.init(KEY, Y), Y)
        guide.sample_posterior(KEY, svi.get_params(state))


def test_many_starts_at_once():
    """Set-up and steps under vmap."""
    svi = SVI(line, quick(), ADAM, Trace_ELBO())

    @jax.jit
    @jax.vmap
    def trained(key):
        return svi.update(svi.init(key, Y), Y)[1]

    losses = trained(jax.random.split(KEY, 3))
    assert np.isfinite(losses).all()
    assert len(set(losses.tolist())) == 3


@pytest.mark.parametrize(("enabled", "dtype"), [(False, "float32"), (True, "float64")])
def test_the_precision_is_the_models(enabled, dtype):
    def model():
        numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    with jax.enable_x64(enabled):
        guide = quick(model)
        params = compiled(guide)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
        assert guide.sample_posterior(KEY, params)["x"].dtype == dtype


def test_keys():
    """The same first weights where none is given, others for another key."""

    def weights(**options):
        leaves = jax.tree.leaves(compiled(quick(**options), Y, seed=len(options)))
        return np.concatenate([np.ravel(leaf) for leaf in leaves])

    options = {"init_loc_fn": init_to_value(values={"level": 1.0, "slope": 1.0})}
    default = weights(**options)
    assert_array_equal(weights(key=jax.random.key(0), **options), default)
    assert_array_equal(weights(key=jax.random.PRNGKey(0), **options), default)
    assert (weights(key=jax.random.key(1), **options) != default).any()
    for wrong in (3, jnp.zeros(2), jax.random.split(KEY)):
        with pytest.raises(TypeError, match="`key` is "):
            quick(key=wrong)


def matrices(params):
    """Which parameters a user might want to shrink."""
    return {name: value.ndim > 1 for name, value in params.items()}


OPTIMIZERS = {
    "plain": optax.adamw(1e-2, weight_decay=0.0),
    "shrinking": optax.adamw(1e-2, weight_decay=1.0),
    "shrinking matrices": optax.adamw(1e-2, weight_decay=1.0, mask=matrices),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_location_and_scale_are_not_trained(name):
    """The rest of the parameters is. An optimiser that shrinks weights leaves them, too."""
    guide = quick()
    optimizer = numpyro.optim.optax_to_numpyro(OPTIMIZERS[name])
    svi = SVI(line, guide, optimizer, Trace_ELBO())
    state = svi.init(KEY, Y)
    before = guide.get_transform(svi.get_params(state)).layers
    update = jax.jit(svi.update)
    for _ in range(30):
        state, _ = update(state, Y)
    after = guide.get_transform(svi.get_params(state)).layers
    for new, old in zip(*map(jax.tree.leaves, (after[-1], before[-1])), strict=True):
        assert_allclose(new, old, rtol=1e-5, atol=1e-6)
    moved = zip(*map(jax.tree.leaves, (after[0], before[0])), strict=True)
    assert any((new != old).any() for new, old in moved)
