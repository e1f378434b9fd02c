"""Corruptions of images, from none to strong."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pyroflows_common.checks import as_count

KINDS = ("blur", "contrast", "morph", "noise", "pixels", "rotation", "shear")
RANDOM = ("noise", "pixels")
RIGHT_ANGLE = math.pi / 2


def corrupt(
    x: np.ndarray,
    kind: str,
    strength: float,
    other: np.ndarray | None,
    levels: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Corrupt images `(*batch, C, H, W)`: whole numbers below `levels`, or numbers in [0, 1]."""
    if kind not in KINDS:
        raise ValueError(f"`kind` is {kind!r}, expected one of {', '.join(KINDS)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"`strength` is {strength!r}, expected a number from 0 to 1")
    white = as_count(levels, "levels", 2) - 1
    check_images(x, white, "x")
    if (kind == "morph") != (other is not None):
        needed = "is missing: kind='morph' needs" if kind == "morph" else "is for kind='morph':"
        raise ValueError(f"`other` {needed} the images to morph into")
    if other is not None:
        check_images(other, white, "other")
        if other.shape[-3:] != x.shape[-3:] or other.dtype.kind != x.dtype.kind:
            raise ValueError(
                f"`other` has shape {other.shape} and dtype {other.dtype}, expected images like "
                f"`x`, of shape {x.shape} and dtype {x.dtype}"
            )
        try:
            other = np.broadcast_to(other, x.shape)
        except ValueError:
            raise ValueError(
                f"`other` has shape {other.shape}, expected one image for each of `x`, {x.shape}"
            ) from None
    if strength == 0:
        return x.copy()
    unit = white if x.dtype.kind in "iu" else 1
    y = _corrupted(x / unit, kind, strength, None if other is None else other / unit, white, rng)
    y = y.clip(0, 1) * unit
    return (np.rint(y) if x.dtype.kind in "iu" else y).astype(x.dtype)


def check_images(x: np.ndarray, white: int, name: str) -> None:
    """Check that `x` are images: whole numbers up to `white`, or numbers in [0, 1]."""
    if x.dtype.kind not in "iuf":
        raise TypeError(f"`{name}` has dtype {x.dtype}, expected whole or real numbers")
    if x.ndim < 3 or not x.size:
        raise ValueError(f"`{name}` has shape {x.shape}, expected images (*batch, C, H, W)")
    highest = white if x.dtype.kind in "iu" else 1
    if not (x.min() >= 0 and x.max() <= highest):
        kind = "whole" if x.dtype.kind in "iu" else "real"
        raise ValueError(
            f"`{name}` has {kind} numbers from {x.min()} to {x.max()}, expected 0 to {highest}"
        )


def _corrupted(
    x: np.ndarray,
    kind: str,
    strength: float,
    other: np.ndarray | None,
    white: int,
    rng: np.random.Generator,
) -> np.ndarray:
    if kind == "noise":
        return x + strength * rng.standard_normal(x.shape)
    if kind == "pixels":
        anew = rng.integers(0, white, x.shape, endpoint=True) / white
        return np.where(rng.random(x.shape) < strength, anew, x)
    if kind == "contrast":
        return (1 - strength) * x + strength * x.mean((-3, -2, -1), keepdims=True)
    if other is not None:
        return (1 - strength) * x + strength * other
    if kind == "blur":
        sides = x.shape[-2:]
        return _filters().gaussian_filter(x, strength * min(sides) / 8, axes=(-2, -1))
    if kind == "shear":
        return _warped(x, np.array([[1.0, 0.0], [strength, 1.0]]))
    cos, sin = math.cos(strength * RIGHT_ANGLE), math.sin(strength * RIGHT_ANGLE)
    return _warped(x, np.array([[cos, -sin], [sin, cos]]))


def _warped(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Map each plane linearly about its centre; beyond its edge it goes on as the edge."""
    warp: Callable[..., np.ndarray] = _filters().affine_transform
    centre = (np.array(x.shape[-2:]) - 1) / 2
    offset = centre - matrix @ centre
    planes = x.reshape(-1, *x.shape[-2:])
    y = [warp(plane, matrix, offset, order=1, mode="nearest") for plane in planes]
    return np.stack(y).reshape(x.shape)


def _filters() -> Any:
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError(
            "this corruption needs SciPy, which the extra pyroflows[applications] installs"
        ) from error
    return ndimage
