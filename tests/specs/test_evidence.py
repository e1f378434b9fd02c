"""Laws on `fit_guide`: what is learned, and what is left where training goes wrong."""

import numpy as np
import pyro
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from tests.wings.hosts import of_density, small


def bent(xp, x):
    """A banana's log-density, which integrates to one."""
    first = -0.5 * x[..., 0] ** 2
    second = -0.5 * ((x[..., 1] - x[..., 0] ** 2) / 0.3) ** 2 - np.log(0.3)
    return first + second - np.log(2 * np.pi)


def plain(host, model):
    """One of the host's guides, which takes a fraction of the time to compile."""
    start = host.init_to_value(values={"x": host.array(np.zeros(2))})
    return host.guides.AutoDiagonalNormal(model, init_loc_fn=start, init_scale=0.5)


def flow(host, model):
    return small(host, model, layers=4, hidden=(16,))


def fitted(host, model, kind=plain, **options):
    """The guide's result, and its draws with their log-density."""
    guide = kind(host, model)
    options = {"progress": False, "steps": 300, "learning_rate": 3e-2, **options}
    result = host.package.fit_guide(guide, **options)
    return result, host.drawn(guide, result)


def elbo(host, model, **options):
    result, (x, log_q) = fitted(host, model, **options)
    return result, (bent(np, x) - log_q).mean()


def test_it_climbs(host):
    """The evidence is zero; the best Gaussian stays below."""
    result, found = elbo(host, of_density(host, bent, 2), kind=flow)
    assert len(result.losses) == 300
    assert (result.stopped, result.skipped) == ("steps", 0)
    assert -0.4 < found < 0.01
    assert found > -result.losses[:10].mean() + 0.1
    assert abs(result.loss + found) < 0.15


def test_the_best_stretch_is_left(host):
    """Where the end of training is its ruin."""
    calm = lambda step: 1.0 if step < 250 else 100.0  # noqa: E731
    result, found = elbo(host, of_density(host, bent, 2), schedule=calm)
    assert found > -1.2
    assert not -np.mean(result.losses[-10:]) > found - 0.4


def test_the_best_rate_is_left(host):
    """Each run starts where the guide does."""
    model = of_density(host, bent, 2)
    result, found = elbo(host, model, learning_rate=[30.0, 3e-2, 1e-6], steps=100)
    pyro.clear_param_store()
    alone, same = elbo(host, model, learning_rate=3e-2, steps=100)
    assert result.learning_rate == 3e-2
    assert_array_equal(result.losses, alone.losses)
    assert found == same


def test_a_rate_that_diverges_is_passed_over(host):
    """Also where the host's validation refuses what the guide has become."""

    def model():
        x = host.sample("x", host.dist.Normal(host.array(np.zeros(2)), 1.0).to_event(1))
        scale = host.np.exp(x[..., 0])
        host.sample("y", host.dist.Normal(x[..., 1] / scale, scale), obs=host.array(0.5))

    with host.validation():
        result, _ = fitted(host, model, learning_rate=[1e-2, 1e4], steps=50)
    assert result.learning_rate == 1e-2
    assert np.isfinite(result.losses).all()


def test_steps_without_a_finite_loss_are_skipped(host):
    """As many draws as have no density."""

    def torn(xp, x):
        return xp.where(xp.sin(1e3 * x[..., 0]) > 0.9995, -np.inf, bent(xp, x))

    result, (x, _) = fitted(host, of_density(host, torn, 2))
    assert 0 < result.skipped < 150
    assert np.isfinite(x).all()


def test_nothing_is_learned_where_nothing_is_finite(host):
    """The guide stays where it started."""
    model = of_density(host, bent, 2)
    hopeless = of_density(host, lambda xp, x: -np.inf * xp.exp(x[..., 0]), 2)
    guide = plain(host, model)
    with pytest.warns(UserWarning, match="training stopped after .* are what they were"):
        result = host.package.fit_guide(guide, hopeless, progress=False, steps=100)
    assert result.stopped == "not finite"
    assert len(result.losses) == result.skipped < 100
    assert result.loss == np.inf
    x, _ = host.drawn(guide, result)
    assert abs(x.mean(0)).max() < 0.1
    assert abs(x.std(0) - 0.5).max() < 0.1


