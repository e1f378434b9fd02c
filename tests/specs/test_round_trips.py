"""Laws of `check_invertible`: what goes there and back, measured."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_flows
import pyroflows
from tests.specs.registry import case


class PyroBroken(pyroflows.TransformModule):
    """A layer whose inverse forgets the shift and whose log-determinant is twice too large."""

    def forward_and_ladj(self, x):
        return 2 * x + 1, x.new_full(x.shape[:-1], 3 * math.log(2))

    def inverse_and_ladj(self, y):
        return y / 2, y.new_full(y.shape[:-1], -6 * math.log(2))


class NumPyroBroken(numpyro_flows.TransformModule):
    """As Pyro's."""

    def forward_and_ladj(self, x):
        return 2 * x + 1, jnp.full(x.shape[:-1], 3 * math.log(2))

    def inverse_and_ladj(self, y):
        return y / 2, jnp.full(y.shape[:-1], -6 * math.log(2))


def points(rows=64, size=3, magnitude=10.0, dtype="float32"):
    rng = np.random.default_rng(0)
    return (magnitude * rng.standard_normal((rows, size))).astype(dtype)


def test_a_permutation_inverts_itself_exactly(wing):
    layer = wing.new("Permutation", [2, 0, 1])
    found = wing.package.check_invertible(layer, wing.array(points()))
    assert found == (0.0, 0.0)
    assert found.error == found.ladj_error == 0.0


def test_a_deep_flow_inverts_itself_up_to_rounding(wing):
    flow = wing.build(case("realnvp", 8, layers=64), dtype="float32", noise=0.01)
    found = wing.package.check_invertible(flow, wing.array(points(size=8)))
    assert 0 < found.error < 1e-4
    assert 0 <= found.ladj_error < 1e-3


def test_a_broken_layer_does_not(wing):
    broken = {"pyro": PyroBroken, "numpyro": NumPyroBroken}[wing.name](3)
    x = points(dtype="float64")
    found = wing.package.check_invertible(broken, wing.array(x))
    assert found.error == pytest.approx((1 / np.maximum(1, abs(x).max(-1))).max())
    assert found.ladj_error == pytest.approx(3 * math.log(2))


def test_round_trips_of_images_and_contexts(wing):
    images = wing.build(case("glow", (1, 4, 4), levels=1, steps=1, channels=4), dtype="float32")
    x = points(6, 16).reshape(2, 3, 1, 4, 4)
    assert wing.package.check_invertible(images, wing.array(x)).error < 1e-4
    flow = wing.build(case("nice", 3, context_dim=2), dtype="float32")
    context = wing.array(points(64, 2))
    found = wing.package.check_invertible(flow.condition(context), wing.array(points()))
    assert found.error < 1e-4


def test_a_round_trip_to_nowhere(wing):
    layer = wing.build(case("DiagonalScaling", 3), noise=0)
    state = wing.state(layer)
    layer = wing.load(layer, {name: np.full_like(v, np.nan) for name, v in state.items()})
    found = wing.package.check_invertible(layer, wing.array(points(dtype="float64")))
    assert found == (math.inf, math.inf)


def test_bad_input_of_a_round_trip(wing):
    check, flow = wing.package.check_invertible, wing.build(case("nice", 3, layers=2))
    with pytest.raises(TypeError, match="`flow` is a function, expected a TransformModule"):
        check(lambda x: x, wing.array(points()))
    with pytest.raises(ValueError, match=r"`x` has shape \(64, 2\)"):
        check(flow, wing.array(points(size=2)))
    with pytest.raises(ValueError, match="has no rows"):
        check(flow, wing.array(points(rows=0)))
    bad = points()
    bad[5, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 64 rows with NaN or inf; the first is row 5"):
        check(flow, wing.array(bad))
    with pytest.raises(TypeError, match="`x` has dtype .*int"):
        check(flow, wing.array(points().astype("int32")))
    with pytest.raises(ValueError, match="`context` is missing"):
        check(wing.build(case("nice", 3, context_dim=2)), wing.array(points()))
