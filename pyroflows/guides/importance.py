"""Importance weights: the draws of a guide, weighed against its model."""

import contextlib
import math
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyroflows_common.checks import Inputs

# Draws whose model is evaluated at once.
BLOCK = 250


class Sites(NamedTuple):
    """The sites of one run, by their names."""

    latent: dict[str, Any]
    observed: dict[str, Any]  # without factors
    deterministic: dict[str, Any]


class Draws(NamedTuple):
    """Draws of a guide, and what the model makes of them: the first dimension is that of draws."""

    sites: Sites
    values: dict[str, Tensor]
    log_q: Tensor
    log_p: Tensor
    log_likelihood: dict[str, Tensor]
    deterministic: dict[str, Tensor]


def draw(posterior: Any, model: Any, inputs: Inputs, draws: int) -> Draws:
    """Draw from a guide or a density, and evaluate the model at each draw."""
    guide = _guide_of(posterior, model, inputs)
    guide_sites, sites = _match(_run(guide, inputs), model, inputs)
    # What the host can draw at once needs a dimension outside of all that the sites have.
    known = isinstance(posterior, AutoContinuous | AutoNormal | dist.Distribution)
    fns = [site["fn"] for kind in (*sites, guide_sites.latent) for site in kind.values()]
    nesting = max(len(fn.batch_shape) for fn in fns) if known else None
    shapes = {name: site["value"].shape for name, site in sites.latent.items()}
    values, log_q = _sample(guide, inputs, draws, shapes, nesting)
    for name, value in values.items():
        if value.is_floating_point() and value.numel() and (value == value[0]).all():
            raise ValueError(
                f"`posterior` gives site {name!r} the same value in all {draws} draws: a point "
                "has no density to weigh; use a guide with a width"
            )
    return Draws(sites, values, log_q, *_evaluate(model, inputs, values))


def _run(function: Any, inputs: Inputs) -> Any:
    return poutine.trace(function).get_trace(*inputs[0], **inputs[1])


def _sites(trace: Any) -> Sites:
    sites = Sites({}, {}, {})
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if not site["is_observed"]:
            sites.latent[name] = site
        elif site["infer"].get("_deterministic"):
            sites.deterministic[name] = site
        elif torch.as_tensor(site["value"]).numel():  # that of a factor is empty
            sites.observed[name] = site
    return sites


def _guide_of(posterior: Any, model: Any, inputs: Inputs) -> Any:
    """Return the guide, or one that draws the model's only site from a density."""
    if not isinstance(posterior, dist.Distribution):
        return posterior
    latent = _sites(_run(model, inputs)).latent
    if len(latent) != 1:
        raise ValueError(
            f"`posterior` is a density, but `model` has the latent sites {sorted(latent)}: "
            "expected one; use a guide"
        )
    ((name, site),) = latent.items()
    support, batch = site["fn"].support, tuple(posterior.batch_shape)
    shape, expected = tuple(posterior.event_shape), tuple(site["fn"].shape())
    if not isinstance(_each(support), type(constraints.real)):
        raise ValueError(
            f"`posterior` is a density on the real line, but site {name!r} of `model` has the "
            f"support {support}: use a guide"
        )
    if batch:
        raise ValueError(
            f"`posterior` is a batch of densities of shape {batch}, expected one: of a "
            "conditional flow, give one context"
        )
    if shape != expected:
        raise ValueError(
            f"`posterior` has events of shape {shape}, but site {name!r} of `model` has shape "
            f"{expected}"
        )
    return lambda *args, **kwargs: pyro.sample(name, posterior)


