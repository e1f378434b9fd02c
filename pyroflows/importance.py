"""Importance weights: the draws of a guide, weighed against its model."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyroflows.latent import without

# Fewer draws have no tail that a Pareto distribution can be fitted to.
FEWEST = 25
# Draws whose model is evaluated at once.
BLOCK = 250
# Log ratios this close are equal but for rounding.
EQUAL = 1e-3
# Draws may stand for the posterior as they are where they count as this fraction of their number.
ENOUGH = 0.8


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


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


class Weights(NamedTuple):
    """Normalised log weights of draws, and how far these can be trusted."""

    log_weight: np.ndarray
    pareto_k: float
    ess: float
    lost: int


def as_inputs(args: Any, kwargs: Any) -> Inputs:
    """Return the arguments of model and guide, and refuse what is none."""
    if isinstance(args, str) or not isinstance(args, Sequence):
        raise TypeError(f"`args` is a {type(args).__name__}, expected a tuple of arguments")
    if not (kwargs is None or isinstance(kwargs, Mapping)):
        raise TypeError(f"`kwargs` is a {type(kwargs).__name__}, expected a dict or None")
    return tuple(args), dict(kwargs or {})


def model_of(posterior: Any, model: Any, name: str = "posterior") -> Any:
    """Return the model, and refuse what is no posterior."""
    expected = "a guide" if name == "guide" else "a guide or a distribution"
    if not callable(posterior):  # which a distribution is, too
        raise TypeError(f"`{name}` is a {type(posterior).__name__}, expected {expected}")
    if isinstance(posterior, type):
        raise TypeError(f"`{name}` is the class {posterior.__name__}, expected an instance")
    if model is None:
        with contextlib.suppress(AttributeError, TypeError):  # a copied guide has lost its model
            model = posterior.model
    if model is None:
        raise ValueError(
            "`model` is missing: only an automatic guide knows the model that it was made for, "
            "and Pyro's forgets it when it is copied or saved"
        )
    if not callable(model):
        raise TypeError(f"`model` is a {type(model).__name__}, expected a function")
    # An automatic guide holds its model in a handler that starts each site from draws of its own.
    return without(model, InitMessenger)


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


def weigh(psis: Callable[[np.ndarray], Any], ratio: np.ndarray) -> Weights:
    """Smooth the weights; `ratio` has minus infinity for draws without weight."""
    finite = np.isfinite(ratio)
    if not finite.any():
        raise ValueError(
            f"`posterior` fits no draw: none of {len(ratio)} has a finite density ratio to `model`"
        )
    if finite.sum() >= FEWEST and np.ptp(ratio[finite]) < EQUAL:  # nothing to fit a tail to
        log_weight, k = np.where(finite, -math.log(finite.sum()), -np.inf), -math.inf
    else:
        log_weight, k = psis(ratio)
        k = math.inf if np.isnan(k) else float(k)
    ess = float(1 / np.exp(2 * log_weight).sum())
    return Weights(log_weight, k, ess, int((~finite).sum()))


def verdict(weights: Weights, resampled: bool) -> str:
    """Say in one line whether the draws can be trusted."""
    draws, k = len(weights.log_weight), weights.pareto_k
    limit = min(1 - 1 / math.log10(draws), 0.7)
    # As many as tell the two apart.
    digits = 2 if f"{k:.2f}" != f"{limit:.2f}" else 4
    if not k < limit:
        text = (
            f"do not trust: above {limit:.{digits}f}, the limit for {draws} draws; train longer, "
            "or use a more flexible guide"
        )
    elif resampled:
        text = f"{'good' if k < 0.5 else 'usable'}; the draws are resampled by importance"
    elif k >= 0.5:
        text = "usable after importance resampling (resample=True)"
    elif weights.lost or weights.ess < ENOUGH * draws:
        text = (
            "good after importance resampling (resample=True): the draws count as "
            f"{weights.ess:.0f} of {draws}"
        )
    else:
        text = "good; the draws can be used as they are"
    if weights.lost:
        text += f"; {weights.lost} of {draws} draws have no finite ratio and no weight"
    return f"k̂ = {k:.{digits}f}: {text}"


def resample(log_weight: np.ndarray, start: float) -> np.ndarray:
    """Return the draws that equally spaced steps through the weights come upon, in order."""
    ends = np.exp(log_weight).cumsum()
    steps = (start + np.arange(len(ends))) / len(ends)
    return np.searchsorted(ends / ends[-1], steps.clip(max=np.nextafter(1.0, 0.0)), side="right")
