"""Bad input: each message names the argument, what came and what was expected."""

import re

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tests.specs.registry import CASES, case

BUILDERS = ["nice", "realnvp", "glow"]
COUPLINGS = ["AdditiveCoupling", "AffineCoupling"]
VECTORS = [*COUPLINGS, *BUILDERS]


def calls(wing, flow):
    """Everything that takes events."""
    density = wing.density(flow)
    return {
        "forward": lambda x: wing.forward(flow, x),
        "inverse": lambda x: wing.inverse(flow, x),
        "call": lambda x: wing.call(flow, x),
        "call_inverse": lambda x: wing.call_inverse(flow, x),
        "initialize": lambda x: wing.initialize(flow, x),
        "update": lambda x: wing.update(flow, x),
        "log_prob": lambda x: wing.log_prob(density, x),
    }


NAMES = ["forward", "inverse", "call", "call_inverse", "initialize", "update"]


@pytest.mark.parametrize("call", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_wrong_event_size(wing, case, call):
    flow, context = wing.build(case), case.context()
    if call in ("initialize", "update"):
        take = getattr(wing, call)
    else:
        take = {"forward": wing.forward, "inverse": wing.inverse,
                "call": wing.call, "call_inverse": wing.call_inverse}[call]  # fmt: skip
    before = wing.state(flow)
    shape = case.base_shape if call in ("forward", "call") else case.shape
    wrong = (2, *shape[:-1], shape[-1] + 1)
    with pytest.raises(ValueError, match=f"`x`.*{re.escape(str(wrong))}.*{re.escape(str(shape))}"):
        take(flow, np.ones(wrong), context)
    with pytest.raises(ValueError, match=r"`x`.*\(\)"):
        take(flow, np.ones(()), context)
    for name, value in wing.state(flow).items():
        assert_array_equal(before[name], value)


@pytest.mark.parametrize("name", BUILDERS)
def test_wrong_event_size_in_log_prob(wing, name):
    density = wing.density(wing.build(case(name, 3, layers=2)))
    for wrong in (np.ones((2, 4)), np.ones((2, 1)), np.ones(1)):
        with pytest.raises(ValueError, match="shape|size|dimension"):
            wing.log_prob(density, wrong)


@pytest.mark.parametrize("dtype", ["int64", "int32", "bool", "complex64"])
@pytest.mark.parametrize("call", NAMES)
def test_wrong_dtype(wing, call, dtype):
    flow = wing.build(case("realnvp", 3, layers=2))
    with pytest.raises(TypeError, match=f"`x` has dtype .*{dtype}.*floating-point"):
        calls(wing, flow)[call](np.ones((2, 3)).astype(dtype))


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_not_an_array(wing, name):
    flow = wing.build(case(name, 2, layers=2))
    with pytest.raises(TypeError, match="`x` is a list"):
        flow.forward_and_ladj([1.0, 2.0])


@pytest.mark.parametrize("name", VECTORS)
def test_a_missing_context(wing, name):
    flow = wing.build(case(name, 3, context_dim=4))
    message = r"`context` is missing.*context_dim=4.*flow\.condition\(context\)"
    for call in (wing.forward, wing.inverse, wing.call, wing.call_inverse, wing.initialize):
        with pytest.raises(ValueError, match=message):
            call(flow, np.ones((2, 3)))
    with pytest.raises(ValueError, match=message):
        wing.density(flow)


@pytest.mark.parametrize("name", [*VECTORS, "ActNorm", "InvertibleLinear"])
def test_an_unwanted_context(wing, name):
    flow = wing.build(case(name, 3))
    context = np.ones((2, 4))
    for call in (
        lambda: flow.condition(wing.array(context)),
        lambda: wing.density(flow, context=context),
        lambda: wing.initialize(flow, np.ones((2, 3)), context),
    ):
        with pytest.raises(ValueError, match=r"`context` was given.*context_dim=0"):
            call()


@pytest.mark.parametrize("name", VECTORS)
def test_a_context_of_the_wrong_size_or_dtype(wing, name):
    flow = wing.build(case(name, 3, context_dim=4))
    for context, size in [(np.ones((2, 3)), "3"), (np.ones(5), "5"), (np.ones(()), "none")]:
        message = f"`context` has last dimension {size}.*context_dim=4"
        with pytest.raises(ValueError, match=message):
            flow.condition(wing.array(context))
        with pytest.raises(ValueError, match=message):
            wing.density(flow, context=context)
        with pytest.raises(ValueError, match=message):
            wing.initialize(flow, np.ones((2, 3)), context)
    with pytest.raises(TypeError, match="`context`.*floating-point"):
        flow.condition(wing.array(np.ones((2, 4), dtype="int64")))


@pytest.mark.parametrize("name", VECTORS)
def test_a_one_dimensional_event(wing, name):
    for size in (1, (1,)):
        with pytest.raises(ValueError, match=r"`event_shape` is \(1,\).*two.*DiagonalScaling"):
            wing.new(name, size)


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("shape", [0, -1, (), (2, 0), 2.5, ("a",)], ids=str)
def test_what_is_not_an_event_shape(wing, name, shape):
    with pytest.raises((ValueError, TypeError), match="`event_shape`"):
        wing.new(name, shape)


@pytest.mark.parametrize("name", ["ActNorm", "BatchNorm", "DiagonalScaling", "InvertibleLinear"])
@pytest.mark.parametrize("shape", [0, -1, (), ("a",)], ids=str)
def test_what_is_not_an_event_shape_of_a_layer(wing, name, shape):
    with pytest.raises((ValueError, TypeError), match="`event_shape`"):
        wing.new(name, shape)


@pytest.mark.parametrize("name", VECTORS)
def test_partitions(wing, name):
    with pytest.raises(ValueError, match="`partition` is 'thirds'.*'alternating', 'halves'"):
        wing.new(name, 4, partition="thirds")
    with pytest.raises(ValueError, match="`partition` has 3 coordinates.*event has 4"):
        wing.new(name, 4, partition=[True, False, True])
    with pytest.raises(ValueError, match="`mask` of length 4 leaves one part empty"):
        wing.new(name, 4, partition=[True] * 4)


def test_masks(wing):
    for mask in ([], [True], [False, False]):
        with pytest.raises(ValueError, match=f"`mask` of length {len(mask)} leaves one part"):
            wing.package.Partition(mask)
    for mask in ([[True, False]], [0, 2], [0.5, 1.0], np.ones((2, 2), dtype=bool)):
        with pytest.raises(ValueError, match="`mask`.*one-dimensional.*booleans"):
            wing.package.Partition(mask)


@pytest.mark.parametrize("name", ["AffineCoupling", "realnvp", "glow"])
def test_scales(wing, name):
    with pytest.raises(ValueError, match="`scale` is 'cosh'.*'clamp', 'exp', 'sigmoid', 'tanh'"):
        wing.new(name, 4, scale="cosh")


@pytest.mark.parametrize("name", VECTORS)
def test_activations(wing, name):
    with pytest.raises(ValueError, match="`activation` is 'sine'.*'relu'"):
        wing.new(name, 4, activation="sine")


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("hidden", [64, (64, 0), (8.5,), None], ids=str)
def test_widths(wing, name, hidden):
    with pytest.raises(ValueError, match="`hidden` is .*expected a sequence of positive ints"):
        wing.new(name, 4, hidden=hidden)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("layers", [0, -3])
def test_no_layers(wing, name, layers):
    with pytest.raises(ValueError, match=f"`layers` is {layers}, expected at least 1"):
        wing.new(name, 4, layers=layers)


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.5])
def test_momentum(wing, momentum):
    with pytest.raises(ValueError, match=rf"`momentum` is {momentum}.*\(0, 1\]"):
        wing.new("BatchNorm", 4, momentum=momentum)


