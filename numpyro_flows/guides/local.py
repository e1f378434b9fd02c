"""The guide of local sites: a conditional flow that all rows share, given the global sites."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax
from jaxtyping import Float, Int
from numpyro.distributions import constraints

from numpyro_flows.guides.path_gradient import limited
from numpyro_flows.layers.chain import Chain
from numpyro_flows.layers.coupling import AffineCoupling
from numpyro_flows.layers.tails import SinhArcsinh
from numpyro_flows.networks import DenseNet
from numpyro_flows.rng import RandomKey, split
from numpyro_flows.transform import TransformModule
from numpyro_flows.tree import frozen
from pyroflows_common.budgets import GUIDE_BUDGET
from pyroflows_common.guides import INIT_SCALE
from pyroflows_common.local import FURTHEST, GAIN, ROUNDS, SKEWED, Starts, masks, unpacked


class LocalFlow(eqx.Module):
    r"""The guide of local sites, given the global ones.

    The d numbers of row i, in their unconstrained space, are

    $$z_i = m_i + L_i \left(b_i + B_i \tilde g + e^{s_i + \rho(S_i \tilde g)} \odot
    \kappa_i(\mathrm{flow}(\epsilon_i; \tilde g, e_i))\right)$$

    for normal \(\epsilon_i\), where \(\tilde g\) are the G global numbers in units of their start.
    Location m, lower-triangular L, the skewness that κ gives, the slopes B and S and what the flow
    sees of a row, e, are those of its distribution at the start, and stay fixed; ρ bounds the
    change of a scale. Shift b and log-scale s are learned for each row, and the flow for all. With
    an encoder, m and L are the same for all rows, e is what the network makes of a row's features,
    and the rest is left out.

    Args:
        starts: where rows start.
        control: `(N, h)`, the control of their densities.
        size: G.
        embedded: number of the encoder's outputs.
        encoder: a network from a row's features to `(embedded,)`, or None.
        key: random key of the flow's first weights.
    """

    start: Float[Array, "..."]
    control: Float[Array, "N h"]
    shift: Any
    log_scale: Any
    flow: TransformModule
    encoder: Any
    width: int = eqx.field(static=True)
    slopes: int = eqx.field(static=True)

    def __init__(
        self,
        starts: Starts,
        control: np.ndarray,
        size: int,
        *,
        embedded: int = 0,
        encoder: Callable[[Array], Array] | None = None,
        key: RandomKey,
    ) -> None:
        self.width, self.slopes = starts.slope.shape[-2:]
        self.start, self.control = jnp.asarray(starts.packed()), jnp.asarray(control)
        learned = encoder is None
        self.shift = jnp.zeros(starts.loc.shape) if learned else None
        self.log_scale = jnp.zeros(starts.loc.shape) if learned else None
        self.encoder = encoder
        context_dim = size + starts.seen.shape[-1] + embedded
        self.flow = _flow(self.width, context_dim, learned, key)

    def is_searched(self) -> bool:
        """Return whether a search has found where the rows start."""
        return bool((self.control[:, 0] != 0).any())

    def surplus(self, rows: Int[Array, " n"], white: Float[Array, "*batch G"]) -> Array:
        """Return what the log-density of each row is above that of the mean row, to first order.

        Over all rows the sum is zero: see `pyroflows_common.local.control`.
        """
        control = lax.stop_gradient(self.control[rows])
        height = control[:, :-1] / control[:, -1:]
        known = height.shape[-1] - 1
        return height[:, 0] + (height[:, 1:] * white[..., None, :known]).sum(-1)

    def taken(self, rows: Int[Array, " n"], features: Array | None) -> "Taken":
        """Return the rows with these indices, or with these features."""
        start, sizes = lax.stop_gradient(self.start), (self.width, self.slopes)
        if self.encoder is not None:
            starts = unpacked(start, *sizes)
            seen = jax.vmap(self.encoder)(features)
            zeros = jnp.zeros((len(seen), self.width), self.start.dtype)
            return Taken(starts._replace(seen=seen.astype(zeros.dtype)), zeros, zeros, self.flow)
        starts = unpacked(start[rows], *sizes)
        return Taken(starts, GAIN * self.shift[rows], GAIN * self.log_scale[rows], self.flow)


class Taken(NamedTuple):
    """Some rows: the flow of each is a function of the whitened global numbers."""

    starts: Starts
    shift: Float[Array, "n d"]
    log_scale: Float[Array, "n d"]
    flow: Any  # None at the start

    def at_start(self) -> "Taken":
        """Return the rows as they start, before anything is learned."""
        return Taken(self.starts, jnp.zeros_like(self.shift), jnp.zeros_like(self.shift), None)

    def inner(self, u: Array, white: Float[Array, "*batch G"]) -> tuple[Array, Array]:
        """Map base `(*batch, n, d)` to units of each row's start, with the log-determinant."""
        shift, log_scale = self._follow(white)
        v, ladj = u, jnp.zeros((), u.dtype)
        if self.flow is not None:
            v, ladj = self.flow.forward_and_ladj(u, self._context(white))
        y, bend = _skewed(v, self.starts.skewness)
        return shift + jnp.exp(log_scale) * y, ladj + bend + log_scale.sum(-1)

    def outer(self, w: Array) -> tuple[Array, Array]:
        """Map units of each row's start to unconstrained numbers, with the log-determinant."""
        factor = self.starts.factor
        z = self.starts.loc + (factor * w[..., None, :]).sum(-1)
        return z, jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)).sum(-1)

    def log_prob(self, z: Array, white: Float[Array, "*batch G"]) -> Float[Array, "*batch n"]:
        """Return the log-density of unconstrained numbers `(*batch, n, d)`."""
        factor = self.starts.factor
        rest = z - self.starts.loc
        if factor.shape[-1] == 1:
            w = rest / factor[..., 0]
        else:
            whole = jnp.broadcast_to(factor, (*rest.shape, rest.shape[-1]))
            w = jax.scipy.linalg.solve_triangular(whole, rest[..., None], lower=True)[..., 0]
        shift, log_scale = self._follow(white)
        v, bend = _straight((w - shift) * jnp.exp(-log_scale), self.starts.skewness)
        u, ladj = self.flow.inverse_and_ladj(v, self._context(white))
        scales = jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)) + log_scale
        return (
            dist.Normal(jnp.zeros_like(u), 1.0).log_prob(u).sum(-1) + ladj + bend - scales.sum(-1)
        )

    def _follow(self, white: Array) -> tuple[Array, Array]:
        """Return shift and log-scale of each row at these global numbers."""
        slope, log_slope = self.starts.slope, self.starts.log_slope
        if not slope.shape[-1]:
            return self.shift, self.log_scale
        white = white[..., None, None, :]
        change = FURTHEST * jnp.tanh((log_slope * white).sum(-1) / FURTHEST)
        return self.shift + (slope * white).sum(-1), self.log_scale + change

    def _context(self, white: Array) -> Array:
        seen, lead = self.starts.seen, white.shape[:-1]
        shape = (*lead, len(self.shift))
        white = jnp.broadcast_to(white[..., None, :], (*shape, white.shape[-1]))
        return jnp.concatenate([white, jnp.broadcast_to(seen, (*shape, seen.shape[-1]))], -1)


