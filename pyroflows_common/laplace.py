"""Laplace's method for models of groups: the posterior of the global sites, without the local ones.

Each group, or row, has d local numbers of its own, given the G global ones. Their conditional mode
and curvature integrate them out of the model, row by row:

$$\\log p(y, g) \\approx \\log p(g) + \\frac{N}{n} \\sum_i \\left[\\ell_i(\\hat z_i(g), g)
+ \\frac d2 \\log 2\\pi - \\frac12 \\log |H_i(g)|\\right], \\qquad
\\ell_i(z, g) = \\log p(y_i, z \\mid g).$$

Tierney and Kadane, "Accurate approximations for posterior moments and marginal densities" (JASA
1986); Rue, Martino and Chopin, "Approximate Bayesian inference for latent Gaussian models" (JRSS B
2009), section 3.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

# Most Newton steps to the modes of rows, and to that of the global sites.
ROW_STEPS, STEPS = 40, 30
# A row is at its mode once the square of its last step, in standard deviations, is below this.
SETTLED = 1e-4
# Smallest curvature, relative to a row's largest.
FLAT = 1e-6
# Up to this many global numbers the search sees their correlations.
JOINT = 24
# Longest Newton step of the search, in standard deviations, and multiples of it that are tried.
LONGEST, MULTIPLES = 5.0, 2.0 ** np.arange(4, -6, -1)
# The search ends where a step would be this short, and curvatures this close to those expected.
NEAR, ALIKE = 0.05, 0.3
# Most numbers that the slopes of all rows may have.
SLOPES = 2**22
# Rows that the model takes at once, and that climb to their modes together.
AT_ONCE, MANY = 2**14, 2**18
# Rows that lead the way to the mode of the global sites, and that place it.
SOME, ENOUGH = 1000, 20_000


class Derived(NamedTuple):
    """The log-densities of P blocks of n rows, with derivatives in the local numbers.

    Args:
        whole: `(P,)`, log-density of the global sites.
        value: `(P, n)`, that of each row.
        slope: `(P, n, d)`.
        curvature: `(P, n, d, d)`, minus the second derivatives.
    """

    whole: np.ndarray
    value: np.ndarray
    slope: np.ndarray
    curvature: np.ndarray


# From global numbers `(P, G)`, local ones `(P, n, d)` and the rows' indices `(P, n)`.
Derive = Callable[[np.ndarray, np.ndarray, np.ndarray], Derived]


class Modes(NamedTuple):
    """Conditional modes of P blocks of rows.

    Args:
        z: `(P, n, d)`, the modes.
        derived: densities and derivatives there.
    """

    z: np.ndarray
    derived: Derived

    def log_marginals(self) -> np.ndarray:
        """Return `(P, n)`, the log-density of each row without its local numbers."""
        values, _ = _eigen(self.derived.curvature)
        size = 0.5 * self.z.shape[-1] * math.log(2 * math.pi)
        return self.derived.value + size - 0.5 * np.log(values).sum(-1)

    def factors(self) -> np.ndarray:
        """Return `(P, n, d, d)`, the lower Cholesky factor of each row's covariance."""
        values, vectors = _eigen(self.derived.curvature)
        root = vectors / np.sqrt(values)[..., None, :]
        # The triangle of a QR decomposition: the covariance itself would lose small variances.
        upper = np.linalg.qr(root.swapaxes(-1, -2), mode="r")
        signs = np.sign(np.diagonal(upper, axis1=-2, axis2=-1))
        return (upper * np.where(signs == 0, 1.0, signs)[..., None]).swapaxes(-1, -2)


def conditional_modes(derive: Derive, x: np.ndarray, z: np.ndarray, rows: np.ndarray) -> Modes:
    """Climb to the mode of each row by damped Newton steps.

    Args:
        derive: the model.
        x: `(P, G)`, global numbers.
        z: `(P, n, d)`, where the rows start.
        rows: `(P, n)`, their indices.
    """
    found = _sound(derive(x, z, rows))
    damping = np.zeros(found.value.shape)
    for _ in range(ROW_STEPS):
        values, vectors = _eigen(found.curvature)
        turned = np.einsum("...ji,...j->...i", vectors, found.slope)
        settled = (turned**2 / values).sum(-1) < SETTLED
        stretch = (values * (1 + damping[..., None])).clip(min=1e-30)
        way = np.einsum("...ij,...j->...i", vectors, turned / stretch)
        tried = _sound(derive(x, z + way, rows))
        better = tried.value >= found.value - 1e-6 * (1 + np.abs(found.value))
        z = np.where(better[..., None], z + way, z)
        found = Derived(found.whole, *(_taken(better, *pair) for pair in zip(tried[1:], found[1:])))
        damping = np.where(better, damping / 8, np.maximum(4 * damping, 1.0))
        if settled.all() or (damping > 1e8).all():
            break
    return Modes(z, found)


