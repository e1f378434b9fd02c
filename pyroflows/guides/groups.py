"""The part of a guide that draws local sites: their start, their plates and their draws."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.guides.local import LocalDistribution, LocalFlow
from pyroflows.guides.model import drawn, unconstrained
from pyroflows.guides.reference import Start
from pyroflows.guides.rows import Rows, joined, site_of, split
from pyroflows.rng import seeded
from pyroflows_common.checks import Inputs
from pyroflows_common.guides import NOTHING, warn_of_search
from pyroflows_common.laplace import located
from pyroflows_common.local import (
    OTHER_SIZE,
    UNKNOWN_ROWS,
    UNORDERED,
    Layout,
    Starts,
    check_features,
    control,
    no_heights,
)
from pyroflows_common.search import DENSE, LARGE

# Most numbers of rows that are drawn at once.
NUMBERS = 2**23


class Encoding(NamedTuple):
    """What tells the rows apart, in place of numbers that are learned for each.

    Args:
        network: maps the features of rows, `(n, ...)`, to vectors.
        features: `(N, ...)`, or a function of the model's arguments that returns those of all rows,
            or of those that are taken.
    """

    network: Callable[[Tensor], Tensor]
    features: Any


class Groups:
    """The local sites of a guide.

    Args:
        layout: the local sites.
        trace: a run of the model.
        encoding: the encoder and its features, or None.
    """

    def __init__(self, layout: Layout, trace: Trace, encoding: Encoding | None) -> None:
        self.layout = layout
        self.encoding: Any = encoding
        self.trace = {name: trace.nodes[name] for name in layout.shapes}

    def start(
        self,
        model: Callable[..., Any],
        inputs: Inputs,
        locs: dict[str, Tensor],
        start: Start,
        scale: float,
        search: bool,
    ) -> tuple[Starts, np.ndarray]:
        """Set where the guide starts, and return where its rows start, with their control.

        Args:
            model: the model.
            inputs: its arguments.
            locs: where each unconstrained global site starts.
            start: the guide's start there, without a search.
            scale: its standard deviation.
            search: whether to search for a better one.

        Raises:
            ValueError: if rows depend on each other, or if they cannot be told apart.
        """
        layout, pool = self.layout, self.encoding is not None
        rows = Rows(model, inputs, layout, locs)
        middle = self.rows_at_start().median(0).values
        rows.check(start.loc, middle)
        follow = rows.follow(start.loc, middle)
        if not (follow or pool):
            raise ValueError(UNKNOWN_ROWS.format(**layout._asdict()))
        z, sizes = middle.double().cpu().numpy(), (layout.size, layout.taken)
        found = None
        if search:
            points = _points(model, inputs, locs, start.loc)
            found = located(rows, points, z, scale, sizes, follow)
            if found is None:
                warn_of_search(NOTHING)
        if found is None:
            wide = np.full(len(z), scale)
            one = Starts.of_all(z, wide)
            flat = control(no_heights(layout.size, len(z), len(start.loc)))
            same = Starts.same(z, wide, layout.size, len(start.loc))
            return one if pool else same, flat
        loc, factor = (torch.as_tensor(a).to(start.loc) for a in found[:2])
        if len(loc) <= DENSE:
            start.precondition(loc, factor)
        else:
            start.at(loc, factor.norm(dim=1))
        return Starts.searched(rows, found, z, sizes, pool, follow)

    def rows_at_start(self) -> Float[Tensor, "n d"]:
        """Return the unconstrained rows of the run of the model."""
        return joined(self.layout, unconstrained(self.trace.values()))

    def like(self, size: int, inputs: Inputs) -> LocalFlow:
        """Return a guide of the rows, for `size` global numbers, whose start is to be set."""
        width = self.layout.width
        zeros, ones = np.zeros(width), np.ones(width)
        flat = control(no_heights(self.layout.size, width, size))
        if self.encoding is None:
            return LocalFlow(Starts.same(zeros, ones, self.layout.size, size), flat, size)
        network = self.encoding.network
        with torch.no_grad():
            embedded = network(torch.as_tensor(self.features(inputs))[:2])
        if embedded.dim() != 2:
            raise ValueError(
                f"`encoder` makes an array of shape {tuple(embedded.shape)} of two rows' features, "
                "expected a vector for each"
            )
        one = Starts.of_all(zeros, ones)
        return LocalFlow(one, flat, size, embedded=embedded.shape[1], encoder=network)

    def draw(
        self,
        name: str,
        local: LocalFlow,
        white: Float[Tensor, "*batch G"],
        model: Callable[..., Any],
        inputs: Inputs,
        plates: Mapping[str, Any],
        path: bool,
    ) -> dict[str, Tensor]:
        """Draw the local sites of the rows that the model takes, given the global numbers."""
        layout = self.layout
        own = plates.get(layout.plate)
        if own is None:
            size, rows = self.taken(model, inputs)
            options = {"subsample_size": rows} if isinstance(rows, int) else {"subsample": rows}
            own = pyro.plate(layout.plate, size, dim=layout.dim, **options)
        plates = {**plates, layout.plate: own}
        white = white.reshape(*white.shape[:-1][: layout.dim], white.shape[-1])
        with own as rows:
            features = self.features_of(rows, own.size, inputs)
            known = own.size == layout.size
            fn = LocalDistribution(local, white, rows, features, layout.dim, path, known)
            z = pyro.sample(name, fn, infer={"is_auxiliary": True})
        z = z.reshape(*z.shape[: z.dim() + layout.dim - 1], len(rows), local.width)
        result = {}
        for site, shape in layout.shapes.items():
            # Plates of the site to the left take the place of dimensions that the rows have there.
            lead, left = z.shape[:-2], len(shape) + 1 + layout.axes[site]
            trimmed = z.reshape(*lead[: max(len(lead) - left, 0)], *z.shape[-2:])
            value, density = self._placed(site, site_of(layout, site, trimmed))
            with contextlib.ExitStack() as stack:
                for frame in self.trace[site]["cond_indep_stack"]:
                    if frame.name not in plates:
                        plates[frame.name] = pyro.plate(frame.name, frame.size, dim=frame.dim)
                    stack.enter_context(plates[frame.name])
                result[site] = pyro.sample(site, density)
        return result

    def _placed(self, name: str, point: Tensor) -> tuple[Tensor, dist.Distribution]:
        fn = self.trace[name]["fn"]
        transform = biject_to(fn.support)
        value = transform(point)
        ladj = transform.log_abs_det_jacobian(point, value)
        batch = value.shape[: value.dim() - fn.event_dim]
        density = -ladj.reshape(*batch, -1).sum(-1)
        return value, dist.Delta(value, density, event_dim=fn.event_dim)

    def taken(self, model: Callable[..., Any], inputs: Inputs) -> tuple[int, int | Tensor]:
        """Return the size of the plate in a run of the model, and how many rows it takes.

        If the model tells which rows it takes, their indices take the place of the number.
        """
        args, kwargs = inputs
        with poutine.block(), seeded(0), torch.no_grad():
            site = poutine.trace(model).get_trace(*args, **kwargs).nodes[self.layout.plate]
        size, part, rows = site["fn"].size, site["fn"].subsample_size, site["value"]
        if self.encoding is None and size != self.layout.size:
            layout = self.layout
            raise ValueError(OTHER_SIZE.format(plate=layout.plate, found=size, size=layout.size))
        if part is None and not torch.equal(rows, torch.arange(size, device=rows.device)):
            return size, rows
        return size, size if part is None else part

    def features(self, inputs: Inputs) -> Any:
        """Return what the features are for these arguments."""
        found = self.encoding.features
        return found(*inputs[0], **inputs[1]) if callable(found) else found

    def features_of(self, rows: Tensor, size: int, inputs: Inputs) -> Tensor | None:
        """Return the features of these rows."""
        if self.encoding is None:
            return None
        features = torch.as_tensor(self.features(inputs))
        if not check_features(tuple(features.shape), len(rows), size):
            return features
        if callable(self.encoding.features) and len(rows) == size and (rows.diff() != 1).any():
            raise ValueError(UNORDERED)
        return features[rows]

    def quantiles(
        self, local: LocalFlow, white: Float[Tensor, "draws G"], levels: Tensor
    ) -> dict[str, Tensor]:
        """Return quantiles of the local sites of all rows, some rows at a time."""
        if self.encoding is not None:
            return {}
        rows = torch.arange(self.layout.size, device=white.device)
        found = []
        for some in rows.split(max(NUMBERS // (len(white) * local.width), 1)):
            z = LocalDistribution(local, white, some, None, -1).rsample()
            values = self.constrained(z).items()
            found.append({name: torch.quantile(value, levels, dim=0) for name, value in values})
        axes = {n: self.layout.dim - s["fn"].event_dim for n, s in self.trace.items()}
        return {n: torch.cat([part[n] for part in found], axes[n]) for n in axes}

    def constrained(self, z: Float[Tensor, "*batch n d"]) -> dict[str, Tensor]:
        """Return the local sites of unconstrained rows."""
        return {name: self._placed(name, x)[0] for name, x in split(self.layout, z).items()}


def _points(
    model: Callable[..., Any], inputs: Inputs, locs: dict[str, Tensor], loc: Tensor
) -> np.ndarray:
    """Return where the search may set out from."""
    sizes = [one.numel() for one in locs.values()]
    where = dict(zip(locs, torch.arange(len(loc)).split(sizes), strict=True))
    uniform = 4.0 * torch.rand(LARGE.starts - 2 - LARGE.prior, len(loc)) - 2.0
    prior = drawn(model, where, LARGE.prior, *inputs[0], **inputs[1])
    prior = prior[prior.isfinite().all(1)]
    points = torch.cat([loc[None], torch.zeros_like(loc)[None], uniform.to(loc), prior.to(loc)])
    return points.double().cpu().numpy()
