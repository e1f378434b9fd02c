"""The search for a guide's start: the Gaussian that fits a posterior best, on any scale."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from numpyro_flows.guides.model import LogDensity
from numpyro_flows.layers.preconditioner import Preconditioner
from numpyro_flows.tree import replace, select
from pyroflows_common.search import (
    APART,
    BETWEEN,
    DENSE,
    DOUBT,
    HALVINGS,
    HISTORY,
    HOPEFUL,
    LARGE,
    NO_HESSIAN,
    PROBES,
    SAME,
    VALLEY,
    Budget,
    matched_draws,
)


class Found(NamedTuple):
    """A Gaussian and its evidence lower bound, up to the constant of the entropy.

    The search returns several at once, with a first dimension of n.
    """

    gaussian: Preconditioner
    elbo: Float[Array, "*n"]
    mode: Float[Array, "*n D"]  # where the path to it ended


def search(
    log_density: LogDensity,
    start: Preconditioner,
    starts: Float[Array, "n D"],
    key: Array,
    budget: Budget = LARGE,
) -> tuple[Found, Array]:
    r"""Find the Gaussians that fit a posterior best, for a guide to start from.

    From each start a damped Newton path climbs to a mode. The Gaussian \(N(x, |H|^{-1})\) of every
    point on the way is a candidate, because the mode may be a bad centre, and the one with the
    highest evidence lower bound stands for the path. Batch and match refines one for each mode that
    the paths have come to, and the best of them again. Fresh draws say which is best: a Gaussian
    that is poor at first may be the best one in the end. In more than `DENSE` dimensions the path
    is one of L-BFGS, the covariance is diagonal plus low-rank, and there is no refinement. The
    given Gaussian is tried at each start, too, in case its path leads nowhere.

    Returns:
        A Gaussian for each start, the best one first, with different locations. Where the evidence
        lower bound is not finite, there is none. With them comes the number of gradients that the
        search took, of which the product of a Hessian and a vector is one.

    References:
        Zhang, Carpenter, Gelman and Vehtari, "Pathfinder" (arXiv:2108.03782), sections 2 and 3,
        for the path of L-BFGS and for scoring along the way; Cai et al., "Batch and match"
        (arXiv:2402.14758), algorithm 1.
    """
    target, dense = _bounded(log_density), starts.shape[-1] <= DENSE
    few_key, many_key, fresh_key, match_key, probe_key = jax.random.split(key, 5)
    few, many = _noise(few_key, LARGE.few, starts), _noise(many_key, LARGE.many, starts)
    path: Callable[..., tuple[Found, Array]]
    if dense:
        path = functools.partial(_newton_path, hessian=_hessian(target, starts[0]))
    else:
        probes = jax.random.rademacher(probe_key, (PROBES, starts.shape[-1]), starts.dtype)
        products = functools.partial(_products(target, starts[0]), vectors=probes)
        path = functools.partial(_quasi_newton_path, products=products)

    def plain(point: Array) -> Preconditioner:
        return replace(start, loc=point)

    ended, steps = lax.map(lambda point: path(target, plain(point), few), starts)
    size = starts.shape[-1]
    count = (steps * (size + 1)).sum() if dense else (steps * (PROBES + 1) + 1).sum()
    candidates = jax.tree.map(
        lambda *a: jnp.concatenate(a), ended.gaussian, jax.vmap(plain)(starts)
    )
    scored = lax.map(lambda gaussian: _scored(target, gaussian, many), candidates)
    halves = jax.tree.map(lambda a: a.reshape(2, len(starts), *a.shape[1:]), scored)
    moved, stayed = (jax.tree.map(lambda a, k=k: a[k], halves) for k in range(2))
    found = jax.vmap(_better)(moved, stayed)._replace(mode=ended.mode)
    found = _in_order(_distinct(found, found.mode))
    if not dense:
        return found, count
    fresh = _noise(fresh_key, LARGE.many, starts)

    gap = HOPEFUL[0] + HOPEFUL[1] * size

    def stage(found: Found, inputs: tuple[Array, Array]) -> tuple[Found, Array]:
        key, most = inputs
        hopeful = jnp.isfinite(found.elbo) & (found.elbo > found.elbo[0] - gap)
        kept = hopeful & (jnp.arange(len(starts)) < most)
        found, elbo = lax.map(
            lambda one: lax.cond(
                one[0],
                lambda found, key: _refined(target, found, many, fresh, key),
                lambda found, _: (found, found.elbo),
                *one[1:],
            ),
            (kept, found, jax.random.split(key, len(starts))),
        )
        # Fresh draws are fair; but where all Gaussians reach out of the support, they tell nothing.
        found = found._replace(elbo=jnp.where(jnp.isfinite(elbo).any(), elbo, found.elbo))
        return _in_order(_distinct(found, found.gaussian.loc)), kept.sum()

    most = jnp.array(budget.refined)
    found, refined = lax.scan(stage, found, (jax.random.split(match_key, len(most)), most))
    return found, count + refined.sum() * LARGE.rounds * matched_draws(size)


def apart(log_density: LogDensity, found: Found) -> Array:
    """Return which of the Gaussians of a search lie at separate modes, as a matrix.

    They are far from each other, and the log-density is low between their modes and also between
    their locations. A banana is bent between locations, and a funnel is uncertain in its neck. A
    path may have ended at a saddle point: a location that is higher stands for the mode.
    """
    target, count = _bounded(log_density), len(found.elbo)
    far = _squares(found.gaussian, found.gaussian.loc) > APART**2
    shares = jnp.linspace(0.0, 1.0, BETWEEN + 2)[:, None]

    def valley(ends: Array) -> Array:
        heights = jax.vmap(target)(ends[0] + shares * (ends[1] - ends[0]))
        return heights[1:-1].min() < jnp.minimum(heights[0], heights[-1]) - VALLEY

    first, second = (k.ravel() for k in jnp.indices((count, count)))
    locs = found.gaussian.loc
    at_modes, at_locs = (lax.map(target, points) for points in (found.mode, locs))
    modes = jnp.where((at_locs > at_modes)[:, None], locs, found.mode)
    points = jnp.stack([modes, locs])
    ends = jnp.stack([points[:, first], points[:, second]], 2).reshape(-1, 2, points.shape[-1])
    valleys = lax.map(valley, ends).reshape(2, count, count)
    return far & far.T & valleys.all(0)


def _bounded(log_density: LogDensity) -> LogDensity:
    def target(x: Array) -> Array:
        value = log_density(x)
        return jnp.where(jnp.isfinite(value), value, -jnp.inf)

    return target


def _distinct(found: Found, points: Float[Array, "n D"]) -> Found:
    """Take the bound from those that are at the same point as a better one."""
    same = _squares(found.gaussian, points) < SAME[0] + SAME[1] * points.shape[-1]
    order = jnp.arange(len(points))
    equal = found.elbo[:, None] == found.elbo
    better = (found.elbo[:, None] > found.elbo) | (equal & (order[:, None] < order))
    return found._replace(elbo=jnp.where((better & same).any(0), -jnp.inf, found.elbo))


def _in_order(found: Found) -> Found:
    order = jnp.argsort(-found.elbo)
    return jax.tree.map(lambda a: a[order], found)


def _squares(gaussians: Preconditioner, points: Float[Array, "n D"]) -> Float[Array, "n n"]:
    """Return the square of each point's distance from every point, on the scale of the latter."""

    def one(gaussian: Preconditioner, point: Array) -> Array:
        far = gaussian.inverse_and_ladj(gaussian.loc + points - point)[0]
        return jnp.square(far).sum(-1)

    return jax.vmap(one)(gaussians, points)


