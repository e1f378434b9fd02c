"""What flows learn from data outside of gradients: `initialize` and `update`."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.reference.layers import Affine
from tests.specs.registry import case

NORMALISED = [
    case("ActNorm", 3),
    case("BatchNorm", 3, eps=1e-12),
    case("glow", 4, layers=3),
    case("glow", 3, layers=2, context_dim=2),
    case(
        "Chain",
        3,
        ("ActNorm", {}),
        ("AffineCoupling", {"hidden": (8,)}),
        ("BatchNorm", {"eps": 1e-12}),
        ("AffineCoupling", {"hidden": (8,), "partition": (False, True, True)}),
        ("ActNorm", {}),
    ),
    case("realnvp", 3, layers=2, context_dim=2, batch_norm=True),
]
each = pytest.mark.parametrize("case", NORMALISED, ids=str)


def data(size, rows=200, seed=0):
    rng = np.random.default_rng(seed)
    skewed = rng.gamma(2.0, size=(rows, size)) @ rng.standard_normal((size, size))
    return 5.0 + 3.0 * skewed


def uninitialised(wing, case):
    """A flow with noise on its conditioners, before it has seen data."""
    flow = wing.build(case, noise=0)
    perturbed = wing.state(wing.build(case))
    state = wing.state(flow)
    return wing.load(
        flow, {n: perturbed[n] if ".network." in n else value for n, value in state.items()}
    )


@pytest.mark.parametrize("case", NORMALISED[:-1], ids=str)
def test_encoded_activations_are_standardised(wing, case):
    """Behind each normalisation, on the way from data to base."""
    flow, x, context = uninitialised(wing, case), data(case.size), case.context(200)
    flow = wing.initialize(flow, x, context)
    state = wing.state(flow)
    seen = 0
    for layer, name in zip(*layers_and_names(case, state), strict=True):
        x, _ = layer.inverse(x, context)
        if name:
            assert_allclose(x.mean(0), 0.0, atol=1e-8)
            assert_allclose(x.var(0), 1.0, rtol=1e-8)
            seen += 1
    assert seen == sum(name.endswith("initialized") for name in state)


def layers_and_names(case, state):
    """The reference's layers from data to base, and whether each normalises."""
    layers = getattr(case.reference(state), "layers", None) or [case.reference(state)]
    if case.name == "glow":
        normalises = [False, False, True] * case.options["layers"] + [False]
    elif case.name == "Chain":
        normalises = ["Norm" in name for name, _ in case.layers]
    else:
        normalises = [isinstance(layer, Affine) for layer in layers]
    return layers[::-1], normalises[::-1]


@each
def test_happens_once(wing, case):
    context = case.context(200)
    flow = wing.initialize(uninitialised(wing, case), data(case.size), context)
    once = wing.state(flow)
    assert all(value.all() for name, value in once.items() if name.endswith("initialized"))
    again = wing.state(wing.initialize(flow, 7.0 - data(case.size, seed=1), context))
    for name, value in once.items():
        assert_array_equal(again[name], value)


@each
def test_no_other_call_does_it(wing, case):
    flow = uninitialised(wing, case)
    before = wing.state(flow)
    x, context = data(case.size), case.context(200)
    density = wing.density(flow, context=context)
    for call in (wing.forward, wing.inverse, wing.call, wing.call_inverse):
        call(flow, x, context)
    wing.log_prob(density, x)
    wing.sample(density, (2,))
    wing.gradients(flow, x, context)
    for name, value in wing.state(flow).items():
        assert_array_equal(before[name], value)
        assert not (name.endswith("initialized") and value.any())


@each
def test_the_flag_travels_with_copies_and_states(wing, case):
    context = case.context(200)
    flow = wing.initialize(uninitialised(wing, case), data(case.size), context)
    state = wing.state(flow)
    copies = [*wing.copies(flow).values(), wing.load(wing.build(case, seed=1), state)]
    for copy in copies:
        copy = wing.initialize(copy, data(case.size, seed=3), context)
        for name, value in wing.state(copy).items():
            assert_array_equal(value, state[name])


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4 / 3, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_constant_coordinate_keeps_its_scale(wing, constant, dtype):
    x = data(3, rows=1000).astype(dtype)
    x[:, 1] = constant
    flow = wing.initialize(wing.build(case("ActNorm", 3), dtype=dtype, noise=0), x)
    assert_allclose(wing.state(flow)["log_scale"][1], 0.0, atol=1e-12)
    encoded, _ = wing.inverse(flow, x)
    assert_allclose(encoded[:, 1], 0.0, atol=1e-6 * max(1, abs(constant)))
    assert_allclose(encoded[:, [0, 2]].var(0), 1.0, rtol=1e-4)


