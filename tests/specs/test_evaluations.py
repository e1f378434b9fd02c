"""Each conditioner is evaluated once: counted with a spy."""

import pytest

from tests.specs.registry import NAMES

COUPLED = [case for case in NAMES if case.conditioners]
pytestmark = pytest.mark.parametrize("case", COUPLED, ids=str)


def test_the_pair(wing, case):
    flow, count = wing.spied(wing.build(case))
    points, context = case.points(3), case.context(3)
    wing.forward(flow, case.latents(3), context)
    assert count() == case.conditioners
    wing.inverse(flow, points, context)
    assert count() == 2 * case.conditioners


def test_log_prob(wing, case):
    flow, count = wing.spied(wing.build(case))
    density = wing.density(flow, context=case.context(3))
    wing.log_prob(density, case.points(3))
    assert count() == case.conditioners
    wing.log_prob(density, case.points(3, seed=5))
    assert count() == 2 * case.conditioners


def test_sample(wing, case):
    flow, count = wing.spied(wing.build(case))
    wing.sample(wing.density(flow, context=case.context()), (3,))
    assert count() == case.conditioners


def test_sample_then_log_prob(wing, case):
    flow, count = wing.spied(wing.build(case))
    wing.sample_and_log_prob(wing.density(flow, context=case.context()), (3,))
    assert count() == case.conditioners


def test_sample_then_log_prob_in_the_host(wing, case):
    flow, count = wing.spied(wing.build(case))
    density = wing.host_density(flow, wing.normal_base(case.base_shape, 0.0, 1.0), case.context())
    wing.sample_and_log_prob(density, (3,))
    assert count() == wing.evaluations_of_sample_and_log_prob * case.conditioners


def test_log_prob_in_the_host(wing, case):
    """The host asks for the inverse first, and then for the log-determinant."""
    flow, count = wing.spied(wing.build(case))
    base = wing.normal_base(case.base_shape, 0.0, 1.0)
    wing.log_prob(wing.host_density(flow, base, case.context()), case.points(3))
    assert count() == wing.evaluations_of_log_prob * case.conditioners


def test_gradients(wing, case):
    flow, count = wing.spied(wing.build(case))
    wing.gradients(flow, case.points(3), case.context(3))
    assert count() == case.conditioners


def test_initialize(wing, case):
    """NumPyro's flows do not evaluate anything where there is nothing to learn."""
    flow, count = wing.spied(wing.build(case))
    learns = any(name.endswith("initialized") for name in wing.state(flow))
    wing.initialize(flow, case.points(3), case.context(3))
    assert count() == (case.conditioners if learns or wing.name == "pyro" else 0)
