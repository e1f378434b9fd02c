"""Guides inside Pyro's inference."""

import contextlib
import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceMeanField_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule, PyroSample
from scipy import stats
from torch.testing import assert_close

from pyroflows import AutoFlow, AutoRealNVP, fit_guide, fit_mixture
from tests.hosts.pyro.line import (
    COVARIANCE,
    DATA,
    DESIGN,
    EVIDENCE,
    MEAN,
    NOISE,
    SCALE,
    exact,
    learn,
    line,
    small,
    straight,
)

LOSSES = {
    "trace": Trace_ELBO(),
    "particles": Trace_ELBO(num_particles=3),
    "vectorised": Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "mean field": TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    "graph": TraceGraph_ELBO(),
    "enumeration": TraceEnum_ELBO(num_particles=3, vectorize_particles=True),
    "renyi": RenyiELBO(0.0, num_particles=3),
    "renyi, vectorised": RenyiELBO(0.5, num_particles=3, vectorize_particles=True),
    "compiled": JitTrace_ELBO(ignore_jit_warnings=True),
    "compiled, mean field": JitTraceMeanField_ELBO(ignore_jit_warnings=True),
    "compiled, enumeration": JitTraceEnum_ELBO(
        num_particles=3, vectorize_particles=True, ignore_jit_warnings=True
    ),
}


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
@pytest.mark.parametrize("name", LOSSES)
def test_every_bound_is_the_evidence_at_the_posterior(name):
    """Without noise, for any number of particles."""
    loss = copy.deepcopy(LOSSES[name])
    assert_allclose(learn(exact(), steps=1, loss=loss), [-EVIDENCE], rtol=1e-6)


def test_learning_from_the_models_own_draws():
    """Without a path from the parameters to the draws, the gradient is that of the density."""
    guide = small(degrees_of_freedom=None)
    guide()
    before = copy.deepcopy(guide.state_dict())
    learn(guide, loss=ReweightedWakeSleep(num_particles=3))
    assert any((value != before[name]).any() for name, value in guide.state_dict().items())


def test_the_density_outside_of_inference():
    """All of its gradient is there."""
    guide = small()
    guide()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    density = guide.get_posterior().log_prob(x).sum()
    gradients = torch.autograd.grad(density, list(guide.parameters()), materialize_grads=True)
    assert all(gradient.abs().max() > 0 for gradient in gradients[-2:])


def test_settings_of_the_hosts_are_left():
    """Validation, switched off in one of them."""
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        small()()
        assert pyro.distributions.util.is_validation_enabled()
        assert not torch.distributions.Distribution._validate_args
    finally:
        torch.distributions.Distribution.set_default_validate_args(True)


def test_predictive():
    """By the guide, and at its draws."""
    guide = exact()
    draws = Predictive(guide, num_samples=500)()
    assert_allclose(draws["level"].mean(), MEAN[0], atol=0.2 * SCALE[0])
    assert_allclose(draws["slope"].std(), SCALE[1], rtol=0.2)
    for parallel in (False, True):
        predict = Predictive(line, guide=guide, num_samples=300, parallel=parallel)
        predicted = predict(None)["y"]
        assert predicted.shape == (300, 5)
        assert_allclose(predicted.mean(0), DESIGN @ MEAN, atol=0.3)


def test_the_posterior_and_its_parts():
    """Host's names for the density of the latent numbers, the base and the map between them."""
    guide = exact()
    posterior = guide.get_posterior()
    x = posterior.sample((3,))
    expected = stats.multivariate_normal.logpdf(x.numpy(), MEAN, COVARIANCE)
    assert_allclose(posterior.log_prob(x).detach(), expected, rtol=1e-6)
    z = guide.get_transform().inv(x)
    assert_close(guide.get_base_dist().log_prob(z), dist.Normal(0.0, 1.0).log_prob(z).sum(-1))


def test_optimisers_of_torch():
    """The guide's parameters are those of the bound as a module."""
    guide = small()
    guide()
    bound = Trace_ELBO()(line, guide)
    optimizer = torch.optim.Adam(bound.parameters(), lr=1e-2)
    before = copy.deepcopy(guide.state_dict())
    bound().backward()
    optimizer.step()
    changed = {name for name, value in guide.state_dict().items() if (value != before[name]).any()}
    assert changed == {name for name, _ in guide.named_parameters()}


