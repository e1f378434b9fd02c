"""Pixels: dequantisation, the logit, and what bits per dimension count."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import integrate, special

from tests.specs.registry import case


def dequantized(wing, x, seed=0, **options):
    return wing.numpy(wing.dequantize(wing.array(x), seed, **options))


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantisation_keeps_the_level(wing, levels):
    x = np.arange(levels)[:, None] + np.zeros((1, 500), dtype=int)
    y = dequantized(wing, x, levels=levels)
    assert y.min() >= 0
    assert y.max() < 1
    assert_array_equal(np.floor(y * levels), x)
    noise = y * levels - x
    assert_allclose(noise.mean(1), 0.5, atol=0.08)
    assert_allclose(noise.var(1), 1 / 12, atol=0.02)


def test_dequantisation_repeats_by_its_seed(wing):
    x = np.full((3, 4), 7, dtype="uint8")
    assert_array_equal(dequantized(wing, x), dequantized(wing, x))
    assert (dequantized(wing, x) != dequantized(wing, x, seed=1)).all()
    assert dequantized(wing, x).shape == x.shape


def test_the_largest_noise_does_not_reach_the_next_level(wing):
    """In float32 a sum of 255 and nearly one is 256."""
    y = dequantized(wing, np.full(300_000, 255, dtype="uint8"))
    assert y.max() < 1


def test_what_is_not_a_pixel(wing):
    for x in (np.ones(3), np.ones(3, dtype=bool), np.ones(3, dtype=complex)):
        with pytest.raises(TypeError, match="`x` is .*whole numbers"):
            wing.dequantize(wing.array(x), 0)
    for x in ([0, 256], [-1, 3]):
        with pytest.raises(ValueError, match=f"`x` has numbers from {min(x)} to {max(x)}, .*255"):
            wing.dequantize(wing.array(np.array(x)), 0)
    assert dequantized(wing, np.zeros((0, 2), dtype=int)).shape == (0, 2)


def test_bits_of_known_densities(wing):
    """A uniform density costs the full number of bits; twice the density, one bit less."""
    bits = wing.package.bits_per_dim
    for shape in (4, (3,), (3, 32, 32)):
        size = int(np.prod(shape))
        for levels in (2, 17, 256):
            assert_allclose(bits(0.0, shape, levels=levels), math.log2(levels), rtol=1e-12)
            halved = bits(size * math.log(2), shape, levels=levels)
            assert_allclose(halved, math.log2(levels) - 1, rtol=1e-12)
    found = bits(wing.array(np.zeros((2, 5))), (1, 8, 8))
    assert_allclose(wing.numpy(found), np.full((2, 5), 8.0))


def test_bits_of_a_density_by_hand(wing):
    """One pixel of four levels with density 2y on the unit interval.

    Level k has the probability (2k + 1) / 16, and `E log2 2y` under noise is that of its
    interval; bits are the mean of `2 − log2 2y`.
    """
    edges = np.linspace(0, 1, 5)
    y = edges[:-1, None] + 0.25 * (np.arange(10**6) + 0.5) / 10**6
    log_density = np.log(2 * y)
    got = wing.package.bits_per_dim(log_density, 1, levels=4).mean(1)
    antiderivative = special.xlogy(edges, 2 * edges) - edges
    exact = 2 - (antiderivative[1:] - antiderivative[:-1]) / 0.25 / math.log(2)
    assert_allclose(got, exact, atol=1e-6)
    probability = (2 * np.arange(4) + 1) / 16
    assert (got >= -np.log2(probability) - 1e-6).all()  # a bound from below on the likelihood


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.05])
def test_bits_through_the_logit_are_those_of_the_pixels(wing, alpha):
    """A logistic base and a logit alone: the density of sigmoid(z) is uniform."""
    layer = wing.build(case("Logit", 2, alpha=alpha))
    density = wing.density(layer, wing.logistic_base((2,)))
    y = np.random.default_rng(0).uniform(0.01, 0.99, (50, 2))
    bits = wing.package.bits_per_dim(wing.log_prob(density, y), 2, levels=256)
    expected = 8 - math.log2(1 - 2 * alpha)  # uniform on an interval that is as much wider
    assert_allclose(bits, expected, rtol=1e-6)


IMAGES = [
    case("glow", (1, 2, 2), levels=1, steps=2, channels=3, logit=0.05),
    case("realnvp", (1, 2, 2), scales=1, channels=3, blocks=1, logit=0.05),
    case("nice", (1, 2, 2), layers=2, hidden=(4,), logit=0.05),
]


@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_the_density_of_a_tiny_image_model_integrates_to_one(wing, case):
    """By Gauss-Legendre quadrature in the space of logits, where the density is smooth."""
    flow = wing.build(case, noise=0.1)
    density = wing.density(flow)
    nodes, weights = np.polynomial.legendre.leggauss(16)
    reach = 6.0
    axis, weight = reach * nodes, reach * weights
    x = np.stack(np.meshgrid(*[axis] * 4, indexing="ij"), -1).reshape(-1, 1, 2, 2)
    w = np.prod(np.meshgrid(*[weight] * 4, indexing="ij"), axis=0).ravel()
    p = special.expit(x)
    margin = 0.05 / 0.9
    y = (1 + 2 * margin) * p - margin
    slope = ((1 + 2 * margin) * p * (1 - p)).prod((-1, -2, -3))
    mass = (np.exp(wing.log_prob(density, y)) * slope * w).sum()
    assert_allclose(mass, 1.0, atol=5e-3)


def test_the_logit_in_one_dimension_by_integration(wing):
    layer = wing.build(case("Logit", 1, alpha=0.05))
    density = wing.density(layer, wing.normal_base((1,), 0.3, 0.7))
    margin = 0.05 / 0.9

    def p(y):
        return math.exp(wing.log_prob(density, np.array([y])))

    mass, _ = integrate.quad(p, -margin + 1e-9, 1 + margin - 1e-9, limit=200)
    assert_allclose(mass, 1.0, atol=1e-6)
