"""Importance weights: the draws of a guide, and their densities in guide and model."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyroflows.guides.model import Screened, mapped
from pyroflows_common.checks import Inputs
from pyroflows_common.sites import Draws, Sites, check_match, check_plates, check_widths, site_of

# Number of draws at which the model is evaluated at once.
BLOCK = 250

Model = Callable[..., Any]  # or a guide
Evaluated = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


class Matched(NamedTuple):
    """A guide and the sites of its model, which fit each other."""

    guide: Model  # of a density, one that draws the model's only site from it
    drawn: Sites  # those of the guide
    sites: Sites  # those of the model
    nesting: int | None  # number of dimensions outside of which the guide draws many at once


def match(posterior: Any, model: Model, inputs: Inputs) -> Matched:
    """Return the guide with the sites of its model, and check that the draws can be weighed."""
    guide = _guide_of(posterior, model, inputs)
    guide_trace = _run(guide, inputs)
    trace = _run(poutine.replay(model, trace=guide_trace), inputs)
    drawn, sites = _sites(guide_trace), _sites(trace)
    check_match(drawn, sites)
    nodes = [s for t in (guide_trace, trace) for s in t.nodes.values() if s["type"] == "sample"]
    plates = (plate for site in nodes for plate in site["cond_indep_stack"])
    check_plates((plate.name, plate.size, plate.full_size) for plate in plates)
    # The host draws many at once along a dimension outside of those of all sites.
    known = isinstance(posterior, AutoContinuous | AutoNormal | dist.Distribution)
    fns = [site["fn"] for kind in (*sites, drawn.latent) for site in kind.values()]
    nesting = max(len(fn.batch_shape) for fn in fns) if known else None
    return Matched(guide, drawn, sites, nesting)


def sample(matched: Matched, inputs: Inputs, draws: int) -> tuple[dict[str, Tensor], Tensor]:
    """Draw each site, with the log-density of each draw; at once if the nesting is known."""
    shapes = {name: site["value"].shape for name, site in matched.sites.latent.items()}
    values, log_q = _sample(matched, inputs, draws, shapes)
    check_widths({name: as_array(value) for name, value in values.items()})
    return values, log_q


def log_joints(model: Model, inputs: Inputs, values: dict[str, Tensor]) -> Tensor:
    """Return the log joint density of each draw."""
    return mapped(lambda values: log_joint(model, inputs, values)[0], values, chunk_size=BLOCK)


def log_joint(model: Model, inputs: Inputs, values: dict[str, Tensor]) -> tuple[Tensor, Trace]:
    """Return the log joint density of one draw, and the trace of the model there."""
    trace = _run(poutine.condition(Screened()(model), values), inputs)
    trace.compute_log_prob()
    log_p = trace.log_prob_sum()
    for name in values:
        log_p = torch.where(_inside(trace.nodes[name]), log_p, -math.inf)
    return log_p, trace


def at_once(
    guide: Model, inputs: Inputs, draws: int, nesting: int
) -> tuple[dict[str, Any], Tensor]:
    """Return the latent sites of many draws, and the log-density of each."""
    trace = _run(pyro.plate("_draws", draws, dim=-nesting - 1)(guide), inputs)
    trace.compute_log_prob()
    sites = _sites(trace).latent
    log_q = [site["log_prob"].reshape(draws, -1).sum(-1) for site in sites.values()]
    return sites, torch.stack(log_q).sum(0)


def evaluate(
    matched: Matched, model: Model, inputs: Inputs, values: dict[str, Tensor], log_q: Tensor
) -> Draws[Tensor]:
    """Return the draws of a guide with what the model makes of them."""
    sites = matched.sites

    def one(values: dict[str, Tensor]) -> Evaluated:
        log_p, trace = log_joint(model, inputs, values)
        observed = {name: trace.nodes[name] for name in sites.observed}
        log_likelihood = {
            name: scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
            for name, site in observed.items()
        }
        return log_p, log_likelihood, {n: trace.nodes[n]["value"] for n in sites.deterministic}

    log_p, log_likelihood, computed = mapped(one, values, chunk_size=BLOCK)
    observed = {name: torch.as_tensor(site["value"]) for name, site in sites.observed.items()}
    # A reparametrised observation is computed, too, from data that stand at another site.
    computed = {
        name: value
        for name, value in computed.items()
        if _is_declared(sites.deterministic[name]) or not (value == value[0]).all()
    }
    return Draws(sites, observed, values, log_q, log_p, log_likelihood, computed)


def simulate(
    model: Model, inputs: Inputs, drawn: Draws[Tensor], index: Iterable[int]
) -> dict[str, Tensor]:
    """Draw the observations of a model again, at some of a guide's draws."""
    known = {**drawn.values, **drawn.deterministic}
    for name, site in drawn.sites.deterministic.items():
        if _is_declared(site):  # it may depend on the observations
            del known[name]
    found = []
    for i in index:
        given = {name: value[i] for name, value in known.items()}
        trace = _run(_Unobserved(drawn.observed)(poutine.condition(model, given)), inputs)
        found.append({name: trace.nodes[name]["value"] for name in drawn.observed})
    return _stacked(found)


