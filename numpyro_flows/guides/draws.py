"""Maximum likelihood on draws: a flow that starts as the normal distribution of its rows."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions import biject_to

from numpyro_flows.rng import RandomKey
from numpyro_flows.support import inverse_inside
from numpyro_flows.training.fit import fit
from numpyro_flows.transform import TransformModule
from numpyro_flows.tree import dtype_of, replace
from pyroflows_common.checks import Inputs, check_rows
from pyroflows_common.draws import (
    OUTSIDE,
    as_draws,
    as_mapping,
    check_moves,
    held_out,
    lowest,
    moments,
)
from pyroflows_common.history import FitResult
from pyroflows_common.local import LOCAL_DRAWS


def fit_to_draws(
    guide: Any,
    draws: Any,
    params: Mapping[str, Any],
    inputs: Inputs,
    rates: Sequence[float],
    key: RandomKey,
    **settings: Any,
) -> tuple[dict[str, Array], FitResult, float]:
    """Train a guide on draws, and return its parameters, the best history and its learning rate.

    Without parameters to go on from, it starts as the normal distribution of the draws. Ctrl-C
    ends all runs.
    """
    args, kwargs = inputs
    set_up_key, fit_key = jax.random.split(key)
    if guide.prototype_trace is None:
        with handlers.block(), handlers.seed(rng_seed=set_up_key):
            guide._setup_prototype(*args, **kwargs)
    if guide._groups is not None:
        raise ValueError(LOCAL_DRAWS)
    rows, weights = _rows(guide, draws, params, inputs)
    goes_on = guide._named(*guide._flow.layers).keys() <= params.keys()
    flow = guide.get_transform(params) if goes_on else started(guide._flow, rows, weights)
    options = {"base": guide.get_base_dist(), "key": fit_key, **settings}
    results: list[FitResult] = []
    for rate in rates:
        results.append(trained(flow, rows, weights, learning_rate=rate, **options))
        if results[-1].stopped == "interrupted":
            break
    best = int(np.argmin([lowest(result.validation_losses) for result in results]))
    return guide._named(*results[best].flow.layers), results[best], rates[best]


def _rows(
    guide: Any, draws: Any, params: Mapping[str, Any], inputs: Inputs
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return draws in the guide's unconstrained coordinates, and their weights."""
    args, kwargs = inputs
    trace, names = guide.prototype_trace, list(guide._init_locs)
    shapes = {name: jnp.shape(trace[name]["value"]) for name in names}
    given, weights = as_mapping(draws)
    values, weights = as_draws(given, weights, names, shapes)

    @jax.jit
    @jax.vmap
    def unconstrained(values: dict[str, Array]) -> Array:
        model = handlers.substitute(handlers.seed(guide.model, 0), {**params, **values})
        with handlers.block():
            sites = handlers.trace(model).get_trace(*args, **kwargs)
        supports = {name: sites[name]["fn"].support for name in names}  # may depend on others
        return jnp.concatenate([_point(supports[name], values[name]) for name in names])

    arrays = {n: jnp.asarray(v, trace[n]["value"].dtype) for n, v in values.items()}
    rows = np.asarray(unconstrained(arrays), float)
    check_rows(np.isfinite(rows).all(1), "`draws`", OUTSIDE)
    for name, value in values.items():
        check_moves(name, value.reshape(len(rows), -1))
    return rows, weights


def _point(support: Any, value: Array) -> Array:
    """Return the unconstrained coordinates of a value, NaN outside of its support."""
    point, slope = inverse_inside(biject_to(support), value, support)
    return jnp.where(jnp.isfinite(slope).all(), point.ravel(), jnp.nan)


def started(flow: TransformModule, rows: np.ndarray, weights: np.ndarray | None) -> TransformModule:
    """Return a flow whose last layer, a `Preconditioner`, is set to the moments of rows."""
    *front, layer = flow.layers
    mean, deviation, factor = moments(rows, weights)
    loc, size = jnp.asarray(mean, layer.loc.dtype), len(mean)
    if factor is not None and layer.basis.shape == (size, size):
        layer = layer.precondition(loc, jnp.asarray(factor))
    else:
        layer = layer.at(loc, jnp.asarray(deviation))
    return replace(flow, layers=(*front, layer))


def trained(
    flow: TransformModule, rows: np.ndarray, weights: np.ndarray | None, **settings: Any
) -> FitResult:
    """Train a flow on rows, a tenth of which is held out.

    Layers that would start from the first batch count as started: the rows are in units of theirs.
    """
    state = flow.state_dict()
    done = {n: jnp.ones_like(x) if n.endswith("initialized") else x for n, x in state.items()}
    flow = flow.load_state_dict(done)
    rows, held = rows.astype(dtype_of(flow)), held_out(len(rows))
    weigh = None if weights is None else weights[~held]
    validation = rows[held] if weights is None else (rows[held], None, weights[held])
    with warnings.catch_warnings():
        # Draws of a normal distribution are those of the start.
        warnings.filterwarnings("ignore", "training did not help")
        return fit(flow, rows[~held], weights=weigh, validation=validation, **settings)
