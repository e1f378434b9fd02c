"""Agreement with what the papers' equations give in NumPy."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.reference import log_density, logistic, normal
from tests.specs.registry import CASES, FLOWS, case


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["new", "perturbed"])
def test_layers_and_builders(wing, case, noise):
    flow = wing.build(case, noise=noise)
    reference = case.reference(wing.state(flow))
    context = case.context(3)
    for ours, theirs, points in [
        (wing.forward, reference.forward, case.latents(3)),
        (wing.inverse, reference.inverse, case.points(3)),
    ]:
        value, ladj = ours(flow, points, context)
        expected, expected_ladj = theirs(points, context)
        assert_allclose(value, expected, rtol=1e-10, atol=1e-10)
        assert_allclose(ladj, expected_ladj, rtol=1e-10, atol=1e-10)


BASES = {
    "default": (None, 1.0, normal),
    "normal": ("normal", 1.0, normal),
    "logistic": ("logistic", 1.0, logistic),
    "cool normal": ("normal", 0.7, lambda z: normal(z, 0.7)),
    "cool logistic": ("logistic", 0.7, lambda z: logistic(z, 0.7)),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", FLOWS, ids=str)
def test_densities(wing, case, base):
    name, temperature, reference_base = BASES[base]
    flow = wing.build(case)
    points, context = case.points(3), case.context(3)
    density = wing.density(flow, name, context, temperature)
    expected = log_density(case.reference(wing.state(flow)), points, reference_base, context)
    assert_allclose(wing.log_prob(density, points), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", range(2, 8))
@pytest.mark.parametrize("swap", [False, True])
def test_partitions(wing, size, swap):
    """Halves keeps the first half, alternating the even coordinates."""
    index = np.arange(size)
    for name, mask in [("halves", index < size // 2), ("alternating", index % 2 == 0)]:
        partition = getattr(wing.package, name)(size, swap=swap)
        mask = mask != swap
        assert partition.mask == tuple(mask.tolist())
        assert partition == wing.package.Partition(mask.tolist())
        assert partition != partition.swap
        assert partition.swap.swap == partition
        assert hash(partition) == hash(wing.package.Partition(mask.tolist()))
        assert partition.sizes == (mask.sum(), (~mask).sum())
        x = np.arange(2.0 * size).reshape(2, size)
        a, b = partition.split(wing.array(x))
        assert_allclose(wing.numpy(a), x[:, mask])
        assert_allclose(wing.numpy(b), x[:, ~mask])
        assert_allclose(wing.numpy(partition.join(a, b)), x)


@pytest.mark.parametrize("size", [1, 3])
def test_a_partition_with_an_empty_part(wing, size):
    """All coordinates are transformed, whichever coupling of a pair it is."""
    partition = wing.package.Partition([False] * size)
    assert partition.swap is partition
    assert partition.sizes == (0, size)
    if size == 1:
        for name in ("halves", "alternating"):
            for swap in (False, True):
                assert getattr(wing.package, name)(1, swap=swap) == partition
    x = np.arange(2.0 * size).reshape(2, size)
    a, b = partition.split(wing.array(x))
    assert a.shape == (2, 0)
    assert_allclose(wing.numpy(b), x)
    assert_allclose(wing.numpy(partition.join(a, b)), x)


def test_builders_default_to_their_papers(wing):
    """NICE has four couplings, even and odd coordinates; Glow's sigmoid, RealNVP's tanh."""
    for name, given in [
        ("nice", {"layers": 4, "partition": "alternating"}),
        ("realnvp", {"layers": 8, "partition": "halves", "scale": "tanh"}),
        ("glow", {"layers": 8, "partition": "halves", "scale": "sigmoid"}),
    ]:
        plain = wing.build(case(name, 4))
        spelled_out = wing.build(case(name, 4, **given))
        points = np.random.default_rng(0).standard_normal((3, 4))
        for got, expected in zip(
            wing.inverse(plain, points), wing.inverse(spelled_out, points), strict=True
        ):
            assert_allclose(got, expected)
