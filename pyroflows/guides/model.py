"""A model as the search for a guide's start sees it: its continuous latent variables."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
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
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pyroflows.rng import seeded
from pyroflows_common import guides
from pyroflows_common.guides import foreign_support
from pyroflows_common.search import FAR

LogDensity = Callable[[Float[Tensor, "n D"]], Float[Tensor, " n"]]


class Latents(NamedTuple):
    """The continuous latent numbers of a model, as one vector of D unconstrained coordinates."""

    where: dict[str, Int[Tensor, " n"]]  # coordinates of each site
    loc: Float[Tensor, " D"]  # where each site starts
    log_density: LogDensity  # at many points; NaN if the model raises an error
    log_model: LogDensity  # the same, without the density of the change to these coordinates
    batched: bool  # whether the model takes many points at once
    subsampled: bool  # whether the model takes a part of its data

    def free(self, points: Float[Tensor, "n D"]) -> tuple[Tensor, Tensor]:
        """Return 1 for each coordinate on which the model does not depend, 0 for others.

        Such a coordinate has no proper posterior: a site under a mask, an entry of a site with
        missing data that is observed. Where the change to unconstrained coordinates makes it
        proper, as for a bounded support, it is not free. Otherwise its log-density is linear.

        Args:
            points: where the density is looked at, and far out in their directions. None is free
                unless most of them have a density, nor if the data are a part of a whole, because
                another part may depend on it.

        Returns:
            The ones and zeros, and the slopes of the free coordinates, 0 for others.
        """
        probes = torch.cat([scale * points for scale in FAR])
        own, slopes = (gradients(f, probes) for f in (self.log_model, self.log_density))
        sound = self.log_density(probes).isfinite() & slopes.isfinite().all(1)
        if 2 * sound[: len(points)].sum() <= len(points) or self.subsampled:
            return torch.zeros_like(self.loc), torch.zeros_like(self.loc)
        own, slopes = own[sound], slopes[sound]
        free = ((own == 0) & (slopes == slopes[0])).all(0)
        return free.to(slopes), slopes[0].where(free, 0.0)


def gradients(function: LogDensity, points: Tensor) -> Tensor:
    """Return the gradient at each point of a batch."""
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        value = function(points).sum() + 0.0 * points.sum()  # may depend on none of them
        return torch.autograd.grad(value, points)[0]


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
    model = Screened()(without(model, InitMessenger, BlockMessenger))

    def start(site: dict[str, Any]) -> Tensor | None:
        return None if site["fn"].support.is_discrete else init_loc_fn(site)

    trace = poutine.trace(InitMessenger(start)(model)).get_trace(*args, **kwargs)
    nesting, sites = plate_nesting(trace), latent_sites(trace)
    subsampled = any(frame.size != frame.full_size for frame in plates(trace))
    discrete = {name for name, site in sites.items() if site["fn"].support.is_discrete}
    starts = unconstrained(site for name, site in sites.items() if name not in discrete)
    if discrete:
        model = poutine.enum(config_enumerate(model), first_available_dim=-1 - nesting)
        trace = poutine.trace(InitMessenger(start)(model)).get_trace(*args, **kwargs)
    evaluator = TraceEinsumEvaluator(trace, bool(discrete), nesting)
    loc = torch.cat([start.reshape(-1) for start in starts.values()])
    ends = torch.tensor([start.numel() for start in starts.values()]).cumsum(0)[:-1]
    where = dict(zip(starts, torch.arange(len(loc)).tensor_split(ends), strict=True))

    def model_alone(latent: Tensor) -> Tensor:
        return evaluator.log_prob(run(latent)[1])

    def whole(latent: Tensor) -> Tensor:
        points, trace = run(latent)
        log_det = latent.new_zeros(())
        for name, point in points.items():
            transform = biject_to(trace.nodes[name]["fn"].support)
            ladj = transform.log_abs_det_jacobian(point, trace.nodes[name]["value"])
            log_det = log_det + ladj.sum()
        return evaluator.log_prob(trace) + log_det

    def run(latent: Tensor) -> tuple[dict[str, Tensor], Trace]:
        points = {n: latent[index].reshape(starts[n].shape) for n, index in where.items()}
        return points, placed(model, points, *args, **kwargs)

    def found(mapped: Callable[..., Tensor], batched: bool) -> Latents:
        log_density, log_model = (
            alone()(functools.partial(_defined, functools.partial(mapped, function)))
            for function in (whole, model_alone)
        )
        return Latents(where, loc, log_density, log_model, batched, subsampled)

    try:
        _at_once(whole, torch.stack([loc, loc]))
    except Exception as error:  # a model that cannot be batched may raise anything
        _each(whole, loc[None])
        if not discrete:
            warnings.warn(
                "the model takes one point at a time: the search for a start is slow, and "
                f"therefore short. At several it raises {type(error).__name__}: "
                f"{first_line(error)}",
                stacklevel=3,
            )
        return found(_each, False)
    return found(_at_once, True)


@alone()
def drawn(
    model: Callable[..., Any],
    where: Mapping[str, Int[Tensor, " n"]],
    count: int,
    *args: Any,
    **kwargs: Any,
) -> Float[Tensor, "draws D"]:
    """Return draws of the prior in unconstrained coordinates: NaN if it cannot be drawn from.

    Args:
        model: the model.
        where: coordinates of each of its sites.
        count: number of draws.
        *args: arguments of the model.
        **kwargs: the same, by name.
    """
    model = Screened()(without(model, InitMessenger, BlockMessenger))

    def draw() -> Tensor:
        sites = poutine.trace(model).get_trace(*args, **kwargs).nodes
        points = unconstrained(sites[name] for name in where)
        return torch.cat([point.reshape(-1) for point in points.values()])

    try:
        return torch.stack([draw() for _ in range(count)])
    except Exception:  # an improper prior, or anything that a model may do outside of a run
        return torch.full((count, sum(map(len, where.values()))), torch.nan)


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

    def supported(start: float) -> dict[str, Any]:
        moved = {n: (point + start).requires_grad_() for n, point in points.items()}
        with torch.enable_grad(), seeded(len(points)):
            run = placed(without(model, InitMessenger), moved, *args, **kwargs)
        return {name: run.nodes[name] for name in points}

    def reached(site: dict[str, Any]) -> Tensor:
        return biject_to(site["fn"].support)(points[site["name"]])

    found = []
    here, there = supported(0.0), supported(0.5)
    for name in points:
        before, now, moved = map(reached, (trace.nodes[name], here[name], there[name]))
        if not torch.allclose(before, now, rtol=1e-3, equal_nan=True):
            raise ValueError(foreign_support(name))
        if now.requires_grad or not torch.allclose(now, moved, rtol=1e-3, equal_nan=True):
            found.append(name)
    return found


def mapped(function: Callable[..., Any], inputs: Any, **options: Any) -> Any:
    """Map a function over the first dimension of all tensors in `inputs`, at once if it can be.

    Args:
        function: a function of one draw, or point, or dictionary of such.
        inputs: many of them.
        options: as in `torch.vmap`.
    """
    try:
        return torch.vmap(function, **options)(inputs)
    except Exception:  # vmap refuses it; an error of the model is raised again
        leaves, spec = tree_flatten(inputs)
        found = [function(tree_unflatten(one, spec)) for one in zip(*leaves, strict=True)]
        return tree_map(lambda *parts: torch.stack(parts), *found)


def _at_once(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Map a function over points, with the same subsample of the data each time.

    Noise would mislead the search.
    """
    with seeded(0):
        return torch.func.vmap(function, randomness="same")(points)


