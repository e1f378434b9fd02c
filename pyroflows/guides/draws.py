"""Guides of draws: a flow that starts as the normal distribution of its rows.

It learns by maximum likelihood, or by the Fisher divergence if the slopes at the draws are known:
Seyboldt, Carlson and Carpenter, "If only my posterior were normal" (arXiv:2603.18845).
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to
from typing_extensions import override

from pyroflows.guides.model import alone, gradients, latent_sites, latents, mapped
from pyroflows.guides.rows import layout_of_model
from pyroflows.rng import seeded
from pyroflows.support import inverse_inside
from pyroflows.training.fit import fit
from pyroflows.transform import Context, Pair, TransformModule, example
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
    model: Callable[..., Any],
    draws: Any,
    inputs: Inputs,
    rates: Sequence[float],
    seed: int,
    slopes: bool,
    **settings: Any,
) -> tuple[FitResult, float, int]:
    """Train a guide on draws, and return the best history and its learning rate.

    The number of slopes that were taken comes last.

    A guide that has not been called starts as the normal distribution of the draws, unless the
    parameter store has loaded it. Ctrl-C ends all runs.
    """
    args, kwargs = inputs
    new = guide.prototype_trace is None
    if has_rows(guide, inputs):
        raise ValueError(LOCAL_DRAWS)
    with seeded(seed), torch.no_grad():
        rows, weights = _rows(model, draws, inputs)
        if new:
            guide._set_up(lambda flow: started(flow, rows, weights), *args, **kwargs)
        flow = guide._modules["transform"]
        _settle(flow)
        guide(*args, **kwargs)  # which takes the store's parameters, or puts these there
    taken = len(rows) if slopes else 0
    if slopes:
        found = _slopes(guide, rows, inputs, seed)
        rows, weights, settings["slopes"] = with_slopes(rows, weights, found)
    start, ends = copy.deepcopy(flow.state_dict()), []
    options = {"base": guide.get_base_dist(), "seed": seed, **settings}
    results: list[FitResult] = []
    for rate in rates:
        flow.load_state_dict(start)
        results.append(trained(flow, rows, weights, learning_rate=rate, **options))
        ends.append(copy.deepcopy(flow.state_dict()))
        if results[-1].stopped == "interrupted":
            break
    best = int(np.argmin([lowest(result.validation_losses) for result in results]))
    flow.load_state_dict(ends[best])
    return results[best], rates[best], taken


def has_rows(guide: Any, inputs: Inputs) -> bool:
    """Return whether a guide has local sites, or will have them."""
    if guide.prototype_trace is not None:
        return guide._groups is not None
    args, kwargs = inputs
    with alone():
        return layout_of_model(guide.model, guide.local, *args, **kwargs)[0] is not None


def _rows(
    model: Callable[..., Any], draws: Any, inputs: Inputs
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return draws in the unconstrained coordinates of a guide of the model, and their weights."""
    args, kwargs = inputs
    with alone():
        sites = latent_sites(poutine.trace(model).get_trace(*args, **kwargs))
    shapes = {name: tuple(site["value"].shape) for name, site in sites.items()}
    given, weights = as_mapping(draws)
    values, weights = as_draws(given, weights, sites, shapes)
    tensors = {n: torch.tensor(v).to(sites[n]["value"]) for n, v in values.items()}

    def unconstrained(values: dict[str, Tensor]) -> Tensor:
        trace = poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)
        supports = {name: trace.nodes[name]["fn"].support for name in sites}  # may depend on others
        return torch.cat([_point(supports[name], values[name]) for name in sites])

    with alone():
        points = mapped(unconstrained, tensors, randomness="same")
    rows = points.double().cpu().numpy()
    check_rows(np.isfinite(rows).all(1), "`draws`", OUTSIDE)
    for name, value in values.items():
        check_moves(name, value.reshape(len(rows), -1))
    return rows, weights


