"""Weights of the parts of a mixture, so that it is as close to a posterior as they can make it."""

import math
import warnings

import numpy as np

# Draws of each part from which the weights are found.
DRAWS = 2000
# Draws at which the model is evaluated at once.
BLOCK = 250
# Effective number of draws below which the weights are uncertain.
FEWEST = 100
# Most rounds of the search for the weights, and the change of a weight at which it ends.
ROUNDS, CHANGE = 1000, 1e-6


def weights_of(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    r"""Return the weights of the mixture that is closest to a posterior.

    They minimise \(\mathrm{KL}(p \,\|\, \sum_k w_k q_k)\). The draws of all parts together stand
    for the posterior, each with its importance ratio to the mixture in equal parts. Where the parts
    do not overlap, their weights are in the ratios of their evidences.

    Args:
        log_p: log-density of the posterior, up to its constant, at draws of each part, `(K, n)`.
        log_q: log-density of every part at the same draws, `(K, n, K)`.

    Returns:
        The weights, `(K,)`.

    Raises:
        ValueError: if no draw has a finite density ratio.

    References:
        Cappé, Douc, Guillin, Marin and Robert, "Adaptive importance sampling in general mixture
        classes" (Statistics and Computing 2008), for the update of the weights; Veach and Guibas,
        "Optimally combining sampling techniques" (SIGGRAPH 1995), for ratios to the mixture of all
        parts; Ionides, "Truncated importance sampling" (JCGS 2008), for their largest value.
    """
    count = log_q.shape[-1]
    log_q = _known(log_q).reshape(-1, count)
    ratio = np.asarray(log_p, dtype=float).ravel() - np.logaddexp.reduce(log_q, -1)
    sound = np.isfinite(ratio)
    if not sound.any():
        raise ValueError("none of the guides of the modes has a draw with a finite density ratio")
    ratio, log_q = ratio[sound], log_q[sound]
    ratio = np.exp(ratio - ratio.max())
    ratio = np.minimum(ratio, ratio.mean() * math.sqrt(len(ratio)))  # a few must not decide
    ratio /= ratio.sum()
    effective = 1 / np.square(ratio).sum()
    if effective < FEWEST:
        warnings.warn(
            f"the weights of the modes are uncertain: {len(ratio)} draws of their guides count as "
            f"{effective:.0f} of the posterior: train longer, or use a more flexible guide",
            stacklevel=3,
        )
    density = np.exp(log_q - log_q.max(-1, keepdims=True))
    weights = np.full(count, 1 / count)
    for _ in range(ROUNDS):  # expectation maximisation
        shares = weights * density
        new = ratio @ (shares / shares.sum(-1, keepdims=True))
        if np.abs(new - weights).max() < CHANGE:
            return new
        weights = new
    return weights


def bound_of(weights: np.ndarray, log_p: np.ndarray, log_q: np.ndarray) -> float:
    """Return the evidence lower bound of a mixture, from draws of its parts with finite ratios."""
    kept = np.flatnonzero(weights > CHANGE)
    log_mixture = np.logaddexp.reduce(np.log(weights[kept]) + _known(log_q)[kept][..., kept], -1)
    ratio = np.asarray(log_p, dtype=float)[kept] - log_mixture
    sound = np.isfinite(ratio)
    each = np.where(sound, ratio, 0.0).sum(1) / np.maximum(sound.sum(1), 1)
    return float(weights[kept] @ each)


def _known(log_density: np.ndarray) -> np.ndarray:
    """Return log-densities in double precision; one that is unknown counts as none."""
    log_density = np.asarray(log_density, dtype=float)
    return np.where(np.isnan(log_density), -np.inf, log_density)