class _Unobserved(Messenger):
    """A model that draws some of its observations, in the shape of their data."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and msg["name"] in self.names:
            fn, shape = msg["fn"], torch.as_tensor(msg["value"]).shape
            batch = torch.broadcast_shapes(shape[: len(shape) - fn.event_dim], fn.batch_shape)
            msg["fn"] = fn if batch == fn.batch_shape else fn.expand(batch)
            msg["is_observed"], msg["value"] = False, None


def as_array(x: Tensor) -> np.ndarray:
    """Return a tensor of any device as an array."""
    return x.detach().cpu().numpy()


def _run(function: Model, inputs: Inputs) -> Trace:
    return poutine.trace(function).get_trace(*inputs[0], **inputs[1])


def _sites(trace: Trace) -> Sites:
    sites = Sites({}, {}, {})
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if not site["is_observed"]:
            sites.latent[name] = site
        elif _is_point(site["fn"]):  # `pyro.deterministic`, or the result of a reparametrisation
            sites.deterministic[name] = site
        elif torch.as_tensor(site["value"]).numel():  # a factor has no value
            sites.observed[name] = site
    return sites


def _guide_of(posterior: Any, model: Model, inputs: Inputs) -> Model:
    """Return the guide, or one that draws the model's only site from a density."""
    if not isinstance(posterior, dist.Distribution):
        return posterior
    name = site_of(posterior, _sites(_run(model, inputs)), _is_real)
    return lambda *args, **kwargs: pyro.sample(name, posterior)


def log_density(function: Model, inputs: Inputs) -> Tensor:
    """Return the log-density of one run of a guide."""
    return _run(function, inputs).log_prob_sum()


def _sample(
    matched: Matched, inputs: Inputs, draws: int, shapes: dict[str, torch.Size]
) -> tuple[dict[str, Tensor], Tensor]:
    guide, nesting = matched.guide, matched.nesting
    if nesting is not None:
        with contextlib.suppress(Exception):  # below, an error of the guide is raised again
            sites, log_q = at_once(guide, inputs, draws, nesting)
            return {n: sites[n]["value"].reshape(draws, *shapes[n]) for n in shapes}, log_q
    values, densities = [], []
    for _ in range(draws):
        trace = _run(guide, inputs)
        values.append({name: trace.nodes[name]["value"] for name in shapes})
        densities.append(trace.log_prob_sum())
    return _stacked(values), torch.stack(densities)


def _stacked(dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return one dictionary of stacked tensors."""
    return {name: torch.stack([tensors[name] for tensors in dicts]) for name in dicts[0]}


def _is_point(fn: Any) -> bool:
    """Return whether a distribution is a point, however it is masked or reshaped."""
    while isinstance(fn, dist.MaskedDistribution | dist.Independent | ExpandedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def _is_declared(site: dict[str, Any]) -> bool:
    """Return whether a site is the model's own `pyro.deterministic`."""
    return bool(site["infer"].get("_deterministic"))


def _each(support: Any) -> Any:
    """Return the constraint on each number of an event."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _is_real(support: Any) -> bool:
    return isinstance(_each(support), type(constraints.real))


def _inside(site: dict[str, Any]) -> Tensor:
    """Return whether a value lies in the support of its site, if each number decides for itself."""
    support = site["fn"].support
    if _each(support).event_dim:  # a simplex or a matrix: its conditions hold up to rounding
        return site["value"].new_ones((), dtype=torch.bool)
    return support.check(site["value"]).all()
