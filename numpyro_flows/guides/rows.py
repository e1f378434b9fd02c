"""The local sites of a model: its densities, row by row, of the rows that are taken."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float, Int
from numpyro import handlers
from numpyro.distributions import biject_to

from numpyro_flows.guides.model import Trace, bounds, is_latent, moving, placed, unblocked
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
        locs: dict[str, Array],
    ) -> None:
        self.model, self.inputs, self.layout, self.locs = model, inputs, layout, locs

    @functools.cached_property
    def _derived(self) -> Callable[..., Any]:
        def one(x: Array, z: Array, rows: Array) -> tuple[Array, ...]:
            def value(z: Array) -> tuple[Array, tuple[Array, Array]]:
                whole, each = self.log_parts(x, z, rows)
                return each.sum(), (whole, each)

            slope, change, parts = jax.linearize(jax.grad(value, has_aux=True), z, has_aux=True)
            eye = jnp.eye(z.shape[-1], dtype=z.dtype)
            ways = jnp.broadcast_to(eye[:, None], (len(eye), *z.shape))
            return *parts, slope, -jax.vmap(change, out_axes=-1)(ways)

        return jax.jit(jax.vmap(one))

    @functools.cached_property
    def _valued(self) -> Callable[..., Array]:
        return jax.jit(jax.vmap(lambda *at: self.log_parts(*at)[1]))

    def derive(self, x: np.ndarray, z: np.ndarray, rows: np.ndarray) -> Derived:
        """Return log-densities and derivatives, as `pyroflows_common.laplace` asks."""
        return Derived(*self._mapped(self._derived, x, z, rows))

    def values(self, x: np.ndarray, z: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the log-density of each row."""
        return self._mapped(lambda *at: (self._valued(*at),), x, z, rows)[0]

    def _mapped(
        self, function: Callable[..., Any], x: np.ndarray, z: np.ndarray, rows: np.ndarray
    ) -> list[np.ndarray]:
        """Map over blocks, as many at once as make one size, which is compiled once."""
        size = max(min(AT_ONCE // rows.shape[1], 64), 1)
        dtype = next(iter(self.locs.values())).dtype
        parts = []
        for start in range(0, len(x), size):
            index = np.arange(start, start + size).clip(max=len(x) - 1)
            taken = x[index].astype(dtype), z[index].astype(dtype), rows[index]
            parts.append(jax.device_get(function(*taken)))
        return [np.concatenate(part)[: len(x)] for part in zip(*parts, strict=True)]

    def log_parts(
        self, x: Float[Array, " G"], z: Float[Array, "n d"], rows: Int[Array, " n"]
    ) -> tuple[Float[Array, ""], Float[Array, " n"]]:
        """Return the log-density of the global sites, and that of each row.

        Those of the changes to unconstrained coordinates are in them. A row counts once.
        """
        layout, (args, kwargs) = self.layout, self.inputs
        points = {**self.spread(x), **split(layout, z)}

        def value(site: dict[str, Any]) -> Array | None:
            if site["type"] == "plate" and site["name"] == layout.plate:
                return rows
            if site["type"] == "sample" and site["name"] in points:
                return biject_to(site["fn"].support)(points[site["name"]])
            return None

        run = handlers.substitute(handlers.seed(self.model, 0), substitute_fn=value)
        with handlers.block():
            trace = handlers.trace(run).get_trace(*args, **kwargs)
        whole, each = jnp.zeros((), z.dtype), jnp.zeros(len(rows), z.dtype)
        share = layout.taken / layout.size
        for name, site in trace.items():
            if site["type"] != "sample":
                continue
            fn, inside = site["fn"], _plates(site).get(layout.plate)
            density = fn.log_prob(site["value"])
            if site["scale"] is not None:
                density = density * (site["scale"] if inside is None else site["scale"] * share)
            parts = [density]
            if name in points:
                ladj = biject_to(fn.support).log_abs_det_jacobian(points[name], site["value"])
                batch = site["value"].shape[: site["value"].ndim - fn.event_dim]
                parts.append(ladj.reshape(*batch, -1).sum(-1))
            for part in parts:
                if inside is None:
                    whole = whole + part.sum()
                else:
                    part = jnp.moveaxis(part, inside, -1)
                    each = each + part.reshape(-1, part.shape[-1]).sum(0)
        return whole, each

    def spread(self, x: Float[Array, " G"]) -> dict[str, Array]:
        """Return the unconstrained value of each global site."""
        ends = np.cumsum([loc.size for loc in self.locs.values()])[:-1]
        parts = jnp.split(x, ends)
        pairs = zip(self.locs.items(), parts, strict=True)
        return {name: part.reshape(loc.shape) for (name, loc), part in pairs}

    def check(self, x: Array, z: Array) -> None:
        """Check that rows are independent of each other, given the global sites.

        Raises:
            ValueError: if they are not.
        """
        rows = jnp.arange(self.layout.taken)
        z = z + jnp.linspace(-0.1, 0.1, len(rows))[:, None]  # no two rows alike

        @jax.jit
        def slopes(z: Array) -> list[Array]:
            (_, each), back = jax.vjp(lambda z: self.log_parts(x, z, rows), z)
            none = jnp.zeros_like(each)
            first, last = none.at[0].set(1.0), none.at[-1].set(1.0)
            seen = (1.0, none), (0.0, first), (0.0, last)
            found = [back((jnp.full((), whole, each.dtype), row))[0] for whole, row in seen]
            return [found[0], found[1].at[0].set(0.0), found[2].at[-1].set(0.0)]

        for reason, others in zip((OUTSIDE, NEIGHBOURS, NEIGHBOURS), slopes(z), strict=True):
            if (others != 0).any():
                raise ValueError(DEPENDENT.format(plate=self.layout.plate, reason=reason))

    def follow(self, x: Array, z: Array) -> bool:
        """Return whether the data follow the indices of the plate."""
        size, taken = self.layout.size, self.layout.taken
        if taken == size:
            return True
        starts = np.linspace(0, size - taken, WINDOWS).astype(int)
        rows = starts[:, None] + np.arange(taken)
        points = np.tile(x, (len(rows), 1)), np.broadcast_to(z, (*rows.shape, z.shape[-1]))
        found = self.values(*points, rows)
        return not all(np.array_equal(found[0], other, equal_nan=True) for other in found[1:])


def split(layout: Layout, z: Float[Array, "*batch n d"]) -> dict[str, Array]:
    """Return the unconstrained value of each local site, with the rows along its plate."""
    result = {}
    for name, columns in layout.columns.items():
        shape, axis = layout.shapes[name], layout.axes[name]
        value = z[..., columns].reshape(*z.shape[:-1], *shape)
        result[name] = jnp.moveaxis(value, -1 - len(shape), axis)
    return result


def joined(layout: Layout, points: dict[str, Array]) -> Float[Array, "n d"]:
    """Return the rows of unconstrained values: the inverse of `split`."""
    parts = [jnp.moveaxis(points[name], axis, 0) for name, axis in layout.axes.items()]
    return jnp.concatenate([part.reshape(len(part), -1) for part in parts], -1)


def layout_of_model(
    model: Callable[..., Any],
    init_loc_fn: Callable[..., Any],
    local: str | None,
    key: Array,
    *args: Any,
    **kwargs: Any,
) -> tuple[Layout | None, Trace]:
    """Return the local sites of a model, and the run of it that tells them.

    Raises:
        ValueError: if the local sites are not such as a guide can have.
    """

    def run() -> Trace:
        with handlers.block():
            started = handlers.substitute(handlers.seed(model, key), substitute_fn=init_loc_fn)
            return handlers.trace(started).get_trace(*args, **kwargs)

    found = []
    try:
        jax.eval_shape(lambda: found.append(_described(run())))  # shapes are enough
    except Exception:  # the model may need values
        try:
            found.append(_described(run()))
        except Exception:  # the host tells what is wrong
            return None, {}
    layout = layout_of(*found[-1], local)
    if layout is None:
        return None, {}
    trace = run()
    latent = {n: s for n, s in trace.items() if is_latent(s)}
    if any(s["fn"].support.is_discrete for s in latent.values()):
        raise ValueError(DISCRETE)
    if unblocked(model) is not model:
        raise ValueError(BLOCKED)
    points = {n: biject_to(s["fn"].support).inv(s["value"]) for n, s in latent.items()}
    moving(model, trace, points, *args, **kwargs)  # not by random choices
    ends = [{name: point + step for name, point in points.items()} for step in (0.0, 0.5)]
    here, there = (placed(model, end, 0, *args, **kwargs) for end in ends)
    for name in layout.shapes:
        for a, b in zip(bounds(here[name]), bounds(there[name]), strict=True):
            if not jnp.allclose(a, b, equal_nan=True):
                raise ValueError(foreign_support(name))
    more = split(layout, jnp.zeros((layout.taken + 1, layout.width)))
    for name, point in more.items():
        fn = trace[name]["fn"]
        if isinstance(fn, dist.MaskedDistribution):
            raise ValueError(MASKED.format(name=name))
        try:
            biject_to(fn.support)(point)
        except Exception:
            raise ValueError(SHAPED.format(name=name)) from None
    return layout, trace


def _described(trace: Trace) -> tuple[list[Site], dict[str, tuple[int, int]]]:
    """Return the continuous latent sites of a run, and the sizes of its plates."""
    sites = []
    for name, site in trace.items():
        if is_latent(site) and not site["fn"].support.is_discrete:
            shape = biject_to(site["fn"].support).inv(site["value"]).shape
            event_dim = site["fn"].event_dim + len(shape) - jnp.ndim(site["value"])
            sites.append(Site(name, shape, event_dim, _plates(site)))
    # Those inside of `scan` are no sites of their own: the host lets them take all rows.
    frames = (f for site in trace.values() for f in site.get("cond_indep_stack", ()))
    plates = {frame.name: (frame.size, frame.size) for frame in frames}
    sizes = {n: s["args"] for n, s in trace.items() if s["type"] == "plate"}
    plates |= {n: (size, size if part is None else part) for n, (size, part) in sizes.items()}
    return sites, plates


def _plates(site: dict[str, Any]) -> dict[str, int]:
    return {frame.name: frame.dim for frame in site["cond_indep_stack"]}
