"""A guide of any flow: its start, its parameters and its posterior."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.tree_util import keystr, tree_leaves_with_path
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_median, init_to_uniform
from numpyro.infer.util import constrain_fn

from numpyro_flows.distribution import FlowDistribution
from numpyro_flows.flows.monotone import monotone
from numpyro_flows.guides.groups import Encoding, Groups
from numpyro_flows.guides.local import LocalFlow
from numpyro_flows.guides.model import (
    Latents,
    LogDensity,
    Trace,
    latents,
    moving,
    placed,
    subsampled,
    unblocked,
)
from numpyro_flows.guides.path_gradient import PathDistribution
from numpyro_flows.guides.reference import GuideDistribution, Start
from numpyro_flows.guides.rows import layout_of_model
from numpyro_flows.guides.starts import Searched, new_start, searched
from numpyro_flows.layers.chain import Chain
from numpyro_flows.layers.elementwise import ActNorm
from numpyro_flows.layers.linear import LowerTriangular
from numpyro_flows.layers.tails import SinhArcsinh
from numpyro_flows.rng import RandomKey, check_key
from numpyro_flows.transform import TransformModule
from numpyro_flows.tree import replace
from pyroflows_common.guides import (
    DRAWS,
    PARTIAL,
    check_built,
    check_function,
    check_options,
    warn_of_search,
)
from pyroflows_common.local import LOCAL_MODES, NO_LOCAL, check_encoder
from pyroflows_common.search import DENSE, LARGE, Budget, for_modes

Params = Mapping[str, Any]


class AutoFlow(AutoContinuous):
    r"""A guide whose posterior is a custom flow over all latent variables.

    The posterior of the D latent numbers, in their unconstrained space, is the distribution of

    $$x = m + L (b + A \cdot \mathrm{flow}(t(z)))$$

    for z from a Student-t distribution. A search for the Gaussian that fits best finds location m
    and scale L when the guide is set up. They stay fixed, so that one learning rate suits every
    model, whatever its units. Shift b, lower-triangular A and the skewness of each coordinate,
    which a `SinhArcsinh` t gives it, are learned with the flow, from 0 and the identity. In more
    than 256 dimensions L is diagonal plus low-rank, and A is diagonal. A flow needs at least two
    coordinates: the guide of a single latent number learns a monotone function instead.

    The search sets out from the model's own start, the origin, random points around it and draws of
    the prior. It warns if it finds separate modes that each hold a part of the posterior, because
    the guide starts at one of them.

    The support of a site may depend on other sites of the guide: it is that of the model at their
    values.

    Some latent numbers may have no posterior, because the model does not depend on them: a site
    under a mask, or the observed entries of a site with `obs_mask`. The search finds them at the
    first call, whose masks count from then on. The guide's density is relative to a standard
    normal there: the bound is that of the model without them, and their draws mean nothing. A
    sampler has no such reference: hide the sites from it, by `handlers.block`.

    Sites inside of a plate that takes a subsample are local, as are those of the plate that `local`
    names; all others are global. The guide of a local site is a distribution of each of the plate's
    rows, given the global sites: see `LocalFlow` in `guides/local.py`. The search integrates the
    local sites out, row by row. The model has to index its data by the plate's indices, and the
    rows have to be independent of each other, given the global sites. There may be one such plate.
    What the rows that are taken differ from the others adds no noise to the bound, as far as it is
    linear in the global numbers. The hosts' `Predictive` does not hand the rows of a subsample to
    the model: let it take all rows there. `NeuTraReparam` transforms the global sites alone.

    Everything else is as in NumPyro's own guides: SVI, `Predictive`, `NeuTraReparam` and so on.
    Each parameter is an array with a name of its own: `auto_start` holds m and L, and what is
    learned is named by its place in `get_transform(params).layers[0]`, such as
    `auto_flow.layers[2].loc` for b.

    Args:
        model: a NumPyro model with continuous latent variables.
        build: makes the flow, given D and a `key`: any builder of this package, with arguments by
            `functools.partial`, or a custom function.
        prefix: beginning of the names of the guide's sites and parameters.
        init_loc_fn: where each site starts, one of NumPyro's strategies; by default
            `init_to_uniform`, or `init_to_median` or zero if that finds no finite density.
        create_plates: makes the plates of subsampled data, as in NumPyro's `AutoGuide`.
        init: `"search"`, or `"location"` to start at `init_loc_fn` with `init_scale`, as
            NumPyro's own guides do.
        init_scale: standard deviation of every coordinate at the start, without a search or if it
            finds nothing better.
        degrees_of_freedom: those of the Student-t base; None for a normal base.
        path_gradient: whether the gradient of an evidence lower bound goes only through the
            samples ("sticking the landing"), each with limited weight. Switch it off for the
            importance weighted bounds of `RenyiELBO`, for which it is biased, and for
            forward-mode differentiation.
        local: name of a plate whose sites are local, although it takes all of its rows.
        encoder: a network from the features of a row to a vector. Then nothing is learned for
            each row, and new rows need no training.
        features: those of all rows, `(N, ...)`, or a function of the model's arguments that returns
            them, or those of the rows that are taken.
        key: random key of the flow's first weights; by default always the same one.

    Raises:
        ValueError: if an argument is out of its range, or the model's local sites are not as
            described above; the message names it.

    References:
        Roeder, Wu and Duvenaud, "Sticking the landing" (arXiv:1703.09194); Agrawal, Sheldon and
        Domke, "Advances in black-box VI" (arXiv:2006.10343).

    Examples:
        >>> import functools, jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro_flows import AutoFlow, nice
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(5.0, 0.1).expand([2]).to_event(1))
        >>> guide = AutoFlow(model, functools.partial(nice, layers=2))
        >>> svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(num_particles=4))
        >>> params = svi.run(jax.random.key(0), 10, progress_bar=False).params
        >>> guide.sample_posterior(jax.random.key(1), params, sample_shape=(3,))["x"].shape
        (3, 2)
    """

    init_loc_fn: Any
    model: Any
    prototype_trace: Any

    def __init__(
        self,
        model: Callable[..., Any],
        build: Callable[..., TransformModule],
        *,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
        init: str = "search",
        init_scale: float = 0.1,
        degrees_of_freedom: float | None = 20.0,
        path_gradient: bool = True,
        local: str | None = None,
        encoder: Callable[[Array], Array] | None = None,
        features: Any = None,
        key: RandomKey | None = None,
    ) -> None:
        expected = "a function of D and a key that makes a flow"
        check_function(build, "build", expected, TransformModule)
        init_loc_fn = init_to_uniform if init_loc_fn is None else init_loc_fn
        expected = "one of NumPyro's strategies"
        check_function(init_loc_fn, "init_loc_fn", expected, TransformModule)
        check_options(init, init_scale, degrees_of_freedom)
        check_encoder(local, encoder, features)
        key = jax.random.key(0) if key is None else key
        check_key(key)
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn, create_plates=create_plates)
        self.build = build
        self.init, self.init_scale = init, init_scale
        self.degrees_of_freedom = degrees_of_freedom
        self.path_gradient = path_gradient
        self.local, self.encoder, self.features = local, encoder, features
        self.key = key
        self._inputs: Any = None
        self._searched = 0  # gradients that the search for a start took
        self._groups: Any = None  # those of local sites, and their guide
        self._local: Any = None

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._find_groups(*args, **kwargs)
        try:
            self._set_up(*args, **kwargs)
        except (RuntimeError, ValueError) as error:  # no finite density, or out of range
            self._set_up_elsewhere(error, *args, **kwargs)
        self._follow(*args, **kwargs)
        size, dtype = self.latent_dim, self._init_latent.dtype
        # Not traced, because the guide keeps the arrays that are not parameters.
        with jax.ensure_compile_time_eval():
            flow = self.build(size, key=self.key) if size > 1 else monotone()
            check_built(flow, size)
            affine = LowerTriangular(size) if size <= DENSE else ActNorm(size)
            inner = Chain([SinhArcsinh(size, tails=False), flow, affine])
            self._flow = Chain([inner, new_start(size)]).astype(dtype)
            if self._groups is not None:
                self._local = self._groups.like(size, self.key, (args, kwargs), dtype)

    def _find_groups(self, *args: Any, **kwargs: Any) -> None:
        """Find the local sites, which the rest of the guide does not see."""
        options = self.init_loc_fn, self.local, self.key
        layout, trace = layout_of_model(self.model, *options, *args, **kwargs)
        self._groups = self._local = None
        if layout is not None:
            encoding = None if self.encoder is None else Encoding(self.encoder, self.features)
            self._groups = Groups(layout, trace, self.prefix, encoding)
        elif self.encoder is not None:
            raise ValueError(NO_LOCAL)

    @contextlib.contextmanager
    def _global(self) -> Iterator[None]:
        """Hide the local sites from the host."""
        model = self.model
        if self._groups is not None:
            self.model = handlers.block(model, hide=list(self._groups.trace))
        try:
            yield
        finally:
            self.model = model

    def _set_up(self, *args: Any, **kwargs: Any) -> None:
        with self._global():
            try:
                super()._setup_prototype(*args, **kwargs)
            except KeyError:  # NumPyro misses the sizes of plates inside of `scan`
                for name, frame in self._prototype_frames.items():
                    self._prototype_frame_full_sizes.setdefault(name, frame.size)
                super()._setup_prototype(*args, **kwargs)

    def _set_up_elsewhere(self, error: Exception, *args: Any, **kwargs: Any) -> None:
        """Set the guide up at a point where the model can be evaluated.

        On the way there the model's parameters may be out of their range.
        """
        own = self.init_loc_fn
        strategies = [own] if isinstance(error, ValueError) else []
        if own is init_to_uniform:
            strategies += [init_to_median, init_to_uniform(radius=0.0)]
        with numpyro.validation_enabled(False):
            for strategy in strategies:
                self.init_loc_fn = strategy
                try:
                    self._set_up(*args, **kwargs)
                    own = strategy  # keep this one
                    return
                except (RuntimeError, ValueError):
                    continue
                finally:
                    self.init_loc_fn = own
        raise error

    def _follow(self, *args: Any, **kwargs: Any) -> None:
        """Find the sites whose supports depend on others: the host would keep them as they are."""
        trace, locs = self.prototype_trace, self._init_locs
        self._moving = moving(self.model, trace, locs, *args, **kwargs)
        if self._moving:
            constrain = functools.partial(constrain_fn, self.model, args, kwargs)
            self._postprocess_fn = handlers.seed(
                functools.partial(constrain, return_deterministic=True), rng_seed=0
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw each site, as in NumPyro's guides."""
        self._inputs = args, kwargs  # the start of new parameters needs them
        new = self.prototype_trace is None
        try:
            if new:
                self._setup_prototype(*args, **kwargs)
            if self._groups is None:
                return self._drawn_global(*args, **kwargs)
            with handlers.trace() as trace:
                result = self._drawn_global(*args, **kwargs)
            return result | self._drawn_local(trace)
        except BaseException:  # or Ctrl-C: the next call sets the guide up again
            if new:
                self.prototype_trace = None
            raise
        finally:
            self._inputs = None

    def _drawn_global(self, *args: Any, **kwargs: Any) -> Any:
        return self._drawn() if self._moving else super().__call__(*args, **kwargs)

    def _drawn_local(self, trace: Trace) -> dict[str, Array]:
        """Draw the local sites, given a run of the guide that has drawn the global ones."""
        params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
        flow, local = handlers.substitute(self._modules, params)()
        white = flow.layers[-1].inv(trace[f"_{self.prefix}_latent"]["value"])
        plates = self._create_plates(*self._inputs[0], **self._inputs[1])
        options = plates, self.path_gradient
        return self._groups.draw(local, white, self.model, self._inputs, *options)

    def _drawn(self) -> dict[str, Array]:
        """Draw each site in the support that it has at the sites before it."""
        args, kwargs = self._inputs
        points = self._unpack_latent(self._sample_latent())
        trace = placed(self.model, points, 0, *args, **kwargs)
        result = {}
        for name, point in points.items():
            fn, value = trace[name]["fn"], trace[name]["value"]
            ladj = biject_to(fn.support).log_abs_det_jacobian(point, value)
            batch = value.shape[: value.ndim - fn.event_dim]
            density = dist.Delta(value, -ladj.reshape(*batch, -1).sum(-1), event_dim=fn.event_dim)
            result[name] = numpyro.sample(name, density)
        return result

    def _start(self, key: RandomKey) -> dict[str, Array]:
        """Return the parameters of a new guide."""
        inner, preconditioner = self._flow.layers
        start = preconditioner.at(self._init_latent, self.init_scale)
        if self._groups is not None:
            return self._started_with_rows(inner, start, key)
        if self.init == "search":
            found = self._search(start, LARGE, key)
            start = start if found is None else found.best(start)
        return self._named(inner, start)

    def _started_with_rows(
        self, inner: TransformModule, start: Start, key: RandomKey
    ) -> dict[str, Array]:
        locs = {name: jnp.asarray(loc) for name, loc in self._init_locs.items()}  # in order
        options = self.init_scale, self.init == "search", key
        start, *rows = self._groups.start(self.model, self._inputs, locs, start, *options)
        packed, control = rows[0].packed(), rows[1]
        dtype = self._local.start.dtype
        state = {"start": jnp.asarray(packed, dtype), "control": jnp.asarray(control, dtype)}
        return self._named(inner, start, replace(self._local, **state))

    def _named(
        self, inner: TransformModule, start: Start, local: LocalFlow | None = None
    ) -> dict[str, Array]:
        """Return parameters by name.

        They are arrays, because NumPyro's `scan` takes the shape of each value in a guide's trace.
        The start ends in its unit, which `_transform` explains.
        """
        fixed, _ = ravel_pytree((start, jnp.ones((), start.loc.dtype)))
        learned = tree_leaves_with_path(eqx.filter(inner, eqx.is_inexact_array))
        named = {f"{self.prefix}_flow{keystr(path)}": leaf for path, leaf in learned}
        rows = tree_leaves_with_path(eqx.filter(local, eqx.is_inexact_array))
        named |= {f"{self.prefix}_rows{keystr(path)}": leaf for path, leaf in rows}
        return {f"{self.prefix}_start": fixed, **named}

    def _modes(
        self, starts: int, key: RandomKey, *args: Any, **kwargs: Any
    ) -> tuple[list[dict[str, Array]], LogDensity]:
        """Return the parameters at the start of a guide of each mode, and the log-density."""
        set_up_key, key = jax.random.split(key)
        if self.prototype_trace is None:
            with handlers.block(), handlers.seed(rng_seed=set_up_key):
                self._setup_prototype(*args, **kwargs)
        if self._groups is not None:
            raise ValueError(LOCAL_MODES)
        self._inputs = args, kwargs
        try:
            inner, preconditioner = self._flow.layers
            start = preconditioner.at(self._init_latent, self.init_scale)
            found = self._search(start, for_modes(LARGE, starts), key)
        finally:
            self._inputs = None
        if found is None:  # sites that are hidden from the guide have no continuous coordinates
            raise ValueError(PARTIAL)
        return [self._named(inner, begin) for begin in found.modes(start)], found.log_density

    def _search(self, start: Start, budget: Budget, key: RandomKey) -> Searched | None:
        """Search for the Gaussians that fit the posterior best, if the model can be followed."""
        key, search_key = jax.random.split(key)
        latents = self._latents(key)
        if latents is None:
            return None
        own = np.concatenate([latents.where[name] for name in self._init_locs])
        loc, scale = start.loc, self.init_scale
        options = own, loc, scale, budget, search_key
        result = searched(self.model, self._inputs, latents, *options)
        if not isinstance(result.gradients, jax.core.Tracer):
            self._searched = int(result.gradients)
        return result

    def _latents(self, key: RandomKey) -> Latents | None:
        args, kwargs = self._inputs
        if unblocked(self.model) is self.model:  # the host has found all of it already
            locs = jax.tree.map(jnp.asarray, self._init_locs)
            potential = self._potential_fn_gen(*args, **kwargs)
            return Latents(locs, potential, subsampled(self.prototype_trace))
        try:
            return latents(key, self.model, self.init_loc_fn, *args, **kwargs)
        except Exception as error:  # the model may do anything outside of a NumPyro run
            warn_of_search(f"cannot follow the model ({type(error).__name__}: {error})")
            return None

    def _transform(self) -> TransformModule:
        return self._modules()[0]

    def _modules(self) -> tuple[TransformModule, LocalFlow | None]:
        """Return the flow, and the guide of local sites."""
        inner, preconditioner = self._flow.layers
        fixed, *learned = self._params(self._named(inner, preconditioner, self._local))
        arrays, rest = eqx.partition((inner, self._local), eqx.is_inexact_array)
        learned = jax.tree.unflatten(jax.tree.structure(arrays), learned)
        inner, local = eqx.combine(learned, rest)
        start, unit = ravel_pytree((preconditioner, jnp.ones(())))[1](fixed)
        # The fixed start is a parameter, too: NumPyro keeps only parameters with the results of
        # SVI. It has no gradient, but decoupled weight decay shrinks it. The unit, which starts at
        # one, is a part of the same array, so that every optimizer shrinks it by the same factor,
        # and the division by it undoes the decay.
        return Chain([inner, jax.tree.map(lambda leaf: leaf / unit, start)]), local

    def _params(self, like: dict[str, Array]) -> list[Array]:
        """Return the parameters of the guide, or start them."""
        given = {name: numpyro.param(name) for name in like}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(like) and self._inputs is not None:
            start = self._start(numpyro.prng_key())
            return [numpyro.param(name, value) for name, value in start.items()]
        if missing:
            raise ValueError(
                f"`params` has no {missing}: expected all parameters of the guide, such as "
                "svi_result.params"
            )
        for name, value in given.items():
            shape, expected = jnp.shape(value), like[name].shape
            if shape != expected:
                raise ValueError(
                    f"`params` has {name!r} of shape {shape}, but in this guide it has shape "
                    f"{expected}"
                )
        return [jnp.asarray(value) for value in given.values()]  # of NumPy, if read from a file

    def _get_posterior(self) -> FlowDistribution:
        kind = PathDistribution if self.path_gradient else GuideDistribution
        return kind(self.get_base_dist(), [self._transform()])

    def get_base_dist(self) -> dist.Distribution:
        """Return the distribution of z: Student-t or normal."""
        zeros = jnp.zeros_like(self._flow.layers[-1].loc)
        if self.degrees_of_freedom is None:
            return dist.Normal(zeros, 1.0).to_event(1)
        return dist.StudentT(self.degrees_of_freedom, zeros, 1.0).to_event(1)

    def get_transform(self, params: Params) -> TransformModule:
        """Return the transform from z to the unconstrained latent numbers at these parameters."""
        return handlers.substitute(self._transform, params)()

    def get_posterior(self, params: Params) -> FlowDistribution:
        """Return the posterior of the unconstrained latent numbers at these parameters."""
        return FlowDistribution(self.get_base_dist(), [self.get_transform(params)])

    def _reference(self, params: Params) -> Start:
        """Return the layer that tells of coordinates without a posterior."""
        return self.get_transform(params).layers[-1]

    def _constrained(self, latent: Array, params: Params) -> dict[str, Array]:
        """Return the global sites at unconstrained latent numbers."""
        values = self._unpack_and_constrain(latent, params)
        return {name: values[name] for name in self._init_locs}

    def sample_posterior(
        self,
        rng_key: RandomKey,
        params: Params,
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Draw from the posterior.

        Without local sites, the deterministic sites of the model come with the latent ones. With
        them, the draws are those of all rows.

        Args:
            rng_key: random key.
            params: parameters of the guide.
            *args: arguments of the model, for the features of an encoder.
            sample_shape: shape of the draws.
            **kwargs: the same, by name.
        """
        if self._groups is None:
            return super().sample_posterior(rng_key, params, sample_shape=sample_shape)
        key, row_key = jax.random.split(rng_key)
        x, white, local = self._drawn_at(key, params, sample_shape)
        rows = self._groups.rows((args, kwargs))
        z = self._groups.drawn(local, white, rows, (args, kwargs), row_key)
        return {**self._constrained(x, params), **self._groups.constrained(z)}

    def _drawn_at(
        self, key: RandomKey, params: Params, shape: tuple[int, ...]
    ) -> tuple[Array, Array, LocalFlow]:
        """Draw the global numbers, and return them as they are and whitened."""
        flow, local = handlers.substitute(self._modules, params)()
        x = flow(self.get_base_dist().sample(key, shape))
        return x, flow.layers[-1].inv(x), local

    def median(self, params: Params) -> dict[str, Array]:
        """Return the median of each latent number, from 4096 draws that are always the same.

        Of local sites with an encoder there are none: they depend on the features.
        """
        return {name: draws[0] for name, draws in self.quantiles(params, [0.5]).items()}

    def quantiles(self, params: Params, quantiles: Sequence[float]) -> dict[str, Array]:
        """Return quantiles of each latent number, from 4096 draws that are always the same.

        Of local sites with an encoder there are none: they depend on the features.
        """
        key, levels = jax.random.key(0), jnp.asarray(quantiles)
        if self._groups is None:
            draws = self.sample_posterior(key, params, sample_shape=(DRAWS,))
            return {name: jnp.quantile(values, levels, axis=0) for name, values in draws.items()}
        x, white, local = self._drawn_at(key, params, (DRAWS,))
        draws = self._constrained(x, params)
        found = {name: jnp.quantile(values, levels, axis=0) for name, values in draws.items()}
        return found | self._groups.quantiles(local, white, levels)