@pytest.mark.parametrize("kind", [plain, lambda *args: small(*args, init="location")])
def test_nothing_is_learned_without_a_gradient(host, kind):
    """The loss is finite at every draw, and its gradient at none."""

    def torn(xp, x):
        below = xp.where(x[..., 0] > np.inf, xp.sqrt(-xp.exp(x[..., 0])), 0.0)
        return bent(xp, x) + below

    guide = kind(host, of_density(host, bent, 2))
    model = of_density(host, torn, 2)
    with pytest.warns(UserWarning, match="gradient .* although .* are what they were"):
        result = host.package.fit_guide(guide, model, progress=False, steps=100)
    assert result.stopped == "not finite"
    assert len(result.losses) == result.skipped < 100


def test_missing_data_that_a_mask_leaves_out(host):
    """They may have any value, or none: the others count."""
    kept = np.array([True, True, False, True])
    y = np.array([3.0, 2.0, np.nan, 4.0])

    def model():
        m = host.sample("x", host.dist.Normal(host.array(np.zeros(2)), 2.0).to_event(1))[..., 0]
        normal = host.dist.Normal(m[..., None], host.array(np.ones(4)))
        host.sample("y", normal.mask(host.bools(kept)).to_event(1), obs=host.array(y))
        with host.plate("people", 4), host.mask(mask=host.bools(kept)):
            positive = np.where(kept, np.exp(y), -999.0)
            host.sample("z", host.dist.LogNormal(m, 1.0), obs=host.array(positive))

    with host.validation():
        _, (x, _) = fitted(host, model, learning_rate=0.1)
    precision = 1 / 4 + 6
    assert_allclose(x[:, 0].mean(), 18 / precision, atol=0.1 * precision**-0.5)
    assert_allclose(x[:, 0].std(), precision**-0.5, rtol=0.1)


def test_equal_seeds_give_equal_numbers(host):
    model = of_density(host, bent, 2)
    first, second = (fitted(host, model, steps=20)[0] for _ in range(2) if not host.clear())
    assert_array_equal(first.losses, second.losses)


def test_the_global_random_numbers_are_not_touched(host):
    """Those of torch and NumPy; JAX has none."""
    before = torch.random.get_rng_state(), np.random.get_state()
    fitted(host, of_density(host, bent, 2), steps=2)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    for now, then in zip(np.random.get_state(), before[1], strict=True):
        assert_array_equal(now, then)


def test_learning_rates_of_any_kind_of_number(host):
    guide = plain(host, of_density(host, bent, 2))
    for rate in (np.float32(1e-2), 1, np.array([1e-3, 1e-2], "float32")):
        result = host.package.fit_guide(guide, steps=10, progress=False, learning_rate=rate)
        assert result.learning_rate in np.atleast_1d(rate)


def test_a_model_that_is_given_is_taken_as_it_is(host):
    """What it hides is hidden from the guide; that of the guide is looked through."""

    def model():
        host.sample("x", host.dist.Normal(host.array(np.zeros(2)), 1.0).to_event(1))
        host.sample("y", host.dist.Normal(host.array(0.0), 1.0), obs=host.array(30.0))

    prior = host.block(model, hide=["y"])
    for options, evidence in [({"model": prior}, 0.0), ({}, -450.9)]:
        host.clear()
        guide = plain(host, prior)
        result = host.package.fit_guide(guide, steps=10, progress=False, **options)
        assert abs(result.loss + evidence) < 1.0


BAD = [
    ({"steps": 0}, "`steps` is 0"),
    ({"learning_rate": []}, "`learning_rate` is empty"),
    ({"learning_rate": "fast"}, "`learning_rate` is 'fast'"),
    ({"learning_rate": None}, "`learning_rate` is None"),
    ({"learning_rate": [1e-3, -1.0]}, "`learning_rate` is -1.0"),
    ({"schedule": "linear"}, "`schedule` is 'linear'"),
    ({"schedule": lambda step: None}, "`schedule` gives None at step 0"),
    ({"args": "data"}, "`args` is a str"),
    ({"kwargs": (1, 2)}, "`kwargs` is a tuple"),
    ({"loss": "elbo"}, "`loss` is 'elbo'"),
    ({"model": 3}, "`model` is a int"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_name_themselves(host, options, message):
    guide = small(host, of_density(host, bent, 2))
    with pytest.raises((ValueError, TypeError), match=message):
        host.package.fit_guide(guide, **{"progress": False, **options})


def test_what_is_no_guide(host):
    for guide, message in [(None, "`guide` is a NoneType"), (dict, "`guide` is the class dict")]:
        with pytest.raises(TypeError, match=message):
            host.package.fit_guide(guide, progress=False)


def test_a_guide_without_a_model(host):
    with pytest.raises(ValueError, match="`model` is missing"):
        host.package.fit_guide(lambda: None, progress=False)