@pytest.mark.parametrize("indices", [[0, 0, 1], [1, 2, 3], [0, -1], [[0, 1], [1, 0]]], ids=str)
def test_permutations(wing, indices):
    with pytest.raises(ValueError, match="`permutation` is .*once"):
        wing.new("Permutation", indices)


@pytest.mark.parametrize("name", ["Chain", "Stack"])
def test_chains(wing, name):
    norm = wing.new("ActNorm", 4)
    with pytest.raises(ValueError, match="`layers` is empty"):
        wing.new(name, [])
    with pytest.raises(TypeError, match="`layers` has a str"):
        wing.new(name, [norm, "tanh"])
    with pytest.raises(ValueError, match=r"`layers` .*\(4,\).*\(3,\)"):
        wing.new(name, [norm, wing.new("ActNorm", 3)])
    with pytest.raises(ValueError, match=r"`layers` .*context.*\[2, 3\]"):
        wing.new(name, [wing.new("AffineCoupling", 4, context_dim=n) for n in (2, 3)])


def test_networks_with_the_wrong_number_of_outputs(wing):
    for name, needed in [("AdditiveCoupling", 3), ("AffineCoupling", 6)]:
        layer = wing.new(name, 5, network=wing.own_network(2, 7))
        with pytest.raises(ValueError, match=f"`network` gave 7 outputs.*needs {needed}"):
            wing.forward(layer, np.ones((2, 5)))


def test_bases_and_temperatures(wing):
    flow = wing.build(case("nice", 2))
    with pytest.raises(ValueError, match="`base` is 'cauchy'.*'logistic', 'normal'"):
        wing.density(flow, "cauchy")
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"`temperature` is {temperature}.*positive"):
            wing.density(flow, temperature=temperature)
    with pytest.raises(ValueError, match="`temperature`.*named bases"):
        wing.density(flow, wing.normal_base((2,), 0.0, 1.0), temperature=0.5)
    with pytest.raises(ValueError, match=r"`base`.*\(3,\).*\(2,\)"):
        wing.density(flow, wing.normal_base((3,), 0.0, 1.0))
