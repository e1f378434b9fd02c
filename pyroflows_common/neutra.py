"""What `sample_neutra` of both wings shares: the stages of a run, its result and its warnings."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pyroflows_common.arviz import ArviZ
from pyroflows_common.checks import as_count, as_scale
from pyroflows_common.guides import MIXTURE

# Shares of the warm-up: plain NUTS, two stages in the flow's coordinates, and the step size; and
# the part of each of the first three that is not kept.
SHARES = (1 / 6, 1 / 4, 5 / 12)
LOST = (3 / 5, 1 / 3, 1 / 5)
# Steps of the last stage, at least: fewer leave a step size with which a chain may stand still.
LAST = 100
# NUTS takes trees of up to this depth while it looks around: the draws need not be independent.
SHALLOW = 5
# The warm-up cannot be divided into shorter stages than this makes.
SHORTEST = 60
# Steps of all chains' warm-up, at least, for ten draws in the first training.
FIRST = 160
# Draws with a higher R-hat, or a smaller effective number for each chain, are not to be trusted
# (Vehtari, Gelman, Simpson, Carpenter and Bürkner, "Rank-normalization", 2021).
HIGHEST, FEWEST = 1.01, 100
# Adam's step size on slopes.
RATE = 5e-3


class Gradients(NamedTuple):
    """How many gradients of the model's log-density each part of a run took.

    Attributes:
        search: the search for the guide's start.
        training: the guide's training.
        warmup: all of NUTS before the draws that count: a leapfrog step is one.
        sampling: the draws.
    """

    search: int
    training: int
    warmup: int
    sampling: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclasses.dataclass
class Sampled:
    """What a result of `sample_neutra` has in both wings."""

    samples: dict[str, np.ndarray]
    gradients: Gradients
    diverging: np.ndarray
    ess: float
    rhat: float

    @property
    def divergences(self) -> int:
        """Number of draws whose trajectory diverged."""
        return int(self.diverging.sum())

    @property
    def ess_per_1000(self) -> float:
        """Least effective number of draws for 1000 gradients, all of them counted."""
        return 1000 * self.ess / max(self.gradients.total, 1)

    def to_arviz(self) -> Any:
        """Return the draws as the data of the installed ArviZ, with the group `sample_stats`."""
        return ArviZ("to_arviz").chains(self.samples, {"diverging": self.diverging})

    def __repr__(self) -> str:
        chains, draws = self.diverging.shape
        return (
            f"{type(self).__name__}({chains} chains of {draws} draws, ess={self.ess:.0f}, "
            f"rhat={self.rhat:.3f}, divergences={self.divergences}, "
            f"gradients={self.gradients.total}, ess_per_1000={self.ess_per_1000:.3g})"
        )


class Stage(NamedTuple):
    """A stage of the warm-up: steps that are not kept, and steps that are."""

    lost: int
    kept: int


class Plan(NamedTuple):
    """The lengths of a run."""

    stages: list[Stage]  # each is followed by training
    warmup: int  # of the last stage
    draws: int
    chains: int


def plan(warmup: int, draws: int, chains: int, fitted: bool) -> Plan:
    """Check the lengths of a run, and divide its warm-up into stages."""
    draws, chains = as_count(draws, "draws", 8), as_count(chains, "chains")
    warmup = as_count(warmup, "warmup", max(SHORTEST, math.ceil(FIRST / chains)))
    lengths = [int(share * warmup) for share in SHARES]
    last = max(warmup - sum(lengths), LAST)
    stages = [] if fitted else [
        Stage(int(lost * length), length - int(lost * length))
        for lost, length in zip(LOST, lengths, strict=True)
    ]  # fmt: skip
    return Plan(stages, last, draws, chains)


def as_target(target_accept_prob: float) -> float:
    """Check an acceptance probability that NUTS is to reach."""
    target = as_scale(target_accept_prob, "target_accept_prob", zero=False)
    if not target < 1:
        raise ValueError(
            f"`target_accept_prob` is {target_accept_prob}, expected a number between 0 and 1"
        )
    return target


def check_sampled(guide: Any, kind: type, mixture: type, fitted: Any, result: type) -> None:
    """Check that NUTS can sample in the coordinates of a guide.

    Args:
        guide: the guide.
        kind: the wing's `AutoFlow`.
        mixture: the wing's mixture of guides.
        fitted: the result of `fit_guide`, or None.
        result: its class.
    """
    if not isinstance(guide, kind):
        raise TypeError(f"`guide` is a {type(guide).__name__}, expected an AutoFlow")
    if isinstance(guide, mixture):
        raise ValueError(MIXTURE)
    if fitted is None:
        return
    if not isinstance(fitted, result):
        raise TypeError(
            f"`fitted` is a {type(fitted).__name__}, expected the result of fit_guide, or None"
        )
    if getattr(fitted, "guide", None) is not guide:
        raise ValueError("`fitted` is the result of another guide than `guide`")


def check_complete(left: list[str]) -> None:
    """Check that no latent site of the model is left out of the guide."""
    if left:
        raise ValueError(
            f"`guide` does not draw the sites {left} of `model`, which NUTS would sample beside "
            "the flow or cannot sample: draw them in the guide, and sum discrete ones out in the "
            "model"
        )


def quality(samples: Mapping[str, np.ndarray], arviz: ArviZ) -> tuple[float, float]:
    """Return the least bulk effective sample size and the highest R-hat over all numbers.

    The R-hat of a single chain is that of its halves.
    """
    columns = [
        column
        for array in samples.values()
        for column in np.moveaxis(array.reshape(*array.shape[:2], -1).astype(float), -1, 0)
    ]
    several = [x if len(x) > 1 else x[0, len(x[0]) % 2 :].reshape(2, -1) for x in columns]
    return min(map(arviz.bulk, columns)), max(map(arviz.rhat, several))


def warn_of_draws(result: Sampled) -> None:
    """Warn of draws that would be wrong in silence."""
    chains, draws = result.diverging.shape
    if result.divergences:
        warnings.warn(
            f"{result.divergences} of {chains * draws} draws end a trajectory that diverged: the "
            "posterior is narrow where they are, and may be missed there; a higher "
            "`target_accept_prob`, a longer `warmup` or a guide of more couplings helps",
            stacklevel=3,
        )
    if not result.rhat <= HIGHEST:
        warnings.warn(
            f"the chains disagree: the highest R-hat is {result.rhat:.3f}, and should be at most "
            f"{HIGHEST}; take more `draws`, a longer `warmup`, or look for several modes",
            stacklevel=3,
        )
    if not result.ess >= FEWEST * chains:
        warnings.warn(
            f"the draws count as {result.ess:.0f} independent ones at some number, and should as "
            f"{FEWEST} for each of {chains} chains, for errors that can be trusted: take more "
            "`draws`, or a longer `warmup` for a better guide",
            stacklevel=3,
        )


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the draws of each stage, `(chains, draws, *shape)` by site, as those to train on.

    Those of plain NUTS, the first stage, serve the first training only.
    """
    flat = [{n: v.reshape(-1, *v.shape[2:]) for n, v in part.items()} for part in parts]
    flat = flat[1:] or flat
    return {name: np.concatenate([part[name] for part in flat]) for name in flat[0]}