def test_nuts_in_the_base_space():
    """A bent geometry straightened, by NeuTra."""
    neutra = NeuTraReparam(exact().requires_grad_(False))
    model = poutine.reparam(line, config=lambda _: neutra)
    mcmc = MCMC(NUTS(model), num_samples=100, warmup_steps=30, disable_progbar=True)
    mcmc.run()
    (z,) = mcmc.get_samples().values()
    assert_allclose(z.mean(0), np.zeros(2), atol=0.4)
    assert_allclose(z.std(0), np.ones(2), rtol=0.4)
    draws = neutra.transform_sample(z)
    assert_allclose(draws["level"].mean(), MEAN[0], atol=0.4 * SCALE[0])


def test_beside_other_guides():
    """One of the host's and another flow, in a list; their names keep them apart."""

    def model():
        for name in "abc":
            pyro.sample(name, dist.Normal(0.0, 1.0))

    guide = AutoGuideList(model)
    guide.append(small(poutine.block(model, expose=["a"])))
    guide.append(small(poutine.block(model, expose=["b"])))
    guide.append(AutoNormal(poutine.block(model, expose=["c"])))
    assert np.isfinite(learn(guide, model)).all()
    assert guide.median().keys() == {*"abc"}
    assert guide.quantiles([0.1, 0.9])["a"].shape == (2,)
    stored = {name.split(".")[1] for name in pyro.get_param_store()}
    assert stored == {"0", "1", "2"}


@pytest.mark.parametrize("way", [{"hide": ["slope"]}, {"expose": ["level"]}])
@pytest.mark.parametrize("outer", [lambda model: model, poutine.scale(scale=1.0)])
def test_a_guide_for_some_sites_starts_where_the_data_are(way, outer):
    """Also where the model shows it nothing but these sites, and so no data."""
    guide = small(outer(poutine.block(line, **way)))
    guide()
    low, high = guide.quantiles([0.16, 0.84])["level"]
    assert high - low < 5.0  # a priori 20


CLUSTERS = torch.tensor([-5.1, -4.9, -5.3, 5.2, 4.8], dtype=torch.float64)


def mixture(y=CLUSTERS):
    zeros = torch.zeros(2, dtype=torch.float64)
    centres = pyro.sample("centres", dist.Normal(zeros, 10.0).to_event(1))
    with pyro.plate("rows", len(y)):
        which = pyro.sample("which", dist.Categorical(torch.ones_like(zeros)))
        loc = torch.where(which == 0, centres[..., 0], centres[..., 1])
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


# The centres may change places.
exchangeable = pytest.mark.filterwarnings("ignore:the search for a start found 2 separate modes")


@exchangeable
@pytest.mark.parametrize("way", [{"hide": ["which"]}, {"expose": ["centres"]}])
def test_discrete_sites_are_enumerated(way):
    """Hidden from the guide, which starts no worse than the host's."""
    values = {"centres": torch.tensor([-1.0, 1.0], dtype=torch.float64)}
    options, marked = {"init_loc_fn": init_to_value(values=values)}, config_enumerate(mixture)
    loss = TraceEnum_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    ours, theirs = (
        learn(make(poutine.block(marked, **way), **options), marked, steps=1, loss=loss)
        for make in (small, AutoNormal)
    )
    assert ours[0] < theirs[0] + 1.0


@exchangeable
def test_fit_guide_sums_discrete_sites_out():
    """Of a model that is not marked for it."""
    values = {"centres": torch.tensor([-1.0, 1.0], dtype=torch.float64)}
    guide = small(poutine.block(mixture, hide=["which"]), init_loc_fn=init_to_value(values=values))
    result = fit_guide(guide, steps=100, progress=False)
    assert_allclose(sorted(guide.median()["centres"]), [-5.1, 5.0], atol=0.3)
    # The clusters are far apart: the evidence around one of the two modes.
    clusters = CLUSTERS[CLUSTERS < 0], CLUSTERS[CLUSTERS > 0]
    evidence = sum(
        stats.multivariate_normal.logpdf(y, cov=np.eye(len(y)) + 100.0) for y in clusters
    )
    assert_allclose(result.loss, -evidence + 5 * np.log(2.0), atol=0.1)


