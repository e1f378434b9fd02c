"""Where guides start: the Gaussians that a search finds for a model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from numpyro_flows.compiling import effort
from numpyro_flows.guides.model import Latents, drawn
from numpyro_flows.guides.reference import Start
from numpyro_flows.guides.search import Found, apart, search
from numpyro_flows.tree import replace, select
from pyroflows_common.checks import Inputs
from pyroflows_common.guides import NOTHING, PARTIAL, SUBSAMPLED, warn_of_search
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

    found: Found
    latents: Latents
    own: Int[np.ndarray, " D"]  # the coordinates of the guide among them
    gradients: Array  # how many the search took

    def best(self, start: Start) -> Start:
        """Return the Gaussian that fits the posterior best, or the given start if there is none."""
        sound = jnp.isfinite(self.found.elbo[0])
        if not isinstance(sound, jax.core.Tracer):
            if not sound:
                warn_of_search(NOTHING)
            elif self.found.elbo[1] > self.found.elbo[0] - CLOSE:
                warn_of_modes(self.found.elbo.tolist(), self._apart(), self._size)
        return select(sound, self._start(start, 0), start)

    def modes(self, start: Start) -> list[Start]:
        """Return a Gaussian for each separate mode, the best one first.

        Raises:
            ValueError: if the guide draws only a part of the sites, or if the model takes a part of
                its data.
        """
        bounds = self.found.elbo.tolist()
        if len(self.own) < self._size:
            raise ValueError(PARTIAL)
        if self.latents.subsampled:
            raise ValueError(SUBSAMPLED)
        if not np.isfinite(bounds[0]):
            warn_of_search(NOTHING)
            return [start]
        gap = POSSIBLE[0] + POSSIBLE[1] * self._size
        starts = [self._start(start, k) for k in separate(bounds, self._apart(), gap)]
        warn_of_many(len(starts))
        # The densities of all guides are relative to one reference.
        free, loc = starts[0].free > 0, starts[0].loc
        return [replace(one, loc=jnp.where(free, loc, one.loc)) for one in starts]

    def log_density(self, x: Float[Array, " D"]) -> Float[Array, ""]:
        """Return the log-density of the model in the guide's order of coordinates."""
        return self.latents.log_density(x[np.argsort(self.own)])

    @property
    def _size(self) -> int:
        return self.found.mode.shape[-1]

    def _apart(self) -> np.ndarray:
        best = jax.tree.map(lambda a: a[0], self.found.gaussian)
        log_density = best.target(self.latents.log_density)
        return np.asarray(jax.jit(lambda found: apart(log_density, found))(self.found))

    def _start(self, start: Start, k: int) -> Start:
        return start.marginal(jax.tree.map(lambda a: a[k], self.found.gaussian), self.own)


def searched(
    model: Callable[..., Any],
    inputs: Inputs,
    latents: Latents,
    own: Int[np.ndarray, " D"],
    loc: Float[Array, " D"],
    scale: float,
    budget: Budget,
    key: Array,
) -> Searched:
    """Search for the Gaussians that fit a posterior best.

    Args:
        model: the model, for draws of the prior.
        inputs: its arguments.
        latents: its latent numbers.
        own: the coordinates of the guide among them.
        loc: where the guide would start without a search.
        scale: its standard deviation there.
        budget: how much the search may take.
        key: random key.
    """
    loc = latents.loc.at[own].set(loc)
    whole = new_start(len(loc)).astype(loc.dtype).at(loc, scale)
    start_key, search_key = jax.random.split(key)

    def run(whole: Start, start_key: Array, key: Array) -> tuple[Found, Array]:
        points = _points(model, inputs, latents, whole.loc, budget, start_key)
        whole = whole.relative(*latents.free(points))
        found, count = search(whole.target(latents.log_density), whole, points, key, budget)
        return found, count + 2 * len(FAR) * len(points)  # of `free`

    inside = isinstance(search_key, jax.core.Tracer)
    compiled = jax.jit(run, compiler_options=None if inside else effort(0))
    found, count = compiled(whole, start_key, search_key)
    return Searched(jax.tree.map(lambda a: a[:MODES], found), latents, own, count)


def _points(
    model: Callable[..., Any],
    inputs: Inputs,
    latents: Latents,
    loc: Array,
    budget: Budget,
    key: Array,
) -> Array:
    """Return the model's own start, the origin, points around it and draws of the prior."""
    args, kwargs = inputs
    uniform_key, *keys = jax.random.split(key, 1 + budget.prior)
    shape = (budget.starts - 2, len(loc))
    points = budget.ranges * jax.random.uniform(uniform_key, shape, loc.dtype, -1.0, 1.0)
    prior = drawn(model, latents.where, jnp.stack(keys), *args, **kwargs)
    sound = jnp.isfinite(prior).all(1) & jnp.isfinite(lax.map(latents.log_density, prior))
    prior = jnp.where(sound[:, None], prior, points[-budget.prior :]).astype(loc.dtype)
    return jnp.stack([loc, jnp.zeros_like(loc), *points[: -budget.prior], *prior])


def new_start(size: int) -> Start:
    """Return a layer of this size, with any correlations in few dimensions."""
    return Start(size, rank=None if size <= DENSE else 2 * HISTORY)
