"""The search for a guide's start: the Gaussian that fits a posterior best, on any scale."""

import copy
import warnings
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyroflows.guides.model import LogDensity, gradients
from pyroflows.layers.preconditioner import Preconditioner
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
    """A Gaussian and its evidence lower bound, up to the constant of the entropy."""

    gaussian: Preconditioner
    elbo: Float[Tensor, ""]
    mode: Float[Tensor, " D"]  # where the path to it ended


def search(
    log_density: LogDensity,
    start: Preconditioner,
    starts: Float[Tensor, "n D"],
    budget: Budget = LARGE,
) -> tuple[list[Found], int]:
    r"""Find the Gaussians that fit a posterior best, for a guide to start from.

    From each start a damped Newton path climbs to a mode. The Gaussian \(N(x, |H|^{-1})\) of every
    point on the way is a candidate, because the mode may be a bad centre, and the one with the
    highest evidence lower bound stands for the path. Batch and match refines one for each mode that
    the paths have come to, and the best of them again. Fresh draws say which is best: a Gaussian
    that is poor at first may be the best one in the end. In more than `DENSE` dimensions the path
    is one of L-BFGS, the covariance is diagonal plus low-rank, and there is no refinement. The
    given Gaussian is tried at each start, too, in case its path leads nowhere.

    Returns:
        The Gaussians with a finite evidence lower bound, the best one first, with different
        locations. With them comes the number of gradients that the search took, of which the
        product of a Hessian and a vector is one.

    References:
        Zhang, Carpenter, Gelman and Vehtari, "Pathfinder" (arXiv:2108.03782), sections 2 and 3,
        for the path of L-BFGS and for scoring along the way; Cai et al., "Batch and match"
        (arXiv:2402.14758), algorithm 1.
    """
    target, dense = _bounded(log_density), starts.shape[-1] <= DENSE
    path = _newton_path if dense else _quasi_newton_path
    steps = budget.newton_steps if dense else budget.quasi_newton_steps
    few, many = _noise(budget.few, starts), _noise(budget.many, starts)
    size, found, count = starts.shape[-1], [], 0
    for point in starts:
        plain = _changed(start, loc=point)
        ended, taken = path(target, plain, few, steps)
        count += taken * (1 + (size if dense else PROBES))
        best = _best([_scored(target, gaussian, many) for gaussian in (ended.gaussian, plain)])
        found.append(best._replace(mode=ended.mode))
    found = _distinct(found, [one.mode for one in found])
    if not dense:
        return found, count
    fresh = _noise(budget.many, starts)
    gap = HOPEFUL[0] + HOPEFUL[1] * size
    for most in budget.refined:
        hopeful = [one for one in found[:most] if one.elbo > found[0].elbo - gap]
        refined = [_refined(target, one, many, budget.rounds) for one in hopeful]
        count += len(refined) * budget.rounds * matched_draws(size)
        fair = [_scored(target, one.gaussian, fresh).elbo for one in refined]
        # Where all Gaussians reach out of the support, fresh draws tell nothing.
        if any(elbo.isfinite() for elbo in fair):
            refined = [one._replace(elbo=elbo) for one, elbo in zip(refined, fair, strict=True)]
        found = refined + found[len(hopeful) :]
        found = _distinct(found, [one.gaussian.loc for one in found])
    return found, count


@torch.no_grad()
def apart(log_density: LogDensity, found: list[Found]) -> np.ndarray:
    """Return which of the Gaussians of a search lie at separate modes, as a matrix.

    They are far from each other, and the log-density is low between their modes and also between
    their locations. A banana is bent between locations, and a funnel is uncertain in its neck. A
    path may have ended at a saddle point: a location that is higher stands for the mode.
    """
    target = _bounded(log_density)
    shares = torch.linspace(0.0, 1.0, BETWEEN + 2).to(found[0].mode)[:, None]

    def valley(start: Tensor, end: Tensor) -> bool:
        heights = target(start + shares * (end - start))
        return bool(heights[1:-1].min() < heights[[0, -1]].min() - VALLEY)

    def far(one: Found, other: Found) -> bool:
        return bool(_square(one.gaussian, other.gaussian.loc - one.gaussian.loc) > APART**2)

    def peak(one: Found) -> Tensor:
        at_mode, at_loc = target(torch.stack([one.mode, one.gaussian.loc]))
        return one.gaussian.loc if at_loc > at_mode else one.mode

    def separate(a: Found, b: Found) -> bool:
        between = valley(peak(a), peak(b)) and valley(a.gaussian.loc, b.gaussian.loc)
        return far(a, b) and far(b, a) and between

    return np.array([[separate(a, b) for b in found] for a in found], dtype=bool)