class Marginal:
    """The log-density of the global numbers, up to Laplace's method, from some or all rows.

    Args:
        derive: the model.
        rows: `(R, n)`, indices of the rows.
        weights: `(R, n)`, how much each counts.
        z: `(d,)`, where each row starts.
    """

    def __init__(
        self, derive: Derive, rows: np.ndarray, weights: np.ndarray, z: np.ndarray
    ) -> None:
        self.derive, self.rows, self.weights = derive, rows, weights
        self.z = np.broadcast_to(z, (*rows.shape, z.shape[-1]))

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the log-density at points `(Q, G)`; -inf where it is not finite."""
        total, count = np.zeros(len(points)), len(points)
        for some in self._parts(count):
            modes = self._modes(points, some)
            found = modes.log_marginals().reshape(-1, count, self.rows.shape[1])
            total += (self.weights[some][:, None] * found).sum((0, 2))
            whole = modes.derived.whole[:count]
        total += whole
        return np.where(np.isfinite(total), total, -np.inf)

    def settle(self, point: np.ndarray) -> None:
        """Let rows start at their modes at this point from now on."""
        modes = [self._modes(point[None], some).z for some in self._parts(1)]
        self.z = np.concatenate(modes)

    def _parts(self, points: int) -> Iterator[slice]:
        """Return blocks that are evaluated at once at so many points."""
        step = max(MANY // (points * self.rows.shape[1]), 1)
        return (slice(k, k + step) for k in range(0, len(self.rows), step))

    def _modes(self, points: np.ndarray, some: slice) -> Modes:
        """Return the modes of some blocks at each point, one block after the other."""
        rows, z = (np.repeat(a[some], len(points), 0) for a in (self.rows, self.z))
        return conditional_modes(self.derive, np.tile(points, (len(rows) // len(points), 1)), z, rows)


class Gaussian(NamedTuple):
    """The Gaussian that stands for the posterior of the global numbers.

    Args:
        loc: `(G,)`.
        factor: `(G, G)`, a factor of the covariance.
        value: log-density at `loc`.
    """

    loc: np.ndarray
    factor: np.ndarray
    value: float


def climbed(marginal: Marginal, start: Gaussian) -> Gaussian:
    """Climb to the mode of the global numbers, by differences over a standard deviation each way.

    Such differences see the curvature on the scale of the posterior, and no rounding errors.
    """
    loc, factor, _ = start
    size = len(loc)
    eye, pairs = np.eye(size), _pairs(size)
    design = np.concatenate([np.zeros((1, size)), eye, -eye, *(p[None] for p in pairs.values())])
    value = -np.inf
    for _ in range(STEPS):
        marginal.settle(loc)
        found = marginal(loc + design @ factor.T)
        value, up, down = found[0], found[1 : size + 1], found[size + 1 : 2 * size + 1]
        slope = np.nan_to_num((up - down) / 2, posinf=LONGEST, neginf=-LONGEST)
        curvature = np.diag(np.nan_to_num(2 * value - up - down, nan=1.0, posinf=1e4, neginf=1e4))
        for (j, k), mixed in zip(pairs, found[2 * size + 1 :], strict=True):
            curvature[j, k] = curvature[k, j] = np.nan_to_num(up[j] + up[k] - value - mixed)
        values, vectors = np.linalg.eigh(curvature)
        stretch = np.clip(np.abs(values), 1e-2, 1e4)
        way = vectors @ ((vectors.T @ slope) / stretch)
        length = np.linalg.norm(way)
        way *= min(1.0, LONGEST / max(length, 1e-30))
        tried = marginal(loc + (MULTIPLES[:, None] * way) @ factor.T)
        k = int(np.argmax(tried))
        better = tried[k] > value
        loc = loc + MULTIPLES[k] * (factor @ way) if better else loc
        factor = factor @ (vectors / np.sqrt(stretch))
        alike = np.abs(np.log(stretch)).max() < ALIKE
        if alike and (length < NEAR or not better):
            break
    return Gaussian(loc, factor, float(max(value, tried[k])))


def blocks(size: int, taken: int, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks of rows `(R, taken)` and their weights, whose sum is the number of rows.

    Args:
        size: number of rows.
        taken: number of rows of a block; the last block repeats rows, without weight.
        most: how many rows are enough; they are random ones. Default: all.
    """
    order = np.arange(size)
    if most is not None and most < size:
        order = np.random.default_rng(0).permutation(size)[: -(-most // taken) * taken]
    count = -(-len(order) // taken)
    rows = np.resize(order, (count, taken))
    weights = (np.arange(count * taken) < len(order)).reshape(count, taken) * (size / len(order))
    return rows, weights


def located(
    derive: Derive,
    points: np.ndarray,
    z: np.ndarray,
    scale: float,
    rows: tuple[int, int],
    follow: bool,
) -> Gaussian | None:
    """Return the Gaussian of the global numbers, whose factor is symmetric up to scales.

    Args:
        derive: the model.
        points: `(C, G)`, where the search may set out from; it does so from the two best.
        z: `(d,)`, where each row starts.
        scale: standard deviation at the start.
        rows: how many there are, and how many a block has.
        follow: whether rows can be chosen; otherwise there is one block, whatever its indices.

    Returns:
        The Gaussian; None if the log-density is finite at no point.
    """
    size, taken = rows
    some = Marginal(derive, *blocks(size, taken, SOME if follow else taken), z)
    heights = some(points)
    order = [k for k in np.argsort(-heights)[:2] if np.isfinite(heights[k])]
    if not order:
        return None
    eye = scale * np.eye(points.shape[1])
    found = max((climbed(some, Gaussian(points[k], eye, 0.0)) for k in order), key=_height)
    if follow and size > SOME:
        found = climbed(Marginal(derive, *blocks(size, taken, ENOUGH), z), found)
    if not np.isfinite(found.value):
        return None
    deviation = np.linalg.norm(found.factor, axis=1)
    basis, values, _ = np.linalg.svd(found.factor / deviation[:, None])
    return found._replace(factor=deviation[:, None] * (basis * values) @ basis.T)


class Responses(NamedTuple):
    """The Gaussians of all N rows, and how they follow the whitened global numbers.

    Args:
        loc: `(N, d)`, conditional modes where the global numbers are at their location.
        factor: `(N, d, d)`, lower Cholesky factors of the covariances there.
        slope: `(N, d, G)`, change of the mode with each, in units of the factor; G may be 0.
        log_slope: `(N, d, G)`, change of the logarithm of the factor's diagonal.
    """

    loc: np.ndarray
    factor: np.ndarray
    slope: np.ndarray
    log_slope: np.ndarray


def followed(rows: int, width: int, size: int) -> int:
    """Return how many of `size` global numbers the rows follow: all, or none if that is too much.

    Args:
        rows: number of rows.
        width: number of local numbers of each.
        size: number of global numbers.
    """
    return size if 2 * rows * width * size <= SLOPES else 0


def responses(
    derive: Derive, size: int, taken: int, start: Gaussian, z: np.ndarray
) -> Responses:
    """Return the Gaussians of all rows, by differences over a standard deviation each way.

    Args:
        derive: the model.
        size: number of rows.
        taken: number of rows of a block.
        start: the Gaussian of the global numbers, whose factor whitens them.
        z: `(d,)`, where each row starts.
    """
    width = z.shape[-1]
    count = followed(size, width, len(start.loc))
    ways = start.factor.T[:count]
    rows, _ = blocks(size, taken)
    found: list[list[np.ndarray]] = []
    at_once = max(MANY // taken, 1)
    for some in (rows[k : k + at_once] for k in range(0, len(rows), at_once)):
        x = np.tile(start.loc, (len(some), 1))
        middle = conditional_modes(derive, x, np.broadcast_to(z, (*some.shape, width)), some)
        factor = middle.factors()
        slopes, log_slopes = [], []
        for way in ways:
            up, down = (
                conditional_modes(derive, x + sign * way, middle.z, some) for sign in (1, -1)
            )
            change = np.linalg.solve(factor, ((up.z - down.z) / 2)[..., None])[..., 0]
            slopes.append(change)
            log_slopes.append(_log_diagonal(up.factors()) - _log_diagonal(down.factors()))
        shape = (*middle.z.shape, count)
        found.append(
            [
                middle.z,
                factor,
                np.stack(slopes, -1) if slopes else np.zeros(shape),
                np.stack(log_slopes, -1) / 2 if slopes else np.zeros(shape),
            ]
        )
    whole = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Responses(*(part.reshape(-1, *part.shape[2:])[:size] for part in whole))


def _height(gaussian: Gaussian) -> float:
    return gaussian.value


def _pairs(size: int) -> dict[tuple[int, int], np.ndarray]:
    """Return the points whose values tell each mixed derivative."""
    if size > JOINT:
        return {}
    eye = np.eye(size)
    return {(j, k): eye[j] + eye[k] for j in range(size) for k in range(j)}


def _eigen(curvature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues, made positive, and eigenvectors."""
    if curvature.shape[-1] == 1:
        values, vectors = curvature[..., 0], np.ones_like(curvature)
    else:
        values, vectors = np.linalg.eigh(curvature)
    values = np.abs(values)
    return np.maximum(values, FLAT * values.max(-1, keepdims=True) + 1e-12), vectors


def _sound(derived: Derived) -> Derived:
    """Return densities that are -inf, with no slope, where they or their derivatives are not."""
    parts = [np.asarray(part, float) for part in derived]
    whole, value, slope, curvature = parts
    sound = np.isfinite(value) & np.isfinite(slope).all(-1) & np.isfinite(curvature).all((-1, -2))
    eye = np.eye(slope.shape[-1])
    return Derived(
        whole,
        np.where(sound, value, -np.inf),
        np.where(sound[..., None], slope, 0.0),
        np.where(sound[..., None, None], curvature, eye),
    )


def _taken(better: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(better.reshape(*better.shape, *[1] * (new.ndim - 2)), new, old)


def _log_diagonal(factor: np.ndarray) -> np.ndarray:
    return np.log(np.diagonal(factor, axis1=-2, axis2=-1))
