"""Five data sets in the plane, as `(n, 2)` arrays, and the densities that they are drawn from."""

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


def log_density(name, points):
    """Return the log-density of points under the distribution that a set is drawn from."""
    x, y = np.asarray(points, float).T
    if name == "parabola":
        return normal(x, 0.0, 1.0) + normal(y, x**2, 0.3)
    if name == "moons":  # an average over the angle
        angle = np.linspace(0.0, np.pi, 1000)[:, None]
        upper = normal(x, np.cos(angle), 0.1) + normal(y, np.sin(angle), 0.1)
        lower = normal(x, 1.0 - np.cos(angle), 0.1) + normal(y, 0.5 - np.sin(angle), 0.1)
        return mixture([*upper, *lower])
    if name == "circles":
        radius = np.hypot(x, y)
        rings = [normal(radius, size, 0.06) for size in (0.5, 1.0)]
        return mixture(rings) - np.log(2.0 * np.pi * radius)
    if name == "blobs":
        centres = [(-1.0, -0.6), (1.0, -0.6), (0.0, 1.1)]
        return mixture([normal(x, a, 0.25) + normal(y, b, 0.25) for a, b in centres])
    return np.where((abs(x) < 1.0) & (abs(y) < 1.0), -np.log(4.0), -np.inf)


def normal(x, mean, deviation):
    return -0.5 * ((x - mean) / deviation) ** 2 - np.log(deviation * np.sqrt(2.0 * np.pi))


def mixture(log_densities):
    return np.logaddexp.reduce(log_densities) - np.log(len(log_densities))