def _refined(
    target: LogDensity, found: Found, many: Array, fresh: Array, key: Array
) -> tuple[Found, Array]:
    """Return the better of a refined Gaussian and its uncorrelated form, and its fresh bound."""
    best = _batch_and_match(target, found, many, key)
    product = _scored(target, _uncorrelated(best.gaussian), many)
    best = _better(best, product._replace(mode=found.mode))
    return best, _scored(target, best.gaussian, fresh).elbo


def _hessian(target: LogDensity, example: Array) -> Callable[[Array], Array]:
    """Return the Hessian as a function: not all models allow forward over reverse mode."""
    for hessian in (jax.hessian(target), jax.jacrev(jax.grad(target))):
        if _has(hessian, example):
            return hessian
    return functools.partial(_symmetric, target)


def _symmetric(target: LogDensity, x: Array) -> Array:
    rows = _differences(target, x, jnp.eye(len(x), dtype=x.dtype))
    return (rows + rows.T) / 2


def _products(target: LogDensity, example: Array) -> Callable[..., Array]:
    """Return a function of a point and vectors: the products of the Hessian with them."""

    def products(x: Float[Array, " D"], vectors: Float[Array, "n D"]) -> Float[Array, "n D"]:
        return jax.vmap(jax.vjp(jax.grad(target), x)[1])(vectors)[0]

    if _has(lambda x: products(x, x[None]), example):
        return products
    return functools.partial(_differences, target)