def careless(rows=5):
    """A model written for one particle: several are broadcast against the data."""
    line = pyro.sample("line", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    design = torch.as_tensor(DESIGN, dtype=torch.float32)
    with pyro.plate("times", rows):
        pyro.sample("y", dist.Normal(line @ design.T, NOISE), obs=DATA.float())


def mixing():
    """Another, that takes its mean over all particles: of equal ones it would be right."""
    with pyro.plate("five", 5):
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.sample("y", dist.Normal(z - z.mean(), 0.5), obs=DATA.float())


def strict():
    """Another, that refuses several."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("y", -10 * (x[0] - x[1].item()) ** 2)


@pytest.mark.parametrize(("model", "message"), [
    (careless, "site 'y' has the log-density"),
    (mixing, "site 'y' has the log-density"),
    (strict, "with several it raises"),
])  # fmt: skip
@pytest.mark.filterwarnings("default:the model takes one point")
def test_fit_guide_takes_models_that_cannot_be_batched(model, message):
    """One particle at a time, and says so."""
    guide = small(model)
    with pytest.warns(UserWarning, match=f"takes one particle at a time.*{message}"):
        result = fit_guide(guide, steps=10, progress=False)
    if model is careless:
        assert_allclose(result.loss, -EVIDENCE, atol=0.5)


@pytest.mark.parametrize("name", ["which", "spread"])
def test_fit_guide_refuses_sites_that_nobody_draws(name):
    """And that cannot be summed out: the bound would not be one."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("spread", dist.Normal(x.sum(-1), 1.0))
        pyro.sample("which", dist.Poisson(1.0))

    guide = small(poutine.block(model, expose=["x", *{"which", "spread"} - {name, "which"}]))
    with pytest.raises(ValueError, match=f"does not draw the sites .*'{name}'.* cannot be summed"):
        fit_guide(guide, steps=10, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_precision_is_the_models(dtype):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1))

    guide = small(model)
    assert guide()["x"].dtype == dtype
    assert {tensor.dtype for tensor in guide.parameters()} == {dtype}
    assert guide.median()["x"].dtype == guide.quantiles([0.5])["x"].dtype == dtype
    assert guide.double()()["x"].dtype == torch.float64


def test_a_model_that_takes_one_point_at_a_time():
    """The search does without batches where the model branches on its values."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = x[0] if x[0] > -1000 else -x[0]
        pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.tensor(2.0))

    guide = AutoFlow(model, straight)
    with pytest.warns(UserWarning, match="takes one point at a time.* RuntimeError"):
        guide()
    assert_allclose(guide.median()["x"], [1.6, 0.0], atol=0.05)


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_raises_errors_at_some_points(whole):
    """Its density there is none."""
    y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def model():
        scales = torch.tensor([0.05, 3.0], dtype=torch.float64)
        x = pyro.sample("x", dist.Normal(torch.zeros_like(scales), scales).to_event(1))
        if not whole and x[0] > 1000:
            raise ArithmeticError
        covariance = torch.eye(3, dtype=x.dtype) + x[0] * (torch.ones(3, 3) - torch.eye(3))
        root = torch.linalg.cholesky(covariance)  # of correlations above 1, there is none
        pyro.sample("y", dist.MultivariateNormal(x[1] + 0 * y, scale_tril=root), obs=y)

    guide = AutoFlow(model, straight, init_loc_fn=init_to_value(values={"x": 0.1 * y[:2]}))
    with contextlib.nullcontext() if whole else pytest.warns(UserWarning, match="one point"):
        guide()
    low, median, high = guide.quantiles([0.1, 0.5, 0.9])["x"]
    assert_allclose(median, [0.0, 1.9], atol=0.1)
    assert_allclose(high - low, 2 * 1.28 * np.array([0.05, 0.58]), rtol=0.2)


@pytest.mark.parametrize("first", ["evaluate", "predict"])
def test_set_up_without_gradients(first):
    """The first call may come where torch computes none."""
    guide = small()
    if first == "evaluate":
        SVI(line, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).evaluate_loss()
    else:
        Predictive(line, guide=guide, num_samples=2)()
    assert_allclose(guide.median()["level"], MEAN[0], atol=0.2 * SCALE[0])
    assert np.isfinite(learn(guide)).all()


def test_a_bayesian_module():
    """Priors on weights, by the host's own means; the guide takes the model's arguments."""

    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](2, 1, bias=False)
            prior = dist.Normal(0.0, torch.ones(1, 2)).to_event(2)
            self.linear.weight = PyroSample(prior)

        def forward(self, x, y=None):
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("rows", len(x)):
                return pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    x = torch.randn(50, 2)
    y, model = x @ torch.tensor([1.0, -2.0]), Regression()
    guide = small(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert np.isfinite([svi.step(x, y), svi.step(x[:20], y[:20])]).all()
    assert_allclose(guide.median(x)["linear.weight"], [[1.0, -2.0]], atol=0.1)


def test_the_search_sees_one_subsample():
    """Another one each time would be another posterior each time: two starts are the same."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        with pyro.plate("rows", 100, subsample_size=10) as index:
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=rows[index])

    rows = 5.0 + torch.randn(100, 2)
    for seed in range(5):
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        guide = AutoFlow(model, straight)
        guide()
        scale = guide.get_transform().layers[-1].log_scale.exp()
        assert_allclose(scale, 0.1 * np.ones(2), rtol=0.1)