def _each(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Evaluate a function at one point after the other, each with the same subsample."""

    def frozen(point: Tensor) -> Tensor:
        with seeded(0):
            return function(point)

    return torch.stack([frozen(point) for point in points])


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


def plates(trace: Trace) -> list[Any]:
    """Return the plates around each site of a trace."""
    return [frame for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ())]


def plate_nesting(trace: Trace) -> int:
    """Return the number of dimensions that the plates of a trace take."""
    return max((-frame.dim for frame in plates(trace) if frame.vectorized), default=0)


class Screened(Messenger):
    """Handler that keeps data which a mask leaves out away from densities, as NumPyro's masks do.

    The log-density of a missing value is NaN. The mask takes it out of the sum, but its gradient
    would stay.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            return
        msg["fn"] = _screened(msg["fn"])
        if isinstance(msg["mask"], Tensor):
            msg["fn"] = _Masked(msg["fn"], msg["mask"])


class _Masked(dist.MaskedDistribution):
    """A distribution that sees some value of its support wherever it is masked."""

    def log_prob(self, value: Tensor) -> Tensor:
        shown, value = self._mask, torch.as_tensor(value)
        # A distribution may not tell its support: then there is nothing to put in.
        with contextlib.suppress(NotImplementedError):
            support = self.base_dist.support
            if support.is_discrete:  # no gradient: a value that is valid can stay
                shown = shown | support.check(value)
            inside = _inside(self.base_dist, value.device).to(value)
            value = torch.where(shown[(..., *[None] * self.event_dim)], value, inside)
        return super().log_prob(value)


def _screened(fn: Any) -> Any:
    if isinstance(fn, dist.MaskedDistribution) and isinstance(fn._mask, Tensor):
        return _Masked(fn.base_dist, fn._mask)
    if isinstance(fn, dist.Independent) and (inner := _screened(fn.base_dist)) is not fn.base_dist:
        return dist.Independent(inner, fn.reinterpreted_batch_ndims)
    return fn


def _inside(fn: Any, device: torch.device) -> Tensor:
    """Return a value in the support of a distribution."""
    if fn.support.is_discrete:
        return torch.zeros(fn.event_shape, device=device)
    transform = biject_to(fn.support)
    return transform(torch.zeros(transform.inverse_shape(fn.event_shape), device=device))


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
