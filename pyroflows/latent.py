"""A model's latent numbers: what a search for a guide's start sees of the model."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to


class Latents(NamedTuple):
    """The continuous latent numbers of a model, as one vector of D unconstrained coordinates.

    Args:
        where: each site's coordinates.
        loc: `(D,)`, where each site starts.
        log_density: maps `(n, D)` to the log-densities in the model.
    """

    where: dict[str, Tensor]
    loc: Tensor
    log_density: Callable[[Tensor], Tensor]


@pyro.validation_enabled(False)
@poutine.block()
def latents(
    model: Callable[..., Any], init_loc_fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> Latents:
    """Return the latent numbers of a model, those that it hides from a guide included.

    A guide for some of the sites sees the model through `poutine.block`, which may hide the data
    with the others. Discrete sites are summed out.

    Raises:
        NotImplementedError: where a discrete site has no finite support.
    """
    model = without(model, BlockMessenger)
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    frames = [frame for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ())]
    nesting = max((-frame.dim for frame in frames if frame.vectorized), default=0)
    sites = prune_subsample_sites(trace).iter_stochastic_nodes()
    discrete = [name for name, site in sites if site["fn"].support.is_discrete]
    if discrete:
        model = poutine.enum(config_enumerate(model), first_available_dim=-1 - nesting)
    trace = poutine.trace(InitMessenger(init_loc_fn)(model)).get_trace(*args, **kwargs)
    evaluator = TraceEinsumEvaluator(trace, bool(discrete), nesting)
    sites = prune_subsample_sites(trace).iter_stochastic_nodes()
    continuous = {name: site for name, site in sites if name not in discrete}
    transforms = {name: biject_to(site["fn"].support) for name, site in continuous.items()}
    starts = {n: t.inv(continuous[n]["value"].detach()) for n, t in transforms.items()}
    loc = torch.cat([start.reshape(-1) for start in starts.values()])
    ends = torch.tensor([start.numel() for start in starts.values()]).cumsum(0)[:-1]
    where = dict(zip(starts, torch.arange(len(loc)).tensor_split(ends), strict=True))

    def one(latent: Tensor) -> Tensor:
        values, log_det = {}, latent.new_zeros(())
        for name, transform in transforms.items():
            unconstrained = latent[where[name]].reshape(starts[name].shape)
            value = values[name] = transform(unconstrained)
            log_det = log_det + transform.log_abs_det_jacobian(unconstrained, value).sum()
        trace = poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)
        return evaluator.log_prob(trace) + log_det

    def each(points: Tensor) -> Tensor:
        return torch.stack([one(point) for point in points])

    @pyro.validation_enabled(False)
    @poutine.block()
    def log_density(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
        # One subsample of the data for the whole search: noise would mislead it.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return function(points)

    batched = functools.partial(log_density, torch.func.vmap(one, randomness="same"))
    try:
        batched(torch.stack([loc, loc]))
    except Exception:  # whatever a model does that cannot be batched
        each(loc[None])
        return Latents(where, loc, functools.partial(log_density, each))
    return Latents(where, loc, batched)


def without(model: Callable[..., Any], *handlers: type) -> Callable[..., Any]:
    """Return the model behind the handlers of some kinds that it is wrapped in."""
    while isinstance(model, functools.partial) and isinstance((*model.args, 0)[0], handlers):
        model = model.args[1]
    return model
