"""Precision, bounds and robustness."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.datasets import make_moons

from tests.specs.registry import CASES, KINDS, case

DEEP = [case(name, 8, layers=64, hidden=(64, 64)) for name in ("nice", "realnvp", "glow")]
MAGNITUDES = [1.0, 10.0, 100.0, 1e4]


def everything(flow, density, x, y):
    """Call every evaluation of a flow, as both hosts name them."""
    there, back = flow(x), flow.inv(y)
    ladjs = flow.log_abs_det_jacobian(x, there), flow.inv.log_abs_det_jacobian(y, back)
    pairs = *flow.forward_and_ladj(x), *flow.inverse_and_ladj(y)
    return [there, back, *ladjs, *pairs, density.log_prob(y)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_dtypes(wing, case, dtype):
    """The wider of the two dtypes comes out, and a flow keeps its own.

    That of float64 stays in float64: no narrower number meets the tolerances of the other laws.
    """
    flow = wing.build(case, dtype="float32")
    points, context = case.points(3, dtype=dtype), case.context(3, dtype=dtype)
    latents = case.latents(3, dtype=dtype)
    # A flow without numbers of its own cannot tell the base its dtype.
    numbers = [value for value in wing.state(flow).values() if value.dtype.kind == "f"]
    base = None if numbers else wing.normal_base(case.base_shape, 0.0, 1.0, dtype)
    density = wing.density(flow, base, context)
    found = wing.dtypes(everything, wing.given(flow, context), density, latents, points)
    if dtype == "float32" and wing.draws_float32:
        found += [str(array.dtype) for array in wing.sample_and_log_prob(density, (3,))]
    assert set(found) == {dtype}
    before = {name: value.dtype for name, value in wing.state(flow).items()}
    for method in (wing.initialize, wing.update):
        flow = method(flow, points, context)
        assert {name: value.dtype for name, value in wing.state(flow).items()} == before


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_float64_goes_through_a_float32_flow_unharmed(wing, case):
    flow = wing.build(case, dtype="float32")
    latents, context = case.latents(3), case.context(3)
    there, ladj = wing.forward(flow, latents, context)
    back, inverse_ladj = wing.inverse(flow, there, context)
    assert_allclose(back, latents, rtol=1e-9, atol=1e-9)
    assert_allclose(inverse_ladj, -ladj, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_limit_to_far_out_draws_has_an_inverse_everywhere(wing, dtype):
    """As the equation has it, where an exponential alone would overflow."""
    this = case("LogTails", 1)
    flow, reference = wing.build(this, dtype=dtype), this.reference({})
    y = np.array([[-1e9], [-1e3], [139.9], [140.1], [188.0], [189.0], [1e6]])
    for got, exact in zip(wing.inverse(flow, y.astype(dtype)), reference.inverse(y), strict=True):
        assert_allclose(got, exact, rtol=1e-4 if dtype == "float32" else 1e-9)
    x = np.array([[-1e30], [2e17], [3e17], [1e20]])
    for got, exact in zip(wing.forward(flow, x.astype(dtype)), reference.forward(x), strict=True):
        assert_allclose(got, exact, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_agrees_with_float64(wing, case):
    """No step of a float32 flow loses more than float32 must."""
    context = case.context(3, dtype="float32")
    single = wing.build(case, dtype="float32")
    double = wing.load(wing.build(case), {
        name: value.astype("float64") if value.dtype.kind == "f" else value
        for name, value in wing.state(single).items()
    })  # fmt: skip
    context64 = None if context is None else context.astype("float64")
    for pair, points in [
        (wing.forward, case.latents(3, dtype="float32")),
        (wing.inverse, case.points(3, dtype="float32")),
    ]:
        rough = pair(single, points, context)
        for got, exact in zip(
            rough, pair(double, points.astype("float64"), context64), strict=True
        ):
            assert_allclose(got, exact, rtol=1e-4, atol=1e-4 * max(1.0, abs(exact).max()))


@pytest.mark.parametrize(
    ("layers", "robust", "partition"),
    [(1, True, "halves"), (4, False, "alternating"), (5, True, "alternating")],
)
@pytest.mark.parametrize("name", ["nice", "realnvp"])
def test_a_new_flow_is_the_identity(wing, name, layers, robust, partition):
    flow = wing.build(case(name, 5, layers=layers, robust=robust, partition=partition), noise=0)
    points = np.random.default_rng(0).standard_normal((6, 5))
    for pair in (wing.forward, wing.inverse):
        value, ladj = pair(flow, points)
        assert_allclose(value, points, rtol=1e-12)
        assert_allclose(ladj, 0.0, atol=1e-12)


def test_starts(wing):
    """What the papers say of weights at the start, where it is not zero."""
    for limit, factor in [(None, 1.0), (2.0, 1.0), (0.25, 0.25)]:
        for size in (4, (4, 2, 2)):
            coupling = wing.build(case("AffineCoupling", size, limit=limit), noise=0)
            assert_allclose(wing.state(coupling)["scale.weight"], factor)
    for name, size in [("InvertibleLinear", 4), ("InvertibleConv1x1", (3, 2, 2))]:
        for gain in (1.0, 0.2):
            layer = wing.build(case(name, size, gain=gain), noise=0)
            rotation = wing.jacobian(layer, case(name, size).points(1))[0]
            assert_allclose(rotation @ rotation.T, np.eye(len(rotation)), atol=1e-5)


def test_the_penalty_is_the_sum_of_squared_factors(wing):
    flow = wing.build(case("realnvp", 4, layers=3, robust=False))
    factors = [v for name, v in wing.state(flow).items() if name.endswith("scale.weight")]
    assert len(factors) == 3
    expected = sum((factor**2).sum() for factor in factors)
    assert_allclose(wing.numpy(flow.scale_penalty()), expected)
    assert_allclose(wing.numpy(wing.build(case("nice", 4)).scale_penalty()), 0.0)


@pytest.mark.parametrize("name", ["nice", "realnvp"])
def test_init_scale_starts_off_the_identity(wing, name):
    points = np.random.default_rng(0).standard_normal((6, 5))
    for scale in (1e-3, 1e-1):
        flow = wing.build(case(name, 5, init_scale=scale), noise=0)
        moved = abs(wing.forward(flow, points)[0] - points).max()
        assert scale / 100 < moved < 100 * scale


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow"])
def test_seeds_matter_and_repeat(wing, name):
    one, same, other = (wing.state(wing.build(case(name, 4), s, noise=0)) for s in (0, 0, 1))
    assert all(np.array_equal(one[key], same[key]) for key in one)
    assert any(not np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("limit", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("scale", ["tanh", "sigmoid", "clamp"])
def test_scales_are_bounded(wing, scale, limit):
    """Whatever the weights: a thousand times what any training gives."""
    points = 1e3 * np.random.default_rng(0).standard_normal((200, 2))
    start = np.log1p(np.exp(-2)) if scale == "sigmoid" else 0.0
    reached = []
    for seed in range(4):
        flow = wing.build(case("AffineCoupling", 2, scale=scale, limit=limit), seed, noise=300.0)
        _, ladj = wing.forward(flow, points)
        reached.append(abs(ladj - start).max())
    assert max(reached) <= limit * (1 + 1e-9)
    assert max(reached) > 0.9 * min(limit, 2.0 if scale == "clamp" else np.inf)


@pytest.mark.parametrize("layers", [2, 32])
@pytest.mark.parametrize("scale", ["tanh", "sigmoid", "clamp"])
@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_log_scales_share_one_budget(wing, name, scale, layers):
    """4 in all of a robust flow, however deep it is and whatever its couplings' weights."""
    flow = wing.build(case(name, 2, layers=layers, scale=scale), noise=0)
    rng = np.random.default_rng(0)
    state = {
        key: 100 * rng.standard_normal(value.shape) if ".network." in key or ".scale." in key
        else value for key, value in wing.state(flow).items()
    }  # fmt: skip
    _, ladj = wing.inverse(wing.load(flow, state), rng.standard_normal((100, 2)))
    start = layers * np.log1p(np.exp(-2)) if scale == "sigmoid" else 0.0
    assert abs(ladj + start).max() <= 4 * (1 + 1e-7)  # Glow's rotations are made in float32
    assert abs(ladj + start).max() > 0.01


