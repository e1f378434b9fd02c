"""Laws of conditional flows: a context makes a plain transform, and contexts broadcast."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.specs.registry import BUILDERS, CASES

CONDITIONAL = [case for case in CASES if case.context_dim]
BATCHES = [
    ((), ()),
    ((4,), ()),
    ((), (4,)),
    ((4,), (4,)),
    ((4,), (1,)),
    ((1,), (4,)),
    ((2, 1), (3,)),
    ((3,), (2, 1)),
    ((2, 3), (2, 3)),
    ((0,), (1,)),
]
# All shapes for one case, one for the others: the base class broadcasts.
BROADCAST = [(CONDITIONAL[0], *shapes) for shapes in BATCHES]
BROADCAST += [(case, (2, 1), (3,)) for case in CONDITIONAL[1:]]
every_case = pytest.mark.parametrize("case", CONDITIONAL, ids=str)


@pytest.mark.parametrize(("case", "batch", "contexts"), BROADCAST, ids=str)
def test_broadcasting_is_looping(wing, case, batch, contexts):
    flow = wing.build(case)
    context = case.context(*contexts)
    joint = np.broadcast_shapes(batch, contexts)
    all_contexts = context + np.zeros((*joint, 1))
    # Three rows with a context each are what the other laws are about: JAX has the programs.
    rows = joint[:-1] if case is not CONDITIONAL[0] else joint
    for pair, points, shape in [
        (wing.forward, case.latents(*batch), case.shape),
        (wing.inverse, case.points(*batch), case.base_shape),
    ]:
        all_points = np.broadcast_to(points, (*joint, *points.shape[len(batch) :])).copy()
        value, ladj = pair(flow, points, context)
        assert value.shape == (*joint, *shape)
        assert ladj.shape == joint
        for index in np.ndindex(*rows):
            alone, alone_ladj = pair(flow, all_points[index], all_contexts[index])
            assert_allclose(value[index], alone, rtol=1e-10, atol=1e-10)
            assert_allclose(ladj[index], alone_ladj, rtol=1e-10, atol=1e-10)
    transform = wing.given(flow, context)
    assert tuple(transform.forward_shape((*batch, *case.base_shape))) == (*joint, *case.shape)
    assert tuple(transform.inverse_shape((*batch, *case.shape))) == (*joint, *case.base_shape)
    if not all(joint):  # torch's own distributions cannot sum over an empty batch
        return
    found = wing.log_prob(wing.density(flow, context=context), points)
    assert found.shape == joint
    for index in np.ndindex(*rows):
        alone = wing.density(flow, context=all_contexts[index])
        assert_allclose(found[index], wing.log_prob(alone, all_points[index]), rtol=1e-9)


@pytest.mark.parametrize(("batch", "contexts"), [((5,), (3,)), ((2, 3), (2,)), ((1, 4), (2, 3))])
def test_batches_that_do_not_fit(wing, batch, contexts):
    """The error says which batch is whose, from each way into a flow."""
    case = CONDITIONAL[0]
    flow, x, context = wing.build(case), case.points(*batch), case.context(*contexts)
    message = f"batch shape {contexts}.*{batch}".replace("(", r"\(").replace(")", r"\)")
    transform = wing.given(flow, context)
    for call in (
        lambda: wing.inverse(flow, x, context),
        lambda: wing.forward(flow, case.latents(*batch), context),
        lambda: transform.forward_shape((*batch, *case.base_shape)),
        lambda: transform.inverse_shape((*batch, *case.shape)),
        lambda: wing.apply("outlier_scores", transform, x.astype("float32")),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("kind", ["int64", "uint8", "bool"])
def test_a_context_of_whole_numbers(wing, kind):
    """A category, given to the density as it is given to `fit`."""
    case = CONDITIONAL[0]
    flow, points = wing.cast(wing.build(case), "float32"), case.points(5).astype("float32")
    whole = np.array([[0, 1], [1, 0], [1, 1], [0, 0], [0, 1]])[:, : case.context_dim].astype(kind)
    context = whole.astype("float32")
    expected = wing.log_prob(wing.density(flow, context=context), points)
    assert_allclose(wing.log_prob(wing.density(flow, context=whole), points), expected, rtol=1e-6)
    assert_allclose(wing.inverse(flow, points, whole)[1], wing.inverse(flow, points, context)[1])
    drawn = [wing.sample(wing.density(flow, context=c), (2,)) for c in (whole, context)]
    assert drawn[0].dtype == drawn[1].dtype
    assert_allclose(*drawn)
    wing.initialize(flow, points, whole)


@every_case
def test_the_context_matters(wing, case):
    flow, points = wing.build(case), case.points(3)
    one = wing.inverse(flow, points, case.context(seed=1))[0]
    other = wing.inverse(flow, points, case.context(seed=2))[0]
    assert abs(one - other).max() > 1e-2


@every_case
def test_one_flow_in_several_contexts_at_a_time(wing, case):
    """Distributions of the same flow do not disturb one another."""
    flow, points = wing.build(case), case.points(3)
    contexts = [case.context(seed=seed) for seed in range(3)]
    densities = [wing.density(flow, context=context) for context in contexts]
    samples = [wing.sample_and_log_prob(density, (4,)) for density in densities]
    for context, density, (sample, log_prob) in zip(contexts, densities, samples, strict=True):
        alone = wing.density(flow, context=context)
        assert_allclose(wing.log_prob(density, points), wing.log_prob(alone, points))
        assert_allclose(log_prob, wing.log_prob(alone, sample), rtol=1e-8, atol=1e-8)


@every_case
def test_gradients_reach_the_context(wing, case):
    flow = wing.build(case)
    points, context = case.points(3), case.context()
    gradient = wing.context_gradient(flow, points, context)
    step, direction = 1e-6, np.ones(case.context_dim)
    up, down = (
        wing.log_prob(wing.density(flow, context=context + sign * step * direction), points).sum()
        for sign in (1, -1)
    )
    assert_allclose(gradient @ direction, (up - down) / (2 * step), rtol=1e-5, atol=1e-6)
    assert abs(gradient).min() > 0


# One number


@pytest.mark.parametrize("name", BUILDERS)
def test_every_coupling_moves_one_number(wing, name):
    """Given the context alone, also the couplings whose parts are swapped."""
    seen = []

    def network(inputs, outputs, *key):
        seen.append((inputs, outputs))
        return wing.new("DenseNet", inputs, outputs, ())

    flow = wing.cast(wing.new(name, 1, layers=3, context_dim=2, network=network), "float64")
    assert seen == [(2, 1 if name == "nice" else 2)] * 3
    state, point, context = wing.state(flow), np.ones(1), np.ones(2)
    still = wing.forward(flow, point, context)[0]
    for key in (key for key in state if key.endswith("network.layers.0.bias")):
        moved = wing.load(flow, {**state, key: state[key] + 1.0})
        assert abs(wing.forward(moved, point, context)[0] - still) > 1e-2
    assert sum(key.endswith("network.layers.0.bias") for key in state) == 3