@pytest.mark.parametrize("name", ["ActNorm", "BatchNorm"])
def test_a_single_row(wing, name):
    """It says nothing about the variance, so the scale stays 1."""
    x = np.array([[3.0, -2.0]])
    flow = wing.initialize(wing.build(case(name, 2), noise=0), x)
    encoded, ladj = wing.inverse(flow, x)
    assert_allclose(encoded, 0.0, atol=1e-12)
    assert_allclose(ladj, 0.0, atol=1e-4)


@each
def test_rows_that_are_not_finite_are_refused(wing, case):
    """With their number and the first one, and nothing has changed."""
    flow = uninitialised(wing, case)
    before = wing.state(flow)
    x, context = data(case.size, rows=10), case.context(10)
    x[4, 1], x[7, 0], x[9, 2] = np.nan, np.inf, -np.inf
    for method in (wing.initialize, wing.update):
        with pytest.raises(ValueError, match=r"`x` has 3 of 10 rows .*first is row 4"):
            method(flow, x, context)
        empty = None if context is None else context[:0]
        with pytest.raises(ValueError, match=r"`x` of shape \(0, .*no rows"):
            method(flow, x[:0], empty)
    for name, value in wing.state(flow).items():
        assert_array_equal(before[name], value)


@each
def test_update_moves_only_the_running_averages(wing, case):
    x, context = data(case.size), case.context(200)
    flow = wing.initialize(uninitialised(wing, case), x, context)
    before = wing.state(flow)
    after = wing.state(wing.update(flow, 2 * x, context))
    for name, value in before.items():
        moves = name.endswith(("running_mean", "running_var"))
        assert np.array_equal(value, after[name]) != moves


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
def test_update_is_the_running_average(wing, momentum):
    x, y = data(3), 2.0 - data(3, seed=1)
    flow = wing.build(case("BatchNorm", 3, momentum=momentum), noise=0)
    flow = wing.initialize(flow, x)
    assert_allclose(wing.state(flow)["running_mean"], x.mean(0), rtol=1e-10)
    assert_allclose(wing.state(flow)["running_var"], x.var(0), rtol=1e-10)
    state = wing.state(wing.update(flow, y))
    for name, old, new in [("mean", x.mean(0), y.mean(0)), ("var", x.var(0), y.var(0))]:
        expected = (1 - momentum) * old + momentum * new
        assert_allclose(state[f"running_{name}"], expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["glow", "Stack"])
def test_data_of_another_precision(wing, name):
    inner = [("ActNorm", {}), ("ActNorm", {})] if name == "Stack" else []
    flow = wing.build(case(name, 3, *inner), dtype="float64", noise=0)
    state = wing.state(wing.initialize(flow, data(3).astype("float32")))
    assert {value.dtype.name for value in state.values() if value.dtype.kind == "f"} == {"float64"}


def test_batches_of_any_shape(wing):
    x = data(3, rows=60)
    flat = wing.state(wing.initialize(wing.build(case("glow", 3, layers=2)), x))
    shaped = wing.initialize(wing.build(case("glow", 3, layers=2)), x.reshape(5, 12, 3))
    for name, value in wing.state(shaped).items():
        assert_allclose(value, flat[name], rtol=1e-9, atol=1e-9)


def test_standardization(wing):
    x = data(3)
    layer = wing.standardize(wing.build(case("Standardization", 3), noise=0), x)
    encoded, ladj = wing.inverse(layer, x)
    assert_allclose(encoded.mean(0), 0.0, atol=1e-9)
    assert_allclose(encoded.var(0), 1.0, rtol=1e-9)
    assert_allclose(ladj, -np.log(x.std(0)).sum(), rtol=1e-9)
    assert list(wing.gradients(layer, x)) == ["x"]
