"""Laws of supports: no density outside them, and no training on rows that are there."""

import importlib

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import special

from tests.wings import WINGS
from tests.wings.base import disturbed
from tests.wings.training import Dataset, batches, fit, logit, loss, small, unchanged

INSIDE = np.random.default_rng(0).uniform(0.05, 0.95, size=(96, 2)).astype("float32")


def outer(alpha):
    """The ends of the codomain of a `Logit`."""
    return -alpha / (1 - 2 * alpha), 1 + alpha / (1 - 2 * alpha)


# The density


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.05, 0.3])
def test_no_density_outside_of_the_support_nor_on_its_edge(wing, alpha, dtype):
    low, high = np.array(outer(alpha), dtype)
    bad = np.array([low, high, low - 0.1, high + 0.1, -1e30, np.inf, -np.inf], dtype)
    y = np.stack([bad, np.full_like(bad, 0.5)], -1)
    for flow in (wing.new("Logit", 2, alpha), small(wing, logit=alpha)):
        x, ladj = wing.inverse(wing.cast(flow, dtype), y)
        assert np.isfinite(x).all()
        assert_array_equal(ladj, -np.inf)
    density = wing.density(wing.cast(small(wing, logit=alpha), dtype))
    assert_array_equal(wing.log_prob(density, y[:2]), -np.inf)
    near = y[:2] + np.array([[1e-6, 0.0], [-1e-6, 0.0]], dtype)
    assert np.isfinite(wing.log_prob(density, near)).all()
    assert np.isnan(wing.inverse(flow, np.full((1, 2), np.nan, "float32"))[1]).all()


def test_no_density_where_the_base_has_none(wing):
    base = wing.uniform_base((2,), -2.0, 2.0)
    density = wing.density(wing.cast(wing.new("DiagonalScaling", 2), "float32"), base)
    y = np.array([[0.0, 0.0], [1.9, -1.9], [2.1, 0.0], [0.0, -9.0]], dtype="float32")
    expected = [-np.log(16), -np.log(16), -np.inf, -np.inf]
    assert_allclose(wing.log_prob(density, y), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="^`base` is .*, expected a distribution over real n"):
        wing.density(small(wing), wing.poisson_base((2,)))


# Training