def _bounded(log_density: LogDensity) -> LogDensity:
    def target(x: Tensor) -> Tensor:
        value = log_density(x)
        return value.where(value.isfinite(), -torch.inf)

    return target


def _distinct(found: list[Found], points: list[Tensor]) -> list[Found]:
    """Return those with a finite bound, the best first, and none at the same point as a better."""
    kept: list[int] = []
    near = SAME[0] + SAME[1] * len(points[0]) if points else 0.0
    for k in sorted(range(len(found)), key=lambda k: -found[k].elbo.item()):
        others = (_square(found[j].gaussian, points[k] - points[j]) for j in kept)
        if found[k].elbo.isfinite() and not any(square < near for square in others):
            kept.append(k)
    return [found[k] for k in kept]


@torch.no_grad()
def _square(gaussian: Preconditioner, way: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    """Return the square of a distance on the scale of a Gaussian."""
    return gaussian.inverse_and_ladj(gaussian.loc + way)[0].square().sum()


def _refined(target: LogDensity, found: Found, many: Tensor, rounds: int) -> Found:
    """Return the better of a refined Gaussian and its uncorrelated form."""
    best = _batch_and_match(target, found, many, rounds)
    product = _scored(target, _uncorrelated(best.gaussian), many)
    return _best([best, product._replace(mode=found.mode)])


def _changed(gaussian: Preconditioner, **state: Tensor) -> Preconditioner:
    """Return a new layer with some of its state replaced."""
    new = copy.deepcopy(gaussian)
    for name, value in state.items():
        getattr(new, name).copy_(value)
    return new


def _noise(draws: int, like: Tensor) -> Tensor:
    """Return standard normal draws in pairs of opposite sign, so that their mean is exact."""
    half = torch.randn(draws // 2, like.shape[-1], dtype=like.dtype, device=like.device)
    return torch.cat([half, -half])


@torch.no_grad()
def _scored(target: LogDensity, gaussian: Preconditioner, noise: Tensor) -> Found:
    draws, ladj = gaussian.forward_and_ladj(noise)
    elbo = _sure(target, draws, noise) + ladj.mean()
    return Found(gaussian, elbo.nan_to_num(-torch.inf, torch.inf, -torch.inf), gaussian.loc)


@torch.no_grad()
def _sure(target: LogDensity, draws: Tensor, noise: Tensor) -> Tensor:
    """Return the mean log-density of draws, less a multiple of its rounding errors.

    A funnel's log-density rises without end where more and more of its digits cancel. The error of
    a draw is the change of its log-density when the last digits of each coordinate change, to the
    side that the noise's sign says.
    """
    nearby = draws * (1 + 2 * torch.finfo(draws.dtype).eps * noise.sign())
    values, others = target(torch.cat([draws, nearby])).chunk(2)
    return (values - DOUBT * (others - values).abs()).mean()


def _best(found: list[Found]) -> Found:
    return max(found, key=lambda candidate: candidate.elbo.item())


def _uncorrelated(gaussian: Preconditioner) -> Preconditioner:
    """Return the product of normal distributions that is closest to a Gaussian of full rank."""
    precision = gaussian.basis.square() @ (-2 * gaussian.log_values).exp()
    scale = gaussian.log_scale.exp() * precision.rsqrt()
    return copy.deepcopy(gaussian).at(gaussian.loc, scale)


@torch.no_grad()
def _furthest(target: LogDensity, x: Tensor, value: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best of halved steps along a way, and whether it is better than staying."""
    steps = 0.5 ** torch.arange(HALVINGS, dtype=x.dtype, device=x.device)
    points = x + steps[:, None] * way
    values = target(points)
    k = values.argmax()
    rounding = 10 * torch.finfo(x.dtype).eps * value.abs()
    going = values[k] > value + rounding.clamp(min=1e-3)
    return torch.where(going, points[k], x), going


def _newton_path(
    target: LogDensity, start: Preconditioner, noise: Tensor, steps: int
) -> tuple[Found, int]:
    """Climb by damped Newton steps; return the best Gaussian on the way, and how many they were."""
    x, best = start.loc, Found(start, start.loc.new_tensor(-torch.inf), start.loc)
    eye, count = torch.eye(len(x), dtype=x.dtype, device=x.device), 0
    while count < steps:
        count += 1
        value, slope, hessian = _derivatives(target, x, eye)
        if not all(part.isfinite().all() for part in (value, slope, hessian)):
            break
        found = _curved(start, x, -(hessian + hessian.mT) / 2)
        best = _best([best, _scored(target, found, noise)])
        # F Fᵀ g, where F is the symmetric root of the inverse curvature on the diagonal's scale.
        scale, turned = found.log_scale.exp(), (2 * found.log_values).exp()
        way = scale * (found.basis @ (turned * (found.basis.mT @ (scale * slope))))
        x, going = _furthest(target, x, value, way)
        if not going:
            break
    return best._replace(mode=x), count


def _derivatives(
    target: LogDensity, x: Float[Tensor, " D"], vectors: Float[Tensor, "n D"]
) -> tuple[Float[Tensor, ""], Float[Tensor, " D"], Float[Tensor, "n D"]]:
    """Return value and gradient at a point, and the products of the Hessian with vectors."""
    x = x.detach().requires_grad_()
    value = target(x[None])[0]
    try:
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        (products,) = torch.autograd.grad(slope, x, vectors, is_grads_batched=True)
    except RuntimeError:  # the model's own derivatives may raise any
        warnings.warn(NO_HESSIAN, stacklevel=2)
        slope, products = gradients(target, x[None])[0], _differences(target, x.detach(), vectors)
    return value.detach(), slope.detach(), products.detach()


def _differences(target: LogDensity, x: Tensor, vectors: Tensor) -> Tensor:
    """Return the Hessian's products with vectors, by central differences of slopes."""
    widths = torch.finfo(x.dtype).eps ** (1 / 3) * (vectors @ x).abs().clamp(min=1.0)
    steps = widths[:, None] * vectors
    above, below = gradients(target, torch.cat([x + steps, x - steps])).chunk(2)
    return (above - below) / (2 * widths[:, None])


def _curved(like: Preconditioner, loc: Tensor, precision: Tensor) -> Preconditioner:
    """Return N(loc, |precision|⁻¹), with eigenvalues on the scale of the diagonal."""
    diagonal = precision.diagonal().abs()
    scale = diagonal.where(diagonal > 0, 1.0).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * precision * scale)
    values = values.abs().clamp(min=10 * torch.finfo(values.dtype).eps)
    return _changed(
        like,
        loc=loc,
        log_scale=scale.log(),
        basis=vectors,
        log_values=-0.5 * values.log(),
    )


def _quasi_newton_path(
    target: LogDensity, start: Preconditioner, noise: Tensor, steps: int
) -> tuple[Found, int]:
    """Climb by L-BFGS; return the best Gaussian on the way, and the number of steps."""
    x, best = start.loc, Found(start, start.loc.new_tensor(-torch.inf), start.loc)
    probes = torch.randn(PROBES, len(x), dtype=x.dtype, device=x.device).sign()
    moves = changes = x.new_zeros(HISTORY, len(x))
    last_x, last_slope, count = x, x, 0
    for count in range(1, steps + 1):
        value, slope, products = _derivatives(target, x, probes)
        if not (value.isfinite() and slope.isfinite().all()):
            break
        s, y = x - last_x, last_slope - slope
        if count > 1 and s @ y > 1e-8 * (y @ y):
            moves, changes = torch.cat([moves[1:], s[None]]), torch.cat([changes[1:], y[None]])
        found = _low_rank(start, x, _diagonal(products), moves, changes)
        best = _best([best, _scored(target, found, noise)])
        scale = found.log_scale.exp()
        along = torch.expm1(2 * found.log_values) * (found.basis.mT @ (scale * slope))
        way = scale * (scale * slope + found.basis @ along)
        last_x, last_slope = x, slope
        x, going = _furthest(target, x, value, way)
        if not going:
            break
    return best._replace(mode=x), count


def _diagonal(products: Tensor) -> Tensor:
    """Return a diagonal inverse curvature from the Hessian's products with vectors of ±1.

    Their root mean square estimates the length of each row of the Hessian. That is the diagonal if
    the Hessian is diagonal, and more otherwise.
    """
    sizes = products.square().mean(0).sqrt()
    sound = sizes.isfinite() & (sizes > 0)
    return torch.where(sound, 1 / sizes.where(sound, 1.0), 1.0)


def _low_rank(
    like: Preconditioner, loc: Tensor, diagonal: Tensor, steps: Tensor, changes: Tensor
) -> Preconditioner:
    """Return the Gaussian of L-BFGS's inverse curvature (Pathfinder, equations 10 to 12)."""
    used = steps.square().sum(1) > 0
    both = used[:, None] & used
    inner = (steps @ changes.mT).triu() + torch.diag((~used).to(loc.dtype))
    eye = torch.eye(HISTORY, dtype=loc.dtype, device=loc.device)
    inverse = torch.linalg.solve_triangular(inner, eye, upper=True).where(both, 0.0)
    middle = inner.diagonal().diag() + (changes * diagonal) @ changes.mT
    corner = inverse.mT @ middle.where(both, 0.0) @ inverse
    core = torch.cat(
        [
            torch.cat([torch.zeros_like(inverse), -inverse], dim=1),
            torch.cat([-inverse.mT, corner], dim=1),
        ]
    )
    scale = diagonal.sqrt()
    columns = torch.cat([changes * diagonal, steps]) / scale
    basis, triangle = torch.linalg.qr(columns.mT)
    values, vectors = torch.linalg.eigh(triangle @ core @ triangle.mT)
    values = (1 + values).clamp(min=10 * torch.finfo(loc.dtype).eps)
    return _changed(
        like,
        loc=loc,
        log_scale=scale.log(),
        basis=basis @ vectors,
        log_values=0.5 * values.log(),
    )


class _Matched(NamedTuple):
    loc: Tensor
    factor: Tensor
    elbo: Tensor


def _batch_and_match(target: LogDensity, start: Found, noise: Tensor, rounds: int) -> Found:
    """Match the Gaussian's slopes to the posterior's, and return the best Gaussian on the way."""
    size = len(start.gaussian.loc)
    batch = matched_draws(size)

    def whitened(z: Tensor) -> Tensor:
        x, ladj = start.gaussian.forward_and_ladj(z)
        return target(x) + ladj

    eye = torch.eye(size, dtype=noise.dtype, device=noise.device)
    last = best = _Matched(torch.zeros_like(noise[0]), eye, start.elbo)
    for count in range(rounds):
        draws = last.loc + torch.randn_like(noise[:1].expand(batch, size)) @ last.factor.mT
        slopes = gradients(whitened, draws)
        try:
            loc, factor = _matched(last, draws, slopes, batch * size / (count + 1.0))
        except torch.linalg.LinAlgError:
            continue
        if not (loc.isfinite().all() and factor.isfinite().all()):
            continue
        x, ladj = start.gaussian.forward_and_ladj(loc + noise @ factor.mT)
        elbo = _sure(target, x, noise) + ladj.mean() + torch.linalg.slogdet(factor).logabsdet
        last = _Matched(loc, factor, elbo)
        best = last if last.elbo > best.elbo else best
    if not best.elbo > start.elbo:
        return start
    centred = _changed(start.gaussian, loc=torch.zeros_like(best.loc))
    gaussian = copy.deepcopy(start.gaussian).precondition(
        start.gaussian(best.loc), centred(best.factor.mT).mT
    )
    return Found(gaussian, best.elbo, start.mode)


def _matched(old: _Matched, draws: Tensor, slopes: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return the Gaussian of one batch-and-match step (Cai et al., equations 9 to 11)."""
    share = weight / (1 + weight)
    mean, slope = draws.mean(0), slopes.mean(0)
    covariance = (draws - mean).mT @ (draws - mean) / len(draws)
    scatter = (slopes - slope).mT @ (slopes - slope) / len(draws)
    gap = old.loc - mean
    u = weight * scatter + share * torch.outer(slope, slope)
    v = old.factor @ old.factor.mT + weight * covariance + share * torch.outer(gap, gap)
    # Solves Σ U Σ + Σ = V by a symmetric root: Σ = 2 L (1 + (1 + 4 Lᵀ U L)^½)⁻¹ Lᵀ with L Lᵀ = V.
    root = torch.linalg.cholesky(v)
    values, vectors = torch.linalg.eigh(root.mT @ u @ root)
    values = 2 / (1 + (1 + 4 * values.clamp(min=0.0)).sqrt())
    factor = root @ (vectors * values.sqrt())
    return (old.loc + weight * (factor @ (factor.mT @ slope) + mean)) / (1 + weight), factor
