"""Where guides start: the Gaussians that a search finds for a model."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyroflows.guides.model import Latents, LogDensity, drawn
from pyroflows.guides.reference import Start
from pyroflows.guides.search import Found, apart, search
from pyroflows_common.checks import Inputs
from pyroflows_common.search import (
    CLOSE,
    DENSE,
    FAR,
    HISTORY,
    MODES,
    POSSIBLE,
    Budget,
    separate,
    warn_of_many,
    warn_of_modes,
)


class Searched(NamedTuple):
    """What a search has found, in the coordinates of all latent numbers of the model."""

    found: list[Found]  # at least one
    latents: Latents
    own: Int[Tensor, " D"]  # the coordinates of the guide among them
    target: LogDensity  # the log-density with the reference measure
    gradients: int  # how many the search took

    def best(self, start: Start) -> Start:
        """Set a guide's start to the Gaussian that fits the posterior best."""
        bounds = self._bounds
        if len(bounds) > 1 and bounds[1] > bounds[0] - CLOSE:
            warn_of_modes(bounds, self._apart(), self._size)
        return start.marginal(self.found[0].gaussian, self.own)

    @torch.no_grad()
    def modes(self, start: Start) -> list[Start]:
        """Return a Gaussian for each separate mode, the best one first."""
        gap = POSSIBLE[0] + POSSIBLE[1] * self._size
        chosen = separate(self._bounds, self._apart(), gap)
        warn_of_many(len(chosen))
        gaussians = [self.found[k].gaussian for k in chosen]
        starts = [copy.deepcopy(start).marginal(one, self.own) for one in gaussians]
        for one in starts:  # the densities of all guides are relative to one reference
            one.loc.copy_(torch.where(one.free > 0, starts[0].loc, one.loc))
        return starts

    def log_density(self, x: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        """Return the log-density of the model in the guide's order of coordinates."""
        return self.latents.log_density(x[:, self.own.argsort()])

    @property
    def _bounds(self) -> list[float]:
        return [one.elbo.item() for one in self.found]

    @property
    def _size(self) -> int:
        return len(self.found[0].mode)

    def _apart(self) -> np.ndarray:
        return apart(self.target, self.found)


def searched(
    model: Callable[..., Any],
    inputs: Inputs,
    latents: Latents,
    own: Int[Tensor, " D"],
    loc: Float[Tensor, " D"],
    scale: float,
    budget: Budget,
) -> Searched | None:
    """Search for the Gaussians that fit a posterior best; None if there are none.

    Args:
        model: the model, for draws of the prior.
        inputs: its arguments.
        latents: its latent numbers.
        own: the coordinates of the guide among them.
        loc: where the guide would start without a search.
        scale: its standard deviation there.
        budget: how much the search may take.
    """
    start = latents.loc.clone()
    start[own] = loc
    with torch.enable_grad():
        points = _points(model, inputs, latents, start, budget)
        whole = new_start(start, scale).relative(*latents.free(points))
        target = whole.target(latents.log_density)
        found, count = search(target, whole, points, budget)
    count += 2 * len(FAR) * len(points)  # of `free`
    return Searched(found[:MODES], latents, own, target, count) if found else None


def _points(
    model: Callable[..., Any], inputs: Inputs, latents: Latents, loc: Tensor, budget: Budget
) -> Tensor:
    """Return the model's own start, the origin, points around it and draws of the prior."""
    args, kwargs = inputs
    uniform = 2.0 * torch.rand(budget.starts - 2, len(loc)) - 1.0
    points = (torch.as_tensor(budget.ranges).to(uniform) * uniform).to(loc)
    prior = drawn(model, latents.where, budget.prior, *args, **kwargs).to(loc)
    sound = prior.isfinite().all(1) & latents.log_density(prior).isfinite()
    prior = prior.where(sound[:, None], points[-budget.prior :])
    return torch.stack([loc, torch.zeros_like(loc), *points[: -budget.prior], *prior])


def new_start(loc: Tensor, scale: float) -> Start:
    """Return a layer at a location, with any correlations in few dimensions."""
    rank = None if len(loc) <= DENSE else 2 * HISTORY
    return Start(len(loc), rank=rank).to(loc).at(loc, scale)
