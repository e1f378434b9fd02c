"""The local sites of a model: its densities, row by row, of the rows that are taken."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine import Trace
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.guides.model import (
    Screened,
    alone,
    latent_sites,
    moving,
    placed,
    unconstrained,
    without,
)
from pyroflows.rng import seeded
from pyroflows_common.checks import Inputs
from pyroflows_common.guides import foreign_support
from pyroflows_common.laplace import AT_ONCE, Derived
from pyroflows_common.local import (
    BLOCKED,
    DEPENDENT,
    DISCRETE,
    MASKED,
    NEIGHBOURS,
    OUTSIDE,
    SHAPED,
    Layout,
    Site,
    layout_of,
)

# Places in the data that are compared.
WINDOWS = 64


class Rows:
    """The rows of a model's local sites, given its global ones.

    Args:
        model: the model.
        inputs: its arguments.
        layout: its local sites.
        locs: where each unconstrained global site starts.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        inputs: Inputs,
        layout: Layout,
        locs: dict[str, Tensor],
    ) -> None:
        self.model = Screened()(without(model, InitMessenger))
        self.inputs, self.layout, self.locs = inputs, layout, locs
        self.batched = True

    def derive(self, x: np.ndarray, z: np.ndarray, rows: np.ndarray) -> Derived:
        """Return log-densities and derivatives, as `pyroflows_common.laplace` asks."""
        return Derived(*self._mapped(self._derived, x, z, rows))

    def values(self, x: np.ndarray, z: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the log-density of each row."""
        return self._mapped(lambda *at: (self.densities(*at)[1],), x, z, rows)[0]

    def densities(
        self, x: Float[Tensor, "P G"], z: Float[Tensor, "P n d"], rows: Int[Tensor, "P n"]
    ) -> tuple[Float[Tensor, " P"], Float[Tensor, "P n"]]:
        """Return the log-density of the global sites, and that of each row, for many blocks."""
        with alone(), seeded(0):
            if self.batched:
                try:
                    return torch.func.vmap(self.log_parts, randomness="same")(x, z, rows)
                except Exception:  # a model that cannot be batched may raise anything
                    self.batched = False
            each = [self.log_parts(*one) for one in zip(x, z, rows, strict=True)]
            whole, rest = zip(*each, strict=True)
            return torch.stack(whole), torch.stack(rest)

    def log_parts(
        self, x: Float[Tensor, " G"], z: Float[Tensor, "n d"], rows: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
        """Return the log-density of the global sites, and that of each row.

        Those of the changes to unconstrained coordinates are in them. A row counts once.
        """
        layout, (args, kwargs) = self.layout, self.inputs
        points = {**self.spread(x), **split(layout, z)}
        with poutine.block():
            trace = placed(_Taken(layout.plate, rows)(self.model), points, *args, **kwargs)
        trace.compute_log_prob()
        whole, each = x.new_zeros(()), z.new_zeros(z.shape[:1])
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            inside, parts = _plates(site).get(layout.plate), [site["log_prob"]]
            if inside is not None:
                parts = [site["log_prob"] * (layout.taken / layout.size)]
            if name in points:
                value, fn = site["value"], site["fn"]
                ladj = biject_to(fn.support).log_abs_det_jacobian(points[name], value)
                batch = value.shape[: value.dim() - fn.event_dim]
                parts.append(ladj.reshape(*batch, -1).sum(-1))
            for part in parts:
                if inside is None:
                    whole = whole + part.sum()
                else:
                    part = part.movedim(inside, -1)
                    each = each + part.reshape(-1, part.shape[-1]).sum(0)
        return whole, each

    def spread(self, x: Float[Tensor, " G"]) -> dict[str, Tensor]:
        """Return the unconstrained value of each global site."""
        parts = x.split([loc.numel() for loc in self.locs.values()])
        pairs = zip(self.locs.items(), parts, strict=True)
        return {name: part.reshape(loc.shape) for (name, loc), part in pairs}

    def check(self, x: Tensor, z: Tensor) -> None:
        """Check that rows are independent of each other, given the global sites.

        Raises:
            ValueError: if they are not.
        """
        rows = torch.arange(self.layout.taken, device=x.device)
        with torch.enable_grad(), alone(), seeded(0):
            apart = torch.linspace(-0.1, 0.1, len(rows)).to(z)  # no two rows alike
            z = (z + apart[:, None]).requires_grad_()
            whole, each = self.log_parts(x, z, rows)
            ways = (OUTSIDE, whole, None), (NEIGHBOURS, each[0], 0), (NEIGHBOURS, each[-1], -1)
            for reason, value, row in ways:
                value = value + 0.0 * z.sum()  # may depend on none of them
                (slopes,) = torch.autograd.grad(value, z, retain_graph=True)
                if row is not None:
                    slopes[row] = 0.0
                if (slopes != 0).any():
                    raise ValueError(DEPENDENT.format(plate=self.layout.plate, reason=reason))

    def follow(self, x: Tensor, z: Tensor) -> bool:
        """Return whether the data follow the indices of the plate."""
        size, taken = self.layout.size, self.layout.taken
        if taken == size:
            return True
        z = z.expand(taken, -1)
        starts = torch.linspace(0, size - taken, WINDOWS, device=x.device).long()
        rows = starts[:, None] + torch.arange(taken, device=x.device)
        with torch.no_grad():
            _, found = self.densities(x.expand(len(rows), -1), z.expand(len(rows), -1, -1), rows)
        return not all(torch.allclose(found[0], other, equal_nan=True) for other in found[1:])

    def _derived(self, x: Tensor, z: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            z = z.requires_grad_()
            whole, each = self.densities(x, z, rows)
            derive = functools.partial(torch.autograd.grad, inputs=z, allow_unused=True)
            (slope,) = derive(each.sum() + 0.0 * z.square().sum(), create_graph=True)
            columns = [
                derive(slope[..., k].sum(), retain_graph=True, materialize_grads=True)[0]
                for k in range(z.shape[-1])
            ]
        return whole, each, slope, -torch.stack(columns, -1)

    def _mapped(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        x: np.ndarray,
        z: np.ndarray,
        rows: np.ndarray,
    ) -> list[np.ndarray]:
        """Map over blocks, some at once."""
        size, like = max(AT_ONCE // rows.shape[1], 1), next(iter(self.locs.values()))
        parts = []
        for start in range(0, len(x), size):
            some = slice(start, start + size)
            at = (torch.tensor(a[some], dtype=like.dtype, device=like.device) for a in (x, z))
            found = function(*at, torch.tensor(rows[some], device=like.device))
            parts.append([part.detach().double().cpu().numpy() for part in found])
        return [np.concatenate(part) for part in zip(*parts, strict=True)]


class _Taken(Messenger):
    """Handler that gives a plate its indices."""

    def __init__(self, plate: str, rows: Tensor) -> None:
        super().__init__()
        self.plate, self.rows = plate, rows

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.plate and site_is_subsample(msg):
            msg["value"] = self.rows


def split(layout: Layout, z: Float[Tensor, "*batch n d"]) -> dict[str, Tensor]:
    """Return the unconstrained value of each local site, with the rows along its plate."""
    return {name: site_of(layout, name, z) for name in layout.shapes}


def site_of(layout: Layout, name: str, z: Float[Tensor, "*batch n d"]) -> Tensor:
    """Return the unconstrained value of one local site."""
    shape, axis = layout.shapes[name], layout.axes[name]
    value = z[..., layout.columns[name]].reshape(*z.shape[:-1], *shape)
    return value.movedim(-1 - len(shape), axis)


def joined(layout: Layout, points: dict[str, Tensor]) -> Float[Tensor, "n d"]:
    """Return the rows of unconstrained values: the inverse of `split`."""
    parts = [points[name].movedim(axis, 0) for name, axis in layout.axes.items()]
    return torch.cat([part.reshape(len(part), -1) for part in parts], -1)


def layout_of_model(
    model: Callable[..., Any], local: str | None, *args: Any, **kwargs: Any
) -> tuple[Layout | None, Trace]:
    """Return the local sites of a model, and the run of it that tells them.

    Raises:
        ValueError: if the local sites are not such as a guide can have.
    """
    with poutine.block(), seeded(0):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    latent = latent_sites(trace)
    smooth = {n: s for n, s in latent.items() if not s["fn"].support.is_discrete}
    points = unconstrained(smooth.values())
    frames = [frame for site in smooth.values() for frame in site["cond_indep_stack"]]
    plates = {f.name: (f.full_size or f.size, f.size) for f in frames if f.vectorized}
    sites = []
    for name, site in smooth.items():
        event_dim = site["fn"].event_dim + points[name].dim() - site["value"].dim()
        sites.append(Site(name, tuple(points[name].shape), event_dim, _plates(site)))
    layout = layout_of(sites, plates, local)
    if layout is None:
        return None, trace
    if len(smooth) < len(latent):
        raise ValueError(DISCRETE)
    if _is_blocked(model):
        raise ValueError(BLOCKED)
    for name in moving(model, trace, *args, **kwargs):
        if name in layout.shapes:
            raise ValueError(foreign_support(name))
    more = split(layout, torch.zeros(layout.taken + 1, layout.width))
    for name, point in more.items():
        site = trace.nodes[name]
        if site["mask"] is not None or isinstance(site["fn"], dist.MaskedDistribution):
            raise ValueError(MASKED.format(name=name))
        try:
            biject_to(site["fn"].support)(point)
        except RuntimeError:
            raise ValueError(SHAPED.format(name=name)) from None
    return layout, trace


def _plates(site: dict[str, Any]) -> dict[str, int]:
    return {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}


def _is_blocked(model: Any) -> bool:
    """Return whether a handler hides sites of a model."""
    if not isinstance(model, functools.partial) or not isinstance((*model.args, 0)[0], Messenger):
        return False
    return isinstance(model.args[0], BlockMessenger) or _is_blocked(model.args[1])
