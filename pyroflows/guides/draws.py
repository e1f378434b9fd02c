"""Maximum likelihood on draws: a flow that starts as the normal distribution of its rows."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.model import alone, without
from pyroflows.rng import seeded
from pyroflows.training.fit import fit
from pyroflows.transform import TransformModule, example
from pyroflows_common.checks import Inputs, check_rows
from pyroflows_common.draws import as_draws, as_mapping, check_moves, held_out, moments
from pyroflows_common.history import FitResult


def fit_to_draws(
    guide: Any, draws: Any, inputs: Inputs, rates: Sequence[float], seed: int, **settings: Any
) -> tuple[FitResult, float]:
    """Train a guide on draws, and return the best history and its learning rate.

    A guide that has not been called starts as the normal distribution of the draws.
    """
    args, kwargs = inputs
    new = guide.prototype_trace is None
    with seeded(seed), torch.no_grad():
        if new:
            guide._set_up(*args, **kwargs)
        rows, weights = _rows(guide, draws, inputs)
        flow = guide._modules["transform"]
        if new:
            started(flow, rows, weights)
        guide(*args, **kwargs)  # which takes the store's parameters, or puts these there
    start, results, ends = copy.deepcopy(flow.state_dict()), [], []
    base = guide.get_base_dist()
    for rate in rates:
        flow.load_state_dict(start)
        options = {**settings, "base": base, "learning_rate": rate, "seed": seed}
        results.append(trained(flow, rows, weights, **options))
        ends.append(copy.deepcopy(flow.state_dict()))
    best = int(np.argmin([result.validation_losses.min() for result in results]))
    flow.load_state_dict(ends[best])
    return results[best], rates[best]


def _rows(guide: AutoFlow, draws: Any, inputs: Inputs) -> tuple[np.ndarray, np.ndarray | None]:
    """Return draws in the guide's unconstrained coordinates, and their weights."""
    args, kwargs = inputs
    sites = dict(guide.prototype_trace.iter_stochastic_nodes())
    shapes = {name: tuple(site["value"].shape) for name, site in sites.items()}
    given, weights = as_mapping(draws)
    values, weights = as_draws(given, weights, sites, shapes)
    tensors = {n: torch.tensor(v).to(sites[n]["value"]) for n, v in values.items()}
    model = without(guide.model, InitMessenger)

    def unconstrained(values: dict[str, Tensor]) -> Tensor:
        trace = poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)
        supports = {name: trace.nodes[name]["fn"].support for name in sites}  # may depend on others
        points = [biject_to(supports[name]).inv(values[name]) for name in sites]
        return torch.cat([point.reshape(-1) for point in points])

    with alone():
        try:
            points = torch.func.vmap(unconstrained, randomness="same")(tensors)
        except Exception:  # a model that cannot be batched may raise anything
            count = len(next(iter(tensors.values())))
            each = [{name: value[i] for name, value in tensors.items()} for i in range(count)]
            points = torch.stack([unconstrained(values) for values in each])
    rows = points.double().cpu().numpy()
    check_rows(np.isfinite(rows).all(1), "`draws`", "with NaN or inf, or on the edge of a support")
    for name, value in values.items():
        check_moves(name, value.reshape(len(rows), -1))
    return rows, weights


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
    """Train a flow on rows, a tenth of which is held out."""
    data, held = torch.tensor(rows).to(example(flow)), held_out(len(rows))
    weigh = None if weights is None else weights[~held]
    validation = data[held] if weights is None else (data[held], None, weights[held])
    with warnings.catch_warnings():
        # Draws of a normal distribution are those of the start.
        warnings.filterwarnings("ignore", "training did not help")
        return fit(flow, data[~held], weights=weigh, validation=validation, **settings)
