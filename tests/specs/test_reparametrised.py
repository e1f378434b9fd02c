"""Laws on deterministic and reparametrised sites: each of ArviZ's groups has its own."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from tests.wings.conjugate import normal, only

# A vector seen through noise: posterior and evidence are known.
LOC, SCALE, NOISE = np.array([1.0, -2.0, 0.5, 3.0]), 0.7, 0.4
Y = np.array([1.4, -1.1, 0.2, 2.0])
DEVIATION = (SCALE**-2 + NOISE**-2) ** -0.5
MEAN = DEVIATION**2 * (LOC / SCALE**2 + Y / NOISE**2)
EVIDENCE = stats.norm.logpdf(Y, LOC, np.hypot(SCALE, NOISE)).sum()


def event(host):
    return host.sample("x", normal(host, LOC, SCALE * np.ones(4)).to_event(1))


def plated(host):
    with host.plate("rows", 4):
        return host.sample("x", normal(host, LOC, SCALE * np.ones(4)))


def transformed(host):
    affine = host.dist.transforms.AffineTransform(host.array(LOC), host.array(SCALE))
    standard = normal(host, np.zeros(4), np.ones(4))
    with host.plate("rows", 4):
        return host.sample("x", host.dist.TransformedDistribution(standard, [affine]))


def by_hand(host):
    with host.plate("rows", 4):
        z = host.sample("z", normal(host, np.zeros(4), np.ones(4)))
        return host.deterministic("x", host.array(LOC) + SCALE * z)


def decentred(centred=0.0):
    """The exact posterior of the auxiliary site of a `LocScaleReparam`."""
    factor = SCALE ** (centred - 1.0)
    return {"x_decentered": (factor * (MEAN - LOC) + centred * LOC, factor * DEVIATION)}


def rotated(name, reparam, host):
    """The same where the auxiliary site is an orthonormal function of x."""
    return {name: (np.asarray(reparam.transform(host.array(MEAN))), DEVIATION)}


# How x is drawn, a reparametrisation of the host, and the posterior of the site that it adds.
CASES = {
    "deterministic": (by_hand, None, {"z": decentred()["x_decentered"]}),
    "decentred": (event, ("LocScaleReparam", 0.0), decentred()),
    "half": (plated, ("LocScaleReparam", 0.5), decentred(0.5)),
    "learned": (event, ("LocScaleReparam",), decentred(0.5)),
    "base": (transformed, ("TransformReparam",), {"x_base": decentred()["x_decentered"]}),
    "cosines": (event, ("DiscreteCosineReparam",), "x_dct"),
    "wavelets": (event, ("HaarReparam",), "x_haar"),
}


@pytest.mark.parametrize("name", CASES)
def test_groups(host, name):
    """Weights and draws are right, too, because the guide is the posterior."""
    draw, reparam, posterior = CASES[name]

    def model(y):
        x = draw(host)
        with host.plate("rows_", 4):
            host.sample("y", host.dist.Normal(x, NOISE), obs=y)

    if reparam is not None:
        reparam = getattr(host.reparams, reparam[0])(*reparam[1:])
        model = host.reparam(model, {"x": reparam})
    if isinstance(posterior, str):
        posterior = rotated(posterior, reparam, host)
    plates = draw is not event

    def guide(y):
        for site, (mean, deviation) in posterior.items():
            density = normal(host, mean, deviation * np.ones(4))
            host.sample(site, density if plates else density.to_event(1))

    data = host.to_arviz(
        guide,
        model,
        params={"x_centered": host.array(0.5 * np.ones(4))},
        args=(host.array(Y),),
        draws=400,
        posterior_predictive=True,
    )
    assert set(data["posterior"].data_vars) == {"x", *posterior}
    for group in ("log_likelihood", "observed_data", "posterior_predictive"):
        assert set(data[group].data_vars) == {"y"}, group
    assert data["posterior"]["x"].dims[2:] == (("rows",) if plates else ("x_dim_0",))
    assert data["posterior_predictive"]["y"].dims[2:] == ("rows_",)
    x, y = only(data, "posterior", "x"), only(data, "posterior_predictive", "y")
    assert_allclose((x.mean(0) - MEAN) / DEVIATION, np.zeros(4), atol=0.2)
    assert_allclose(x.std(0), DEVIATION, rtol=0.15)
    assert_allclose(only(data, "log_likelihood", "y"), stats.norm.logpdf(Y, x, NOISE), rtol=1e-6)
    assert_allclose(only(data, "sample_stats", "log_importance_ratio"), EVIDENCE, rtol=1e-6)
    noise = (y - x) / NOISE
    assert_allclose([noise.mean(), noise.std()], [0.0, 1.0], atol=0.1)
    assert abs(np.corrcoef(noise.ravel(), x.ravel())[0, 1]) < 0.1


def test_events_in_plates(host):
    """A reparametrised site keeps the names of its plates."""

    def model(y):
        with host.plate("schools", 2):
            x = host.sample("x", normal(host, np.zeros((2, 3)), np.ones((2, 3))).to_event(1))
        host.sample("y", host.dist.Normal(x.sum(), 1.0), obs=y)

    model = host.reparam(model, {"x": host.reparams.LocScaleReparam(0.0)})

    def guide(y):
        density = normal(host, np.zeros((2, 3)), np.ones((2, 3)))
        host.sample("x_decentered", density.to_event(1))

    data = host.to_arviz(guide, model, args=(host.array(1.0),), draws=30)
    assert data["posterior"]["x"].dims[2:] == ("schools", "x_dim_1")
