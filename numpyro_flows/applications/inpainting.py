"""Inpainting: the unknown part of an event given the known one, its mode and draws of it."""

import math
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Bool, Float
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from numpyro_flows.applications.inputs import joined
from numpyro_flows.distribution import flow_distribution
from numpyro_flows.inputs import Events
from numpyro_flows.layers.constrained import BijectTo
from numpyro_flows.rng import RandomKey, check_key
from numpyro_flows.support import is_real, log_prob_inside
from numpyro_flows.transform import Context, Pair, TransformModule
from pyroflows_common import inpainting as common
from pyroflows_common.checks import as_count, as_scale


def inpaint(
    flow: TransformModule,
    x: Events,
    known: Bool[Array | np.ndarray, "..."],
    *,
    base: str | dist.Distribution | None = None,
    context: Context = None,
    support: Any = None,
    space: str = "data",
    steps: int = 500,
    noise: float = 1.0,
    restarts: int = 4,
    key: RandomKey,
) -> Float[Array, "..."]:
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
        key: random key.

    Returns:
        `x` with its unknown part filled in, and with its known part unchanged.

    Raises:
        ValueError: if the shapes do not fit, if a known number is not finite or not in the support,
            or if the flow gives simplices or ordered vectors, whose numbers cannot change alone.
        TypeError: if `known` is not a mask, or `x` not an array of real numbers.

    References:
        Dinh, Krueger and Bengio, "NICE" (arXiv:1410.8516), section 5.2.

    Examples:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from numpyro_flows import LowerTriangular, inpaint
        >>> flow = LowerTriangular(2)  # made to be x = (z1, 2 z1 + z2)
        >>> flow = eqx.tree_at(lambda flow: flow.lower, flow, jnp.full((2, 2), 2.0))
        >>> x = jnp.array([1.5, jnp.nan])
        >>> whole = inpaint(flow, x, ~jnp.isnan(x), steps=200, key=jax.random.key(0))
        >>> round(whole[1].item(), 1)
        3.0
    """
    common.check_space(space)
    steps, noise = as_count(steps, "steps"), as_scale(noise, "noise")
    restarts = as_count(restarts, "restarts")
    check_key(key)
    start_key, climb_key = jax.random.split(key)
    unknown, z = _Unknown.drawn(flow, x, known, base, context, support, restarts, start_key)
    ends, log_probs = unknown.start(z, steps)
    if space == "data":
        ends, log_probs = unknown.climb(ends, steps, noise, climb_key)
    return unknown.complete(unknown.best(ends, log_probs))[0]


def inpaint_draws(
    flow: TransformModule,
    x: Events,
    known: Bool[Array | np.ndarray, "..."],
    *,
    base: str | dist.Distribution | None = None,
    context: Context = None,
    support: Any = None,
    num_samples: int = 1000,
    num_warmup: int = 500,
    chains: int = 8,
    max_tree_depth: int = 10,
    key: RandomKey,
) -> Float[Array, "num_samples ..."]:
    r"""Draw the unknown part of events from its distribution given the known part.

    $$x_U \sim p(x_U \mid x_K) \propto p(x_K, x_U)$$

    The sampler is NumPyro's NUTS. All chains of all events move as one state, from the ends of a
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
        key: random key.

    Returns:
        Draws `(num_samples, *batch, *event_shape)`, chain by chain, with the known part of `x`.

    Raises:
        ValueError: as `inpaint`.
        TypeError: as `inpaint`.

    References:
        Hoffman and Gelman, "The No-U-Turn Sampler" (JMLR 2014).

    Examples:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from numpyro_flows import LowerTriangular, inpaint_draws
        >>> flow = LowerTriangular(2)  # made to be x = (z1, 2 z1 + z2)
        >>> flow = eqx.tree_at(lambda flow: flow.lower, flow, jnp.full((2, 2), 2.0))
        >>> x = jnp.array([1.5, jnp.nan])
        >>> draws = inpaint_draws(flow, x, ~jnp.isnan(x), key=jax.random.key(0))
        >>> 2.8 < draws[:, 1].mean() < 3.2
        Array(True, dtype=bool)
    """
    num_samples = as_count(num_samples, "num_samples")
    num_warmup = as_count(num_warmup, "num_warmup")
    chains, max_tree_depth = as_count(chains, "chains"), as_count(max_tree_depth, "max_tree_depth")
    check_key(key)
    start_key, draw_key = jax.random.split(key)
    unknown, z = _Unknown.drawn(flow, x, known, base, context, support, chains, start_key)
    length = max(math.ceil(num_samples / chains), common.FEWEST_DRAWS)
    starts, _ = unknown.start(z, common.STEPS_TO_STARTS)
    log_probs = unknown.log_prob(unknown.complete(starts)[0])
    # Chains cannot start where there is no density: they start from the event's best start.
    good = jnp.isfinite(log_probs)
    log_probs = jnp.where(good, log_probs, -jnp.inf)
    wide = (..., *(None for _ in unknown.flow.event_shape))
    starts = jnp.where(good[wide], starts, unknown.best(starts, log_probs))
    log_probs = jnp.where(good, log_probs, log_probs.max(0))
    places = np.nonzero(np.broadcast_to(~np.asarray(unknown.known), starts.shape))
    if not len(places[0]):
        return jnp.broadcast_to(unknown.x, (num_samples, *unknown.x.shape))

    # The host's sampler computes in JAX's default precision, whatever that of its start.
    initial = starts[places].astype(float)

    def potential(v: Array) -> Array:
        y, ladj = unknown.complete(starts.at[places].set(v.astype(starts.dtype)))
        energy = log_probs - unknown.log_prob(y) - ladj
        return jnp.where(jnp.isnan(energy), jnp.inf, energy).sum().astype(v.dtype)

    kernel = NUTS(potential_fn=potential, max_tree_depth=max_tree_depth)
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=length, progress_bar=False)
    with jax.numpy_dtype_promotion("standard"):  # the host's sampler knows no other
        mcmc.run(draw_key, init_params=initial)
    draws = mcmc.get_samples().astype(starts.dtype)
    rhat = split_gelman_rubin(np.asarray(draws).reshape(length, chains, -1).swapaxes(0, 1))
    warning = common.disagreement(rhat)
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    v = jnp.broadcast_to(starts, (length, *starts.shape)).at[:, *places].set(draws)
    y = jnp.swapaxes(unknown.complete(v)[0], 0, 1).reshape(-1, *unknown.x.shape)
    return y[common.kept(num_samples, chains, length)]


class _Unknown(eqx.Module):
    """The unknown numbers of events, in real coordinates of about unit scale."""

    flow: TransformModule
    base: dist.Distribution
    own: BijectTo | None  # the bijection onto the flow's support
    bijection: BijectTo | None  # that onto the support to stay in
    inner: common.Ends  # of that support, a little inside
    x: Array
    known: Array
    location: Array
    scale: Array
    spread: Array  # of the flow's events in real coordinates
    middle: Array  # of latents
    width: Array

    @classmethod
    def drawn(
        cls,
        flow: TransformModule,
        x: Events,
        known: Bool[Array | np.ndarray, "..."],
        base: str | dist.Distribution | None,
        context: Context,
        support: Any,
        count: int,
        key: RandomKey,
    ) -> "tuple[_Unknown, Float[Array, 'count ...']]":
        """Scale the coordinates by draws of the flow; return the latents of `count` draws, too."""
        flow, x, context = joined(flow, x, context)
        if not hasattr(known, "dtype"):
            raise TypeError(f"`known` is a {type(known).__name__}, expected a jax.Array")
        flow = flow if context is None else flow.condition(context)
        density = flow_distribution(flow, base)
        own = _bounds(flow, flow.codomain)
        bijection = own if support is None else _bounds(flow, support)
        ends, own_ends = (common.ends(b, flow.event_shape) for b in (bijection, own))
        mask = common.check_known(np.asarray(known), np.asarray(x), ends, own_ends)
        batch = x.shape[: x.ndim - len(flow.event_shape)]
        rows = () if density.batch_shape else batch
        z = density.base_dist.sample(key, (common.draws_to_scale_by(count, batch), *rows))
        z = z.astype(x.dtype)
        y = flow(z)
        inner = common.inner(np.asarray(y), ends)
        moments = (
            *_moments(_coordinates(y, own, bijection, inner), flow.event_shape),
            _moments(y if own is None else own.inv(y), flow.event_shape)[1],
            *_moments(z, flow.base_shape),
        )
        of_x = (x, jnp.asarray(mask))
        return cls(flow, density.base_dist, own, bijection, inner, *of_x, *moments), z[:count]

    def complete(self, v: Float[Array, "..."]) -> Pair:
        """Return the events with these coordinates, and the log-determinant up to a constant."""
        y, ladj = self.location + self.scale * v, jnp.zeros((), v.dtype)
        if self.bijection is not None:
            y, ladj = self.bijection.forward_and_ladj(y)
        return jnp.where(self.known, self.x, y), ladj

    def log_prob(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the log-density of events."""
        z, ladj = self.flow.inverse_and_ladj(y)
        return (log_prob_inside(self.base, z) + ladj).astype(y.dtype)

    def start(
        self, z: Float[Array, "count ..."], steps: int
    ) -> tuple[Float[Array, "count ..."], Float[Array, "count ..."]]:
        """Search for starts from these latents.

        Return the coordinates of the most likely latents whose events agree with what is known,
        and what the search has maximised.
        """
        y, value = self._start(z, jnp.asarray(common.latent_schedule(steps), z.dtype))
        u = _coordinates(y, self.own, self.bijection, self.inner)
        # A search that failed is not the best of an event.
        return (u - self.location) / self.scale, jnp.where(jnp.isnan(value), -jnp.inf, value)

    @eqx.filter_jit
    def _start(self, z: Array, schedule: Array) -> tuple[Array, Array]:
        given = jnp.where(self.known, self.x, self.flow(z[0]))
        target = given if self.own is None else self.own.inv(given)
        axes = tuple(range(-len(self.flow.event_shape), 0))

        def total(w: Array, deviation: Array) -> tuple[Array, Array]:
            z = self.middle + self.width * w
            y = self.flow(z)
            u = y if self.own is None else self.own.inv(y)
            apart = jnp.where(self.known, (u - target) / (deviation * self.spread), 0)
            value = log_prob_inside(self.base, z) - 0.5 * jnp.square(apart).sum(axes)
            return value.sum(), value.astype(w.dtype)

        def step(state: Any, step: Array) -> tuple[Any, None]:
            w, first, second, _ = state
            size, deviation, once, twice = step
            gradient, value = jax.grad(total, has_aux=True)(w, deviation)
            gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
            change, first, second = common.direction(gradient, first, second, once, twice)
            w = w + size * change
            return (w, first, second, value), None

        batch = z.shape[: z.ndim - len(self.flow.base_shape)]
        w, zeros = (z - self.middle) / self.width, jnp.zeros_like(z)
        state = (w, zeros, zeros, jnp.zeros(batch, z.dtype))
        (w, *_, value), _ = jax.lax.scan(step, state, schedule)
        return self.flow(self.middle + self.width * w), value

    def best(
        self, ends: Float[Array, "count ..."], values: Float[Array, "count ..."]
    ) -> Float[Array, "..."]:
        """Return the coordinates with the highest value for each event, if they have a density."""
        places = values.reshape(len(values), -1).argmax(0)
        rows = ends.reshape(len(ends), len(places), *self.flow.event_shape)
        best = rows[places, jnp.arange(len(places))].reshape(self.x.shape)
        common.check_density(np.asarray(self.log_prob(self.complete(best)[0])))
        return best

    def climb(
        self, starts: Float[Array, "count ..."], steps: int, noise: float, key: RandomKey
    ) -> tuple[Float[Array, "count ..."], Float[Array, "count ..."]]:
        """Climb from the starts; return the highest points met and their log-densities."""
        schedule = jnp.asarray(common.schedule(steps, noise), starts.dtype)
        return self._climb(starts, schedule, key)

    @eqx.filter_jit
    def _climb(self, starts: Array, schedule: Array, key: RandomKey) -> tuple[Array, Array]:
        batch = starts.shape[: starts.ndim - len(self.flow.event_shape)]
        wide = (..., *(None for _ in self.flow.event_shape))

        def total(v: Array) -> tuple[Array, Array]:
            value = self.log_prob(self.complete(v)[0])
            return value.sum(), value

        def step(state: Any, step: Any) -> tuple[Any, None]:
            v, first, second, best, highest = state
            (size, jitter, once, twice), key = step
            gradient, value = jax.grad(total, has_aux=True)(v)
            higher = value > highest
            best = jnp.where(higher[wide], v, best)
            highest = jnp.where(higher, value, highest)
            gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
            change, first, second = common.direction(gradient, first, second, once, twice)
            v = v + size * (change + jitter * jax.random.normal(key, v.shape, v.dtype))
            return (v, first, second, best, highest), None

        keys = jax.random.split(key, len(schedule))
        zeros, lowest = jnp.zeros_like(starts), jnp.full(batch, -jnp.inf, starts.dtype)
        state = (starts, zeros, zeros, starts, lowest)
        (*_, best, highest), _ = jax.lax.scan(step, state, (schedule, keys))
        return best, highest


def _bounds(flow: TransformModule, support: Any) -> BijectTo | None:
    """Return the bijection onto a support, None for all real events."""
    return None if is_real(support) else BijectTo(flow.event_shape, support)


def _coordinates(
    y: Array, own: BijectTo | None, bijection: BijectTo | None, inner: common.Ends
) -> Array:
    """Return events in real coordinates, those beyond a narrower support from within it."""
    if bijection is not own:
        y = jnp.clip(y, *(jnp.asarray(end, y.dtype) for end in inner))
    return y if bijection is None else bijection.inv(y)


def _moments(u: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    location, scale = common.location_and_scale(np.asarray(u), shape)
    return jnp.asarray(location, u.dtype), jnp.asarray(scale, u.dtype)