class LocalDistribution(dist.Distribution):
    """The distribution of some rows, given the global numbers, at a dimension of a plate.

    Its gradient is a path gradient, as that of `PathDistribution`: the log-density is a function of
    its value and of the global numbers alone.

    Args:
        local: the guide of local sites.
        white: `(*batch, G)`, whitened global numbers.
        rows: `(n,)`, indices of the rows.
        features: `(n, ...)`, those of an encoder.
        dim: dimension of the plate, counted from the last.
        path: whether the gradient is a path gradient.
        controlled: whether the log-density is a part of a bound, from which the control takes
            noise.
    """

    support = constraints.real_vector

    def __init__(
        self,
        local: LocalFlow,
        white: Float[Array, "*batch G"],
        rows: Int[Array, " n"],
        features: Array | None,
        dim: int,
        path: bool = False,
        controlled: bool = False,
    ) -> None:
        self.local, self.white, self.rows, self.features = local, white, rows, features
        self.path, self.controlled, self.ones = path, controlled, (1,) * (-1 - dim)
        batch = (*white.shape[:-1], len(rows), *self.ones)
        super().__init__(batch_shape=batch, event_shape=(local.width,))

    def sample(self, key: Array, sample_shape: Sequence[int] = ()) -> Array:
        """Draw rows."""
        return self.sample_with_intermediates(key, sample_shape)[0]

    def sample_with_intermediates(
        self, key: Array, sample_shape: Sequence[int] = ()
    ) -> tuple[Array, list[Array]]:
        """Draw rows, and return the unit of each for `log_prob` to add."""
        taken = self.local.taken(self.rows, self.features)
        shape = (*sample_shape, *self.white.shape[:-1], len(self.rows), self.local.width)
        white = jnp.broadcast_to(self.white, (*shape[:-2], self.white.shape[-1]))
        w, _ = taken.inner(jax.random.normal(key, shape, self.local.start.dtype), white)
        unit = jnp.zeros_like(w, shape=w.shape[:-1])
        if self.path:
            w, unit = limited(w, unit)
        z, _ = taken.outer(w)
        return z.reshape(*shape[:-1], *self.ones, shape[-1]), [self._placed(unit)]

    def log_prob(self, value: Array, intermediates: Sequence[Array] | None = None) -> Array:
        """Return the log-density of each row."""
        local = frozen(self.local) if self.path else self.local
        taken = local.taken(self.rows, self.features)
        ones = len(self.ones)
        z = value.reshape(*value.shape[: value.ndim - 1 - ones], value.shape[-1])
        white = jnp.broadcast_to(self.white, (*z.shape[:-2], self.white.shape[-1]))
        density = taken.log_prob(z, white)
        if self.controlled:
            density = density + self.local.surplus(self.rows, white)
        return self._placed(density) + sum(intermediates or [])

    def _placed(self, each: Array) -> Array:
        return each.reshape(*each.shape, *self.ones)


