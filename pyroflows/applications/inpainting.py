"""Inpainting: the unknown part of an event given the known one, its mode and draws of it."""

import math
import warnings
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from pyroflows.applications.inputs import joined
from pyroflows.distribution import flow_distribution
from pyroflows.layers.constrained import BijectTo
from pyroflows.rng import seeded
from pyroflows.support import is_real, log_prob_inside
from pyroflows.transform import Context, Pair, TransformModule
from pyroflows_common import inpainting as common
from pyroflows_common.checks import as_count, as_scale


def inpaint(
    flow: TransformModule,
    x: Float[Tensor, "..."],
    known: Bool[Tensor, "..."],
    *,
    base: "str | dist.TorchDistribution | None" = None,
    context: Context = None,
    support: Any = None,
    space: str = "data",
    steps: int = 500,
    noise: float = 1.0,
    restarts: int = 4,
    seed: int = 0,
) -> Float[Tensor, "..."]:
    r"""Fill in the unknown part of events by its most likely values given the known part.

    Ascent on the log-density over the unknown part U, with NICE's schedule of steps and noise; the
    known part K stays as it is.

    $$x_U \leftarrow x_U + \alpha_i \bigl( \nabla_{x_U} \log p(x_K, x_U) + \epsilon \bigr), \qquad
    \epsilon \sim N(0, I), \quad \alpha_i = \frac{10}{100 + i}$$

    Here each number is in units of its spread under the flow, and the gradient is normalised as by
    Adam, so that one schedule suits data of any scale. The last quarter of the steps has no noise,
    and shrinks to nothing. Bounded numbers move in unbounded coordinates where NICE projects them;
    what rises is the density of `x` all the same.

    The starts come from a search in latent space, for the most likely latents whose event agrees
    with the known part within a deviation that falls to a hundredth of its spread. With
    `space="latent"` its result is returned, and there is no ascent. Where the flow's
    log-determinant is constant, as for NICE, both spaces have the same mode. Elsewhere a density
    may be highest where no data lie, and the latent mode looks more like them: take it for images.

    The result is a mode. Modes are smoother than draws, which `inpaint_draws` gives.

    Args:
        flow: the flow; a conditional one with `context`.
        x: events `(*batch, *event_shape)`. Unknown numbers may be NaN.
        known: mask that broadcasts to the shape of `x`, true where `x` is known.
        base: base distribution, as for `flow_distribution`.
        context: contexts `(*batch, context_dim)` of a conditional flow.
        support: support to stay in, as for `fit`: `unit_interval` for pixels and a flow on all real
            numbers. Default: the flow's own support.
        space: `"data"` for the mode of the density of `x`, `"latent"` for that of the latents.
        steps: number of steps of the search and of the ascent.
        noise: factor on ε; 0 for a plain ascent.
        restarts: number of starts for each event, from draws of the flow. The most likely end is
            returned.
        seed: seed of all random numbers; the global ones are left alone.

    Returns:
        `x` with its unknown part filled in, and with its known part unchanged.

    Raises:
        ValueError: if the shapes do not fit, if a known number is not finite or not in the support,
            or if the flow gives simplices or ordered vectors, whose numbers cannot change alone.
        TypeError: if `known` is not a mask, or `x` not a tensor of real numbers.

    References:
        Dinh, Krueger and Bengio, "NICE" (arXiv:1410.8516), section 5.2.

    Examples:
        >>> import torch
        >>> from pyroflows import LowerTriangular, inpaint
        >>> flow = LowerTriangular(2)
        >>> _ = flow.lower.data.fill_(2.0)  # x = (z1, 2 z1 + z2)
        >>> x = torch.tensor([1.5, torch.nan])
        >>> round(inpaint(flow, x, ~x.isnan(), steps=200)[1].item(), 1)
        3.0
    """
    common.check_space(space)
    steps, noise = as_count(steps, "steps"), as_scale(noise, "noise")
    restarts, seed = as_count(restarts, "restarts"), as_count(seed, "seed", 0)
    unknown = _Unknown(flow, x, known, base, context, support)
    with seeded(seed):
        ends, log_probs = unknown.start(restarts, steps)
        if space == "data":
            ends, log_probs = unknown.climb(ends, steps, noise)
    return unknown.complete(unknown.best(ends, log_probs))[0]


