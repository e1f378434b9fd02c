"""Laws of guides that are trained on draws and the slopes of the model there."""

import importlib

import numpy as np
import pytest
from numpy.testing import assert_allclose

from pyroflows_common.draws import held_out
from tests.wings.hosts import of_density, small

MEAN = np.array([1.0, -2.0, 0.5])
FACTOR = np.array([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-2.0, 1.0, 3.0]])
PRECISION = np.linalg.inv(FACTOR @ FACTOR.T)


def normal(host):
    """The model whose posterior is a correlated normal distribution."""

    def log_density(np, x):
        away = x - host.array(MEAN)
        return -0.5 * ((away @ host.array(PRECISION)) * away).sum(-1)

    return of_density(host, log_density)


def straight(host, model):
    return host.package.AutoFlow(model, host.straight, degrees_of_freedom=None)


def learned(host, guide, draws, **options):
    options = {"slopes": True, "steps": 1, "learning_rate": 1e-9, "progress": False, **options}
    return host.package.fit_guide(guide, draws=draws, **options)


def exact(count, seed=0):
    """Draws whose mean and covariance are those of the posterior to the last digit."""
    z = np.random.default_rng(seed).standard_normal((count, 3))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / count)).T
    return z @ FACTOR.T + MEAN


def test_no_loss_of_a_guide_that_is_exact(host):
    result = learned(host, straight(host, normal(host)), {"x": exact(100)})
    assert result.loss < 1e-9
    assert result.losses[0] < 1e-9
    assert result.gradients == 100


def test_the_loss_of_a_normal_guide(host):
    """Of other moments: ½‖Lᵀs + L⁻¹(x − m)‖² for the root L of the guide's covariance."""
    x = 0.7 * exact(100) + np.random.default_rng(1).standard_normal((100, 3))
    result = learned(host, straight(host, normal(host)), {"x": x})
    root = np.linalg.cholesky(np.cov(x.T, ddof=0))
    z = np.linalg.solve(root, (x - x.mean(0)).T).T
    losses = 0.5 * ((-(x - MEAN) @ PRECISION @ root + z) ** 2).sum(1)
    assert result.loss == pytest.approx(losses[held_out(100)].mean(), rel=1e-5)


def test_the_loss_of_a_curved_flow(wing):
    """Half the square of the slopes by differences, through the forward map alone."""
    draws = importlib.import_module(f"{wing.package.__name__}.guides.draws")
    flow = wing.cast(wing.new("realnvp", 3, layers=2, hidden=(4,)), "float64")
    rng = np.random.default_rng(0)
    state = {n: np.asarray(a) for n, a in wing.state(flow).items()}
    state = {
        n: a + 0.3 * rng.standard_normal(a.shape) if a.dtype.kind == "f" else a
        for n, a in state.items()
    }
    flow = wing.load(flow, state) or flow
    base = wing.normal_base((3,), 0.0, 1.0)
    z, slopes = rng.standard_normal((2, 5, 3))
    x, _ = wing.forward(flow, z)

    def ratio(z):
        x, ladj = wing.forward(flow, z)
        return (slopes * x).sum(1) + ladj + 0.5 * (z**2).sum(1)

    step = 1e-5 * np.eye(3)
    left = np.stack([(ratio(z + h) - ratio(z - h)) / 2e-5 for h in step], 1)
    rows = np.concatenate([x, slopes], 1)
    _, found = wing.inverse(draws.Sloped(flow, base), rows)
    assert_allclose(-found, 0.5 * (left**2).sum(1), rtol=1e-5)


def test_slopes_need_fewer_draws_than_the_likelihood(host):
    """Twice as many as coordinates tell the covariance of a normal distribution."""
    size = 5
    rng = np.random.default_rng(2)
    factor = np.tril(rng.standard_normal((size, size))) + 2 * np.eye(size)
    precision = np.linalg.inv(factor @ factor.T)

    def log_density(np, x):
        return -0.5 * ((x @ host.array(precision)) * x).sum(-1)

    model = of_density(host, log_density, size)
    draws = {"x": rng.standard_normal((2 * size, size)) @ factor.T}
    errors = []
    for slopes in (False, True):
        host.clear()
        options = {"slopes": slopes, "steps": 300, "learning_rate": 3e-2}
        guide = straight(host, model)
        x, _ = host.drawn(guide, learned(host, guide, draws, **options))
        shares = np.linalg.eigvals(precision @ np.cov(x.T)).real
        errors.append(abs(np.log(shares)).max())
    assert errors[1] < 0.35
    assert errors[0] > 1.0


def test_slopes_of_bounded_sites(host):
    """The log-density is that of the unconstrained coordinates, with their Jacobian."""

    def model():
        host.sample("scale", host.dist.LogNormal(host.array(1.0), host.array(2.0)))
        host.sample("other", host.dist.Normal(host.array(0.0), host.array(1.0)))

    z = np.random.default_rng(3).standard_normal((100, 2))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / 100)).T
    draws = {"scale": np.exp(1.0 + 2.0 * z[:, 0]), "other": z[:, 1]}
    assert learned(host, straight(host, model), draws).loss < 1e-9


def test_draws_without_a_slope_are_left_out(host):
    def log_density(np, x):
        return -0.5 * (x**2).sum(-1) + 0.0 * np.sqrt(x[..., 0])

    x = abs(np.random.default_rng(4).standard_normal((100, 3)))
    x[:3, 0] *= -1.0
    guide = straight(host, of_density(host, log_density))
    with pytest.warns(UserWarning, match="no finite slope at 3 of 100 draws"):
        learned(host, guide, {"x": x})
    x[5:, 0] = -abs(x[5:, 0])
    host.clear()
    guide = straight(host, of_density(host, log_density))
    with pytest.raises(ValueError, match="2 of 100 rows with a finite slope"):
        learned(host, guide, {"x": x})


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"draws": None}, ValueError, "there are no `draws`"),
        ({"slopes": 1}, TypeError, "`slopes` is a int"),
    ],
)
def test_bad_arguments(host, options, kind, match):
    given = {"draws": {"x": exact(20)}, **options}
    with pytest.raises(kind, match=match):
        learned(host, small(host, normal(host)), given.pop("draws"), **given)
