"""Bad input: each message names the argument, what came and what was expected."""

import inspect
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


def test_a_second_context(wing):
    """A flow that has its context takes no other."""
    context = wing.array(np.ones((2, 4)))
    flow = wing.build(case("realnvp", 3, context_dim=4)).condition(context)
    x = wing.array(np.ones((2, 3)))
    for method in (flow.forward_and_ladj, flow.inverse_and_ladj, flow.initialize, flow.update):
        with pytest.raises(ValueError, match=r"`context` was given.*context_dim=0"):
            method(x, context)


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
    with pytest.raises(TypeError, match="`context` is .*complex.*, expected .* of real numbers"):
        flow.condition(wing.array(np.ones((2, 4), dtype="complex64")))


@pytest.mark.parametrize("name", VECTORS)
def test_a_one_dimensional_event(wing, name):
    for size in (1, (1,)):
        with pytest.raises(ValueError, match=r"`event_shape` is \(1,\).*two") as caught:
            wing.new(name, size)
        for layer in ("SinhArcsinh", "LowerTriangular", "DiagonalScaling"):
            assert layer in str(caught.value)
            wing.new(layer, size)
        assert "`context_dim`" in str(caught.value)
        wing.new(name, size, context_dim=2)


def test_an_image_of_one_number(wing):
    with pytest.raises(ValueError, match=r"`event_shape` is \(1, 1, 1\).*two coordinates"):
        wing.new("nice", (1, 1, 1))
    flow = wing.new("nice", (1, 1, 1), context_dim=2)
    assert wing.forward(flow, np.ones((3, 1)), np.ones((3, 2)))[0].shape == (3, 1, 1, 1)
    for shape in [(1, 1, 1), (3, 1, 1)]:
        size = f"`event_shape` is {re.escape(str(shape))}"
        for context_dim in (0, 2):
            with pytest.raises(ValueError, match=f"{size}.*two pixels.*event_shape={shape[0]}"):
                wing.new("realnvp", shape, context_dim=context_dim)
            with pytest.raises(ValueError, match=f"{size}, but levels=1"):
                wing.new("glow", shape, context_dim=context_dim)


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


@pytest.mark.parametrize("gain", [0, -1.0, np.inf, "1"])
@pytest.mark.parametrize("layer", [("InvertibleLinear", 2), ("InvertibleConv1x1", (2, 1, 1))])
def test_gains(wing, layer, gain):
    with pytest.raises(ValueError, match=f"`gain` is {gain!r}, expected a positive number"):
        wing.new(*layer, gain=gain)


@pytest.mark.parametrize("name", VECTORS)
def test_partitions(wing, name):
    with pytest.raises(ValueError, match="`partition` is 'thirds'.*'alternating', 'halves'"):
        wing.new(name, 4, partition="thirds")
    with pytest.raises(ValueError, match="`partition` has 3 coordinates.*event has 4"):
        wing.new(name, 4, partition=[True, False, True])
    with pytest.raises(ValueError, match="`mask` of length 4 leaves part b empty"):
        wing.new(name, 4, partition=[True] * 4, context_dim=2)
    with pytest.raises(ValueError, match="`partition` leaves part a empty.*without a context"):
        wing.new(name, 4, partition=[False] * 4)


def test_masks(wing):
    for mask in ([], [True], [True, True]):
        with pytest.raises(ValueError, match=f"`mask` of length {len(mask)} leaves part b empty"):
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
@pytest.mark.parametrize("layers", [0, -3, 2.5, "a", True])
def test_no_layers(wing, name, layers):
    with pytest.raises(ValueError, match=f"`layers` is {layers!r}, expected .*at least 1"):
        wing.new(name, 4, layers=layers)


@pytest.mark.parametrize("name", VECTORS)
def test_numbers_out_of_range(wing, name):
    for context_dim in (-1, 1.5, "a"):
        with pytest.raises(ValueError, match=f"`context_dim` is {context_dim!r}, .*at least 0"):
            wing.new(name, 4, context_dim=context_dim)
    for init_scale in (-1.0, "a", float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"`init_scale` is {init_scale!r}, expected a number"):
            wing.new(name, 4, init_scale=init_scale)


@pytest.mark.parametrize("scale", ["tanh", "sigmoid", "clamp"])
@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), "a"])
def test_limits(wing, scale, limit):
    with pytest.raises(ValueError, match=f"`limit` is {limit!r}, expected a positive number"):
        wing.new("AffineCoupling", 4, scale=scale, limit=limit)


def test_eps(wing):
    with pytest.raises(ValueError, match="`eps` is -1.0, expected a number from 0"):
        wing.new("BatchNorm", 4, eps=-1.0)


@pytest.mark.parametrize("name", BUILDERS)
def test_misspelt_options(wing, name):
    with pytest.raises(TypeError, match=f"{name}: .*'hiden'"):
        wing.new(name, 4, hiden=(8,))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_network_in_place_of_what_makes_one(wing, name):
    network = wing.new("DenseNet", 2, 4)
    with pytest.raises(TypeError, match="`network` is a DenseNet, expected a function"):
        wing.new(name, 4, network=network)


@pytest.mark.parametrize("name", BUILDERS)
def test_keys(wing, name):
    if "key" in inspect.signature(getattr(wing.package, name)).parameters:
        with pytest.raises(TypeError, match="`key` is 0, expected one of jax.random.key"):
            getattr(wing.package, name)(4, key=0)
        with pytest.raises(TypeError, match=f"{name}: missing .*'key'"):
            getattr(wing.package, name)(4)


