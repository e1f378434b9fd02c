"""Laws of the distribution that a base and a flow make."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from tests.specs.registry import BUILDERS, FLOWS, KINDS, case

PLANE = [
    case("nice", 2),
    case("realnvp", 2, layers=4),
    case("realnvp", 2, layers=3, batch_norm=True, scale="sigmoid"),
    case("realnvp", 2, layers=2, scale="exp", robust=False),
    case("realnvp", 2, layers=2, scale="clamp", context_dim=2),
    case("glow", 2, layers=3),
    case("glow", 2, layers=2, scale="tanh", context_dim=2),
]
SHORT = [case for case in FLOWS if case in KINDS]


@pytest.mark.parametrize(
    ("case", "base"), [*((case, "normal") for case in PLANE), (PLANE[1], "logistic")], ids=str
)
def test_integrates_to_one(wing, case, base):
    """By quadrature on a grid that covers the samples amply."""
    flow, context = wing.build(case), case.context()
    density = wing.density(flow, base, context)
    samples = wing.sample(density, (2000,))
    centre, reach = samples.mean(0), 10 * samples.std(0)
    steps = 400
    axes = [np.linspace(c - r, c + r, steps) for c, r in zip(centre, reach, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    mass = np.exp(wing.log_prob(density, grid)).sum()
    assert_allclose(mass * np.prod(2 * reach / (steps - 1)), 1.0, atol=2e-3)


@pytest.mark.parametrize("name", BUILDERS)
def test_one_number_given_a_context(wing, name):
    """In each of several contexts a density, whose mean and width its samples have."""
    scalar = case(name, 1, context_dim=2)
    flow, context = wing.build(scalar), scalar.context(3)
    density = wing.density(flow, context=context)
    samples = wing.sample(density, (4000,))[..., 0]
    centre, width = samples.mean(0), samples.std(0)
    grid = centre + width * np.linspace(-10, 10, 2001)[:, None]
    p = np.exp(wing.log_prob(density, grid[..., None])) * width * 0.01
    assert_allclose(p.sum(0), 1.0, rtol=1e-6)
    mean = (p * grid).sum(0)
    assert_allclose(mean, centre, atol=0.1 * width.max())
    assert_allclose(np.sqrt((p * (grid - mean) ** 2).sum(0)), width, rtol=0.05)
    assert np.ptp(mean) > 0.1


@pytest.mark.parametrize(
    ("case", "base"), [*((case, "normal") for case in SHORT), (SHORT[0], "logistic")], ids=str
)
def test_samples_follow_the_density(wing, case, base):
    """Encoded samples are the base's: each coordinate passes a Kolmogorov-Smirnov test."""
    flow, context = wing.build(case, noise=0.15), case.context()
    samples = wing.sample(wing.density(flow, base, context), (2000,), seed=2)
    encoded, _ = wing.inverse(flow, samples, context)
    assert samples.shape == (2000, *case.shape)
    for column in encoded.T:
        assert stats.kstest(column, "norm" if base == "normal" else "logistic").pvalue > 1e-5
    assert abs(np.corrcoef(encoded.T) - np.eye(encoded.shape[1])).max() < 0.15


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_log_prob_agrees_with_the_host(wing, case):
    """A flow is correct in the host's own distribution, too, with a base of the user's own."""
    flow = wing.build(case)
    points, context = case.points(3), case.context(3)
    base = wing.normal_base(case.base_shape, 0.5, 2.0)
    ours = wing.density(flow, base, context)
    host = wing.host_density(flow, base, context)
    z, ladj = wing.inverse(flow, points, context)
    expected = stats.norm(0.5, 2.0).logpdf(z).reshape(3, -1).sum(-1) + ladj
    for density in (ours, host):
        assert_allclose(wing.log_prob(density, points), expected, rtol=1e-10, atol=1e-10)
    assert isinstance(ours, type(host))
    shape = (3,) if context is None else ()  # three events: JAX has the program
    drawn = wing.sample(ours, shape)
    assert drawn.dtype == "float64"
    assert_allclose(drawn, wing.sample(host, shape))


@pytest.mark.parametrize(
    ("case", "shape"),
    [*((case, (3,)) for case in SHORT), (SHORT[0], ()), (SHORT[0], (2, 3))],
    ids=str,
)
def test_a_sample_and_its_density_in_one_go(wing, case, shape):
    flow, context = wing.build(case), case.context()
    density = wing.density(flow, None, context)
    sample, log_prob = wing.sample_and_log_prob(density, shape)
    assert sample.shape == (*shape, *case.shape)
    assert log_prob.shape == shape
    assert sample.dtype == log_prob.dtype == "float64"
    fresh = wing.density(flow, None, context)
    assert_allclose(log_prob, wing.log_prob(fresh, sample), rtol=1e-9, atol=1e-9)
    assert_allclose(sample, wing.sample(density, shape), rtol=1e-12)


def test_temperature_scales_the_base(wing):
    flow = wing.build(case("realnvp", 2, layers=2))
    for base in ("normal", "logistic"):
        warm = wing.sample(wing.density(flow, base), (50,))
        cool = wing.sample(wing.density(flow, base, temperature=0.5), (50,))
        assert_allclose(wing.inverse(flow, cool)[0], wing.inverse(flow, warm)[0] / 2, atol=1e-9)


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow"])
def test_distribution_shapes(wing, name):
    density = wing.density(wing.build(case(name, 3, layers=2)))
    assert tuple(density.batch_shape) == ()
    assert tuple(density.event_shape) == (3,)
    conditional = wing.build(case(name, 3, layers=2, context_dim=2))
    density = wing.density(conditional, context=np.zeros((4, 1, 2)))
    assert tuple(density.batch_shape) == (4, 1)
    assert tuple(density.event_shape) == (3,)
    assert wing.sample(density, (5,)).shape == (5, 4, 1, 3)
    assert wing.log_prob(density, np.zeros((4, 6, 3))).shape == (4, 6)