def inpaint_draws(
    flow: TransformModule,
    x: Float[Tensor, "..."],
    known: Bool[Tensor, "..."],
    *,
    base: "str | dist.TorchDistribution | None" = None,
    context: Context = None,
    support: Any = None,
    num_samples: int = 1000,
    num_warmup: int = 500,
    chains: int = 8,
    max_tree_depth: int = 10,
    seed: int = 0,
) -> Float[Tensor, "num_samples ..."]:
    r"""Draw the unknown part of events from its distribution given the known part.

    $$x_U \sim p(x_U \mid x_K) \propto p(x_K, x_U)$$

    The sampler is Pyro's NUTS. All chains of all events move as one state, from the ends of a
    search in latent space as that of `inpaint`. A warning says on how many numbers the chains
    disagree.

    Args:
        flow: the flow; a conditional one with `context`.
        x: events `(*batch, *event_shape)`. Unknown numbers may be NaN.
        known: mask that broadcasts to the shape of `x`, true where `x` is known.
        base: base distribution, as for `flow_distribution`.
        context: contexts `(*batch, context_dim)` of a conditional flow.
        support: support to stay in, as for `inpaint`.
        num_samples: number of draws for each event.
        num_warmup: number of steps before them, in which NUTS adapts.
        chains: number of chains for each event, which share the draws.
        max_tree_depth: limit on how often NUTS doubles a trajectory. A lower one is faster and
            mixes more slowly.
        seed: seed of all random numbers; the global ones are left alone.

    Returns:
        Draws `(num_samples, *batch, *event_shape)`, chain by chain, with the known part of `x`.

    Raises:
        ValueError: as `inpaint`.
        TypeError: as `inpaint`.

    References:
        Hoffman and Gelman, "The No-U-Turn Sampler" (JMLR 2014).

    Examples:
        >>> import torch
        >>> from pyroflows import LowerTriangular, inpaint_draws
        >>> flow = LowerTriangular(2)
        >>> _ = flow.lower.data.fill_(2.0)  # x = (z1, 2 z1 + z2)
        >>> x = torch.tensor([1.5, torch.nan])
        >>> draws = inpaint_draws(flow, x, ~x.isnan(), num_samples=400, num_warmup=50, chains=40)
        >>> 2.5 < draws[:, 1].mean() < 3.5
        tensor(True)
    """
    num_samples = as_count(num_samples, "num_samples")
    num_warmup = as_count(num_warmup, "num_warmup")
    chains, seed = as_count(chains, "chains"), as_count(seed, "seed", 0)
    max_tree_depth = as_count(max_tree_depth, "max_tree_depth")
    unknown = _Unknown(flow, x, known, base, context, support)
    length = max(math.ceil(num_samples / chains), common.FEWEST_DRAWS)
    with seeded(seed):
        starts, _ = unknown.start(chains, common.STEPS_TO_STARTS)
        log_probs = unknown.log_prob(unknown.complete(starts)[0]).detach()
        # Chains cannot start where there is no density: they start from the event's best start.
        good = log_probs.isfinite()
        log_probs = torch.where(good, log_probs, -math.inf)
        wide = (..., *(None for _ in unknown.flow.event_shape))
        starts = torch.where(good[wide], starts, unknown.best(starts, log_probs))
        log_probs = torch.where(good, log_probs, log_probs.amax(0))
        places = (~unknown.known).expand_as(starts)
        if not places.any():
            return unknown.x.expand(num_samples, *unknown.x.shape).clone()

        def potential(parameters: dict[str, Tensor]) -> Tensor:
            y, ladj = unknown.complete(starts.masked_scatter(places, parameters["unknown"]))
            energy = log_probs - unknown.log_prob(y) - ladj
            return torch.where(energy.isnan(), math.inf, energy).sum()

        kernel = NUTS(potential_fn=potential, max_tree_depth=max_tree_depth)
        initial = {"unknown": starts[places]}
        mcmc = MCMC(kernel, length, num_warmup, initial_params=initial, disable_progbar=True)
        mcmc.run()
    draws = mcmc.get_samples()["unknown"]
    rhat = split_gelman_rubin(draws.reshape(length, chains, -1), chain_dim=1, sample_dim=0)
    warning = common.disagreement(rhat.cpu().numpy())
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    v = starts.expand(length, *starts.shape)
    y, _ = unknown.complete(v.masked_scatter(places.expand_as(v), draws))
    return y.transpose(0, 1).flatten(0, 1)[common.kept(num_samples, chains, length)]


