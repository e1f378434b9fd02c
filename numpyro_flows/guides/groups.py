"""The part of a guide that draws local sites: their start, their plates and their draws."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float, Int
from numpyro import handlers
from numpyro.distributions import biject_to

from numpyro_flows.guides.local import LocalDistribution, LocalFlow
from numpyro_flows.guides.model import Trace, drawn
from numpyro_flows.guides.reference import Start
from numpyro_flows.guides.rows import Rows, joined, split
from numpyro_flows.rng import RandomKey
from numpyro_flows.tree import as_dtype
from pyroflows_common.checks import Inputs
from pyroflows_common.guides import NOTHING, warn_of_search
from pyroflows_common.laplace import located
from pyroflows_common.local import (
    OTHER_SIZE,
    TRACED,
    UNKNOWN_ROWS,
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
        network: maps the features of one row to a vector.
        features: `(N, ...)`, or a function of the model's arguments that returns those of all rows,
            or of those that are taken.
    """

    network: Callable[[Array], Array]
    features: Any


class Groups:
    """The local sites of a guide.

    Args:
        layout: the local sites.
        trace: a run of the model.
        prefix: beginning of the names of sites.
        encoding: the encoder and its features, or None.
    """

    def __init__(
        self, layout: Layout, trace: Trace, prefix: str, encoding: Encoding | None
    ) -> None:
        self.layout = layout
        self.encoding: Any = encoding
        self.name = f"_{prefix}_rows"
        self.trace = {name: trace[name] for name in layout.shapes}
        # Those of the model, as they start.
        params = (site for site in trace.values() if site["type"] == "param")
        self.params = {site["name"]: site["value"] for site in params}

    def start(
        self,
        model: Callable[..., Any],
        inputs: Inputs,
        locs: dict[str, Array],
        start: Start,
        scale: float,
        search: bool,
        key: RandomKey,
    ) -> tuple[Start, Starts, np.ndarray]:
        """Return where the guide starts: in the global sites, and in the rows, with their control.

        Args:
            model: the model.
            inputs: its arguments.
            locs: where each unconstrained global site starts.
            start: the guide's start there, without a search.
            scale: its standard deviation.
            search: whether to search for a better one.
            key: random key.

        Raises:
            ValueError: if rows depend on each other, or if they cannot be told apart.
        """
        if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((start, inputs))):
            raise ValueError(TRACED)
        layout, pool = self.layout, self.encoding is not None
        rows = Rows(handlers.substitute(model, self.params), inputs, layout, locs)
        z = np.asarray(jnp.median(self.rows_at_start(), 0))
        rows.check(start.loc, jnp.asarray(z))
        follow = rows.follow(start.loc, jnp.asarray(z))
        if not (follow or pool):
            raise ValueError(UNKNOWN_ROWS.format(**layout._asdict()))
        sizes = layout.size, layout.taken
        found = None
        if search:
            points = _points(model, inputs, locs, start.loc, key)
            found = located(rows, points, z, scale, sizes, follow)
            if found is None:
                warn_of_search(NOTHING)
        if found is None:
            wide = np.full(len(z), scale)
            one = Starts.of_all(z, wide)
            flat = control(no_heights(layout.size, len(z), len(start.loc)))
            same = Starts.same(z, wide, layout.size, len(start.loc))
            return start, one if pool else same, flat
        loc, factor = (jnp.asarray(a, start.loc.dtype) for a in found[:2])
        if len(loc) <= DENSE:
            start = start.precondition(loc, factor)
        else:
            start = start.at(loc, jnp.linalg.norm(factor, axis=1))
        return start, *Starts.searched(rows, found, z, sizes, pool, follow)

    def rows_at_start(self) -> Float[Array, "n d"]:
        """Return the unconstrained rows of the run of the model."""
        points = {n: biject_to(s["fn"].support).inv(s["value"]) for n, s in self.trace.items()}
        return joined(self.layout, points)

    def like(self, size: int, key: RandomKey, inputs: Inputs, dtype: Any) -> LocalFlow:
        """Return a guide of the rows, for `size` global numbers, whose start is to be set."""
        key = jax.random.fold_in(key, size)
        width = self.layout.width
        zeros, ones = np.zeros(width), np.ones(width)
        flat = control(no_heights(self.layout.size, width, size))
        if self.encoding is None:
            starts = Starts.same(zeros, ones, self.layout.size, size)
            return as_dtype(LocalFlow(starts, flat, size, key=key), dtype)
        network, features = self.encoding.network, self.features(inputs)
        embedded = jax.eval_shape(network, features[0]).shape
        if len(embedded) != 1:
            raise ValueError(
                f"`encoder` makes an array of shape {embedded} of one row's features, expected a "
                "vector"
            )
        one = Starts.of_all(zeros, ones)
        local = LocalFlow(one, flat, size, embedded=embedded[0], encoder=network, key=key)
        return as_dtype(local, dtype)

    def draw(
        self,
        local: LocalFlow,
        white: Float[Array, " G"],
        model: Callable[..., Any],
        inputs: Inputs,
        plates: Mapping[str, Any],
        path: bool,
    ) -> dict[str, Array]:
        """Draw the local sites of the rows that the model takes, given the global numbers."""
        layout = self.layout
        size, taken = self.taken(model, inputs)
        own = plates.get(layout.plate)
        if own is None:
            own = numpyro.plate(layout.plate, size, taken, dim=layout.dim)
        plates = {**plates, layout.plate: own}
        with own as rows:
            features = self.features_of(rows, size, inputs)
            known = size == layout.size
            fn = LocalDistribution(local, white, rows, features, layout.dim, path, known)
            z = numpyro.sample(self.name, fn, infer={"is_auxiliary": True})
        z = z.reshape(*z.shape[: z.ndim + layout.dim - 1], len(rows), local.width)
        result = {}
        for name, point in split(layout, z).items():
            value, density = self._placed(name, point)
            with ExitStack() as stack:
                for frame in self.trace[name]["cond_indep_stack"]:
                    if frame.name not in plates:
                        plates[frame.name] = numpyro.plate(frame.name, frame.size, dim=frame.dim)
                    stack.enter_context(plates[frame.name])
                result[name] = numpyro.sample(name, density)
        return result

    def _placed(self, name: str, point: Array) -> tuple[Array, dist.Distribution]:
        fn = self.trace[name]["fn"]
        transform = biject_to(fn.support)
        value = transform(point)
        ladj = transform.log_abs_det_jacobian(point, value)
        batch = value.shape[: value.ndim - fn.event_dim]
        density = -ladj.reshape(*batch, -1).sum(-1)
        return value, dist.Delta(value, density, event_dim=fn.event_dim)

    def taken(self, model: Callable[..., Any], inputs: Inputs) -> tuple[int, int]:
        """Return the size of the plate in a run of the model, and how many rows it takes."""
        args, kwargs = inputs
        found = []

        def run() -> None:
            with handlers.block():
                trace = handlers.trace(handlers.seed(model, 0)).get_trace(*args, **kwargs)
            found.append(trace[self.layout.plate]["args"])

        try:
            jax.eval_shape(run)  # the sizes are no arrays
        except Exception:  # the model may need values
            run()
        size, part = found[-1]
        if self.encoding is None and size != self.layout.size:
            layout = self.layout
            raise ValueError(OTHER_SIZE.format(plate=layout.plate, found=size, size=layout.size))
        return size, size if part is None else part

    def features(self, inputs: Inputs) -> Any:
        """Return what the features are for these arguments."""
        found = self.encoding.features
        return found(*inputs[0], **inputs[1]) if callable(found) else found

    def features_of(self, rows: Array, size: int, inputs: Inputs) -> Array | None:
        """Return the features of these rows."""
        if self.encoding is None:
            return None
        features = jnp.asarray(self.features(inputs))
        return features[rows] if check_features(features.shape, len(rows), size) else features

    def rows(self, inputs: Inputs) -> Int[Array, " N"]:
        """Return the indices of all rows."""
        size = self.layout.size if self.encoding is None else len(self.features(inputs))
        return jnp.arange(size)

    def drawn(
        self,
        local: LocalFlow,
        white: Float[Array, "*shape G"],
        rows: Int[Array, " n"],
        inputs: Inputs,
        key: RandomKey,
    ) -> Float[Array, "*shape n d"]:
        """Draw unconstrained rows, given the global numbers."""
        features = self.features_of(rows, len(rows), inputs)
        return LocalDistribution(local, white, rows, features, -1).sample(key)

    def quantiles(
        self, local: LocalFlow, white: Float[Array, "draws G"], levels: Array
    ) -> dict[str, Array]:
        """Return quantiles of the local sites of all rows, some rows at a time."""
        if self.encoding is not None:
            return {}
        rows, step = jnp.arange(self.layout.size), max(NUMBERS // (len(white) * local.width), 1)
        found = []
        for k in range(0, len(rows), step):
            key = jax.random.fold_in(jax.random.key(1), k)
            z = self.drawn(local, white, rows[k : k + step], ((), {}), key)
            some = self.constrained(z).items()
            found.append({name: jnp.quantile(value, levels, axis=0) for name, value in some})
        axes = {n: self.layout.dim - s["fn"].event_dim for n, s in self.trace.items()}
        return {n: jnp.concatenate([part[n] for part in found], axes[n]) for n in axes}

    def constrained(self, z: Float[Array, "*batch n d"]) -> dict[str, Array]:
        """Return the local sites of unconstrained rows."""
        return {name: self._placed(name, x)[0] for name, x in split(self.layout, z).items()}


def _points(
    model: Callable[..., Any], inputs: Inputs, locs: dict[str, Array], loc: Array, key: RandomKey
) -> np.ndarray:
    """Return where the search may set out from."""
    uniform_key, *keys = jax.random.split(key, 1 + LARGE.prior)
    ends = np.cumsum([one.size for one in locs.values()])
    where = dict(zip(locs, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
    shape = (LARGE.starts - 2 - LARGE.prior, len(loc))
    uniform = jax.random.uniform(uniform_key, shape, loc.dtype, -2.0, 2.0)
    prior = drawn(model, where, jnp.stack(keys), *inputs[0], **inputs[1])
    prior = prior[jnp.isfinite(prior).all(1)]
    return np.concatenate([loc[None], jnp.zeros_like(loc)[None], uniform, prior])