def _has(derivative: Callable[[Array], Array], example: Array) -> bool:
    try:
        jax.eval_shape(derivative, example)
    except Exception:  # the model's own derivatives may raise any
        return False
    return True


def _differences(target: LogDensity, x: Array, vectors: Array) -> Array:
    """Return the Hessian's products with vectors, by central differences of slopes."""
    warnings.warn(NO_HESSIAN, stacklevel=2)
    widths = jnp.finfo(x.dtype).eps ** (1 / 3) * jnp.maximum(1.0, jnp.abs(vectors @ x))
    steps = widths[:, None] * vectors
    above, below = jnp.split(lax.map(jax.grad(target), jnp.concatenate([x + steps, x - steps])), 2)
    return (above - below) / (2 * widths[:, None])


def _noise(key: Array, draws: int, like: Array) -> Array:
    """Return standard normal draws in pairs of opposite sign, so that their mean is exact."""
    half = jax.random.normal(key, (draws // 2, like.shape[-1]), like.dtype)
    return jnp.concatenate([half, -half])


def _scored(target: LogDensity, gaussian: Preconditioner, noise: Array) -> Found:
    draws, ladj = gaussian.forward_and_ladj(noise)
    elbo = _sure(target, draws, noise) + ladj.mean()
    return Found(gaussian, jnp.where(jnp.isnan(elbo), -jnp.inf, elbo), gaussian.loc)


def _sure(target: LogDensity, draws: Array, noise: Array) -> Array:
    """Return the mean log-density of draws, less a multiple of its rounding errors.

    A funnel's log-density rises without end where more and more of its digits cancel. The error of
    a draw is the change of its log-density when the last digits of each coordinate change, to the
    side that the noise's sign says.
    """
    nearby = draws * (1 + 2 * jnp.finfo(draws.dtype).eps * jnp.sign(noise))
    values, others = jnp.split(jax.vmap(target)(jnp.concatenate([draws, nearby])), 2)
    return (values - DOUBT * jnp.abs(others - values)).mean()


def _better(a: Any, b: Any) -> Any:
    return select(b.elbo > a.elbo, b, a)


def _uncorrelated(gaussian: Preconditioner) -> Preconditioner:
    """Return the product of normal distributions that is closest to a Gaussian of full rank."""
    precision = jnp.square(gaussian.basis) @ jnp.exp(-2 * gaussian.log_values)
    return gaussian.at(gaussian.loc, jnp.exp(gaussian.log_scale) * lax.rsqrt(precision))


def _furthest(target: LogDensity, x: Array, value: Array, way: Array) -> tuple[Array, Array]:
    """Return the best of halved steps along a way, and whether it is better than staying."""
    steps = 0.5 ** jnp.arange(HALVINGS, dtype=x.dtype)
    points = x + steps[:, None] * way
    values = jax.vmap(target)(points)
    values = jnp.where(jnp.isnan(values), -jnp.inf, values)
    k = jnp.argmax(values)
    rounding = 10 * jnp.finfo(x.dtype).eps * jnp.abs(value)
    going = values[k] > value + jnp.maximum(1e-3, rounding)
    return jnp.where(going, points[k], x), going


def _newton_path(
    target: LogDensity, start: Preconditioner, noise: Array, hessian: Callable[[Array], Array]
) -> tuple[Found, Array]:
    """Climb by damped Newton steps, and return the best Gaussian on the way."""

    def step(state: Any) -> Any:
        x, best, count, _ = state
        value, slope = jax.value_and_grad(target)(x)
        found = _curved(start, x, -hessian(x))
        best = _better(best, _scored(target, found, noise))
        # F Fᵀ g, where F is the symmetric root of the inverse curvature on the diagonal's scale.
        scale, turned = jnp.exp(found.log_scale), jnp.exp(2 * found.log_values)
        way = scale * (found.basis @ (turned * (found.basis.T @ (scale * slope))))
        x, going = _furthest(target, x, value, way)
        return x, best, count + 1, going

    value = target(start.loc)
    best = Found(start, jnp.full_like(value, -jnp.inf), start.loc)
    return _climbed(step, (start.loc, best, 0, jnp.isfinite(value)), LARGE.newton_steps)


def _climbed(step: Callable[[Any], Any], state: Any, most: int) -> tuple[Found, Array]:
    """Repeat a step, and return the best Gaussian, the end of the path and the number of steps.

    A state begins with the point, and ends in best, count and going.
    """
    end = lax.while_loop(lambda state: state[-1] & (state[-2] < most), step, state)
    return end[-3]._replace(mode=end[0]), end[-2]


def _curved(like: Preconditioner, loc: Array, precision: Array) -> Preconditioner:
    """Return N(loc, |precision|⁻¹), with eigenvalues on the scale of the diagonal."""
    diagonal = jnp.abs(jnp.diagonal(precision))
    scale = jnp.where(diagonal > 0, lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1.0)), 1.0)
    values, vectors = jnp.linalg.eigh(scale[:, None] * precision * scale)
    values = jnp.maximum(jnp.abs(values), 10 * jnp.finfo(precision.dtype).eps)
    state = {"loc": loc, "log_scale": jnp.log(scale), "basis": vectors}
    return replace(like, **state, log_values=-0.5 * jnp.log(values))


