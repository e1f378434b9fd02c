r"""Models of groups: the posterior of the global sites, without the local ones.

Each group, or row, has d local numbers of its own, given the G global ones. Row by row, adaptive
quadrature around their conditional mode integrates them out; of more than three numbers, Laplace's
method does, which is quadrature with a single node:

$$\log p(y_i \mid g) \approx \ell_i(\hat z_i, g) + \frac d2 \log 2\pi
- \frac12 \log |H_i|, \qquad \ell_i(z, g) = \log p(y_i, z \mid g).$$

Naylor and Smith, "Applications of a method for the efficient computation of posterior
distributions" (Applied Statistics 1982); Tierney and Kadane, "Accurate approximations for posterior
moments and marginal densities" (JASA 1986); Rue, Martino and Chopin, "Approximate Bayesian
inference for latent Gaussian models" (JRSS B 2009), section 3.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

# Most Newton steps to the modes of rows, and to that of the global sites.
ROW_STEPS, STEPS = 40, 30
# A row is at its mode once the square of its last step, in standard deviations, is below this.
SETTLED = 1e-4
# Smallest curvature, relative to a row's largest.
FLAT = 1e-6
# Nodes along each of up to three local numbers.
NODES = {1: 9, 2: 7, 3: 5}
# Most skewness that a row starts with.
SKEWEST = 0.9
# Up to this many global numbers the search sees their correlations.
JOINT = 24
# Longest Newton step of the search, in standard deviations, and multiples of it that are tried.
LONGEST, MULTIPLES = 5.0, 2.0 ** np.arange(4, -6, -1)
# The search ends where a step would be this short, and curvatures this close to those expected.
NEAR, ALIKE = 0.05, 0.3
# What stands for a log-density that is not finite.
LOWEST = -1e30
# Most numbers that the slopes of all rows may have.
SLOPES = 2**24
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


class Model(Protocol):
    """The densities of a model's rows, as a wing computes them.

    Both methods take global numbers `(P, G)`, local ones `(P, n, d)` and the rows' indices
    `(P, n)`.
    """

    def derive(self, x: np.ndarray, z: np.ndarray, rows: np.ndarray) -> Derived:
        """Return log-densities and derivatives."""

    def values(self, x: np.ndarray, z: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the log-density of each row, `(P, n)`."""


class Fitted(NamedTuple):
    """The conditional distributions of P blocks of rows.

    Args:
        whole: `(P,)`, log-density of the global numbers.
        height: `(P, n)`, log-density of each row without its local numbers.
        mode: `(P, n, d)`.
        loc: `(P, n, d)`, the mean, or the mode of more than three numbers.
        factor: `(P, n, d, d)`, lower Cholesky factor of the covariance.
        skewness: `(P, n, d)`, of each number in units of the factor.
    """

    whole: np.ndarray
    height: np.ndarray
    mode: np.ndarray
    loc: np.ndarray
    factor: np.ndarray
    skewness: np.ndarray


def fitted(model: Model, x: np.ndarray, z: np.ndarray, rows: np.ndarray) -> Fitted:
    """Return the conditional distributions of rows.

    Args:
        model: the densities.
        x: `(P, G)`, global numbers.
        z: `(P, n, d)`, where the rows start.
        rows: `(P, n)`, their indices.
    """
    z, found = _modes(model, x, z, rows)
    size = z.shape[-1]
    values, vectors = _eigen(found.curvature)
    factor = _lower(vectors / np.sqrt(values)[..., None, :])
    height = found.value + 0.5 * size * math.log(2 * math.pi) - 0.5 * np.log(values).sum(-1)
    rule = quadrature(size)
    if rule is None:
        return Fitted(found.whole, height, z, z, factor, np.zeros_like(z))
    nodes, log_weights = rule
    points = (z + np.einsum("...ij,mj->m...i", factor, nodes)).reshape(-1, *z.shape[1:])
    count = len(nodes)
    drops = model.values(np.tile(x, (count, 1)), points, np.tile(rows, (count, 1)))
    sound = np.isfinite(found.value)
    drops = drops.reshape(count, *found.value.shape) - np.where(sound, found.value, 0.0)
    drops = np.where(sound, drops, -0.5 * np.square(nodes).sum(-1)[:, None, None])
    shares = drops + (0.5 * np.square(nodes).sum(-1) + log_weights)[:, None, None]
    shares = np.where(np.isfinite(shares), shares, -np.inf)
    log_mass = np.logaddexp.reduce(shares, 0)
    shares = np.exp(shares - log_mass)
    mean = np.einsum("m...,mj->...j", shares, nodes)
    rest = nodes[:, None, None] - mean
    covariance = np.einsum("m...,m...i,m...j->...ij", shares, rest, rest)
    inner = np.linalg.cholesky(covariance + FLAT * np.eye(size))
    turned = np.linalg.solve(inner, rest[..., None])[..., 0]
    skewness = np.einsum("m...,m...j->...j", shares, turned**3).clip(-SKEWEST, SKEWEST)
    loc = z + np.einsum("...ij,...j->...i", factor, mean)
    return Fitted(found.whole, height + log_mass, z, loc, factor @ inner, skewness)


