"""Inpainting: the schedule of the ascent, its coordinates, and checks of what is known."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyroflows_common.checks import check_rows

# Adam's decays, and its guard against division by zero.
DECAYS, TINY = (0.9, 0.99), 1e-12
# Share of the steps, at the end, without noise.
SETTLING = 0.25
# Steps of the search for the starts of chains, and the fewest draws of a chain, for its two halves.
STEPS_TO_STARTS, FEWEST_DRAWS = 300, 4
# First and last step of the search for latents, and the first and last deviation that it allows
# what is known, in units of their spread.
LATENT_STEPS, DEVIATIONS = (0.05, 0.005), (1.0, 0.01)
SPACES = ("data", "latent")
# Events by which the numbers are scaled, at least and at most; the least scale, in units of the
# median one.
SCALING, LEAST_SCALE = (64, 512), 1e-3
# Distance that starts keep from the ends of an interval, in units of its length.
MARGIN = 1e-3
# One number may have an R-hat of 1.01 (Vehtari et al., "Rank-normalization, folding, and
# localization", arXiv:1903.08008); this is for the largest of many.
RHAT_LIMIT = 1.1

Ends = tuple[np.ndarray, np.ndarray]  # of the interval of each number; infinite where it has none


def schedule(steps: int, noise: float) -> np.ndarray:
    """Return four numbers for each step: its size, its noise, and Adam's two corrections of bias.

    The size is NICE's 10 / (100 + i) until the ascent settles.
    """
    i = np.arange(steps)
    left = ((steps - i) / (SETTLING * steps)).clip(max=1)
    corrections = (1 - decay ** (i + 1) for decay in DECAYS)
    return np.stack([left * 10 / (100 + i), noise * (left == 1), *corrections], -1)


def latent_schedule(steps: int) -> np.ndarray:
    """Return four numbers for each step: its size, the deviation, and Adam's two corrections."""
    share = np.linspace(0, 1, steps)
    falling = (first * (last / first) ** share for first, last in (LATENT_STEPS, DEVIATIONS))
    corrections = (1 - decay ** (np.arange(steps) + 1) for decay in DECAYS)
    return np.stack([*falling, *corrections], -1)


def direction(
    gradient: Any, first: Any, second: Any, once: Any, twice: Any
) -> tuple[Any, Any, Any]:
    """Return Adam's direction and its two moments, of either host's arrays."""
    early, late = DECAYS
    first = early * first + (1 - early) * gradient
    second = late * second + (1 - late) * gradient * gradient
    return first / once / ((second / twice) ** 0.5 + TINY), first, second


def check_space(space: str) -> None:
    """Check the name of the space in which to search."""
    if space not in SPACES:
        raise ValueError(f"`space` is {space!r}, expected one of {', '.join(SPACES)}")


def ends(bijection: Any, event_shape: tuple[int, ...]) -> Ends:
    """Return the ends of the interval of each number that a `BijectTo`, or None, maps onto."""
    support = None if bijection is None else bijection.support
    if isinstance(support, str):
        raise ValueError(
            f"`support` is {support}, whose numbers depend on each other: a part of them cannot "
            "change alone"
        )
    pairs = ((None, None),) if support is None else support
    low, high = (
        np.array([unbounded if end is None else end for end in side], float)
        for side, unbounded in zip(zip(*pairs, strict=True), (-math.inf, math.inf), strict=True)
    )
    return np.broadcast_to(low, event_shape), np.broadcast_to(high, event_shape)


def check_known(known: np.ndarray, x: np.ndarray, ends: Ends, own: Ends) -> np.ndarray:
    """Check a mask and the numbers it calls known; return it in the shape of the events.

    Args:
        known: the mask.
        x: the events.
        ends: the ends of the support to stay in.
        own: those of the flow's own support, on which it has no density.
    """
    if known.dtype != bool:
        raise TypeError(f"`known` has dtype {known.dtype}, expected a mask of booleans")
    try:
        mask = np.broadcast_to(known, x.shape).copy()
    except ValueError:
        raise ValueError(
            f"`known` has shape {known.shape}, which does not broadcast to that of `x`, {x.shape}"
        ) from None
    low, high = ends
    faults = (
        (np.isfinite(x), "with NaN or inf where `known` is true"),
        ((x >= low) & (x <= high), "outside the support where `known` is true"),
        ((x > own[0]) & (x < own[1]), "on the edge of the flow's support where `known` is true"),
    )
    for good, fault in faults:
        check_rows((good | ~mask).reshape(-1, low.size).all(-1), "`x`", fault)
    return mask


def check_density(log_probs: np.ndarray) -> None:
    """Check that each event can be completed."""
    fault = "to which the flow gives no density, whatever stands in their unknown part"
    check_rows(np.isfinite(log_probs).ravel(), "`x`", fault)


def draws_to_scale_by(count: int, batch: Sequence[int]) -> int:
    """Return how many draws for each event give `count` starts and enough to scale by."""
    return max(count, math.ceil(SCALING[0] / max(math.prod(batch), 1)))


def inner(draws: np.ndarray, ends: Ends) -> Ends:
    """Return intervals a little inside of others; half-lines by the spread of draws of the flow."""
    low, high = ends
    events = draws.reshape(-1, *low.shape)
    with np.errstate(invalid="ignore"):
        spread = np.median(np.abs(events - np.where(np.isfinite(low), low, high)), 0)
        margin = MARGIN * np.where(np.isfinite(high - low), high - low, spread)
    margin = np.where(np.isfinite(margin), margin, 0)
    return low + margin, high - margin


def location_and_scale(u: np.ndarray, event_shape: tuple[int, ...]) -> Ends:
    """Return the median and the spread of each number of draws, by quartiles."""
    events = u.reshape(-1, *event_shape)
    events = events[:: max(len(events) // SCALING[1], 1)]
    low, location, high = np.quantile(events, (0.25, 0.5, 0.75), axis=0)
    scale = (high - low) / 1.349  # one standard deviation of a normal
    least = LEAST_SCALE * np.median(scale)
    return location, scale.clip(least if least > 0 else 1.0)


def kept(num_samples: int, chains: int, length: int) -> np.ndarray:
    """Return which of the draws of all chains to keep, evenly spaced."""
    return np.linspace(0, chains * length - 1, num_samples).round().astype(int)


def disagreement(rhat: np.ndarray) -> str | None:
    """Return a warning where the chains disagree on unknown numbers."""
    apart = ~(rhat <= RHAT_LIMIT)  # NaN: a chain did not move
    if not apart.any():
        return None
    high = rhat[np.isfinite(rhat)].max(initial=0)
    worst = f"R-hat is up to {high:.2f}, above {RHAT_LIMIT}" if high > 0 else "they do not move"
    return (
        f"the chains disagree on {apart.sum()} of {rhat.size} unknown numbers ({worst}), so these "
        "draws are not yet draws of the whole distribution; raise `num_warmup` and `num_samples`, "
        "and more `chains` show whether there are several modes"
    )