def _quasi_newton_path(
    target: LogDensity, start: Preconditioner, noise: Array, products: Callable[[Array], Array]
) -> tuple[Found, Array]:
    """Climb by L-BFGS, and return the best Gaussian on the way."""

    def step(state: Any) -> Any:
        x, slope, steps, changes, best, count, _ = state
        found = _low_rank(start, x, _diagonal(products(x)), steps, changes)
        best = _better(best, _scored(target, found, noise))
        scale = jnp.exp(found.log_scale)
        along = jnp.expm1(2 * found.log_values) * (found.basis.T @ (scale * slope))
        way = scale * (scale * slope + found.basis @ along)
        new, going = _furthest(target, x, target(x), way)
        new_slope = jax.grad(target)(new)
        s, y = new - x, slope - new_slope
        curved = s @ y > 1e-8 * (y @ y)
        steps = jnp.where(curved, jnp.roll(steps, -1, 0).at[-1].set(s), steps)
        changes = jnp.where(curved, jnp.roll(changes, -1, 0).at[-1].set(y), changes)
        going &= jnp.isfinite(new_slope).all()
        return new, new_slope, steps, changes, best, count + 1, going

    value, slope = jax.value_and_grad(target)(start.loc)
    none = jnp.zeros((HISTORY, len(slope)), slope.dtype)
    best = Found(start, jnp.full_like(value, -jnp.inf), start.loc)
    going = jnp.isfinite(value) & jnp.isfinite(slope).all()
    state = (start.loc, slope, none, none, best, 0, going)
    return _climbed(step, state, LARGE.quasi_newton_steps)


def _diagonal(products: Array) -> Array:
    """Return a diagonal inverse curvature from the Hessian's products with vectors of ±1.

    Their root mean square estimates the length of each row of the Hessian. That is the diagonal if
    the Hessian is diagonal, and more otherwise.
    """
    sizes = jnp.sqrt(jnp.square(products).mean(0))
    sound = jnp.isfinite(sizes) & (sizes > 0)
    return jnp.where(sound, 1 / jnp.where(sound, sizes, 1.0), 1.0)