class Rows(Dataset):
    """A dataset of the rows of an array."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


FORMS = {
    "array": lambda x: (x, {}),
    "float64": lambda x: (x.astype(float), {}),
    "dataset": lambda x: (Rows(x), {}),
    "batches": lambda x: ([x[:48], x[48:]], {}),
    "held out": lambda x: (INSIDE, {"validation": x}),
    "held-out dataset": lambda x: (INSIDE, {"validation": Rows(x)}),
    "held-out batches": lambda x: (INSIDE, {"validation": [x[:48], x[48:]]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_outside_of_the_support_are_refused(wing, form):
    flow = small(wing, logit=0.0)
    before = wing.state(flow)
    for bad in (1.2, 0.0, 1.0):
        x = INSIDE.copy()
        x[7, 1] = bad
        data, options = FORMS[form](x)
        for standardize in (False, True):
            with pytest.raises(ValueError, match=r"has 1 of .* rows outside .* support, Interval"):
                fit(wing, flow, data, standardize=standardize, steps=3, **options)
        unchanged(wing, flow, before)


def test_raw_pixels_are_refused(wing):
    pixels = np.round(255 * INSIDE)
    with pytest.raises(ValueError, match="`data` has 96 of 96 rows outside .* the first is row 0"):
        fit(wing, small(wing, logit=0.05), pixels)
    with pytest.raises(ValueError, match="`data` after `augment` has .* of 32 rows outside the fl"):
        fit(wing, small(wing, logit=0.05), INSIDE, augment=logit(wing))
    with pytest.raises(ValueError, match="`x` has 96 of 96 rows outside the flow's support"):
        wing.initialize(small(wing, "glow", logit=0.05), pixels)


def test_rows_outside_of_the_support_of_the_base(wing):
    flow, base = small(wing), wing.uniform_base((2,), -4.0, 4.0)
    x = batches(1, size=64)[0].clip(-2.0, 2.0)
    options = {"base": base, "validation": None, "batch_size": 64}
    assert_allclose(fit(wing, flow, x, steps=1, **options).losses, np.log(64), rtol=1e-6)
    flow = small(wing)
    x[5] = 5.0
    with pytest.warns(UserWarning, match="step 12.*outside the support of `base` has an "):
        result = fit(wing, flow, x, **options)
    assert_array_equal(result.losses, np.inf)
    assert result.stopped == "not finite"
    before = wing.state(flow)
    with pytest.raises(ValueError, match="every row of the first batch outside the support of `b"):
        fit(wing, flow, x + 100.0, **options)
    unchanged(wing, flow, before, base=flow.base)


def test_validation_rows_outside_of_the_support_of_the_base(wing):
    x = batches(1, size=64)[0].clip(-2.0, 2.0)
    options = {"base": wing.uniform_base((2,), -4.0, 4.0), "batch_size": 64, "steps": 2}
    with pytest.warns(UserWarning, match="no validation loss was finite"):
        fit(wing, small(wing), x, validation=x + 3.0, **options)


# Supports as the host's constraints


def constraints(wing):
    return importlib.import_module(f"{wing.name}.distributions").constraints


POINTS = np.random.default_rng(1).normal(size=(300, 3))
SUPPORTS = {
    "positive": (lambda c: c.positive, np.exp(POINTS)),
    "unit interval": (lambda c: c.unit_interval, special.expit(POINTS)),
    "interval": (lambda c: c.interval(-np.pi, np.pi), 6.0 * special.expit(POINTS) - 3.0),
    "greater than": (lambda c: c.greater_than(100.0), 100.0 + np.exp(POINTS)),
    "less than": (lambda c: c.less_than(-1.0), -1.0 - np.exp(POINTS)),
    "ordered": (lambda c: c.ordered_vector, np.sort(POINTS, -1)),
    "simplex": (lambda c: c.simplex, special.softmax(POINTS @ np.eye(3, 4), -1)),
    "columns": (
        lambda c: [c.real, c.positive, c.interval(2.0, 3.0)],
        np.stack([POINTS[:, 0], np.exp(POINTS[:, 1]), 2.0 + special.expit(POINTS[:, 2])], -1),
    ),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_nothing_leaves_a_support(wing, name):
    """Also far out in single precision, where rounding meets the edge."""
    make, y = SUPPORTS[name]
    support = make(constraints(wing))
    layer = wing.new("BijectTo", y.shape[1], support)
    x, ladj = wing.inverse(layer, y)
    again, back = wing.forward(layer, x)
    assert_allclose(again, y, rtol=1e-6)
    assert_allclose(back, -ladj, rtol=1e-6, atol=1e-6)
    if name != "columns":
        assert_allclose(again, wing.biject_to(support, x), rtol=1e-6)
    if name not in ("simplex", "ordered"):  # whose numbers meet by rounding
        x = np.linspace(-300.0, 300.0, 303).reshape(101, 3).astype("float32")
        assert wing.satisfies(layer.codomain, wing.forward(layer, x)[0]).all()
    bad = y[:3].copy()
    bad[0], bad[1], bad[2, 1] = -1e4, -np.inf, np.nan
    if name == "ordered":
        bad[:2] = [1.0, 0.0, 2.0]
    if name == "less than":
        bad[:2] = [-2.0, -1.0, -0.5]
    x, ladj = wing.inverse(layer, bad)
    assert_array_equal(ladj, [-np.inf, -np.inf, np.nan])
    assert np.isfinite(x[:2]).all() or name == "columns"


@pytest.mark.parametrize("name", ["simplex", "columns"])
def test_a_density_on_a_support_integrates_to_one(wing, name):
    """By Gauss-Legendre quadrature, in coordinates in which the density is smooth."""
    c = constraints(wing)
    support = c.simplex if name == "simplex" else [c.positive, c.interval(2.0, 3.0)]
    layer = wing.new("BijectTo", 3 if name == "simplex" else 2, support)
    flow = wing.cast(
        wing.new("Chain", [wing.new("realnvp", 2, layers=2, hidden=(4,)), layer]), "float64"
    )
    density = wing.density(wing.load(flow, disturbed(wing.state(flow), 0, 0.1)))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u, v = np.meshgrid(8.0 * nodes, 8.0 * nodes, indexing="ij")
    weight = 64.0 * np.outer(weights, weights) * special.expit(v) * special.expit(-v)
    if name == "simplex":
        first, second = special.expit(u), special.expit(-u) * special.expit(v)
        y = np.stack([first, second, special.expit(-u) * special.expit(-v)], -1)
        weight = weight * first * special.expit(-u) ** 2
    else:
        y, weight = np.stack([np.exp(u), 2.0 + special.expit(v)], -1), weight * np.exp(u)
    assert_allclose((np.exp(wing.log_prob(density, y)) * weight).sum(), 1.0, atol=1e-3)


@pytest.mark.parametrize("name", ["interval", "simplex", "columns"])
def test_a_flow_is_fitted_on_a_support(wing, name, tmp_path):
    make, y = SUPPORTS[name]
    y = y.astype("float32")
    options = {"support": make(constraints(wing)), "validation": None, "batch_size": 300}
    result = fit(wing, small(wing, size=3), y, standardize=True, **options)
    assert result.flow.event_shape == y.shape[1:]
    assert_allclose(loss(wing, result.flow, y), result.losses[-1], atol=0.05)
    wing.package.save(result.flow, tmp_path / "flow")
    expected = wing.log_prob(wing.density(result.flow), y)
    for other in WINGS:
        loaded = other.package.load(tmp_path / "flow")
        assert_allclose(other.log_prob(other.density(loaded), y), expected, rtol=1e-4, atol=1e-4)
    before = wing.state(result.flow)
    with pytest.raises(ValueError, match="`support` is given, but `flow` has one already"):
        fit(wing, result.flow, y, **options)
    bad = np.concatenate([y, np.full_like(y[:1], -9.0)])
    with pytest.raises(ValueError, match="`data` has 1 of 301 rows outside the flow's support"):
        fit(wing, result.flow, bad)
    unchanged(wing, result.flow, before)


def test_supports_that_do_not_fit(wing):
    c = constraints(wing)
    for support, message in [
        (c.integer_interval(0, 3), "expected an interval of real numbers, one for each column, or"),
        (c.positive_definite, "expected an interval of real numbers, one for each column, or one"),
        ("positive", "`support` is 'positive', expected an interval"),
        ([c.positive, c.real], r"`support` has 2 columns, but the events have shape \(3,\)"),
        (c.interval(1.0, 1.0), "`support` is an interval from 1.0 to 1.0"),
        (c.greater_than(np.inf), "`support` is an interval from inf"),
        ([], "`support` is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            wing.new("BijectTo", 3, support)
    with pytest.raises(ValueError, match=r"`support` is simplex, but the events have shape \(1,\)"):
        wing.new("BijectTo", 1, c.simplex)
