"""A model as the search for a guide's start sees it: its continuous latent variables."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from numpyro import handlers
from numpyro.infer.util import initialize_model
from numpyro.primitives import Messenger


class Latents(NamedTuple):
    """The continuous latent numbers of a model, as one vector of D unconstrained coordinates."""

    locs: dict[str, Array]  # where each unconstrained site starts
    potential: Callable[[dict[str, Array]], Array]  # minus the log-density at such a dict

    @property
    def where(self) -> dict[str, Int[np.ndarray, " n"]]:
        """Coordinates of each site."""
        ends = np.cumsum([loc.size for loc in self.locs.values()])
        return dict(zip(self.locs, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))

    @property
    def loc(self) -> Float[Array, " D"]:
        """Where each site starts."""
        return jnp.concatenate([loc.ravel() for loc in self.locs.values()])

    def log_density(self, latent: Float[Array, " D"]) -> Float[Array, ""]:
        """Return the log-density of the model at one point."""
        where = self.where
        sites = {name: latent[where[name]].reshape(loc.shape) for name, loc in self.locs.items()}
        with handlers.block():
            return -self.potential(sites)


def latents(
    key: Array,
    model: Callable[..., Any],
    init_loc_fn: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Latents:
    """Return the latent numbers of a guide's model, including those hidden from the guide.

    A guide for some of the sites sees the model through `handlers.block`, which may hide the data
    together with the other sites. Discrete sites are summed out, by the package funsor, and must
    have finite support.
    """
    with handlers.block():
        found = initialize_model(
            key,
            handlers.infer_config(unblocked(model), _enumerated),
            init_strategy=init_loc_fn,
            model_args=args,
            model_kwargs=kwargs,
        )
    return Latents(found.param_info.z, found.potential_fn)


def unblocked(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model without the handlers that hide its sites."""
    if not isinstance(model, Messenger):
        return model
    inner = unblocked(model.fn)
    if isinstance(model, handlers.block):
        return inner
    if inner is model.fn:
        return model
    outer = copy.copy(model)
    outer.fn = inner
    return outer


def is_latent(site: dict[str, Any]) -> bool:
    """Return whether a site of a trace is latent."""
    return site["type"] == "sample" and not site["is_observed"]


def _enumerated(site: dict[str, Any]) -> dict[str, str]:
    """Mark a discrete site to be summed out."""
    if site["is_observed"] or not site["fn"].has_enumerate_support:
        return {}
    return {"enumerate": "parallel"}
