"""The verdict on a guide: smoothed importance weights of its draws, and what they say of it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# A Pareto distribution cannot be fitted to the tail of fewer draws.
FEWEST = 25
# Log ratios this close are as good as equal: their tail would be that of roundings, or of the step
# from one part of a mixture to the next.
EQUAL = 0.02
# Draws can be used as they are if their effective number is at least this fraction of them.
ENOUGH = 0.8
# What no weights can tell, and what looks for it.
UNSEEN, SEEKER = "no draw tells of modes that were missed", ": fit_mixture looks for them"


class Weights(NamedTuple):
    """Importance weights of draws, and how far they can be trusted.

    Args:
        ratio: log importance ratios; minus infinity for draws without weight.
        log_weight: normalised, smoothed logarithms of the weights.
        pareto_k: shape of the Pareto distribution; minus infinity if all ratios are equal.
        ess: effective number of the weighted draws.
    """

    ratio: np.ndarray
    log_weight: np.ndarray
    pareto_k: float
    ess: float

    @property
    def lost(self) -> int:
        """Number of draws without weight."""
        return int((~np.isfinite(self.ratio)).sum())

    @property
    def limit(self) -> float:
        """Largest shape at which the weights of so many draws can be trusted."""
        return min(1 - 1 / math.log10(len(self.ratio)), 0.7)

    @property
    def trusted(self) -> bool:
        """Whether the weights can be trusted."""
        return self.pareto_k < self.limit


def weigh(
    smooth: Callable[[np.ndarray], tuple[np.ndarray, float]],
    log_p: np.ndarray,
    log_q: np.ndarray | float,
) -> Weights:
    """Weigh draws by their densities in model and guide.

    A draw has no weight if the ratio of its densities is not finite.
    """
    ratio = np.subtract(log_p, log_q, dtype=np.float64)
    ratio = np.nan_to_num(ratio, nan=-np.inf, posinf=-np.inf, neginf=-np.inf)
    finite = np.isfinite(ratio)
    if not finite.any():
        raise ValueError(
            f"`posterior` fits no draw: none of {len(ratio)} has a finite density ratio to `model`"
        )
    if finite.sum() >= FEWEST and np.ptp(ratio[finite]) < EQUAL:  # no tail to fit
        log_weight, k = np.where(finite, -math.log(finite.sum()), -np.inf), -math.inf
    else:
        log_weight, k = smooth(ratio)
        k = math.inf if np.isnan(k) else float(k)
    return Weights(ratio, log_weight, k, float(1 / np.exp(2 * log_weight).sum()))


def verdict(weights: Weights, resampled: bool, single: bool = False, local: bool = False) -> str:
    """Say in one line whether the draws can be trusted.

    Args:
        weights: importance weights of draws.
        resampled: whether the draws are resampled by them.
        single: whether the guide is one that `fit_mixture` takes.
        local: whether the weights are those of the global sites, and local ones are weighed apart.
    """
    draws, k, limit = len(weights.ratio), weights.pareto_k, weights.limit
    digits = 2 if f"{k:.2f}" != f"{limit:.2f}" else 4  # enough to tell the two apart
    if not weights.trusted:
        text = (
            f"do not trust: above {limit:.{digits}f}, the limit for {draws} draws; train longer, "
            "or use a more flexible guide"
        )
    elif resampled:
        text = f"{'good' if k < 0.5 else 'usable'}; the draws are resampled by importance"
    elif k >= 0.5:
        text = "usable after importance resampling (resample=True)"
    elif weights.lost or weights.ess < ENOUGH * draws:
        text = (
            "good after importance resampling (resample=True): the draws count as "
            f"{weights.ess:.0f} of {draws}"
        )
    else:
        text = "good; the draws can be used as they are"
    if weights.lost:
        text += f"; {weights.lost} of {draws} draws have no finite ratio and no weight"
    if weights.trusted:
        text += f"; {UNSEEN}{SEEKER if single else ''}"
    return f"k̂ = {k:.{digits}f}{' of the global sites' if local else ''}: {text}"


def resample(log_weight: np.ndarray, start: float) -> np.ndarray:
    """Return the indices of systematically resampled draws, in order.

    Args:
        log_weight: normalised logarithms of the weights.
        start: uniform in [0, 1), the offset of the equally spaced steps through the weights.
    """
    ends = np.exp(log_weight).cumsum()
    steps = (start + np.arange(len(ends))) / len(ends)
    return np.searchsorted(ends / ends[-1], steps.clip(max=np.nextafter(1.0, 0.0)), side="right")
