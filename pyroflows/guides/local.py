"""The guide of local sites: a conditional flow that all rows share, given the global sites."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from pyro.distributions import constraints
from torch import Tensor, nn

from pyroflows.guides.path_gradient import Limited
from pyroflows.layers.chain import Chain
from pyroflows.layers.coupling import AffineCoupling
from pyroflows.layers.tails import SinhArcsinh
from pyroflows.networks import DenseNet
from pyroflows.transform import TransformModule
from pyroflows_common.budgets import GUIDE_BUDGET
from pyroflows_common.guides import INIT_SCALE
from pyroflows_common.local import FURTHEST, GAIN, ROUNDS, SKEWED, Starts, masks, unpacked


class LocalFlow(nn.Module):
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
        encoder: a network from features `(n, ...)` to `(n, embedded)`, or None.
    """

    start: Float[Tensor, "..."]
    control: Float[Tensor, "N h"]
    shift: Any
    log_scale: Any
    encoder: Any

    def __init__(
        self,
        starts: Starts,
        control: np.ndarray,
        size: int,
        *,
        embedded: int = 0,
        encoder: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.width, self.slopes = starts.slope.shape[-2:]
        self.register_buffer("start", torch.as_tensor(starts.packed()))
        self.register_buffer("control", torch.as_tensor(control))
        learned = encoder is None
        for name in ("shift", "log_scale"):
            zeros = torch.zeros(starts.loc.shape, dtype=self.start.dtype)
            self.register_parameter(name, nn.Parameter(zeros) if learned else None)
        self.encoder = encoder
        self.flow = _flow(self.width, size + starts.seen.shape[-1] + embedded, learned)

    @torch.no_grad()
    def begin(self, starts: Starts, control: np.ndarray) -> None:
        """Set where rows start, and the control of their densities."""
        self.start.copy_(torch.as_tensor(starts.packed()))
        self.control.copy_(torch.as_tensor(control))

    def is_searched(self) -> bool:
        """Return whether a search has found where the rows start."""
        return bool((self.control[:, 0] != 0).any())

    def surplus(self, rows: Int[Tensor, " n"], white: Float[Tensor, "*batch G"]) -> Tensor:
        """Return what the log-density of each row is above that of the mean row, to first order.

        Over all rows the sum is zero: see `pyroflows_common.local.control`.
        """
        control = self.control[rows]
        height = control[:, :-1] / control[:, -1:]
        known = height.shape[-1] - 1
        return height[:, 0] + (height[:, 1:] * white[..., None, :known]).sum(-1)

    def taken(self, rows: Int[Tensor, " n"], features: Tensor | None) -> "Taken":
        """Return the rows with these indices, or with these features."""
        sizes = self.width, self.slopes
        if self.encoder is not None:
            starts = unpacked(self.start, *sizes)
            seen = self.encoder(features)
            zeros = self.start.new_zeros(len(seen), self.width)
            return Taken(starts._replace(seen=seen.to(zeros)), zeros, zeros, self.flow)
        starts = unpacked(self.start[rows], *sizes)
        return Taken(starts, GAIN * self.shift[rows], GAIN * self.log_scale[rows], self.flow)


class Taken(NamedTuple):
    """Some rows: the flow of each is a function of the whitened global numbers."""

    starts: Starts
    shift: Float[Tensor, "n d"]
    log_scale: Float[Tensor, "n d"]
    flow: Any  # None at the start

    def at_start(self) -> "Taken":
        """Return the rows as they start, before anything is learned."""
        zeros = torch.zeros_like(self.shift)
        return Taken(self.starts, zeros, zeros, None)

    def inner(self, u: Tensor, white: Float[Tensor, "*batch G"]) -> tuple[Tensor, Tensor]:
        """Map base `(*batch, n, d)` to units of each row's start, with the log-determinant."""
        shift, log_scale = self._follow(white)
        v, ladj = u, u.new_zeros(())
        if self.flow is not None:
            v, ladj = self.flow.forward_and_ladj(u, self._context(white))
        y, bend = _skewed(v, self.starts.skewness)
        return shift + log_scale.exp() * y, ladj + bend + log_scale.sum(-1)

    def outer(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Map units of each row's start to unconstrained numbers, with the log-determinant."""
        factor = self.starts.factor
        z = self.starts.loc + (factor * w[..., None, :]).sum(-1)
        return z, factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def log_prob(self, z: Tensor, white: Float[Tensor, "*batch G"]) -> Float[Tensor, "*batch n"]:
        """Return the log-density of unconstrained numbers `(*batch, n, d)`."""
        factor = self.starts.factor
        rest = z - self.starts.loc
        if factor.shape[-1] == 1:
            w = rest / factor[..., 0]
        else:
            w = torch.linalg.solve_triangular(factor, rest[..., None], upper=False)[..., 0]
        shift, log_scale = self._follow(white)
        v, bend = _straight((w - shift) * (-log_scale).exp(), self.starts.skewness)
        u, ladj = self.flow.inverse_and_ladj(v, self._context(white))
        scales = factor.diagonal(dim1=-2, dim2=-1).log() + log_scale
        return log_normal(u) + ladj + bend - scales.sum(-1)

    def _follow(self, white: Tensor) -> tuple[Tensor, Tensor]:
        """Return shift and log-scale of each row at these global numbers."""
        slope, log_slope = self.starts.slope, self.starts.log_slope
        if not slope.shape[-1]:
            return self.shift, self.log_scale
        white = white[..., None, None, :]
        change = FURTHEST * torch.tanh((log_slope * white).sum(-1) / FURTHEST)
        return self.shift + (slope * white).sum(-1), self.log_scale + change

    def _context(self, white: Tensor) -> Tensor:
        seen, lead = self.starts.seen, white.shape[:-1]
        shape = (*lead, len(self.shift))
        white = white[..., None, :].expand(*shape, -1)
        return torch.cat([white, seen.expand(*shape, -1)], -1)


class LocalDistribution(dist.TorchDistribution):
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

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        local: LocalFlow,
        white: Float[Tensor, "*batch G"],
        rows: Int[Tensor, " n"],
        features: Tensor | None,
        dim: int,
        path: bool = False,
        controlled: bool = False,
    ) -> None:
        self.local, self.white, self.rows, self.features = local, white, rows, features
        self.path, self.controlled, self.ones = path, controlled, (1,) * (-1 - dim)
        batch = (*white.shape[:-1], len(rows), *self.ones)
        super().__init__(torch.Size(batch), torch.Size((local.width,)), validate_args=False)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw rows, and keep the unit of each for `log_prob` to add."""
        taken = self.local.taken(self.rows, self.features)
        shape = (*sample_shape, *self.white.shape[:-1], len(self.rows), self.local.width)
        white = self.white.expand(*shape[:-2], -1)
        noise = torch.randn(shape, dtype=self.white.dtype, device=self.white.device)
        w, _ = taken.inner(noise, white)
        unit = w.new_zeros(w.shape[:-1])
        if self.path:
            w, unit = Limited.apply(w, unit)
        z = taken.outer(w)[0].reshape(*shape[:-1], *self.ones, shape[-1])
        self._drawn = z, unit
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of each row."""
        ones = len(self.ones)
        z = value.reshape(*value.shape[: value.dim() - 1 - ones], value.shape[-1])
        white = self.white.expand(*z.shape[:-2], -1)
        leaves = [leaf.detach().requires_grad_() for leaf in (z, white)]
        inner = self.path and torch.is_grad_enabled() and z.requires_grad
        inner = inner and not torch.jit.is_tracing()
        taken = self.local.taken(self.rows, self.features)
        density = taken.log_prob(*(leaves if inner else (z, white)))
        if inner:
            slopes = torch.autograd.grad(density.sum(), leaves)
            density = density.detach()
            for now, leaf, slope in zip((z, white), leaves, slopes, strict=True):
                path = ((now - leaf.detach()) * slope).sum(-1)
                # That of the global numbers is a sum over rows, which share it.
                density = density + (path if now is z else path[..., None] / len(self.rows))
            drawn, unit = getattr(self, "_drawn", (None, density))
            density = density + unit if drawn is value else density
        if self.controlled:
            density = density + self.local.surplus(self.rows, white)
        return self._placed(density)

    def _placed(self, each: Tensor) -> Tensor:
        return each.reshape(*each.shape, *self.ones)


def log_normal(u: Tensor) -> Tensor:
    """Return the log-density of standard normal vectors."""
    return dist.Normal(torch.zeros_like(u), 1.0, validate_args=False).log_prob(u).sum(-1)


def _skewed(v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return variables of a skewness of about t, y = v + c t (√(1 + v²/c²) − 1), and the ladj."""
    root = torch.sqrt(1 + (v / SKEWED) ** 2)
    return v + SKEWED * t * (root - 1), torch.log1p(t * v / (SKEWED * root)).sum(-1)


def _straight(y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse of `_skewed`, and its ladj."""
    a = torch.asinh((y / SKEWED + t) * torch.rsqrt(1 - t * t)) - torch.atanh(t)
    return SKEWED * torch.sinh(a), -torch.log1p(t * torch.tanh(a)).sum(-1)


class Gained(nn.Module):
    """A network whose outputs have a gain.

    Args:
        network: the network.
    """

    def __init__(self, network: DenseNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """Return the outputs."""
        return GAIN * self.network(x)


def _flow(width: int, context_dim: int, near: bool) -> TransformModule:
    """Return the flow that all rows share, which has little to learn if they start near."""
    parts = [part for _ in range(ROUNDS) for part in (*masks(width), None)] + [[False] * width]
    layers: list[TransformModule] = []
    for part in parts:
        if part is None:
            layers.append(SinhArcsinh(width))
            continue
        inputs, outputs = sum(part) + context_dim, 2 * (width - sum(part))
        net = DenseNet(inputs, outputs, (32, 32), activation="silu", init_scale=INIT_SCALE)
        options: Any = {"network": Gained(net) if near else net, "limit": GUIDE_BUDGET / len(parts)}
        layers.append(AffineCoupling(width, partition=part, context_dim=context_dim, **options))
    return Chain(layers)