def _match(guide_trace: Any, model: Any, inputs: Inputs) -> tuple[Sites, Sites]:
    """Return the sites of guide and model, and refuse what cannot be weighed."""
    trace = _run(poutine.replay(model, trace=guide_trace), inputs)
    guide_sites, sites = _sites(guide_trace), _sites(trace)
    auxiliary = {n for n, s in guide_sites.latent.items() if s["infer"].get("is_auxiliary")}
    missing = sorted(set(sites.latent) - set(guide_sites.latent))
    surplus = sorted(set(guide_sites.latent) - set(sites.latent) - auxiliary)
    if missing or not sites.latent:
        raise ValueError(
            f"`posterior` does not draw the latent sites {missing} of `model`: expected all of "
            "them; sum discrete ones out in the model"
        )
    if surplus:
        raise ValueError(
            f"`posterior` draws the sites {surplus}, which `model` does not have: mark auxiliary "
            "ones with infer={'is_auxiliary': True}"
        )
    for name, site in sites.latent.items():
        shape, expected = tuple(site["value"].shape), tuple(site["fn"].shape())
        if shape != expected:
            raise ValueError(
                f"`posterior` draws site {name!r} with shape {shape}, but in `model` it has shape "
                f"{expected}"
            )
    everything = (*guide_trace.nodes.values(), *trace.nodes.values())
    for plate in (p for s in everything if s["type"] == "sample" for p in s["cond_indep_stack"]):
        if plate.full_size not in (None, plate.size):
            raise ValueError(
                f"plate {plate.name!r} takes a subsample, {plate.size} of {plate.full_size}: the "
                "ratios need all of the data; choose `args` or `kwargs` so that the model does"
            )
    return guide_sites, sites


def _sample(
    guide: Any, inputs: Inputs, draws: int, shapes: dict[str, Any], nesting: int | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw each site with the log-density of each draw, at once if all plates can be nested."""
    if nesting is not None:
        with contextlib.suppress(Exception):  # an error of the guide comes again below
            trace = _run(pyro.plate("_draws", draws, dim=-nesting - 1)(guide), inputs)
            trace.compute_log_prob()
            sites = _sites(trace).latent
            log_q = [site["log_prob"].reshape(draws, -1).sum(-1) for site in sites.values()]
            values = {n: sites[n]["value"].reshape(draws, *shapes[n]) for n in shapes}
            return values, torch.stack(log_q).sum(0)
    traces = [_run(guide, inputs) for _ in range(draws)]
    values = {n: torch.stack([trace.nodes[n]["value"] for trace in traces]) for n in shapes}
    return values, torch.stack([trace.log_prob_sum() for trace in traces])


def _evaluate(model: Any, inputs: Inputs, values: dict[str, Tensor]) -> tuple[Any, ...]:
    """Return log joint densities, log-likelihoods of observations and deterministic values."""

    def one(values: dict[str, Tensor]) -> tuple[Any, ...]:
        trace = _run(poutine.condition(model, values), inputs)
        trace.compute_log_prob()
        log_p = trace.log_prob_sum()
        for name in values:
            log_p = torch.where(_inside(trace.nodes[name]), log_p, -math.inf)
        sites = _sites(trace)
        log_likelihood = {
            name: scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
            for name, site in sites.observed.items()
            if name not in values
        }
        return log_p, log_likelihood, {n: s["value"] for n, s in sites.deterministic.items()}

    try:
        return torch.vmap(one, chunk_size=BLOCK)(values)
    except Exception:  # what vmap cannot do, it refuses; an error of the model comes again
        draws = range(len(next(iter(values.values()))))
        log_p, *rest = zip(*[one({n: v[i] for n, v in values.items()}) for i in draws], strict=True)
        stacked = ({n: torch.stack([d[n] for d in dicts]) for n in dicts[0]} for dicts in rest)
        return torch.stack(log_p), *stacked


def _each(support: Any) -> Any:
    """Return the constraint on each number of an event."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _inside(site: Any) -> Tensor:
    """Whether a value lies in the support of its site, where that is a matter of each number."""
    support = site["fn"].support
    if _each(support).event_dim:  # a simplex or a matrix, whose conditions hold up to rounding
        return site["value"].new_ones((), dtype=torch.bool)
    return support.check(site["value"]).all()
