"""A model's latent numbers: what a search for a guide's start sees of the model."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.infer.util import initialize_model
from numpyro.primitives import Messenger


class Latents(NamedTuple):
    """The continuous latent numbers of a model, as one vector of D unconstrained coordinates.

    Args:
        locs: where each unconstrained site starts.
        potential: what the host calls so, minus the log-density of such a dict.
    """

    locs: dict[str, Array]
    potential: Callable[[dict[str, Array]], Array]

    @property
    def where(self) -> dict[str, np.ndarray]:
        """Each site's coordinates."""
        ends = np.cumsum([loc.size for loc in self.locs.values()])
        return dict(zip(self.locs, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))

    @property
    def loc(self) -> Array:
        """Where the search starts, `(D,)`."""
        return jnp.concatenate([loc.ravel() for loc in self.locs.values()])

    def log_density(self, latent: Array) -> Array:
        """Return the log-density of `(D,)` in the model."""
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
    """Return the latent numbers of a guide's model, those that it hides from the guide included.

    A guide for some of the sites sees the model through `handlers.block`, which may hide the data
    with the others. Discrete sites are summed out, which takes the package funsor.

    Raises:
        ImportError: where the model has discrete sites and funsor is not installed.
        NotImplementedError: where a discrete site has no finite support.
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
    """Return a model without the handlers that hide sites of it."""
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
    """Whether a site of a trace is latent."""
    return site["type"] == "sample" and not site["is_observed"]


def _enumerated(site: dict[str, Any]) -> dict[str, str]:
    """Mark a discrete site to be summed out."""
    if site["is_observed"] or not site["fn"].has_enumerate_support:
        return {}
    return {"enumerate": "parallel"}


def model_of(posterior: Any, model: Any, name: str = "posterior") -> Any:
    """Return the model, and refuse what is no posterior."""
    expected = "a guide" if name == "guide" else "a guide or a distribution"
    if not callable(posterior):  # which a distribution is, too
        raise TypeError(f"`{name}` is a {type(posterior).__name__}, expected {expected}")
    if isinstance(posterior, type):
        raise TypeError(f"`{name}` is the class {posterior.__name__}, expected an instance")
    model = getattr(posterior, "model", None) if model is None else model
    if model is None:
        raise ValueError(
            "`model` is missing: only an automatic guide knows the model that it was made for"
        )
    if not callable(model):
        raise TypeError(f"`model` is a {type(model).__name__}, expected a function")
    return model