def test_arguments_of_the_other_kind_of_event(wing):
    image = (1, 8, 8)
    for name, option, value, kind in [
        ("glow", "layers", 4, "vectors"),
        ("glow", "hidden", (4,), "vectors"),
        ("realnvp", "partition", "halves", "vectors"),
    ]:
        with pytest.raises(ValueError, match=rf"`{option}` is for {kind}.*\(1, 8, 8\): use `"):
            wing.new(name, image, **{option: value})
    for name, option in [("glow", "levels"), ("glow", "channels"), ("realnvp", "scales")]:
        with pytest.raises(ValueError, match=f"`{option}` is for images, .* 4: use `layers`"):
            wing.new(name, 4, **{option: 2})


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 4, 5)])
def test_images_that_cannot_be_squeezed(wing, shape):
    good = (shape[0], shape[1] + shape[1] % 2, shape[2] + shape[2] % 2)
    message = f"`event_shape` is {re.escape(str(shape))}.*even.*{re.escape(str(good))}"
    with pytest.raises(ValueError, match=message):
        wing.new("Squeeze", shape)


def test_images_that_cannot_be_halved(wing):
    """Each message names a size that works, and that one does."""
    for name, count, halved in [("glow", "levels", 3), ("realnvp", "scales", 2)]:
        message = rf"`event_shape` is \(1, 28, 20\).*{count}=3.*multiples of {2**halved}"
        if name == "realnvp":
            wing.new(name, (1, 28, 20), scales=3, channels=4, blocks=1)
            continue
        with pytest.raises(ValueError, match=rf"{message}.*\(1, 32, 24\)"):
            wing.new(name, (1, 28, 20), levels=3, steps=1, channels=4)
        wing.new(name, (1, 32, 24), levels=3, steps=1, channels=4)
    with pytest.raises(ValueError, match=r"`event_shape` is \(1, 15, 15\).*\(1, 16, 16\)"):
        wing.new("glow", (1, 15, 15), steps=1, channels=4)
    with pytest.raises(ValueError, match="`steps` is 0.*at least 1"):
        wing.new("glow", (1, 4, 4), steps=0)


def test_options_of_images(wing):
    with pytest.raises(ValueError, match="`coupling` is 'cubic'.*'additive', 'affine'"):
        wing.new("glow", (1, 4, 4), coupling="cubic")
    with pytest.raises(ValueError, match="`norm` is 'layer', expected 'batch', 'instance'"):
        wing.new("ResNet", 2, 2, norm="layer")
    with pytest.raises(ValueError, match="`blocks` is -1, expected a whole number, at least 0"):
        wing.new("ResNet", 2, 2, blocks=-1)
    with pytest.raises(ValueError, match="`channels` is 0, expected a whole number, at least 1"):
        wing.new("ResNet", 2, 2, channels=0)
    with pytest.raises(ValueError, match=r"`event_shape` is \(1, 4, 4\).*channels.*checkerboard"):
        wing.package.channels((1, 4, 4))
    with pytest.raises(ValueError, match=r"`event_shape` is \(3, 1, 1\).*two pixels"):
        wing.package.checkerboard((3, 1, 1))
    with pytest.raises(ValueError, match=r"`event_shape` is \(4,\), expected \(C, H, W\)"):
        wing.package.checkerboard((4,))
    with pytest.raises(ValueError, match="`partition` is 'alternating'.*'channels'"):
        wing.new("AffineCoupling", (2, 2, 2), partition="alternating")
    with pytest.raises(ValueError, match="`partition` has 3 channels.*event has 2 channels"):
        wing.new("AffineCoupling", (2, 2, 2), partition=[True, False, True])
    for alpha in (-0.1, 0.5, float("nan")):
        with pytest.raises(ValueError, match=f"`alpha` is {alpha}"):
            wing.new("Logit", 3, alpha)


def test_levels_that_do_not_fit(wing):
    coarse, fine = wing.new("ActNorm", (3, 2, 2)), wing.new("Squeeze", (1, 4, 4))
    with pytest.raises(ValueError, match=r"`levels` do not fit.*\(3, 2, 2\).*\(2, 2, 2\)"):
        wing.new("MultiScale", [coarse, fine])
    with pytest.raises(ValueError, match="`levels` is empty"):
        wing.new("MultiScale", [])


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
    with pytest.raises(ValueError, match=r"layer 0 gives .*\(4,\), but layer 1 takes \(3,\)"):
        wing.new(name, [norm, wing.new("ActNorm", 3)])
    with pytest.raises(ValueError, match=r"`layers` .*context.*\[2, 3\]"):
        wing.new(name, [wing.new("AffineCoupling", 4, context_dim=n) for n in (2, 3)])


def test_networks_with_the_wrong_number_of_outputs(wing):
    for name, needed in [("AdditiveCoupling", 3), ("AffineCoupling", 6)]:
        layer = wing.new(name, 5, network=wing.own_network(2, 7))
        with pytest.raises(ValueError, match=f"`network` gave 7 outputs.*needs {needed}"):
            wing.forward(layer, np.ones((2, 5)))
    layer = wing.new("AffineCoupling", (4, 2, 3), network=wing.own_convolution(2, 7))
    with pytest.raises(ValueError, match="`network` gave 7 outputs.*needs 4"):
        wing.forward(layer, np.ones((2, 4, 2, 3)))


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
    for wrong in (5, type(wing.normal_base((2,), 0.0, 1.0))):
        with pytest.raises(TypeError, match="`base` is .*expected 'normal', 'logistic' or a dist"):
            wing.density(flow, wrong)
        random = {"key": wing.key(0)} if hasattr(wing, "key") else {"seed": 0}
        with pytest.raises(ValueError, match="`base` is .*expected 'normal', 'logistic' or a dist"):
            wing.package.fit(flow, wing.array(np.ones((9, 2))), base=wrong, steps=1, **random)
