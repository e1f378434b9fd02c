"""Nothing goes stale: updates, copies and threads get the numbers of a flow that is new."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.specs.registry import NAMES, case
from tests.wings import WINGS

PLAIN = [
    case("nice", 4),
    case("realnvp", 4, layers=3),
    case("glow", 4, layers=2),
    case("ActNorm", 4),
    case("AffineCoupling", 4),
    case("InvertibleLinear", 4),
]
UPDATES = [(wing, name) for wing in WINGS for name in wing.updates]


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize(("wing", "update"), UPDATES, ids=str)
def test_update_then_log_prob(wing, update, case):
    """With the earlier sample and its log-density kept alive."""
    flow = wing.build(case)
    density = wing.density(flow)
    kept = wing.drawn(density, (3,))
    flow = wing.updates[update](flow, case.points(3))
    fresh = wing.load(wing.build(case), wing.state(flow))
    expected = wing.log_prob(wing.density(fresh), kept.sample)
    assert abs(expected - kept.log_prob).max() > 1e-3
    for updated in (wing.again(density, flow), wing.density(flow)):
        assert_allclose(wing.log_prob_of(updated, kept), expected, rtol=1e-9)
        assert_allclose(wing.log_prob(updated, kept.sample), expected, rtol=1e-9)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize(("wing", "update"), UPDATES, ids=str)
def test_update_then_log_determinant(wing, update, case, inverse):
    """With the host's own objects of the earlier call kept alive."""
    flow, points = wing.build(case), case.points(3)
    kept = wing.held(flow, points, inverse)
    x, y = map(wing.numpy, kept)
    flow = wing.updates[update](flow, case.points(3))
    fresh = wing.load(wing.build(case), wing.state(flow))
    there, back = (wing.inverse, wing.forward) if inverse else (wing.forward, wing.inverse)
    old = there(wing.build(case), x)[1]
    ladj, again = wing.recalled(flow, kept, inverse)
    assert_allclose(again, back(fresh, y)[0], rtol=1e-9, atol=1e-9)
    assert abs(again - x).max() > 1e-4
    # The two are no longer a pair of this flow. Their log-determinant is that of the map that made
    # them one or, when asked for again, that of one end or of the other.
    ends = there(fresh, x)[1], -back(fresh, y)[1]
    assert min(abs(ladj - end).max() for end in (*ends, old)) < 1e-9
    ladj, _ = wing.recalled(flow, kept, inverse)
    assert min(abs(ladj - end).max() for end in ends) < 1e-9


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("case", NAMES, ids=str)
def test_copies(wing, case, way):
    """Of a flow that has been used, with gradients; the copy shares nothing with it."""
    flow = wing.build(case)
    points, context = case.points(3), case.context(3)
    kept = wing.drawn(wing.density(flow, context=context), ())
    wing.gradients(flow, points, context)
    copy = wing.copies(flow)[way]
    before = wing.state(copy)
    assert type(copy) is type(flow)
    assert copy.event_shape == flow.event_shape
    assert copy.context_dim == flow.context_dim
    for name, value in wing.state(flow).items():
        assert_array_equal(before[name], value)
        assert before[name].dtype == value.dtype
    for pair in (wing.forward, wing.inverse, wing.call, wing.call_inverse):
        x = points if "inv" in pair.__name__ else case.latents(3)
        for got, wanted in zip(pair(copy, x, context), pair(flow, x, context), strict=True):
            assert_array_equal(got, wanted)
    expected = wing.inverse(flow, points, context)
    wing.updates["in_place"](flow, points)
    for got, wanted in zip(wing.inverse(copy, points, context), expected, strict=True):
        assert_array_equal(got, wanted)
    for name, value in wing.state(copy).items():
        assert_array_equal(before[name], value)
    assert kept


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow"])
def test_copies_of_distributions(wing, name):
    flow = wing.build(case(name, 3, layers=2))
    density = wing.density(flow, "logistic")
    kept = wing.drawn(density, (3,))
    points = np.ones((2, 3))
    for copy in wing.copies(density).values():
        assert_allclose(wing.log_prob(copy, points), wing.log_prob(density, points), rtol=1e-12)
    assert kept


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow"])
def test_threads(wing, name):
    """Four threads that share one flow get the numbers that one thread gets."""
    flow = wing.build(case(name, 3, layers=3))
    density = wing.density(flow)
    inputs = [np.random.default_rng(i).standard_normal((16, 3)) for i in range(4)]

    def work(i):
        found = []
        for _ in range(5):
            found += [wing.log_prob(density, inputs[i]), *wing.decoded(density, flow, inputs[i])]
            found += [*wing.call(flow, inputs[i]), *wing.call_inverse(flow, inputs[i])]
        return found

    expected = [work(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for ours, theirs in zip(found, expected, strict=True):
        for got, wanted in zip(ours, theirs, strict=True):
            assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)
