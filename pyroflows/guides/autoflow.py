"""A guide of any flow: its start, its parameters and its posterior."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.distribution import FlowDistribution
from pyroflows.flows.monotone import monotone
from pyroflows.guides import store
from pyroflows.guides.groups import Encoding, Groups
from pyroflows.guides.model import (
    LogDensity,
    alone,
    latents,
    mapped,
    moving,
    placed,
    unconstrained,
    without,
)
from pyroflows.guides.path_gradient import PathDistribution
from pyroflows.guides.reference import GuideDistribution, Start
from pyroflows.guides.rows import layout_of_model
from pyroflows.guides.starts import Searched, new_start, searched
from pyroflows.layers.chain import Chain
from pyroflows.layers.elementwise import ActNorm
from pyroflows.layers.linear import LowerTriangular
from pyroflows.layers.tails import SinhArcsinh
from pyroflows.rng import seeded
from pyroflows.transform import TransformModule
from pyroflows_common.checks import Inputs, as_count
from pyroflows_common.guides import (
    DRAWS,
    NOTHING,
    check_built,
    check_function,
    check_options,
    warn_of_search,
)
from pyroflows_common.local import FORGOTTEN, LOCAL_MODES, NO_LOCAL, check_encoder
from pyroflows_common.search import DENSE, LARGE, SMALL, for_modes


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
    sampler has no such reference: hide the sites from it, by `poutine.block`.

    Sites inside of a plate that takes a subsample are local, as are those of the plate that `local`
    names; all others are global. The guide of a local site is a distribution of each of the plate's
    rows, given the global sites: see `LocalFlow` in `guides/local.py`. The search integrates the
    local sites out, row by row. The model has to index its data by the plate's indices, and the
    rows have to be independent of each other, given the global sites. There may be one such plate.
    What the rows that are taken differ from the others adds no noise to the bound, as far as it is
    linear in the global numbers. The hosts' `Predictive` does not hand the rows of a subsample to
    the model: let it take all rows there. `NeuTraReparam` transforms the global sites alone.

    Everything else is as in Pyro's own guides: SVI, `Predictive`, `NeuTraReparam` and so on.

    Args:
        model: a Pyro model with continuous latent variables.
        build: makes the flow, given D: any builder of this package, with arguments by
            `functools.partial`, or a custom function.
        init_loc_fn: where each site starts, one of Pyro's strategies; by default
            `init_to_median`.
        create_plates: makes the plates of subsampled data, as in Pyro's `AutoGuide`.
        init: `"search"`, or `"location"` to start at `init_loc_fn` with `init_scale`, as
            Pyro's own guides do.
        init_scale: standard deviation of every coordinate at the start, without a search or if it
            finds nothing better.
        degrees_of_freedom: those of the Student-t base; None for a normal base.
        path_gradient: whether the gradient of an evidence lower bound goes only through the
            samples ("sticking the landing"), each with limited weight. Switch it off for the
            importance weighted bounds of `RenyiELBO`, for which it is biased.
        local: name of a plate whose sites are local, although it takes all of its rows.
        encoder: a network from the features of rows, `(n, ...)`, to vectors. Then nothing is
            learned for each row, and new rows need no training.
        features: those of all rows, `(N, ...)`, or a function of the model's arguments that returns
            them, or those of the rows that are taken.
        seed: seed of the flow's first weights.
        name: name of the guide in Pyro's parameter store; by default the name of its class, or of
            its place in an `AutoGuideList`. A new guide goes on with parameters of this name that
            the store has loaded. From an earlier guide it takes the name, and starts anew.

    Raises:
        ValueError: if an argument is out of its range, or the model's local sites are not as
            described above; the message names it.

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

    _model: Any
    master: Any
    _pyro_name: Any
    prototype_trace: Any

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
        local: str | None = None,
        encoder: Callable[[Tensor], Tensor] | None = None,
        features: Any = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        check_function(build, "build", "a function of D that makes a flow", TransformModule)
        init_loc_fn = init_to_median if init_loc_fn is None else init_loc_fn
        check_function(init_loc_fn, "init_loc_fn", "one of Pyro's strategies", TransformModule)
        check_options(init, init_scale, degrees_of_freedom)
        check_encoder(local, encoder, features)
        super().__init__(model, init_loc_fn)
        self._pyro_name = name or self._pyro_name
        self.create_plates = create_plates
        self.init_loc_fn = init_loc_fn
        self.build = build
        self.init, self.init_scale = init, init_scale
        self.degrees_of_freedom = degrees_of_freedom
        self.path_gradient = path_gradient
        self.local = local
        # In a tuple, as it is registered with the guide of local sites alone.
        self._encoding = None if encoder is None else Encoding(encoder, features)
        self.seed = as_count(seed, "seed", 0)
        self.transform: Any = None
        self._start: Callable[[TransformModule], object] | None = None
        self._copied = False
        self._searched = 0  # gradients that the search for a start took
        # Sites whose supports depend on others, and the last arguments: the model tells them.
        self._moving: list[str] = []
        self._inputs: Inputs | None = None
        self._groups: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # Pyro takes the model out of pickles and copies, and out of the guide itself, too.
        model, master = self._model, self.master
        copied = "transform" in self._modules
        gone = {"init_loc_fn": None, "_inputs": None}
        state = {**super().__getstate__(), **gone, "_copied": copied}
        self._model, self.master = model, master
        return state

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        wrong = None
        try:
            try:
                self._find_sites(*args, **kwargs)
            except ValueError as error:  # out of range, maybe only at these draws of the prior
                wrong = error
                with alone():
                    self._find_sites(*args, **kwargs)
            self._moving = moving(self.model, self.prototype_trace, *args, **kwargs)
            self._inputs = (args, kwargs) if self._moving else None
            self.transform = self._made(wrong, *args, **kwargs)
        except BaseException:  # or Ctrl-C: the next call sets the guide up again
            self.prototype_trace = None
            raise

    def _find_sites(self, *args: Any, **kwargs: Any) -> None:
        """Find the local sites, and let the host find the others."""
        layout, trace = layout_of_model(self.model, self.local, *args, **kwargs)
        self._groups = None
        if layout is None:
            if self._encoding is not None:
                raise ValueError(NO_LOCAL)
            super()._setup_prototype(*args, **kwargs)
            return
        self._groups = Groups(layout, trace, self._encoding)
        model = self._model
        self._model = (poutine.block(self.model, hide=list(layout.shapes)),)
        try:
            super()._setup_prototype(*args, **kwargs)
        finally:
            self._model = model

    def _set_up(
        self, start: Callable[[TransformModule], object], *args: Any, **kwargs: Any
    ) -> None:
        """Set the guide up with a start that a function gives its flow, in place of a search."""
        self._start = start
        try:
            self._setup_prototype(*args, **kwargs)
        finally:
            self._start = None

    def _made(self, wrong: ValueError | None, *args: Any, **kwargs: Any) -> TransformModule:
        """Return a new flow and its start, which is searched for or taken from the store.

        Raises:
            ValueError: what was wrong with the model, unless there is a start.
        """
        size, loc = self.latent_dim, self._init_loc()
        with seeded(self.seed):
            flow = self.build(size) if size > 1 else monotone()
            check_built(flow, size)
            affine = LowerTriangular(size) if size <= DENSE else ActNorm(size)
            local = None if self._groups is None else self._groups.like(size, (args, kwargs))
        start = new_start(loc, self.init_scale)
        transform = Chain([Chain([SinhArcsinh(size, tails=False), flow, affine]), start])
        if local is not None:
            transform.rows = local  # of its state and parameters
        transform = transform.to(loc)
        stored = self._is_stored(transform)
        if self._start is not None and not stored:
            self._start(transform)
        found = stored or self._start is not None
        if not found and local is not None:
            options = start, self.init_scale, self.init == "search"
            found = self._groups.start(self.model, (args, kwargs), self._locs(), *options)
            local.begin(*found)
            found = True
        if not found and self.init == "search":
            result = self._search(start, None, *args, **kwargs)
            found = result is not None and result.best(start) is start
        if wrong is not None and not found:
            raise wrong
        if not stored:
            self._take_name(transform)
        return transform

    def _another(self, name: str) -> "AutoFlow":
        """Return a new guide with the options of this one."""
        other = type(self).__new__(type(self))
        AutoFlow.__init__(other, self.model, self.build, **self._options(), name=name)
        return other

    def _options(self) -> dict[str, Any]:
        names = ("init_loc_fn", "create_plates", "init", "init_scale", "degrees_of_freedom")
        return {name: getattr(self, name) for name in (*names, "path_gradient", "local", "seed")}

    def _locs(self) -> dict[str, Tensor]:
        """Return where each unconstrained global site starts."""
        return unconstrained(site for _, site in self.prototype_trace.iter_stochastic_nodes())

    def _modes(
        self, starts: int, *args: Any, **kwargs: Any
    ) -> tuple[list[Start], LogDensity | None]:
        """Return the start of a guide of each mode, the best mode first.

        The model's log-density comes with them, if the model can be followed.
        """
        if layout_of_model(self.model, self.local, *args, **kwargs)[0] is not None:
            raise ValueError(LOCAL_MODES)
        self._set_up(lambda _: None, *args, **kwargs)  # the search follows
        start = self._modules["transform"].layers[-1]
        found = self._search(start, starts, *args, **kwargs)
        begins = [start] if found is None else found.modes(start)
        return begins, None if found is None else found.log_density

    def _search(
        self, start: Start, starts: int | None, *args: Any, **kwargs: Any
    ) -> Searched | None:
        """Search for the Gaussians that fit the posterior best; None, with a warning, if it fails.

        With a number of starts, it is for several modes.
        """
        try:
            found = latents(self.model, self.init_loc_fn, *args, **kwargs)
            sites = self.prototype_trace.iter_stochastic_nodes()
            own = torch.cat([found.where[name] for name, _ in sites])
            budget = LARGE if found.batched else SMALL
            budget = budget if starts is None else for_modes(budget, starts)
            options = start.loc, self.init_scale, budget
            result = searched(self.model, (args, kwargs), found, own, *options)
            self._searched = 0 if result is None else result.gradients
        except Exception as error:  # the model may do anything outside of a Pyro run
            warn_of_search(f"cannot follow the model ({type(error).__name__}: {error})")
            return None
        if result is None:
            warn_of_search(NOTHING)
        return result

    def _is_stored(self, transform: TransformModule) -> bool:
        """Return whether Pyro's parameter store has loaded this guide, which needs no search."""
        name = self._pyro_name
        if pyro.settings.get("module_local_params") or not store.has_loaded(name, transform):
            return False
        warnings.warn(
            f"Pyro's parameter store has loaded a guide by the name of {name!r}: this one goes on "
            "with its parameters. For a new start give it another `name`, or call "
            "pyro.clear_param_store()",
            stacklevel=2,
        )
        return True

    def _take_name(self, transform: torch.nn.Module) -> None:
        """Take this guide's name in Pyro's parameter store from an earlier guide."""
        name = self._pyro_name
        if pyro.settings.get("module_local_params") or not store.has_made(name, transform):
            return
        warnings.warn(
            f"a new guide takes the name {name!r} in Pyro's parameter store from an earlier one, "
            "which moves to another name if it is used again: give guides that are used side by "
            "side a `name` each",
            stacklevel=2,
        )
        store.forget(name)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw each site, as in Pyro's guides."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        if self._groups is None:
            return self._drawn_global(*args, **kwargs)
        tracer = poutine.trace()
        with tracer:
            result = self._drawn_global(*args, **kwargs)
        latent = tracer.trace.nodes[f"_{self._pyro_name}_latent"]["value"]
        return {**result, **self._drawn_local(latent, *args, **kwargs)}

    def _drawn_local(self, latent: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the local sites, given the global numbers."""
        if self._model is None:
            raise RuntimeError(FORGOTTEN)
        transform = self.get_transform()
        white = transform.layers[-1].inv(latent)
        name, inputs = f"_{self._pyro_name}_rows", (args, kwargs)
        options = self.model, inputs, self.plates, self.path_gradient
        return self._groups.draw(name, transform.rows, white, *options)

    def _drawn_global(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if not self._moving:
            return super().forward(*args, **kwargs)
        self._inputs = args, kwargs
        values = self._followed(self.sample_latent(*args, **kwargs))
        plates, result = self._create_plates(*args, **kwargs), {}
        for name, (value, ladj) in values.items():
            event_dim = value.dim() - ladj.dim()
            with contextlib.ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                result[name] = pyro.sample(name, dist.Delta(value, -ladj, event_dim=event_dim))
        return result

    def _followed(self, latent: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each site in the support that it has at the sites before it, with its ladj."""
        if self._model is None or self._inputs is None:
            raise RuntimeError(
                f"the supports of {self._moving} depend on other sites, and a guide that is "
                "copied or saved forgets the model that tells them: make a new guide"
            )
        args, kwargs = self._inputs
        model = without(self.model, InitMessenger)

        def one(latent: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
            points = {site["name"]: point for site, point in self._unpack_latent(latent)}
            with poutine.block():
                trace = placed(model, points, *args, **kwargs)
            result = {}
            for name, point in points.items():
                fn, value = trace.nodes[name]["fn"], trace.nodes[name]["value"]
                ladj = biject_to(fn.support).log_abs_det_jacobian(point, value)
                batch = value.shape[: value.dim() - fn.event_dim]
                result[name] = value, ladj.reshape(*batch, -1).sum(-1)
            return result

        with seeded(0):  # sites that the guide does not draw
            if latent.dim() == 1:
                return one(latent)
            each = mapped(one, latent.reshape(-1, latent.shape[-1]), randomness="same")
        result, outer = {}, latent.shape[:-1]
        for name, (value, ladj) in each.items():
            inner, event_shape = ladj.shape[1:], value.shape[ladj.dim() :]
            batch = torch.broadcast_shapes(inner, outer)
            result[name] = value.reshape(batch + event_shape), ladj.reshape(batch)
        return result

    def get_base_dist(self) -> dist.Distribution:
        """Return the distribution of z: Student-t or normal."""
        zeros = torch.zeros_like(self._reference().loc)
        if self.degrees_of_freedom is None:
            return dist.Normal(zeros, 1.0).to_event(1)
        return dist.StudentT(self.degrees_of_freedom, zeros, 1.0).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> TransformModule:
        """Return the transform from z to the unconstrained latent numbers."""
        return self._registered()

    def _registered(self) -> Any:
        """Return the transform, whose parameters are those of the store while a handler is on."""
        if not self._pyro_context.active or pyro.settings.get("module_local_params"):
            return self.transform
        transform = self._modules["transform"]
        # A copy is separate from the original, and a guide from a newer one of the same name.
        if self._copied or store.has_made(self._pyro_name, transform):
            self._pyro_name, self._copied = store.free_name(self._pyro_name), False
        store.register(self._pyro_name, transform)
        return transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """Return the posterior of the unconstrained latent numbers."""
        kind: type[FlowDistribution] = FlowDistribution
        if self._pyro_context.active:
            kind = PathDistribution if self.path_gradient else GuideDistribution
        return self._posterior(kind)

    def _posterior(self, kind: type[FlowDistribution]) -> dist.TorchDistribution:
        return kind(self.get_base_dist(), [self.get_transform()])

    def _reference(self) -> Start:
        """Return the layer that tells of coordinates without a posterior."""
        return self._modules["transform"].layers[-1]

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each latent number, from 4096 draws that are always the same.

        Of local sites with an encoder there are none: they depend on the features.
        """
        return {name: draws[0] for name, draws in self.quantiles([0.5]).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each latent number, from 4096 draws that are always the same.

        Of local sites with an encoder there are none: they depend on the features.
        """
        posterior, groups = self._posterior(FlowDistribution), self._groups
        with seeded(0):
            draws = posterior.sample((DRAWS,))
            levels = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device)
            sites = self._constrained(draws)
            result = {name: torch.quantile(value, levels, dim=0) for name, value in sites.items()}
            if groups is not None:
                transform = self.get_transform()
                white = transform.layers[-1].inv(draws)
                result |= groups.quantiles(transform.rows, white, levels)
        return result

    def _constrained(self, draws: Tensor) -> dict[str, Tensor]:
        """Return the values of the sites, except for local ones, at unconstrained numbers."""
        # The dimensions of the plates lie between those of the draws and of the latent numbers.
        plates = max((-frame.dim for frame in self._prototype_frames.values()), default=0)
        count, draws = len(draws), draws[(slice(None), *[None] * plates)]
        if self._moving:
            values = {name: value for name, (value, _) in self._followed(draws).items()}
        else:
            sites = self._unpack_latent(draws)
            values = {site["name"]: biject_to(site["fn"].support)(x) for site, x in sites}
        shapes = {name: self.prototype_trace.nodes[name]["value"].shape for name in values}
        return {name: value.reshape(count, *shapes[name]) for name, value in values.items()}