def _point(support: Any, value: Tensor) -> Tensor:
    """Return the unconstrained coordinates of a value, NaN outside of its support."""
    point, slope = inverse_inside(biject_to(support), value, support)
    return torch.where(slope.isfinite().all(), point.reshape(-1), torch.nan)


def _settle(flow: TransformModule) -> None:
    """Let layers that would start from the first batch count as started."""
    for name, state in flow.named_buffers():
        if name.endswith("initialized"):
            state.fill_(True)


@torch.no_grad()
def started(flow: TransformModule, rows: np.ndarray, weights: np.ndarray | None) -> TransformModule:
    """Return a flow whose last layer, a `Preconditioner`, is set to the moments of rows."""
    layer = flow.layers[-1]
    mean, deviation, factor = moments(rows, weights)
    loc, size = torch.tensor(mean).to(layer.loc), len(mean)
    if factor is not None and layer.basis.shape == (size, size):
        layer.precondition(loc, torch.tensor(factor).to(loc))
    else:
        layer.at(loc, torch.tensor(deviation).to(loc))
    return flow


def _slopes(guide: Any, rows: np.ndarray, inputs: Inputs, seed: int) -> np.ndarray:
    """Return the slopes of the model's log-density at rows of the guide's coordinates."""
    args, kwargs = inputs
    with seeded(seed):
        found = latents(guide.model, guide.init_loc_fn, *args, **kwargs)
    if len(found.loc) > rows.shape[1]:
        raise ValueError(PARTIAL)
    sites = guide.prototype_trace.iter_stochastic_nodes()
    own = torch.cat([found.where[name] for name, _ in sites])
    back, points = own.argsort(), torch.tensor(rows).to(found.loc)

    def log_density(x: Tensor) -> Tensor:
        return found.log_density(x[:, back])

    return torch.cat([gradients(log_density, part) for part in points.split(PARTS)]).numpy(
        force=True
    )


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

    def __init__(self, flow: TransformModule, density: Any) -> None:
        super().__init__(2 * flow.event_shape[0])
        self.flow, self.density = flow, density

    @override
    def forward_and_ladj(self, x: Float[Tensor, "..."], context: Context = None) -> Pair:
        raise NotImplementedError("a loss has no inverse")

    @override
    def inverse_and_ladj(self, y: Float[Tensor, "..."], context: Context = None) -> Pair:
        learning = torch.is_grad_enabled()
        with torch.enable_grad():
            x, slope = y.chunk(2, -1)
            z = self.flow._inverse_pair(x, None)[0]
            z = z if z.requires_grad else z.requires_grad_()
            x, ladj = self.flow._forward_pair(z, None)
            ratio = ((slope * x).sum(-1) + ladj - self.density.log_prob(z)).sum()
            (left,) = torch.autograd.grad(ratio, z, create_graph=learning)
        return y, -0.5 * left.square().sum(-1)

    @override
    def _absorb(self, y: Tensor, context: Any, first: bool) -> Tensor:
        self.flow._absorb(y.chunk(2, -1)[0], context, first)
        return y


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
    _settle(flow)
    learner, like = flow, example(flow)
    if slopes is not None:
        learner, rows = Sloped(flow, settings["base"]), np.concatenate([rows, slopes], 1)
        zeros = like.new_zeros(learner.event_shape)
        settings["base"] = dist.Normal(zeros, 1.0).to_event(1).mask(False)  # a density of one
    data, held = torch.tensor(rows).to(like), held_out(len(rows))
    weigh = None if weights is None else weights[~held]
    validation = data[held] if weights is None else (data[held], None, weights[held])
    with warnings.catch_warnings():
        # Draws of a normal distribution are those of the start.
        warnings.filterwarnings("ignore", "training did not help")
        found = fit(learner, data[~held], weights=weigh, validation=validation, **settings)
    return dataclasses.replace(found, flow=flow)