class _Unknown:
    """The unknown numbers of events, in real coordinates of about unit scale."""

    def __init__(
        self,
        flow: TransformModule,
        x: Float[Tensor, "..."],
        known: Bool[Tensor, "..."],
        base: "str | dist.TorchDistribution | None",
        context: Context,
        support: Any,
    ) -> None:
        flow, x, context = joined(flow, x, context)
        if not isinstance(known, Tensor):
            raise TypeError(f"`known` is a {type(known).__name__}, expected a torch.Tensor")
        self.flow = flow if context is None else flow.condition(context)
        self.density = flow_distribution(self.flow, base)
        self.own = _bounds(flow, flow.codomain)
        self.bijection = self.own if support is None else _bounds(flow, support)
        ends, own = (common.ends(b, flow.event_shape) for b in (self.bijection, self.own))
        mask = common.check_known(known.cpu().numpy(), x.cpu().numpy(), ends, own)
        self.ends = ends
        self.inner: list[Tensor] = []
        self.x, self.known = x, torch.from_numpy(mask).to(x.device)
        self.batch = x.shape[: x.ndim - len(flow.event_shape)]
        self.location, self.scale = x.new_zeros(()), x.new_ones(())

    def complete(self, v: Float[Tensor, "..."]) -> Pair:
        """Return the events with these coordinates, and the log-determinant up to a constant."""
        y, ladj = self.location + self.scale * v, v.new_zeros(())
        if self.bijection is not None:
            y, ladj = self.bijection.forward_and_ladj(y)
        return torch.where(self.known, self.x, y), ladj

    def log_prob(self, y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the log-density of events."""
        z, ladj = self.flow.inverse_and_ladj(y)
        return log_prob_inside(self.density.base_dist, z) + ladj

    def start(
        self, count: int, steps: int
    ) -> tuple[Float[Tensor, "count ..."], Float[Tensor, "count ..."]]:
        """Scale the coordinates by draws of the flow, and search for `count` starts.

        Return the coordinates of the most likely latents whose events agree with what is known,
        and what the search has maximised.
        """
        base, shape = self.density.base_dist, self.flow.event_shape
        own = () if self.density.batch_shape else self.batch
        draws = torch.Size((common.draws_to_scale_by(count, self.batch), *own))
        with torch.no_grad():
            z = base.sample(draws).to(self.x)
            y = self.flow(z)
            inner = common.inner(y.cpu().numpy(), self.ends)
            self.inner = [torch.from_numpy(end).to(y) for end in inner]
            self.location, self.scale = self._moments(self._coordinates(y), shape)
            u = y if self.own is None else self.own.inv(y)
            _, spread = self._moments(u, shape)
            middle, width = self._moments(z, self.flow.base_shape)
            given = torch.where(self.known, self.x, y[0])
            target = given if self.own is None else self.own.inv(given)
            w = (z[:count] - middle) / width
        first, second = torch.zeros_like(w), torch.zeros_like(w)
        axes = tuple(range(-len(shape), 0))
        for size, deviation, once, twice in common.latent_schedule(steps).tolist():
            w = w.detach().requires_grad_()
            with torch.enable_grad():
                z = middle + width * w
                y = self.flow(z)
                u = y if self.own is None else self.own.inv(y)
                apart = torch.where(self.known, (u - target) / (deviation * spread), 0.0)
                value = log_prob_inside(base, z) - 0.5 * apart.square().sum(axes)
                (gradient,) = torch.autograd.grad(value.sum(), w)
            gradient = torch.where(gradient.isfinite(), gradient, 0.0)
            step, first, second = common.direction(gradient, first, second, once, twice)
            w = w.detach() + size * step
        with torch.no_grad():
            u = self._coordinates(self.flow(middle + width * w))
            # A search that failed is not the best of an event.
            return (u - self.location) / self.scale, torch.where(value.isnan(), -math.inf, value)

    def _coordinates(self, y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return events in real coordinates, those beyond a narrower support from within it."""
        if self.bijection is not self.own:
            y = y.clamp(*self.inner)
        return y if self.bijection is None else self.bijection.inv(y)

    def _moments(self, u: Float[Tensor, "..."], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        location, scale = common.location_and_scale(u.cpu().numpy(), shape)
        return torch.from_numpy(location).to(u), torch.from_numpy(scale).to(u)

    def best(
        self, ends: Float[Tensor, "count ..."], values: Float[Tensor, "count ..."]
    ) -> Float[Tensor, "..."]:
        """Return the coordinates with the highest value for each event, if they have a density."""
        places = values.reshape(len(values), -1).argmax(0)
        rows = ends.reshape(len(ends), len(places), *self.flow.event_shape)
        best = rows[places, torch.arange(len(places))].reshape(self.x.shape)
        with torch.no_grad():
            common.check_density(self.log_prob(self.complete(best)[0]).cpu().numpy())
        return best

    def climb(
        self, starts: Float[Tensor, "count ..."], steps: int, noise: float
    ) -> tuple[Float[Tensor, "count ..."], Float[Tensor, "count ..."]]:
        """Climb from the starts; return the highest points met and their log-densities."""
        v = best = starts
        highest = v.new_full((len(starts), *self.batch), -math.inf)
        first, second = torch.zeros_like(v), torch.zeros_like(v)
        wide = (..., *(None for _ in self.flow.event_shape))
        for size, jitter, once, twice in common.schedule(steps, noise).tolist():
            v = v.detach().requires_grad_()
            with torch.enable_grad():
                value = self.log_prob(self.complete(v)[0])
                (gradient,) = torch.autograd.grad(value.sum(), v)
            higher = value.detach() > highest
            best = torch.where(higher[wide], v.detach(), best)
            highest = torch.where(higher, value.detach(), highest)
            gradient = torch.where(gradient.isfinite(), gradient, 0.0)
            step, first, second = common.direction(gradient, first, second, once, twice)
            if jitter:
                step = step + jitter * torch.randn_like(v)
            v = v.detach() + size * step
        return best, highest


def _bounds(flow: TransformModule, support: Any) -> BijectTo | None:
    """Return the bijection onto a support, None for all real events."""
    return None if is_real(support) else BijectTo(flow.event_shape, support)
