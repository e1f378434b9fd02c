"""A model's latent numbers: what a search for a guide's start sees of the model."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Distribution, biject_to

from pyroflows.rng import seeded


class Latents(NamedTuple):
    """The continuous latent numbers of a model, as one vector of D unconstrained coordinates.

    Args:
        where: each site's coordinates.
        loc: `(D,)`, where each site starts.
        log_density: maps `(n, D)` to the log-densities in the model, NaN where that has none.
        batched: whether the model is evaluated at many points at once.
    """

    where: dict[str, Tensor]
    loc: Tensor
    log_density: Callable[[Tensor], Tensor]
    batched: bool


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Run models unseen by what else runs, and without validation."""
    validated = Distribution._validate_args  # which Pyro would set to its own
    try:
        with poutine.block(), pyro.validation_enabled(False):
            yield
    finally:
        Distribution.set_default_validate_args(validated)


@alone()
def latents(
    model: Callable[..., Any], init_loc_fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> Latents:
    """Return the latent numbers of a guide's model, those that it hides from the guide included.

    A guide for some of the sites sees the model through `poutine.block`, which may hide the data
    with the others. Discrete sites are summed out.

    Raises:
        NotImplementedError: where a discrete site has no finite support.
    """
    model = without(model, InitMessenger, BlockMessenger)

    def start(site: Any) -> Tensor | None:
        return None if site["fn"].support.is_discrete else init_loc_fn(site)

    trace = poutine.trace(InitMessenger(start)(model)).get_trace(*args, **kwargs)
    nesting, sites = plate_nesting(trace), latent_sites(trace)
    discrete = {name for name, site in sites.items() if site["fn"].support.is_discrete}
    if discrete:
        model = poutine.enum(config_enumerate(model), first_available_dim=-1 - nesting)
        trace = poutine.trace(InitMessenger(start)(model)).get_trace(*args, **kwargs)
    evaluator = TraceEinsumEvaluator(trace, bool(discrete), nesting)
    continuous = {n: site for n, site in latent_sites(trace).items() if n not in discrete}
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
        return torch.stack([_frozen(one, point) for point in points])

    batched = functools.partial(_frozen, torch.func.vmap(one, randomness="same"))
    try:
        batched(torch.stack([loc, loc]))
    except Exception as error:  # whatever a model does that cannot be batched
        each(loc[None])
        if not discrete:
            warnings.warn(
                "the model takes one point at a time: the search for a start is slow, and so it is "
                f"a short one. At several it raises {type(error).__name__}: {first_line(error)}",
                stacklevel=3,
            )
        return Latents(where, loc, alone()(functools.partial(_defined, each)), False)
    return Latents(where, loc, alone()(functools.partial(_defined, batched)), True)


def _frozen(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Evaluate a model with the same subsample of its data each time: noise misleads a search."""
    with seeded(0):
        return function(x)


def _defined(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Evaluate a function of each point, with NaN at those where it raises an error."""
    try:
        return function(points)
    except (ArithmeticError, RuntimeError, ValueError):
        if len(points) == 1:
            return torch.nan * points.square().sum(1)
        return torch.cat([_defined(function, half) for half in points.chunk(2)])


def latent_sites(trace: Any) -> dict[str, Any]:
    """Return the latent sites of a trace by name, but for the subsamples of plates."""
    return dict(prune_subsample_sites(trace).iter_stochastic_nodes())


def plate_nesting(trace: Any) -> int:
    """Return how many dimensions the plates of a trace take."""
    frames = [frame for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ())]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def first_line(error: Exception) -> str:
    """Return the message of an error without what Pyro and torch append."""
    return (str(error).splitlines() or [""])[0]


def without(model: Callable[..., Any], *handlers: type) -> Callable[..., Any]:
    """Return a model without the handlers of some kinds among those that it is wrapped in."""
    if not isinstance(model, functools.partial) or not isinstance((*model.args, 0)[0], Messenger):
        return model
    handler, inner = model.args[0], without(model.args[1], *handlers)
    return inner if isinstance(handler, handlers) else handler(inner)


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
