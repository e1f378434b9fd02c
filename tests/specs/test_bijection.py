"""Laws of a bijection: round trips, log-determinants, shapes."""

import re

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.specs.registry import CASES, NAMES

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_round_trips(wing, case):
    flow = wing.build(case)
    latents, points, context = case.latents(3), case.points(3), case.context(3)
    there, _ = wing.forward(flow, latents, context)
    assert_allclose(wing.inverse(flow, there, context)[0], latents, rtol=1e-9, atol=1e-9)
    back, _ = wing.inverse(flow, points, context)
    assert_allclose(wing.forward(flow, back, context)[0], points, rtol=1e-9, atol=1e-9)
    assert there.shape == points.shape
    assert back.shape == latents.shape
    if case.name != "Flatten":
        assert abs(there.ravel() - latents.ravel()).max() > 1e-3


def differences(wing, case, flow, latents, context, step=1e-6):
    """The Jacobian of each row, by central differences."""
    columns = []
    for unit in np.eye(latents[0].size).reshape(-1, *case.base_shape):
        up, down = (wing.forward(flow, latents + s * step * unit, context)[0] for s in (1, -1))
        columns.append((up - down).reshape(len(latents), -1) / (2 * step))
    return np.stack(columns, -1)


@every_case
def test_log_determinant_is_that_of_the_jacobian(wing, case):
    """By central differences. That of the inverse is its negative, by the next law."""
    flow, latents, context = wing.build(case), case.latents(3), case.context(3)
    _, expected = np.linalg.slogdet(differences(wing, case, flow, latents, context))
    assert_allclose(wing.forward(flow, latents, context)[1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", NAMES, ids=str)
def test_the_gradient_of_a_value_is_its_jacobian(wing, case):
    """Which variational inference needs, in the direction from base to data."""
    flow, latents, context = wing.build(case), case.latents(3), case.context()
    contexts = None if context is None else np.broadcast_to(context, (3, *context.shape)).copy()
    found = wing.jacobian(flow, latents, context)
    assert_allclose(found, differences(wing, case, flow, latents, contexts), rtol=1e-5, atol=1e-6)


@every_case
def test_inverse_log_determinant_is_the_negative(wing, case):
    flow = wing.build(case)
    latents, context = case.latents(3), case.context(3)
    there, ladj = wing.forward(flow, latents, context)
    assert_allclose(wing.inverse(flow, there, context)[1], -ladj, rtol=1e-9, atol=1e-9)


@every_case
def test_host_calls_agree_with_the_pair(wing, case):
    flow = wing.build(case)
    context = case.context(3)
    for call, pair, x in [
        (wing.call, wing.forward, case.latents(3)),
        (wing.call_inverse, wing.inverse, case.points(3)),
    ]:
        for got, expected in zip(call(flow, x, context), pair(flow, x, context), strict=True):
            assert got.shape == expected.shape
            assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", NAMES, ids=str)
@pytest.mark.parametrize("batch", [(), (2, 3), (0,)], ids=str)
def test_any_batch_shape(wing, case, batch):
    flow = wing.build(case)
    context = case.context(*batch)
    for pair, points, shape, other in [
        (wing.forward, case.latents(*batch), case.base_shape, case.shape),
        (wing.inverse, case.points(*batch), case.shape, case.base_shape),
    ]:
        rows = points.reshape(-1, *shape)
        contexts = [None] * len(rows) if context is None else context.reshape(-1, case.context_dim)
        value, ladj = pair(flow, points, context)
        assert value.shape == (*batch, *other)
        assert ladj.shape == batch
        values, ladjs = value.reshape(-1, *other), ladj.reshape(-1)
        for row, own, one_value, one_ladj in zip(rows, contexts, values, ladjs, strict=True):
            alone, alone_ladj = pair(flow, row, own)
            assert_allclose(one_value, alone, rtol=1e-10, atol=1e-10)
            assert_allclose(one_ladj, alone_ladj, rtol=1e-10, atol=1e-10)


@every_case
def test_shape_methods(wing, case):
    flow, context = wing.build(case), case.context()
    data, base = case.shape, case.base_shape
    assert (tuple(flow.event_shape), tuple(flow.base_shape)) == (data, base)
    transform = wing.given(flow, context)
    for batch in [(), (7,), (2, 0)]:
        assert tuple(transform.forward_shape((*batch, *base))) == (*batch, *data)
        assert tuple(transform.inverse_shape((*batch, *data))) == (*batch, *base)
    for method, shape in [(transform.forward_shape, base), (transform.inverse_shape, data)]:
        for wrong in [(), (*shape[:-1], shape[-1] + 1), (3, *shape[:-1], shape[-1] + 1)]:
            with pytest.raises(ValueError, match=re.escape(str(shape))):
                method(wrong)


@every_case
def test_inverse_of_the_inverse_and_domains(wing, case):
    flow = wing.given(wing.build(case), case.context())
    inverse = flow.inv
    assert inverse.inv is flow
    dims = len(case.base_shape), len(case.shape)
    assert (flow.domain.event_dim, flow.codomain.event_dim) == dims
    assert (inverse.codomain.event_dim, inverse.domain.event_dim) == dims
    for constraint, events in [(flow.domain, case.latents(2)), (flow.codomain, case.points(2))]:
        events[1].flat[0] = np.nan
        assert_array_equal(wing.satisfies(constraint, events), [True, False])
    if case.pixels:
        assert not wing.satisfies(flow.codomain, np.full(case.shape, 1.2))


@every_case
def test_nan_in_one_row_touches_only_that_row(wing, case):
    flow = wing.build(case)
    context = case.context(3)
    for pair, points in [(wing.forward, case.latents(3)), (wing.inverse, case.points(3))]:
        broken = points.copy()
        broken[2] = np.nan
        whole, ladj = pair(flow, points, context)
        holed, holed_ladj = pair(flow, broken, context)
        others = [0, 1]
        assert_allclose(holed[others], whole[others], rtol=1e-12)
        assert_allclose(holed_ladj[others], ladj[others], rtol=1e-12)
        assert np.isnan(holed[2]).all()


@every_case
def test_gradients_are_finite_and_right(wing, case):
    """Against central differences in a random direction of all weights."""
    flow = wing.build(case)
    points, context = case.points(3), case.context(3)
    found = wing.gradients(flow, points, context)
    assert all(np.isfinite(gradient).all() for gradient in found.values())
    state, rng = wing.state(flow), np.random.default_rng(3)
    direction = {name: rng.standard_normal(g.shape) for name, g in found.items()}
    step, totals = 1e-6, []
    if case.name in ("Squeeze", "Flatten", "Logit", "BijectTo"):
        assert list(found) == ["x"]
    for sign in (1, -1):
        moved = {
            name: value + sign * step * direction[name] if name in direction else value
            for name, value in state.items()
        }
        moved_points = points + sign * step * direction["x"]
        density = wing.density(wing.load(flow, moved), context=context)
        totals.append(wing.log_prob(density, moved_points).sum())
    slope = sum((found[name] * direction[name]).sum() for name in found)
    assert_allclose((totals[0] - totals[1]) / (2 * step), slope, rtol=1e-5, atol=1e-5)
