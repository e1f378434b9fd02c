"""Maximum likelihood on draws: a flow that starts as the normal distribution of its rows."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.guides.model import alone, latent_sites, mapped
from pyroflows.guides.rows import layout_of_model
from pyroflows.rng import seeded
from pyroflows.support import inverse_inside
from pyroflows.training.fit import fit
from pyroflows.transform import TransformModule, example
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
    model: Callable[..., Any],
    draws: Any,
    inputs: Inputs,
    rates: Sequence[float],
    seed: int,
    **settings: Any,
) -> tuple[FitResult, float]:
    """Train a guide on draws, and return the best history and its learning rate.

    A guide that has not been called starts as the normal distribution of the draws, unless the
    parameter store has loaded it. Ctrl-C ends all runs.
    """
    args, kwargs = inputs
    new = guide.prototype_trace is None
    if _has_rows(guide, inputs):
        raise ValueError(LOCAL_DRAWS)
    with seeded(seed), torch.no_grad():
        rows, weights = _rows(model, draws, inputs)
        if new:
            guide._set_up(lambda flow: started(flow, rows, weights), *args, **kwargs)
        flow = guide._modules["transform"]
        _settle(flow)
        guide(*args, **kwargs)  # which takes the store's parameters, or puts these there
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
    return results[best], rates[best]


def _has_rows(guide: Any, inputs: Inputs) -> bool:
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


def trained(
    flow: TransformModule, rows: np.ndarray, weights: np.ndarray | None, **settings: Any
) -> FitResult:
    """Train a flow on rows, a tenth of which is held out.

    Layers that would start from the first batch count as started: the rows are in units of theirs.
    """
    _settle(flow)
    data, held = torch.tensor(rows).to(example(flow)), held_out(len(rows))
    weigh = None if weights is None else weights[~held]
    validation = data[held] if weights is None else (data[held], None, weights[held])
    with warnings.catch_warnings():
        # Draws of a normal distribution are those of the start.
        warnings.filterwarnings("ignore", "training did not help")
        return fit(flow, data[~held], weights=weigh, validation=validation, **settings)
