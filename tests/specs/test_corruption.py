"""Corrupted images: nothing at strength 0, and what each kind promises at others."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from pyroflows_common.corruption import KINDS

SHAPE = (3, 2, 12, 12)


def images(dtype="float32", seed=0):
    x = np.random.default_rng(seed).random(SHAPE)
    return np.rint(255 * x).astype(dtype) if dtype == "uint8" else x.astype(dtype)


def corrupted(wing, x, kind, strength, **options):
    if kind == "morph":
        options.setdefault("other", images(x.dtype, seed=1))
    return wing.apply("corrupt", x, kind, strength, **options)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_at_strength_zero_and_more_with_more(wing, kind, dtype):
    x = images(dtype)
    assert_array_equal(corrupted(wing, x, kind, 0.0), x)
    changes = []
    for strength in (0.2, 0.4, 0.8):
        y = corrupted(wing, x, kind, strength)
        assert y.dtype == x.dtype
        assert y.shape == x.shape
        assert y.min() >= 0
        assert y.max() <= (255 if dtype == "uint8" else 1)
        changes.append(abs(y.astype(float) - x).mean())
        assert_array_equal(corrupted(wing, x, kind, strength), y)
    assert 0 < changes[0] < changes[1] < changes[2]


def test_full_strength(wing):
    x, other = images(), images(seed=1)
    turned = corrupted(wing, x, "rotation", 1.0)
    quarter = [np.rot90(x, turns, axes=(-2, -1)) for turns in (1, -1)]
    assert min(abs(turned - q).max() for q in quarter) < 1e-5
    mean = x.mean((-3, -2, -1), keepdims=True)
    assert_allclose(corrupted(wing, x, "contrast", 1.0), np.broadcast_to(mean, SHAPE), rtol=1e-6)
    assert_array_equal(corrupted(wing, x, "morph", 1.0, other=other), other)
    assert_array_equal(
        corrupted(wing, x, "morph", 1.0, other=other[0]), np.broadcast_to(other[0], SHAPE)
    )


def test_pixels_and_noise_are_as_strong_as_they_say(wing):
    x = np.full((4, 1, 64, 64), 0.5, np.float32)
    share = (corrupted(wing, x, "pixels", 0.2) != x).mean()
    assert_allclose(share, 0.2 * 255 / 256, atol=0.02)
    assert_allclose(corrupted(wing, x, "noise", 0.1).std(), 0.1, rtol=0.03)
    other = corrupted(wing, x, "noise", 0.1, seed=1)
    assert abs(other - corrupted(wing, x, "noise", 0.1)).mean() > 0.05


def test_blur_and_shear_by_hand(wing):
    x = images()
    blurred = np.stack([[ndimage.gaussian_filter(plane, 0.75) for plane in image] for image in x])
    assert_allclose(corrupted(wing, x, "blur", 0.5), blurred, atol=1e-5)
    line = np.zeros((1, 1, 5, 5), np.float32)
    line[..., 2] = 1  # upright, in the middle
    sheared = corrupted(wing, line, "shear", 1.0)[0, 0]
    diagonals = np.eye(5), np.eye(5)[::-1]
    assert min(abs(sheared - d).max() for d in diagonals) < 1e-6


def test_levels_are_those_of_the_pixels(wing):
    x = np.full((2, 1, 4, 4), 16, np.uint8)
    y = corrupted(wing, x, "noise", 0.5, levels=17)
    assert y.max() == 16
    assert len(np.unique(y)) > 5
    with pytest.raises(ValueError, match="`x` has whole numbers from 16 to 16, expected 0 to 7"):
        corrupted(wing, x, "noise", 0.5, levels=8)


X = images()
ERRORS = {
    "kind": ((X, "melt", 0.1), {}, ValueError, "`kind` is 'melt', expected one of blur, contrast"),
    "strength": ((X, "blur", 1.5), {}, ValueError, "`strength` is 1.5"),
    "no other": ((X, "morph", 0.1), {}, ValueError, "`other` is missing"),
    "other": ((X, "blur", 0.1), {"other": X}, ValueError, "`other` is for kind='morph'"),
    "other size": (
        (X, "morph", 0.1), {"other": X[..., :6]}, ValueError, r"`other` has shape \(3, 2, 12, 6\)",
    ),
    "other count": (
        (X, "morph", 0.1), {"other": X[:2]}, ValueError, "expected one image for each of `x`",
    ),
    "other dtype": (
        (X, "morph", 0.1), {"other": images("uint8")}, ValueError, "and dtype uint8, expected",
    ),
    "range": ((X + 1, "blur", 0.1), {}, ValueError, "`x` has real numbers from 1"),
    "nan": ((X * np.float32(np.nan), "blur", 0.1), {}, ValueError, "`x` has real numbers from nan"),
    "vector": ((X[0, 0, 0], "blur", 0.1), {}, ValueError, r"`x` has shape \(12,\)"),
    "list": (([1.0], "blur", 0.1), {}, TypeError, "`x` is a list"),
    "dtype": ((X > 0.5, "blur", 0.1), {}, TypeError, "`x` has dtype bool"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(wing, name):
    args, options, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        wing.apply("corrupt", *args, **options)