def _low_rank(
    like: Preconditioner, loc: Array, diagonal: Array, steps: Array, changes: Array
) -> Preconditioner:
    """Return the Gaussian of L-BFGS's inverse curvature (Pathfinder, equations 10 to 12)."""
    used = jnp.square(steps).sum(1) > 0
    inner = jnp.triu(steps @ changes.T) + jnp.diag(jnp.where(used, 0.0, 1.0))
    inverse = jax.scipy.linalg.solve_triangular(inner, jnp.eye(HISTORY, dtype=loc.dtype))
    inverse = jnp.where(used[:, None] & used, inverse, 0.0)
    middle = jnp.diag(jnp.diagonal(inner)) + (changes * diagonal) @ changes.T
    corner = inverse.T @ jnp.where(used[:, None] & used, middle, 0.0) @ inverse
    core = jnp.block([[jnp.zeros_like(inverse), -inverse], [-inverse.T, corner]])
    scale = jnp.sqrt(diagonal)
    columns = jnp.concatenate([changes * diagonal, steps]) / scale
    basis, triangle = jnp.linalg.qr(columns.T)
    values, vectors = jnp.linalg.eigh(triangle @ core @ triangle.T)
    values = jnp.maximum(1 + values, 10 * jnp.finfo(loc.dtype).eps)
    state = {"loc": loc, "log_scale": jnp.log(scale), "basis": basis @ vectors}
    return replace(like, **state, log_values=0.5 * jnp.log(values))


class _Matched(NamedTuple):
    loc: Array
    factor: Array
    elbo: Array


def _batch_and_match(target: LogDensity, start: Found, noise: Array, key: Array) -> Found:
    """Match the Gaussian's slopes to the posterior's, and return the best Gaussian on the way."""
    size = len(start.gaussian.loc)
    batch = matched_draws(size)

    def whitened(z: Array) -> Array:
        x, ladj = start.gaussian.forward_and_ladj(z)
        return target(x) + ladj

    def round_(state: tuple[_Matched, _Matched], inputs: Any) -> Any:
        (last, best), (count, key) = state, inputs
        draws = last.loc + jax.random.normal(key, (batch, size), noise.dtype) @ last.factor.T
        slopes = jax.vmap(jax.grad(whitened))(draws)
        loc, factor = _matched(last, draws, slopes, batch * size / (count + 1.0))
        x, ladj = start.gaussian.forward_and_ladj(loc + noise @ factor.T)
        elbo = _sure(target, x, noise) + ladj.mean() + jnp.linalg.slogdet(factor)[1]
        new = _Matched(loc, factor, elbo)
        sound = jnp.isfinite(factor).all() & jnp.isfinite(loc).all()
        last = select(sound, new, last)
        return (last, _better(best, last)), None

    eye = jnp.eye(size, dtype=noise.dtype)
    state = _Matched(jnp.zeros(size, noise.dtype), eye, start.elbo)
    inputs = (jnp.arange(LARGE.rounds), jax.random.split(key, LARGE.rounds))
    (_, best), _ = lax.scan(round_, (state, state), inputs)
    centred = replace(start.gaussian, loc=jnp.zeros_like(best.loc))
    gaussian = start.gaussian.precondition(start.gaussian(best.loc), centred(best.factor.T).T)
    return _better(start, Found(gaussian, best.elbo, start.mode))


def _matched(old: _Matched, draws: Array, slopes: Array, weight: Array) -> tuple[Array, Array]:
    """Return the Gaussian of one batch-and-match step (Cai et al., equations 9 to 11)."""
    share = weight / (1 + weight)
    mean, slope = draws.mean(0), slopes.mean(0)
    covariance = (draws - mean).T @ (draws - mean) / len(draws)
    scatter = (slopes - slope).T @ (slopes - slope) / len(draws)
    gap = old.loc - mean
    u = weight * scatter + share * jnp.outer(slope, slope)
    v = old.factor @ old.factor.T + weight * covariance + share * jnp.outer(gap, gap)
    # Solves Σ U Σ + Σ = V by a symmetric root: Σ = 2 L (1 + (1 + 4 Lᵀ U L)^½)⁻¹ Lᵀ with L Lᵀ = V.
    root = jnp.linalg.cholesky(v)
    values, vectors = jnp.linalg.eigh(root.T @ u @ root)
    values = 2 / (1 + jnp.sqrt(1 + 4 * jnp.maximum(values, 0.0)))
    factor = root @ (vectors * jnp.sqrt(values))
    return (old.loc + weight * (factor @ (factor.T @ slope) + mean)) / (1 + weight), factor
