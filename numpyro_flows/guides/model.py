"""A model as the search for a guide's start sees it: its continuous latent variables."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax
from jaxtyping import Float, Int
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import initialize_model
from numpyro.primitives import Messenger

from pyroflows_common.guides import foreign_support
from pyroflows_common.search import FAR

LogDensity = Callable[[Float[Array, " D"]], Float[Array, ""]]
Trace = dict[str, dict[str, Any]]


class Latents(NamedTuple):
    """The continuous latent numbers of a model, as one vector of D unconstrained coordinates."""

    locs: dict[str, Array]  # where each unconstrained site starts
    potential: Callable[[dict[str, Array]], Array]  # minus the log-density at such a dict
    subsampled: bool  # whether the model takes a part of its data

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
        """Return the log-density of the model at one point, with that of the coordinates."""
        return self._evaluated(latent, 1.0)

    def log_model(self, latent: Float[Array, " D"]) -> Float[Array, ""]:
        """Return the log-density of the model at one point, without that of the coordinates."""
        return self._evaluated(latent, 0.0)

    def free(self, points: Float[Array, "n D"]) -> tuple[Array, Array]:
        """Return 1 for each coordinate on which the model does not depend, 0 for others.

        Such a coordinate has no proper posterior: a site under a mask, an entry of a site with
        missing data that is observed. Where the change to unconstrained coordinates makes it
        proper, as for a bounded support, it is not free. Otherwise its log-density is linear.

        Args:
            points: where the density is looked at, and far out in their directions. None is free
                unless most of them have a density, nor if the data are a part of a whole, because
                another part may depend on it.

        Returns:
            The ones and zeros, and the slopes of the free coordinates, 0 for others.
        """
        probes = jnp.concatenate([scale * points for scale in FAR])
        own = jax.vmap(jax.grad(self.log_model))(probes)
        values, slopes = jax.vmap(jax.value_and_grad(self.log_density))(probes)
        sound = jnp.isfinite(values) & jnp.isfinite(slopes).all(1)
        first = slopes[jnp.argmax(sound)]
        linear = (own == 0) & (slopes == first)
        free = (linear | ~sound[:, None]).all(0) & (2 * sound[: len(points)].sum() > len(points))
        free &= not self.subsampled
        return free.astype(slopes.dtype), jnp.where(free, first, 0.0)

    def _evaluated(self, latent: Array, weight: float) -> Array:
        where = self.where
        sites = {name: latent[where[name]].reshape(loc.shape) for name, loc in self.locs.items()}
        with handlers.block(), _Changes(self.locs, weight):
            return -self.potential(sites)


class _Changes(Messenger):
    """Handler that gives the densities of changes to unconstrained coordinates a weight.

    The host puts them under the masks and scales of their sites; guides count them in full.
    """

    def __init__(self, names: Iterable[str], weight: float) -> None:
        super().__init__()
        self.names = {f"_{name}_log_det" for name in names}
        self.weight = weight

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self.names:
            msg["scale"] = self.weight
            while isinstance(msg["fn"], dist.MaskedDistribution):
                msg["fn"] = msg["fn"].base_dist


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
    return Latents(found.param_info.z, found.potential_fn, subsampled(found.model_trace))


def drawn(
    model: Callable[..., Any],
    where: Mapping[str, Int[np.ndarray, " n"]],
    keys: Array,
    *args: Any,
    **kwargs: Any,
) -> Float[Array, "draws D"]:
    """Return draws of the prior in unconstrained coordinates: NaN if it cannot be drawn from.

    Args:
        model: the model.
        where: coordinates of each of its sites.
        keys: a random key for each draw.
        *args: arguments of the model.
        **kwargs: the same, by name.
    """

    def draw(key: Array) -> Array:
        with handlers.block():
            trace = handlers.trace(handlers.seed(unblocked(model), key)).get_trace(*args, **kwargs)
        sites = (trace[name] for name in where)
        points = (biject_to(site["fn"].support).inv(site["value"]) for site in sites)
        return jnp.concatenate([point.ravel() for point in points])

    try:
        return lax.map(draw, keys)
    except Exception:  # an improper prior, or anything that a model may do outside of a run
        return jnp.full((len(keys), sum(map(len, where.values()))), jnp.nan)


def subsampled(trace: Trace) -> bool:
    """Return whether a model takes a part of its data."""
    plates = (site["args"] for site in trace.values() if site["type"] == "plate")
    return any(part not in (None, size) for size, part in plates)


def placed(
    model: Callable[..., Any], points: Mapping[str, Array], seed: int, *args: Any, **kwargs: Any
) -> Trace:
    """Run a model at unconstrained coordinates of its sites.

    The support of a site may depend on sites before it.
    """

    def value(site: dict[str, Any]) -> Array | None:
        if site["type"] != "sample" or site["name"] not in points:
            return None
        return biject_to(site["fn"].support)(points[site["name"]])

    run = handlers.substitute(handlers.seed(model, seed), substitute_fn=value)
    with handlers.block(hide_fn=lambda site: site["type"] != "param"):
        return handlers.trace(run).get_trace(*args, **kwargs)


def moving(
    model: Callable[..., Any], trace: Trace, locs: Mapping[str, Array], *args: Any, **kwargs: Any
) -> list[str]:
    """Return the sites of a guide whose supports may depend on others.

    Raises:
        ValueError: if they depend on sites that the guide does not have.
    """
    found = [name for name in locs if bounds(trace[name])]
    if not found:
        return found
    with jax.ensure_compile_time_eval():  # in spite of jit, unless the arguments are traced
        origin = {name: jnp.zeros_like(loc) for name, loc in locs.items()}
        one, other = (placed(model, origin, seed, *args, **kwargs) for seed in range(2))
        for name in found:
            for a, b in zip(bounds(one[name]), bounds(other[name]), strict=True):
                same = jnp.allclose(a, b, equal_nan=True)
                if not isinstance(same, jax.core.Tracer) and not same:
                    raise ValueError(foreign_support(name))
    return found


def bounds(site: dict[str, Any]) -> list[Array]:
    """Return the arrays that make a support: what is no array cannot depend on anything."""
    leaves = jax.tree.leaves(biject_to(site["fn"].support))
    return [leaf for leaf in leaves if isinstance(leaf, Array)]


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
