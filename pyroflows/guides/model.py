"""A model as the search for a guide's start sees it: its continuous latent variables."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from jaxtyping import Float, Int
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine import Trace
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Distribution, biject_to

from pyroflows.rng import seeded
from pyroflows_common import guides
from pyroflows_common.guides import foreign_support

LogDensity = Callable[[Float[Tensor, "n D"]], Float[Tensor, " n"]]


class Latents(NamedTuple):
    """The continuous latent numbers of a model, as one vector of D unconstrained coordinates."""

    where: dict[str, Int[Tensor, " n"]]  # coordinates of each site
    loc: Float[Tensor, " D"]  # where each site starts
    log_density: LogDensity  # at many points; NaN if the model raises an error
    batched: bool  # whether the model takes many points at once


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Run models without validation, and hidden from all handlers outside."""
    validated = Distribution._validate_args  # Pyro would leave its own setting behind
    try:
        with poutine.block(), pyro.validation_enabled(False):
            yield
    finally:
        Distribution.set_default_validate_args(validated)


@alone()
def latents(
    model: Callable[..., Any], init_loc_fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> Latents:
    """Return the latent numbers of a guide's model, including those hidden from the guide.

    A guide for some of the sites sees the model through `poutine.block`, which may hide the data
    together with the other sites. Discrete sites are summed out, and must have finite support.
    """
    model = without(model, InitMessenger, BlockMessenger)

    def start(site: dict[str, Any]) -> Tensor | None:
        return None if site["fn"].support.is_discrete else init_loc_fn(site)

    trace = poutine.trace(InitMessenger(start)(model)).get_trace(*args, **kwargs)
    nesting, sites = plate_nesting(trace), latent_sites(trace)
    discrete = {name for name, site in sites.items() if site["fn"].support.is_discrete}
    if discrete:
        model = poutine.enum(config_enumerate(model), first_available_dim=-1 - nesting)
        trace = poutine.trace(InitMessenger(start)(model)).get_trace(*args, **kwargs)
    evaluator = TraceEinsumEvaluator(trace, bool(discrete), nesting)
    starts = unconstrained(site for n, site in latent_sites(trace).items() if n not in discrete)
    loc = torch.cat([start.reshape(-1) for start in starts.values()])
    ends = torch.tensor([start.numel() for start in starts.values()]).cumsum(0)[:-1]
    where = dict(zip(starts, torch.arange(len(loc)).tensor_split(ends), strict=True))

    def one(latent: Tensor) -> Tensor:
        points = {n: latent[index].reshape(starts[n].shape) for n, index in where.items()}
        trace = placed(model, points, *args, **kwargs)
        log_det = latent.new_zeros(())
        for name, point in points.items():
            transform = biject_to(trace.nodes[name]["fn"].support)
            ladj = transform.log_abs_det_jacobian(point, trace.nodes[name]["value"])
            log_det = log_det + ladj.sum()
        return evaluator.log_prob(trace) + log_det

    def each(points: Tensor) -> Tensor:
        return torch.stack([_frozen(one, point) for point in points])

    batched = functools.partial(_frozen, torch.func.vmap(one, randomness="same"))
    try:
        batched(torch.stack([loc, loc]))
    except Exception as error:  # a model that cannot be batched may raise anything
        each(loc[None])
        if not discrete:
            warnings.warn(
                "the model takes one point at a time: the search for a start is slow, and "
                f"therefore short. At several it raises {type(error).__name__}: "
                f"{first_line(error)}",
                stacklevel=3,
            )
        return Latents(where, loc, alone()(functools.partial(_defined, each)), False)
    return Latents(where, loc, alone()(functools.partial(_defined, batched)), True)


class _Placed(Messenger):
    """Gives sites the values of unconstrained coordinates, each in the support it has by then."""

    def __init__(self, points: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.points = points

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.points:
            msg["value"] = biject_to(msg["fn"].support)(self.points[msg["name"]])
            msg["is_observed"] = True


def placed(
    model: Callable[..., Any], points: Mapping[str, Tensor], *args: Any, **kwargs: Any
) -> Trace:
    """Run a model at unconstrained coordinates of its sites.

    The support of a site may depend on sites before it.
    """
    return poutine.trace(_Placed(points)(model)).get_trace(*args, **kwargs)


def unconstrained(sites: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the unconstrained coordinates of the values of sites."""
    return {s["name"]: biject_to(s["fn"].support).inv(s["value"].detach()) for s in sites}


@alone()
def moving(model: Callable[..., Any], trace: Trace, *args: Any, **kwargs: Any) -> list[str]:
    """Return the latent sites of a trace whose supports depend on other latent sites.

    Raises:
        ValueError: if they depend on sites that the trace does not have.
    """
    sites = latent_sites(trace)
    points = unconstrained(sites.values())
    with torch.enable_grad(), seeded(len(points)):
        traced = {name: point.clone().requires_grad_() for name, point in points.items()}
        run = placed(without(model, InitMessenger), traced, *args, **kwargs)
    found = []
    for name, point in points.items():
        before, now = (biject_to(t.nodes[name]["fn"].support)(point) for t in (trace, run))
        if not torch.allclose(before, now, rtol=1e-3, equal_nan=True):
            raise ValueError(foreign_support(name))
        if now.requires_grad:
            found.append(name)
    return found


def _frozen(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Evaluate a model with the same subsample of its data each time: noise misleads the search."""
    with seeded(0):
        return function(x)


def _defined(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Evaluate a function at each point; NaN where it raises an error."""
    try:
        return function(points)
    except (ArithmeticError, RuntimeError, ValueError):
        if len(points) == 1:
            return torch.nan * points.square().sum(1)
        return torch.cat([_defined(function, half) for half in points.chunk(2)])


def latent_sites(trace: Trace) -> dict[str, Any]:
    """Return the latent sites of a trace by name, without the subsamples of plates."""
    return dict(prune_subsample_sites(trace).iter_stochastic_nodes())


def plate_nesting(trace: Trace) -> int:
    """Return the number of dimensions that the plates of a trace take."""
    frames = [frame for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ())]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; Pyro and torch append more."""
    return (str(error).splitlines() or [""])[0]


def without(model: Callable[..., Any], *handlers: type) -> Callable[..., Any]:
    """Return a model without the handlers of some kinds that it is wrapped in."""
    if not isinstance(model, functools.partial) or not isinstance((*model.args, 0)[0], Messenger):
        return model
    handler, inner = model.args[0], without(model.args[1], *handlers)
    return inner if isinstance(handler, handlers) else handler(inner)


def model_of(posterior: Any, model: Any, name: str = "posterior") -> Callable[..., Any]:
    """Check that `posterior` is a guide or a distribution, and return its model."""
    model = guides.model_of(
        posterior, model, name, note=", and Pyro's forgets it when it is copied or saved"
    )
    # An automatic guide holds its model in a handler that starts each site at a draw of its own.
    return without(model, InitMessenger)
