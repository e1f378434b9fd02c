"""Five data sets in the plane, as `(n, 2)` arrays."""

import numpy as np


def parabola(n, rng):
    x = rng.normal(0.0, 1.0, n)
    return np.stack([x, x**2 + rng.normal(0.0, 0.3, n)], axis=1)


def moons(n, rng):
    angle = rng.uniform(0.0, np.pi, n)
    upper = rng.random(n) < 0.5
    x = np.where(upper, np.cos(angle), 1.0 - np.cos(angle))
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle))
    return np.stack([x, y], axis=1) + rng.normal(0.0, 0.1, (n, 2))


def circles(n, rng):
    angle = rng.uniform(0.0, 2.0 * np.pi, n)
    radius = rng.choice([0.5, 1.0], n) + rng.normal(0.0, 0.06, n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def blobs(n, rng):
    centres = np.array([[-1.0, -0.6], [1.0, -0.6], [0.0, 1.1]])
    return centres[rng.integers(3, size=n)] + rng.normal(0.0, 0.25, (n, 2))


def unstructured(n, rng):
    return rng.uniform(-1.0, 1.0, (n, 2))


TOYS = {f.__name__: f for f in (parabola, moons, circles, blobs, unstructured)}
