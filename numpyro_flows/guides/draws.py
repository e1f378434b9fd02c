"""Guides of draws: a flow that starts as the normal distribution of its rows.

It learns by maximum likelihood, or by the Fisher divergence if the slopes at the draws are known:
Seyboldt, Carlson and Carpenter, "If only my posterior were normal" (arXiv:2603.18845).
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax
from numpyro import handlers
from numpyro.distributions import biject_to
from typing_extensions import override

from numpyro_flows.inputs import Events
from numpyro_flows.rng import RandomKey
from numpyro_flows.support import inverse_inside
from numpyro_flows.training.fit import fit
from numpyro_flows.transform import Context, Pair, TransformModule
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
    with_slopes,
)
from pyroflows_common.guides import PARTIAL
from pyroflows_common.history import FitResult
from pyroflows_common.local import LOCAL_DRAWS

# Slopes of so many draws are taken at once.
PARTS = 256


def fit_to_draws(
    guide: Any,
    draws: Any,
    params: Mapping[str, Any],
    inputs: Inputs,
    rates: Sequence[float],
    key: RandomKey,
    slopes: bool,
    **settings: Any,
) -> tuple[dict[str, Array], FitResult, float, int]:
    """Train a guide on draws, and return its parameters, the best history and its learning rate.

    The number of slopes that were taken comes last.

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
    taken = len(rows) if slopes else 0
    if slopes:
        found = _slopes(guide, rows, params, inputs)
        rows, weights, options["slopes"] = with_slopes(rows, weights, found)
    results: list[FitResult] = []
    for rate in rates:
        results.append(trained(flow, rows, weights, learning_rate=rate, **options))
        if results[-1].stopped == "interrupted":
            break
    best = int(np.argmin([lowest(result.validation_losses) for result in results]))
    return guide._named(*results[best].flow.layers), results[best], rates[best], taken


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


def _slopes(guide: Any, rows: np.ndarray, params: Mapping[str, Any], inputs: Inputs) -> np.ndarray:
    """Return the slopes of the model's log-density at rows of the guide's coordinates."""
    guide._inputs = inputs
    try:
        latents = guide._latents(jax.random.key(0))
    finally:
        guide._inputs = None
    if latents is None or len(latents.loc) > rows.shape[1]:
        raise ValueError(PARTIAL)
    back = np.argsort(np.concatenate([latents.where[name] for name in guide._init_locs]))

    def log_density(x: Array) -> Array:
        with handlers.block(), handlers.substitute(data=dict(params)):
            return latents.log_density(x[back])

    points = jnp.asarray(rows, latents.loc.dtype)
    found = jax.jit(lambda x: lax.map(jax.grad(log_density), x, batch_size=PARTS))(points)
    return np.asarray(found, float)


class Sloped(TransformModule):
    r"""A flow whose log-density of a draw and its slope is minus their loss.

    $$\mathrm{loss} = \tfrac12 \lVert J^T s + \nabla_z \log|\det J|
    - \nabla_z \log b(z) \rVert^2$$

    with the draw x, the slope s of the model's log-density there, the flow's inverse z of x, its
    Jacobian J = dx/dz and the base's density b. `fit` minimises it as it does any other.

    Shapes: `(*batch, 2 D)`, a draw and its slope.

    Args:
        flow: the flow.
        density: its base.
    """

    buffers: ClassVar[tuple[str, ...]] = ("density",)

    flow: TransformModule
    density: Any

    def __init__(self, flow: TransformModule, density: Any) -> None:
        super().__init__(2 * flow.event_shape[0])
        self.flow, self.density = flow, density

    @override
    def forward_and_ladj(self, x: Events, context: Context = None) -> Pair:
        raise NotImplementedError("a loss has no inverse")

    @override
    def inverse_and_ladj(self, y: Events, context: Context = None) -> Pair:
        x, slope = jnp.split(y, 2)
        z = self.flow._inverse_pair(x, None)[0]

        def ratio(z: Array) -> Array:
            x, ladj = self.flow._forward_pair(z, None)
            return slope @ x + ladj - self.density.log_prob(z)

        return jnp.asarray(y), -0.5 * jnp.square(jax.grad(ratio)(z)).sum()

    @override
    def _absorb(self, y: Array, context: Any, first: bool) -> tuple[TransformModule, Array]:
        flow, _ = self.flow._absorb(jnp.split(y, 2, -1)[0], context, first)
        return replace(self, flow=flow), y


def trained(
    flow: TransformModule,
    rows: np.ndarray,
    weights: np.ndarray | None,
    slopes: np.ndarray | None = None,
    **settings: Any,
) -> FitResult:
    """Train a flow on rows, a tenth of which is held out, or on rows and their slopes.

    Layers that would start from the first batch count as started: the rows are in units of theirs.
    """
    state = flow.state_dict()
    done = {n: jnp.ones_like(x) if n.endswith("initialized") else x for n, x in state.items()}
    flow = flow.load_state_dict(done)
    if slopes is not None:
        flow, rows = Sloped(flow, settings["base"]), np.concatenate([rows, slopes], 1)
        zeros = jnp.zeros(flow.event_shape, dtype_of(flow.flow))
        settings["base"] = dist.Normal(zeros, 1.0).to_event(1).mask(False)  # a density of one
    rows, held = rows.astype(dtype_of(flow)), held_out(len(rows))
    weigh = None if weights is None else weights[~held]
    validation = rows[held] if weights is None else (rows[held], None, weights[held])
    with warnings.catch_warnings():
        # Draws of a normal distribution are those of the start.
        warnings.filterwarnings("ignore", "training did not help")
        found = fit(flow, rows[~held], weights=weigh, validation=validation, **settings)
    return found if slopes is None else dataclasses.replace(found, flow=found.flow.flow)
