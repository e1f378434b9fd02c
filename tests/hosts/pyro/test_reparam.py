"""Pyro's own reparametrisations, as `to_arviz` sees them."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, AutoStructured
from pyro.infer.reparam import (
    ConjugateReparam,
    DiscreteCosineReparam,
    GumbelSoftmaxReparam,
    LatentStableReparam,
    NeuTraReparam,
    ProjectedNormalReparam,
    SplitReparam,
    StructuredReparam,
    StudentTReparam,
    SymmetricStableReparam,
)
from scipy import stats

from pyroflows import AutoRealNVP, to_arviz
from tests.wings.conjugate import only

Y = torch.tensor([0.3, -0.8, 1.2])
ONES, ZEROS = torch.ones(3), torch.zeros(3)


def seen(density):
    """A vector seen through noise."""

    def model(y):
        x = pyro.sample("x", density)
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    return model


NORMAL = seen(dist.Normal(ZEROS, ONES).to_event(1))
RELAXED = dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=ZEROS)


def neutra():
    guide = AutoRealNVP(NORMAL, layers=2, hidden=(4,), init="location")
    guide(Y)
    return NeuTraReparam(guide)


def structured():
    guide = AutoStructured(NORMAL, conditionals={"x": "mvn"})
    guide(Y)
    return StructuredReparam(guide)


# A model, a reparametrisation of x and the sites that it adds.
LATENT = {
    "split": (NORMAL, lambda: SplitReparam([1, 2], -1), ["x_split_0", "x_split_1"]),
    "neutra": (NORMAL, neutra, ["x_shared_latent"]),
    "structured": (NORMAL, structured, ["x_aux"]),
    "student": (seen(dist.StudentT(4.0, ZEROS).to_event(1)), StudentTReparam, ["x_gamma"]),
    "symmetric": (
        seen(dist.Stable(1.5 * ONES, ZEROS).to_event(1)),
        SymmetricStableReparam,
        ["x_uniform", "x_exponential"],
    ),
    "stable": (
        seen(dist.Stable(1.5 * ONES, 0.5 * ONES).to_event(1)),
        LatentStableReparam,
        ["x_uniform", "x_exponential"],
    ),
    "projected": (seen(dist.ProjectedNormal(ONES)), ProjectedNormalReparam, ["x_normal"]),
    "relaxed": (seen(RELAXED), GumbelSoftmaxReparam, ["x_uniform"]),
}


def groups(data):
    return [
        set(data[g].data_vars) for g in ("log_likelihood", "observed_data", "posterior_predictive")
    ]


@pytest.mark.filterwarnings("ignore:At pyro.sample.*does not commute with init:RuntimeWarning")
@pytest.mark.parametrize("name", LATENT)
def test_latent_sites(name):
    """They are of the posterior, with the auxiliary sites, and the observations are as without."""
    model, make, sites = LATENT[name]
    model = poutine.reparam(model, {"x": make()})
    guide = AutoNormal(model, init_scale=0.5)
    guide(Y)
    data = to_arviz(guide, args=(Y,), draws=30, posterior_predictive=True)
    assert set(data["posterior"].data_vars) == {"x", *sites}
    assert groups(data) == [{"y"}] * 3
    x = only(data, "posterior", "x")
    assert x.std(0).min() > 0.01
    expected = stats.norm.logpdf(Y, x, 1.0)
    assert_allclose(only(data, "log_likelihood", "y"), expected, rtol=1e-4, atol=1e-5)


def test_a_conjugate_site():
    """It is drawn anew from its posterior, and the weights are those of the evidence."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        rate = pyro.sample("rate", dist.Beta(1.0, 2.0))
        pyro.sample("count", dist.Binomial(20, rate), obs=torch.tensor(4.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    model = poutine.reparam(model, {"rate": ConjugateReparam(dist.Beta(5.0, 17.0))})
    mean = float(Y.sum() / 4)

    def guide(y):
        pyro.sample("mean", dist.Normal(mean, 0.5))

    data = to_arviz(guide, model, args=(Y,), draws=1000, posterior_predictive=True)
    rate = only(data, "posterior", "rate")
    exact = stats.beta(5.0, 18.0)
    assert_allclose([rate.mean(), rate.std()], [exact.mean(), exact.std()], rtol=0.1)
    evidence = stats.multivariate_normal.logpdf(Y, cov=np.eye(3) + 1.0)
    evidence += stats.betabinom.logpmf(4, 20, 1.0, 2.0)
    ratio = only(data, "sample_stats", "log_importance_ratio")
    assert_allclose(ratio, evidence, rtol=1e-4)
    count = only(data, "posterior_predictive", "count")
    error = (count - 20 * rate) / np.sqrt(20 * rate * (1 - rate))
    assert_allclose([error.mean(), error.std()], [0.0, 1.0], atol=0.1)


@pytest.mark.parametrize(
    ("reparam", "name", "sites"),
    [(StudentTReparam(), "y", {"x", "y_gamma"}), (DiscreteCosineReparam(), "y_dct", {"x"})],
)
def test_observations(reparam, name, sites):
    """A reparametrised observation is no latent site: at its own site or at the auxiliary one."""

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.StudentT(4.0, x * ONES, 1.0).to_event(1), obs=y)

    model = poutine.reparam(model, {"y": reparam})
    guide = AutoNormal(model, init_scale=0.5)
    guide(Y)
    data = to_arviz(guide, args=(Y,), draws=30, posterior_predictive=True)
    assert set(data["posterior"].data_vars) == sites
    assert groups(data) == [{name}] * 3
    assert len(np.unique(only(data, "posterior_predictive", name)[:, 0])) == 30


def test_a_deterministic_site_of_the_observations():
    """In simulations it follows the simulated ones."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        first = pyro.sample("first", dist.Normal(mean, 0.1), obs=y[0])
        second = pyro.deterministic("second", 2.0 * first)
        pyro.sample("third", dist.Normal(second, 0.1), obs=y[1])

    args = (torch.tensor([5.0, 10.0]),)
    options = {"args": args, "draws": 400, "posterior_predictive": True}
    data = to_arviz(dist.Normal(torch.tensor(0.0), 1e-3), model, **options)
    first, third = (only(data, "posterior_predictive", name) for name in ("first", "third"))
    assert_allclose([first.mean(), first.std()], [0.0, 0.1], atol=0.02)
    assert_allclose((third - 2.0 * first).std(), 0.1, atol=0.02)
    assert_array_equal(only(data, "posterior", "second"), 10.0)
