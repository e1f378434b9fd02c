"""Laws of learned matrices in training: however wide and deep, Adam's steps stay small."""

import math

import numpy as np
import pytest

from tests.specs.registry import case

RATE = 1e-2
VECTORS = [(64, 32), (200, 2)]
CASES = [
    *(case("glow", size, layers=layers, hidden=(8,), scale="tanh") for size, layers in VECTORS),
    case("glow", (32, 2, 2), levels=1, steps=2, channels=4, coupling="additive"),
]


def excess(wing, flow, shape):
    """Nats of N(0, I) under a linear flow beyond its entropy: its Kullback-Leibler divergence."""
    size = math.prod(shape)
    z, ladj = wing.inverse(flow, np.eye(size, dtype="float32").reshape(size, *shape))
    return 0.5 * ((z.astype("float64") ** 2).sum() - size) - ladj[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step_of_every_entry_costs_little(wing, case):
    """Adam's first step moves each entry by the rate, in directions that may agree."""
    flow = wing.build(case, dtype="float32", noise=0)
    before, rng = wing.state(flow), np.random.default_rng(0)
    assert abs(excess(wing, flow, case.shape)) < 0.01
    for signs in (np.ones, lambda shape: rng.choice([-1.0, 1.0], shape)):
        state = {
            name: (value + RATE * signs(value.shape)).astype("float32")
            if name.endswith((".lower", ".upper", ".log_diagonal")) else value
            for name, value in before.items()
        }  # fmt: skip
        assert excess(wing, wing.load(flow, state), case.shape) < 2.0


def test_a_wide_flow_that_starts_at_the_truth_stays_there(wing):
    rng, size = np.random.default_rng(0), 200
    rows = [rng.standard_normal((128, size)).astype("float32") for _ in range(9)]
    flow = wing.build(case("glow", size, layers=1, hidden=(8,)), dtype="float32", noise=0)
    flow, losses = wing.train(flow, rows[:8], RATE)
    truth = [0.5 * (x**2).sum(1).mean() + 0.5 * size * math.log(2 * math.pi) for x in rows[:8]]
    assert (losses - truth).max() < 5.0
    back = wing.forward(flow, wing.inverse(flow, rows[8])[0])[0]
    assert abs(back - rows[8]).max() <= 1e-3
