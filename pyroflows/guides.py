"""Guides: flows as variational posteriors of Pyro models."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.chain import Chain, Stack
from pyroflows.checks import as_count, as_scale
from pyroflows.coupling import AdditiveCoupling, AffineCoupling, TanhScale
from pyroflows.distribution import FlowDistribution
from pyroflows.flows import glow
from pyroflows.linear import LowerTriangular, Permutation, Preconditioner
from pyroflows.normalization import ActNorm
from pyroflows.partition import as_partition
from pyroflows.search import DENSE, HISTORY, search
from pyroflows.tails import LogTails, SinhArcsinh
from pyroflows.transform import TransformModule

# Points that the search starts from: the model's own, the origin and random ones around it.
STARTS = 8
# Bound of a guide's log-scales over all its couplings: posteriors like funnels need a wide one.
LOG_SCALE_BUDGET = 24.0
# Standard deviation of the first weights of each conditioner's last layer.
INIT_SCALE = 1e-3
# Draws that medians and quantiles are taken of.
DRAWS = 4096


# Longest gradient that one draw may contribute, in standard deviations of the whole posterior.
GRADIENT_LIMIT = 10.0


class Limited(torch.autograd.Function):
    """Both arguments as they are; what comes back to x is no longer than the limit.

    The gradient that comes back to `unit`, a zero that is added to each draw's log-density, is
    what one nat of that draw weighs in the objective: a mean over particles weighs each by one in
    their number.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Copy both."""
        return x.clone(), unit.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, slope: Tensor, weight: Tensor) -> tuple[Tensor, None]:
        """Shorten what comes back to x."""
        bound = GRADIENT_LIMIT * math.sqrt(slope.shape[-1]) * weight.abs()
        size = slope.norm(dim=-1)
        # A draw without a finite gradient contributes nothing.
        slope = slope.where(size.isfinite()[..., None], 0.0)
        shrunk = (weight != 0) & (size > bound)
        factor = torch.where(shrunk, bound / size.where(shrunk, 1.0), 1.0)
        return slope * factor.where(factor.isfinite(), 0.0)[..., None], None


class PathDistribution(FlowDistribution):
    r"""A guide's posterior, whose `log_prob` has no gradient in the parameters.

    An evidence lower bound keeps the gradient that goes through the samples: as right on average,
    and zero for every draw where guide and posterior are equal. What one draw contributes is cut
    to a length of \(10 \sqrt D\), in standard deviations of the Gaussian that the guide started
    from: one draw from far out would otherwise outweigh all others for thousands of steps.

    References:
        Roeder, Wu and Duvenaud, "Sticking the landing" (arXiv:1703.09194), section 3.
    """

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, and keep what `log_prob` adds for `Limited` to know the weight of a draw."""
        (flow,) = self.transforms
        inner, preconditioner = flow.layers
        x, _ = inner.forward_and_ladj(self.base_dist.rsample(torch.Size(sample_shape)))
        x, unit = Limited.apply(x, x.new_zeros(x.shape[:-1]))
        y, _ = preconditioner.forward_and_ladj(x)
        self._drawn = y, unit
        return y

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of `value`, as a function of the value alone."""
        if torch.jit.is_tracing():  # where gradients cannot be taken: the whole one is right, too
            return super().log_prob(value)
        if not (torch.is_grad_enabled() and value.requires_grad):
            return super().log_prob(value).detach()
        leaf = value.detach().requires_grad_()
        density = super().log_prob(leaf)
        (slope,) = torch.autograd.grad(density.sum(), leaf)
        density = density.detach() + ((value - leaf.detach()) * slope).sum(-1)
        drawn, unit = getattr(self, "_drawn", (None, density))
        return density + unit if drawn is value else density


class AutoFlow(AutoContinuous):
    r"""A guide whose posterior is a flow of one's own over all latent variables.

    In the unconstrained space of the D latent numbers the posterior is that of

    $$x = m + L (b + A \cdot \mathrm{flow}(z))$$

    for z from a Student-t distribution. Location m and scale L are found when the guide is set up,
    by a search for the Gaussian that fits best, and stay fixed: one learning rate then suits every
    model, whatever its units. Shift b and lower-triangular A are learned with the flow, from 0 and
    the identity. In more than 256 dimensions L is diagonal plus a matrix of low rank, and A
    diagonal. A flow takes two coordinates at least: the guide of a single latent number has a
    learned monotone function in its place.

    All else is as in Pyro's own guides, with SVI, `Predictive`, `NeuTraReparam` and the like.

    Args:
        model: a Pyro model with continuous latent variables.
        build: makes the flow, given D: any builder of this package, with arguments by
            `functools.partial`, or a function of one's own.
        init_loc_fn: where each site starts, one of Pyro's strategies; by default
            `init_to_median`.
        create_plates: makes the plates of subsampled data, as in Pyro's `AutoGuide`.
        init: `"search"`, or `"location"` to start at `init_loc_fn` with `init_scale`, as the
            host's guides do.
        init_scale: standard deviation of every coordinate at the start without a search, or where
            it finds nothing better.
        degrees_of_freedom: of the Student-t base; None for a normal one.
        path_gradient: whether the gradient of an evidence lower bound goes through the samples
            alone ("sticking the landing"), each of limited weight. Switch it off for the
            importance weighted bounds of `RenyiELBO`, for which it is biased.

    Raises:
        ValueError: where an argument is out of its range; the message names it.

    References:
        Roeder, Wu and Duvenaud, "Sticking the landing" (arXiv:1703.09194); Agrawal, Sheldon and
        Domke, "Advances in black-box VI" (arXiv:2006.10343).

    Examples:
        >>> import functools, pyro, pyro.distributions as dist, torch
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyroflows import AutoFlow, nice
        >>> def model():
        ...     pyro.sample("x", dist.Normal(5.0, 0.1).expand([2]).to_event(1))
        >>> guide = AutoFlow(model, functools.partial(nice, layers=2))
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(num_particles=4))
        >>> losses = [svi.step() for _ in range(10)]
        >>> guide.median()["x"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        build: Callable[..., TransformModule],
        *,
        init_loc_fn: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
        init: str = "search",
        init_scale: float = 0.1,
        degrees_of_freedom: float | None = 20.0,
        path_gradient: bool = True,
    ) -> None:
        if not callable(build):
            raise TypeError(f"`build` is a {type(build).__name__}, expected a function of D")
        if init not in ("search", "location"):
            raise ValueError(f"`init` is {init!r}, expected 'search' or 'location'")
        as_scale(init_scale, "init_scale", zero=False)
        if degrees_of_freedom is not None:
            as_scale(degrees_of_freedom, "degrees_of_freedom", zero=False)
        super().__init__(model, init_to_median if init_loc_fn is None else init_loc_fn)
        self.create_plates = create_plates
        self._searched_model = (model,)  # without the host's initialisation; in a tuple: no child
        self.build = build
        self.init, self.init_scale = init, init_scale
        self.degrees_of_freedom = degrees_of_freedom
        self.path_gradient = path_gradient
        self.transform: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # As the host, which keeps no model in pickles and copies.
        return {**super().__getstate__(), "_searched_model": None}

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        size, loc = self.latent_dim, self._init_loc()
        flow = self.build(size) if size > 1 else _monotone()
        dense = size <= DENSE
        affine = LowerTriangular(size) if dense else ActNorm(size)
        start = Preconditioner(size, rank=None if dense else 2 * HISTORY).to(loc)
        start.at(loc, self.init_scale)
        if self.init == "search":
            start = self._searched(start, *args, **kwargs)
        self.transform = Chain([Chain([flow, affine]), start]).to(loc)

    def _searched(self, start: Preconditioner, *args: Any, **kwargs: Any) -> Preconditioner:
        uniform = 4.0 * torch.rand(STARTS - 2, self.latent_dim).to(start.loc) - 2.0
        starts = torch.cat([start.loc[None], torch.zeros_like(start.loc)[None], uniform])
        with torch.enable_grad(), pyro.validation_enabled(False), poutine.block():
            found, elbo = search(self._log_density(*args, **kwargs), start, starts)
        if not elbo.isfinite():
            warnings.warn(
                "the search for a start has found no Gaussian with a finite evidence lower bound: "
                "the guide starts at `init_loc_fn` with `init_scale`",
                stacklevel=2,
            )
            return start
        return found

    def _log_density(self, *args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
        """Return the function from latent numbers `(n, D)` to their log-density in the model."""
        (model,) = self._searched_model
        enumerated = _has_enumerated_sites(model, *args, **kwargs)

        def one(latent: Tensor) -> Tensor:
            values, log_det = {}, latent.new_zeros(())
            for site, unconstrained in self._unpack_latent(latent):
                transform = biject_to(site["fn"].support)
                value = values[site["name"]] = transform(unconstrained)
                log_det = log_det + transform.log_abs_det_jacobian(unconstrained, value).sum()
            conditioned = poutine.condition(model, values)
            if enumerated:
                elbo = TraceEnum_ELBO()
                return log_det - elbo.differentiable_loss(conditioned, _empty, *args, **kwargs)
            return poutine.trace(conditioned).get_trace(*args, **kwargs).log_prob_sum() + log_det

        def each(latents: Tensor) -> Tensor:
            return torch.stack([one(latent) for latent in latents])

        def seeded(function: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
            # One subsample of the data for the whole search: noise would mislead it.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return function(latents)

        if enumerated:
            return functools.partial(seeded, each)
        batched = torch.func.vmap(one, randomness="same")
        try:
            batched(torch.stack([self._init_loc()] * 2))
        except Exception:  # whatever a model does that cannot be batched
            return functools.partial(seeded, each)
        return functools.partial(seeded, batched)

    def get_base_dist(self) -> Any:
        """Return the distribution of z: Student-t or normal."""
        zeros = torch.zeros_like(self._modules["transform"].layers[-1].loc)
        if self.degrees_of_freedom is None:
            return dist.Normal(zeros, 1.0).to_event(1)
        return dist.StudentT(self.degrees_of_freedom, zeros, 1.0).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> TransformModule:
        """Return the transform of z to the unconstrained latent numbers."""
        return self.transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Return the posterior of the unconstrained latent numbers."""
        kind = PathDistribution if self.path_gradient else FlowDistribution
        return kind(self.get_base_dist(), [self.get_transform()])

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each latent number, of 4096 draws that are always the same."""
        return {name: draws[0] for name, draws in self.quantiles([0.5]).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each latent number, of 4096 draws that are always the same."""
        posterior = FlowDistribution(self.get_base_dist(), [self.get_transform()])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            draws = posterior.sample((DRAWS,))
        levels = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device)
        # Dimensions for the model's plates between that of the draws and the latent numbers'.
        plates = max((-frame.dim for frame in self._prototype_frames.values()), default=0)
        result = {}
        for site, unconstrained in self._unpack_latent(draws[(slice(None), *[None] * plates)]):
            values = biject_to(site["fn"].support)(unconstrained)
            values = values.reshape(DRAWS, *site["value"].shape)
            result[site["name"]] = torch.quantile(values, levels, dim=0)
        return result


class AutoNICE(AutoFlow):
    """A guide of additive couplings.

    Pairs of couplings that swap their halves, each behind a fixed random permutation.

    Args:
        model: as `AutoFlow`'s.
        layers: number of couplings.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        options: as `AutoFlow`'s.

    References:
        Dinh, Krueger and Bengio, "NICE" (arXiv:1410.8516).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        layers: int = 20,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
        **options: Any,
    ) -> None:
        coupling = functools.partial(
            AdditiveCoupling, hidden=hidden, activation=activation, init_scale=INIT_SCALE
        )
        super().__init__(model, functools.partial(_pairs, coupling, layers), **options)


class AutoRealNVP(AutoFlow):
    """A guide of affine couplings: the one to try first.

    Pairs of couplings that swap their halves, each behind a fixed random permutation.

    Args:
        model: as `AutoFlow`'s.
        layers: number of couplings.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        preset: None, or `"high_dim"` for thousands of latent numbers: a soft asymmetric clamp for
            a scale, learned tails of each base coordinate, and a limit to what far-out draws
            become.
        options: as `AutoFlow`'s.

    Raises:
        ValueError: where an argument is out of its range; the message names it.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803);
        Agrawal, Sheldon and Domke, "Advances in black-box VI" (arXiv:2006.10343), for the size;
        Andrade, "Stable training of normalizing flows for high-dimensional variational inference"
        (2024), for the preset.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        layers: int = 20,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
        preset: str | None = None,
        **options: Any,
    ) -> None:
        if preset not in (None, "high_dim"):
            raise ValueError(f"`preset` is {preset!r}, expected 'high_dim' or None")
        coupling = functools.partial(
            AffineCoupling,
            hidden=hidden,
            activation=activation,
            init_scale=INIT_SCALE,
            scale="clamp" if preset else "tanh",
            limit=LOG_SCALE_BUDGET / as_count(layers, "layers"),
        )
        build = functools.partial(_pairs, coupling, layers)
        super().__init__(model, functools.partial(_tailed, build) if preset else build, **options)


class AutoGlow(AutoFlow):
    """A guide of Glow's steps: `AutoFlow` with `glow`.

    Args:
        model: as `AutoFlow`'s.
        layers: number of steps.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        options: as `AutoFlow`'s.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        layers: int = 10,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
        **options: Any,
    ) -> None:
        build = functools.partial(
            glow,
            layers=layers,
            hidden=hidden,
            activation=activation,
            scale=TanhScale((1,), LOG_SCALE_BUDGET / as_count(layers, "layers")),
            init_scale=INIT_SCALE,
        )
        super().__init__(model, build, **options)


def _pairs(coupling: Callable[..., TransformModule], layers: int, size: int) -> TransformModule:
    """Stack couplings in pairs that swap their halves, each pair behind a random permutation.

    Without the permutations, coordinates of one half would see each other only through the other.
    """
    halves = as_partition("halves", size)
    random, order, pairs = np.random.default_rng(0), np.arange(size), []
    for _ in range(as_count(layers, "layers") // 2):
        permutation = random.permutation(size)
        order = order[permutation]
        pair = [coupling(size, partition=part) for part in (halves, halves.swap)]
        pairs.append(Chain([Permutation(permutation.tolist()), *pair]))
    stack = [Stack(pairs)] if pairs else []
    single = [coupling(size, partition=halves)] if layers % 2 else []
    return Chain([*stack, *single, Permutation(np.argsort(order).tolist())])


def _tailed(build: Callable[..., TransformModule], size: int) -> TransformModule:
    """Return a flow with learned tails at the base and a limit at the other end."""
    return Chain([SinhArcsinh(size), build(size), LogTails(size)])


def _monotone() -> TransformModule:
    """Return a flexible bijection of one number, which couplings cannot give."""
    return Chain([layer for _ in range(4) for layer in (SinhArcsinh(1), LowerTriangular(1))])


def _empty(*args: Any, **kwargs: Any) -> None:
    """A guide of a model whose latent variables are all given."""


def _has_enumerated_sites(model: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    return any(site["infer"].get("enumerate") for _, site in trace.iter_stochastic_nodes())