def inputs(magnitude, size=8, rows=64, dtype="float32"):
    rng = np.random.default_rng(0)
    return (magnitude * rng.uniform(-1, 1, (rows, size))).astype(dtype)


def error(wing, flow, x):
    """The round trip's error, relative to inputs above 1."""
    back = wing.forward(flow, wing.inverse(flow, x)[0])[0]
    return (abs(back - x) / np.maximum(1.0, abs(x).max(-1, keepdims=True))).max()


@pytest.mark.parametrize("case", DEEP, ids=str)
def test_deep_float32_round_trip_before_training(wing, case):
    flow = wing.build(case, dtype="float32", noise=0)
    rng = np.random.default_rng(1)
    flow = wing.initialize(flow, rng.standard_normal((256, 8)).astype("float32"))
    for magnitude in MAGNITUDES:
        assert error(wing, flow, inputs(magnitude)) <= 1e-4
    assert np.isfinite(wing.log_prob(wing.density(flow), inputs(1e6))).all()


def heavy_tails(rows=4096):
    """Standardised Student-t(2) data."""
    x = np.random.default_rng(0).standard_t(2, (rows, 8))
    return ((x - x.mean(0)) / x.std(0)).astype("float32")


def batches(x, steps, size, seed=0):
    rng = np.random.default_rng(seed)
    return [x[rng.integers(len(x), size=size)] for _ in range(steps)]