def test_location_and_scale_are_not_trained():
    """Nor are they among what the host stores."""
    guide = small()
    guide()
    preconditioner = guide.get_transform().layers[-1]
    before = copy.deepcopy(preconditioner.state_dict())
    learn(guide)
    assert_close(dict(preconditioner.state_dict()), dict(before))
    assert not list(preconditioner.parameters())


def test_a_start_of_ones_own():
    """The strategy is the host's; without a search it is where the guide starts."""
    values = {"level": DATA.mean(), "slope": torch.ones_like(DATA[0])}
    guide = AutoFlow(
        line, straight, init="location", init_loc_fn=init_to_value(values=values), init_scale=1e-6
    )
    assert_close(guide(), values, atol=1e-4, rtol=0.0)


class Untold(dist.Normal):
    """A distribution that does not tell its support."""

    @property
    def support(self):
        raise NotImplementedError


def test_data_under_a_mask_may_be_of_any_kind():
    """What is masked counts for nothing, valid or not; validation sees no harm in it."""
    kept = torch.tensor([True, True, False])
    rows = {
        "one_hot": (dist.OneHotCategorical, torch.eye(3)),
        "category": (dist.Categorical, torch.tensor([0, 1, -1])),
    }

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", 3), poutine.mask(mask=kept):
            for name, (kind, y) in rows.items():
                pyro.sample(name, kind(logits=x), obs=y)
            rate = x[..., 0].exp()
            pyro.sample("count", dist.Poisson(rate), obs=torch.tensor([1.0, 2.0, float("nan")]))
            pyro.sample("untold", Untold(x[..., 0], 1.0, validate_args=False), obs=torch.ones(3))

    guide = AutoNormal(model)
    with pyro.validation_enabled(True):
        result = fit_guide(guide, steps=50, learning_rate=1e-2, progress=False)
    assert (result.skipped, result.stopped) == (0, "steps")
    assert np.isfinite(result.losses).all()


def rows(y, order=None):
    """Ten groups, in the order that is given."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 10, subsample=order) as index:
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(x, 0.1), obs=y[index])


def test_features_follow_the_indices_of_the_plate():
    y, order = torch.arange(10.0), torch.randperm(10)
    seen = []

    def network(features):
        seen.append(features[:, 0].clone())
        return features

    guide = AutoRealNVP(
        rows, layers=2, hidden=(4,), local="rows", encoder=network, features=y[:, None]
    )
    guide(y)
    seen.clear()
    guide(y, order)
    assert all(torch.equal(one, y[order]) for one in seen)
    as_function = {"encoder": network, "features": lambda y, order=None: y[:, None]}
    guide = AutoRealNVP(rows, layers=2, hidden=(4,), local="rows", name="other", **as_function)
    guide(y)
    with pytest.raises(ValueError, match="takes all rows in another order"):
        guide(y, order)


def test_a_refused_mixture_leaves_a_guide_of_rows_as_it_was():
    guide = AutoRealNVP(rows, layers=2, hidden=(4,), local="rows")
    with pytest.raises(ValueError, match="modes are not told apart"):
        fit_mixture(guide, args=(torch.arange(10.0),), progress=False)
    assert guide.prototype_trace is None
