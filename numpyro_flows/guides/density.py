"""The density of a guide at values of the model's sites that it has not drawn."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.autoguide import AutoContinuous, AutoGuideList
from numpyro.infer.util import log_density

from numpyro_flows.guides import importance
from numpyro_flows.guides.autoflow import AutoFlow
from numpyro_flows.guides.importance import Matched, Model, Params
from pyroflows_common.checks import Inputs
from pyroflows_common.sites import check_scored


def free_sites(posterior: Any, params: Params) -> set[str]:
    """Return the sites on which the model does not depend at all, as guides of flows tell."""
    found = set()
    for part in _parts(posterior):
        if isinstance(part, AutoFlow):
            free = part._unpack_latent(part._reference(params).free)
            found |= {name for name, each in free.items() if (each > 0).all()}
    return found


def densities(
    posterior: Any,
    matched: Matched,
    model: Model,
    params: Params,
    inputs: Inputs,
    values: dict[str, np.ndarray],
    key: Array,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-densities of model and guide at draws from elsewhere.

    Coordinates on which the model does not depend are drawn again, from the measure to which the
    guide's density is relative.
    """
    vectors = {_name(part): list(part._init_locs) for part in _parts(posterior)}
    check_scored(matched.drawn, vectors)
    count = len(next(iter(values.values())))

    def one(values: dict[str, Array], key: Array) -> tuple[Array, Array]:
        log_p, trace = importance.log_joint(model, params, inputs, values, key)
        given = dict(values)
        for part in _parts(posterior):
            supports = {name: trace[name]["fn"].support for name in part._init_locs}
            points = {name: biject_to(s).inv(given.pop(name)) for name, s in supports.items()}
            latent = jnp.concatenate([point.reshape(-1) for point in points.values()])
            if isinstance(part, AutoFlow):
                start, (key, own) = part._reference(params), jax.random.split(key)
                fresh = start.loc + jax.random.normal(own, latent.shape, latent.dtype)
                latent = jnp.where(start.free > 0, fresh, latent)
            given[_name(part)] = latent
        guide = handlers.seed(matched.guide, key)
        return log_p, log_density(guide, *inputs, {**params, **given})[0]

    arrays = {n: jnp.asarray(v, matched.sites.latent[n]["value"].dtype) for n, v in values.items()}
    both = arrays, jax.random.split(key, count)
    return importance.mapped(lambda both: one(*both), both, count, matched.block)


def _parts(posterior: Any) -> Iterator[Any]:
    """Return the guides that draw all of their sites as one vector."""
    if isinstance(posterior, AutoContinuous):
        yield posterior
    elif isinstance(posterior, AutoGuideList):
        for part in posterior:
            yield from _parts(part)


def _name(part: AutoContinuous) -> str:
    return f"_{part.prefix}_latent"