def _skewed(v: Array, t: Array) -> tuple[Array, Array]:
    """Return variables of a skewness of about t, y = v + c t (√(1 + v²/c²) − 1), and the ladj."""
    root = jnp.sqrt(1 + (v / SKEWED) ** 2)
    return v + SKEWED * t * (root - 1), jnp.log1p(t * v / (SKEWED * root)).sum(-1)


def _straight(y: Array, t: Array) -> tuple[Array, Array]:
    """Return the inverse of `_skewed`, and its ladj."""
    a = jnp.arcsinh((y / SKEWED + t) * lax.rsqrt(1 - t * t)) - jnp.arctanh(t)
    return SKEWED * jnp.sinh(a), -jnp.log1p(t * jnp.tanh(a)).sum(-1)


class Gained(eqx.Module):
    """A network whose outputs have a gain.

    Args:
        network: the network.
    """

    network: DenseNet

    def __call__(self, x: Float[Array, " i"]) -> Float[Array, " o"]:
        """Return the outputs."""
        return GAIN * self.network(x)


def _flow(width: int, context_dim: int, near: bool, key: RandomKey) -> TransformModule:
    """Return the flow that all rows share, which has little to learn if they start near."""
    parts = [part for _ in range(ROUNDS) for part in (*masks(width), None)] + [[False] * width]
    keys = split(key, len(parts))
    layers: list[TransformModule] = []
    for part, one in zip(parts, keys, strict=True):
        if part is None:
            layers.append(SinhArcsinh(width))
            continue
        inputs, outputs = sum(part) + context_dim, 2 * (width - sum(part))
        net = DenseNet(inputs, outputs, (32, 32), activation="silu", init_scale=INIT_SCALE, key=one)
        options: Any = {
            "network": Gained(net) if near else net,
            "limit": GUIDE_BUDGET / len(parts),
            "key": one,
        }
        layers.append(AffineCoupling(width, partition=part, context_dim=context_dim, **options))
    return Chain(layers)
