"""The verdict on a guide: smoothed importance weights of its draws, and what they say of it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Fewer draws have no tail that a Pareto distribution can be fitted to.
FEWEST = 25
# Log ratios this close are equal but for rounding.
EQUAL = 1e-3
# Draws can stand for the posterior as they are if they count as this fraction of their number.
ENOUGH = 0.8


class Weights(NamedTuple):
    """Normalised log weights of draws, and how far these can be trusted."""

    log_weight: np.ndarray
    pareto_k: float
    ess: float
    lost: int


def weigh(psis: Callable[[np.ndarray], Any], ratio: np.ndarray) -> Weights:
    """Smooth the weights; `ratio` has minus infinity for draws without weight."""
    finite = np.isfinite(ratio)
    if not finite.any():
        raise ValueError(
            f"`posterior` fits no draw: none of {len(ratio)} has a finite density ratio to `model`"
        )
    if finite.sum() >= FEWEST and np.ptp(ratio[finite]) < EQUAL:  # nothing to fit a tail to
        log_weight, k = np.where(finite, -math.log(finite.sum()), -np.inf), -math.inf
    else:
        log_weight, k = psis(ratio)
        k = math.inf if np.isnan(k) else float(k)
    ess = float(1 / np.exp(2 * log_weight).sum())
    return Weights(log_weight, k, ess, int((~finite).sum()))


def verdict(weights: Weights, resampled: bool) -> str:
    """Say in one line whether the draws can be trusted."""
    draws, k = len(weights.log_weight), weights.pareto_k
    limit = min(1 - 1 / math.log10(draws), 0.7)
    # As many as tell the two apart.
    digits = 2 if f"{k:.2f}" != f"{limit:.2f}" else 4
    if not k < limit:
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
    return f"k̂ = {k:.{digits}f}: {text}"


def resample(log_weight: np.ndarray, start: float) -> np.ndarray:
    """Return the draws that equally spaced steps through the weights come upon, in order."""
    ends = np.exp(log_weight).cumsum()
    steps = (start + np.arange(len(ends))) / len(ends)
    return np.searchsorted(ends / ends[-1], steps.clip(max=np.nextafter(1.0, 0.0)), side="right")