def _modes(
    model: Model, x: np.ndarray, z: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, Derived]:
    """Climb to the mode of each row by damped Newton steps."""
    found = _sound(model.derive(x, z, rows))
    damping = np.zeros(found.value.shape)
    for _ in range(ROW_STEPS):
        values, vectors = _eigen(found.curvature)
        turned = np.einsum("...ji,...j->...i", vectors, found.slope)
        settled = (turned**2 / values).sum(-1) < SETTLED
        stretch = (values * (1 + damping[..., None])).clip(min=1e-30)
        way = np.einsum("...ij,...j->...i", vectors, turned / stretch)
        tried = _sound(model.derive(x, z + way, rows))
        better = tried.value >= found.value - 1e-6 * (1 + np.abs(found.value))
        z = np.where(better[..., None], z + way, z)
        pairs = zip(tried[1:], found[1:], strict=True)
        found = Derived(found.whole, *(_chosen(better, *pair) for pair in pairs))
        damping = np.where(better, damping / 8, np.maximum(4 * damping, 1.0))
        if settled.all() or (damping > 1e8).all():
            break
    return z, found


class Marginal:
    """The log-density of the global numbers, from some or all rows.

    Args:
        model: the densities.
        rows: `(R, n)`, indices of the rows.
        weights: `(R, n)`, how much each counts.
        z: `(d,)`, where each row starts.
    """

    def __init__(self, model: Model, rows: np.ndarray, weights: np.ndarray, z: np.ndarray) -> None:
        self.model, self.rows, self.weights = model, rows, weights
        self.z = np.broadcast_to(z, (*rows.shape, z.shape[-1]))

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the log-density at points `(Q, G)`; -inf where it is not finite."""
        total, count = np.zeros(len(points)), len(points)
        for some in self._parts(count):
            found = self._fitted(points, some)
            heights = found.height.reshape(-1, count, self.rows.shape[1])
            weights = self.weights[some][:, None]
            total += (weights * np.where(weights > 0, heights, 0.0)).sum((0, 2))
            whole = found.whole[:count]
        total += whole
        return np.where(np.isfinite(total), total, -np.inf)

    def settle(self, point: np.ndarray) -> None:
        """Let rows start at their modes at this point from now on."""
        parts = [self._fitted(point[None], some).mode for some in self._parts(1)]
        self.z = np.concatenate(parts)

    def _parts(self, points: int) -> Iterator[slice]:
        """Return blocks that are evaluated at once at so many points."""
        step = max(MANY // (points * self.rows.shape[1]), 1)
        return (slice(k, k + step) for k in range(0, len(self.rows), step))

    def _fitted(self, points: np.ndarray, some: slice) -> Fitted:
        """Fit some blocks at each point, one block after the other."""
        rows, z = (np.repeat(a[some], len(points), 0) for a in (self.rows, self.z))
        return fitted(self.model, np.tile(points, (len(rows) // len(points), 1)), z, rows)


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
        found = np.maximum(marginal(loc + design @ factor.T), LOWEST)
        value, up, down = found[0], found[1 : size + 1], found[size + 1 : 2 * size + 1]
        slope, curvature = (up - down) / 2, np.diag(2 * value - up - down)
        for (j, k), mixed in zip(pairs, found[2 * size + 1 :], strict=True):
            curvature[j, k] = curvature[k, j] = up[j] + up[k] - value - mixed
        values, vectors = np.linalg.eigh(curvature)
        stretch = np.clip(np.abs(values), 1e-2, 1e4)
        way = vectors @ ((vectors.T @ slope) / stretch)
        length = np.linalg.norm(way)
        way *= min(1.0, LONGEST / max(float(length), 1e-30))
        tried = np.maximum(marginal(loc + (MULTIPLES[:, None] * way) @ factor.T), LOWEST)
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
    model: Model,
    points: np.ndarray,
    z: np.ndarray,
    scale: float,
    rows: tuple[int, int],
    follow: bool,
) -> Gaussian | None:
    """Return the Gaussian of the global numbers, whose factor is symmetric up to scales.

    Args:
        model: the densities.
        points: `(C, G)`, where the search may set out from; it does so from the two best.
        z: `(d,)`, where each row starts.
        scale: standard deviation at the start.
        rows: how many there are, and how many a block has.
        follow: whether rows can be chosen; otherwise there is one block, whatever its indices.

    Returns:
        The Gaussian; None if the log-density is finite at no point.
    """
    size, taken = rows
    some = Marginal(model, *blocks(size, taken, SOME if follow else taken), z)
    heights = some(points)
    order = [k for k in np.argsort(-heights)[:2] if np.isfinite(heights[k])]
    if not order:
        return None
    eye = scale * np.eye(points.shape[1])
    found = max((climbed(some, Gaussian(points[k], eye, 0.0)) for k in order), key=_height)
    if follow and size > SOME:
        found = climbed(Marginal(model, *blocks(size, taken, ENOUGH), z), found)
    if found.value <= LOWEST:
        return None
    deviation = np.linalg.norm(found.factor, axis=1)
    basis, values, _ = np.linalg.svd(found.factor / deviation[:, None])
    return found._replace(factor=deviation[:, None] * (basis * values) @ basis.T)


class Responses(NamedTuple):
    """The conditional distributions of all N rows, and how they follow whitened global numbers.

    Args:
        loc: `(N, d)`, means where the global numbers are at their location.
        factor: `(N, d, d)`, lower Cholesky factors of the covariances there.
        skewness: `(N, d)`, of each number in units of the factor.
        slope: `(N, d, G)`, change of the mean with each, in units of the factor; G may be 0.
        log_slope: `(N, d, G)`, change of the logarithm of the factor's diagonal.
        height: `(N, 1 + G)`, log-density of the row without its local numbers, and its change with
            each global number.
    """

    loc: np.ndarray
    factor: np.ndarray
    skewness: np.ndarray
    slope: np.ndarray
    log_slope: np.ndarray
    height: np.ndarray


def followed(rows: int, width: int, size: int) -> int:
    """Return how many of `size` global numbers the rows follow: all, or none if that is too much.

    Args:
        rows: number of rows.
        width: number of local numbers of each.
        size: number of global numbers.
    """
    return size if 2 * rows * width * size <= SLOPES else 0


def responses(model: Model, size: int, taken: int, start: Gaussian, z: np.ndarray) -> Responses:
    """Return the distributions of all rows, by differences over a standard deviation each way.

    Args:
        model: the densities.
        size: number of rows.
        taken: number of rows of a block.
        start: the Gaussian of the global numbers, whose factor whitens them.
        z: `(d,)`, where each row starts.
    """
    width = z.shape[-1]
    ways = start.factor.T[: followed(size, width, len(start.loc))]
    rows, _ = blocks(size, taken)
    found = []
    at_once = max(MANY // taken, 1)
    for some in (rows[k : k + at_once] for k in range(0, len(rows), at_once)):
        x = np.tile(start.loc, (len(some), 1))
        middle = fitted(model, x, np.broadcast_to(z, (*some.shape, width)), some)
        none = np.zeros((*middle.loc.shape, 0))
        slopes, log_slopes, heights = [none], [none], [middle.height[..., None]]
        for way in ways:
            up, down = (fitted(model, x + sign * way, middle.mode, some) for sign in (1, -1))
            slopes.append(np.linalg.solve(middle.factor, ((up.loc - down.loc) / 2)[..., None]))
            logs = _log_diagonal(up.factor) - _log_diagonal(down.factor)
            log_slopes.append(logs[..., None] / 2)
            with np.errstate(invalid="ignore"):  # of rows without a density, which tell nothing
                heights.append((up.height - down.height)[..., None] / 2)
        parts = (np.concatenate(part, -1) for part in (slopes, log_slopes, heights))
        found.append([middle.loc, middle.factor, middle.skewness, *parts])
    whole = (np.concatenate(parts) for parts in zip(*found, strict=True))
    count = rows.size
    return Responses(*(part.reshape(count, *part.shape[2:])[:size] for part in whole))


def quadrature(size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return nodes `(m, size)` and log-weights of a rule for normal variables, if they are few."""
    if size not in NODES:
        return None
    line, weights = np.polynomial.hermite_e.hermegauss(NODES[size])
    grid = np.stack(np.meshgrid(*[line] * size, indexing="ij"), -1)
    logs = np.log(weights / weights.sum())
    return grid.reshape(-1, size), np.sum(np.meshgrid(*[logs] * size, indexing="ij"), 0).ravel()


def _height(gaussian: Gaussian) -> float:
    return gaussian.value


def _pairs(size: int) -> dict[tuple[int, int], np.ndarray]:
    """Return the points whose values tell each mixed derivative."""
    if size > JOINT:
        return {}
    eye = np.eye(size)
    return {(j, k): eye[j] + eye[k] for j in range(size) for k in range(j)}


def _lower(root: np.ndarray) -> np.ndarray:
    """Return the lower Cholesky factor of a covariance, from any factor of it."""
    # By QR decomposition: the covariance itself would lose small variances.
    upper = np.asarray(np.linalg.qr(root.swapaxes(-1, -2), mode="r"))
    signs = np.sign(np.diagonal(upper, axis1=-2, axis2=-1))
    return (upper * np.where(signs == 0, 1.0, signs)[..., None]).swapaxes(-1, -2)


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


def _chosen(better: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(better.reshape(*better.shape, *[1] * (new.ndim - 2)), new, old)


def _log_diagonal(factor: np.ndarray) -> np.ndarray:
    return np.log(np.diagonal(factor, axis1=-2, axis2=-1))