def hard_training(wing, case, steps, seed=0):
    """200 Adam steps at a high rate on heavy tails, then far-out inputs."""
    flow = wing.build(case, seed, dtype="float32", noise=0)
    flow, losses = wing.train(flow, batches(heavy_tails(), steps, 256), 1e-2)
    assert np.isfinite(losses).all()
    assert np.isfinite(wing.log_prob(wing.density(flow), inputs(1e6))).all()
    for magnitude in MAGNITUDES:
        assert error(wing, flow, inputs(magnitude)) <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layers", [8, 64])
@pytest.mark.parametrize("name", ["nice", "realnvp", "glow"])
def test_hard_training(wing, name, layers, seed):
    hard_training(wing, case(name, 8, layers=layers, hidden=(64, 64)), 200, seed)


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow"])
def test_hard_training_in_short(wing, name):
    hard_training(wing, case(name, 8, layers=8, hidden=(32,)), 40)


def two_moons(rows=2000, seed=0):
    x, _ = make_moons(rows, noise=0.05, random_state=seed)
    return ((x - x.mean(0)) / x.std(0)).astype("float32")


def held_out_nats(wing, flow):
    return -wing.log_prob(wing.density(flow), two_moons(seed=1)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_two_moons(wing, name, seed):
    """`fit` at thirty times its usual rate."""
    flow = wing.build(case(name, 2, hidden=(64, 64)), seed, dtype="float32", noise=0)
    random = {"key": wing.key(seed)} if hasattr(wing, "key") else {"seed": seed}
    options = {"steps": 500, "learning_rate": 3e-2, "progress": False}
    result = wing.package.fit(flow, two_moons(), **options, **random)
    assert np.isfinite(result.losses).all()
    assert held_out_nats(wing, result.flow) < 2.0


@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_two_moons_in_short(wing, name):
    """Better than the best Gaussian (2.51 nats) after a few steps."""
    flow = wing.build(case(name, 2, layers=4, hidden=(32,)), 0, dtype="float32", noise=0)
    flow, losses = wing.train(flow, batches(two_moons(), 100, 256, 0), 1e-2)
    assert np.isfinite(losses).all()
    assert held_out_nats(wing, flow) < 2.4
