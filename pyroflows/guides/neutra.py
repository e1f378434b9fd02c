"""`sample_neutra`: NUTS in the coordinates of a guide's flow."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.draws import has_rows
from pyroflows.guides.fit import GuideFitResult, fit_guide
from pyroflows.guides.mixture import AutoFlowMixture
from pyroflows.guides.model import (
    Latents,
    Screened,
    alone,
    latent_sites,
    latents,
    mapped,
    model_of,
    placed,
    unconstrained,
    without,
)
from pyroflows.rng import seeded
from pyroflows_common.arviz import ArviZ
from pyroflows_common.checks import Inputs, as_count, as_inputs
from pyroflows_common.local import LOCAL_NEUTRA
from pyroflows_common.neutra import (
    RATE,
    SHALLOW,
    Gradients,
    Sampled,
    Stage,
    as_target,
    check_complete,
    check_sampled,
    joined,
    plan,
    quality,
    warn_of_draws,
)

Chains = dict[str, np.ndarray]  # (chains, draws, *shape) by site
Potential = Callable[[dict[str, Tensor]], Tensor]
# Largest relative difference of a compiled log-density from that of the model.
CLOSE = 1e-3


@dataclasses.dataclass(repr=False)
class NeuTraResult(Sampled):
    """The result of `sample_neutra`.

    Args:
        samples: the model's latent and deterministic sites, `(chains, draws, *shape)`.
        gradients: how many gradients of the model's log-density the parts of the run took:
            `search`, `training`, `warmup` and `sampling`, and their `total`.
        diverging: `(chains, draws)`, whether the trajectory to each draw diverged.
        ess: least bulk effective sample size over all latent numbers.
        rhat: highest R-hat over all latent numbers.
        guide: the guide.

    `divergences` counts those of all draws, `ess_per_1000` is the effective sample size for 1000
    gradients of all parts, and `to_arviz()` hands the draws to ArviZ.
    """

    guide: Any


def sample_neutra(
    guide: Any,
    model: Callable[..., Any] | None = None,
    *,
    fitted: GuideFitResult | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    steps: int = 300,
    warmup: int = 600,
    draws: int = 1000,
    chains: int = 4,
    target_accept_prob: float = 0.8,
    progress: bool = True,
    seed: int = 0,
) -> NeuTraResult:
    r"""Draw from a model's posterior by NUTS in the coordinates of a guide's flow (NeuTra).

    NUTS samples the posterior of the flow's base variable,

    $$\log \tilde\pi(z) = \log p(x, \theta(z)) + \log|\det d\theta/dz|,$$

    and the flow carries the draws to the model's sites. Where the flow fits, that is nearly a
    standard normal distribution, whatever the posterior's shape.

    The guide learns during the warm-up, from draws of the chains and the slopes there (`fit_guide`
    with `draws` and `slopes`). A sixth of the warm-up is plain NUTS in shallow trees, with which
    the guide is trained; in a quarter and in five twelfths NUTS moves in the guide's coordinates,
    and the guide is trained again after each. The last sixth, or 100 steps if that is more, adapts
    the step size. The mass matrix is the identity: one of a hundred draws would be worse. No bound
    is climbed, and no start is searched for. With `fitted`, such as the result of
    `fit_guide(guide)`, nothing is learned, and the warm-up is that last part.

    Args:
        guide: an `AutoFlow` of all latent sites of the model, such as `AutoRealNVP`.
        model: the model, with its data as observed sites. Default: the model of the guide.
        fitted: the result of `fit_guide` for this guide; None to train it here.
        args: positional arguments of the model.
        kwargs: its keyword arguments.
        steps: number of steps of each training.
        warmup: number of steps of each chain before the draws, at least 60, and 160 of all chains.
        draws: number of draws of each chain, at least 8.
        chains: number of chains, which run one after the other.
        target_accept_prob: that of NUTS.
        progress: whether to show bars of the training.
        seed: seed of all random numbers; the global ones are left alone.

    Returns:
        The draws, how far they can be trusted, and what they took. Warnings tell of divergences,
        of chains that disagree and of too few effective draws.

    Raises:
        ValueError: if an argument is out of its range, if `fitted` is of another guide, if the
            guide has local sites or is a mixture, or if it leaves latent sites of the model out.
        TypeError: if `guide`, `fitted`, `model` or `args` has the wrong type.
        ImportError: if ArviZ is not installed.

    References:
        Hoffman, Sountsov, Dillon, Langmore, Tran and Vasudevan, "NeuTra-lizing bad geometry in
        Hamiltonian Monte Carlo using neural transport" (arXiv:1903.03704); Seyboldt, Carlson and
        Carpenter, "If only my posterior were normal" (arXiv:2603.18845), for slopes.

    Examples:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroflows import AutoRealNVP, sample_neutra
        >>> def model():
        ...     pyro.sample("x", dist.Normal(5.0, 0.1).expand([2]).to_event(1))
        >>> pyro.clear_param_store()
        >>> guide = AutoRealNVP(model, layers=2)
        >>> options = {"warmup": 160, "draws": 800, "chains": 1, "progress": False}
        >>> result = sample_neutra(guide, steps=30, **options)
        >>> result.samples["x"].shape
        (1, 800, 2)
        >>> result.divergences
        0
    """
    arviz = ArviZ("sample_neutra")
    check_sampled(guide, AutoFlow, AutoFlowMixture, fitted, GuideFitResult)
    target = as_target(target_accept_prob)
    seen, inputs = model_of(guide, model, "guide"), as_inputs(args, kwargs)
    model = Screened()(without(seen, BlockMessenger))
    steps, lengths = as_count(steps, "steps"), plan(warmup, draws, chains, fitted is not None)
    seed = as_count(seed, "seed", 0)
    with alone():
        own = latent_sites(poutine.trace(seen).get_trace(*inputs[0], **inputs[1]))
        sites = latent_sites(poutine.trace(model).get_trace(*inputs[0], **inputs[1]))
    discrete = {name for name, site in sites.items() if site["fn"].support.is_discrete}
    check_complete(sorted(discrete | (set(sites) - set(own))))
    if has_rows(guide, inputs):
        raise ValueError(LOCAL_NEUTRA)
    with seeded(seed):
        chain = _Sampler(guide, model, inputs, chains, target)
        training = warmed = 0
        kept: list[Chains] = []
        for number, stage in enumerate(lengths.stages):
            found, _, before, after = chain.run(stage, plain=not kept, max_tree_depth=SHALLOW)
            warmed += before + after
            kept.append({name: value for name, value in found.items() if name in sites})
            learned = fit_guide(
                guide,
                seen,
                draws=joined(kept),
                slopes=True,
                args=args,
                kwargs=kwargs,
                steps=steps,
                learning_rate=RATE,
                progress=progress,
                seed=seed + number,
            )
            training += learned.gradients
        samples, diverging, before, after = chain.run(Stage(lengths.warmup, draws))
    searched = 0
    if fitted is not None:
        training, searched = fitted.gradients, guide._searched
    gradients = Gradients(searched, training, warmed + before, after)
    ess, rhat = quality({name: samples[name] for name in sites}, arviz)
    result = NeuTraResult(samples, gradients, diverging, ess, rhat, guide)
    warn_of_draws(result)
    return result


class _Sampler:
    """Chains of a model, as it is or in the coordinates of a guide."""

    def __init__(
        self,
        guide: AutoFlow,
        model: Callable[..., Any],
        inputs: Inputs,
        chains: int,
        target: float,
    ) -> None:
        self.guide, self.model, self.inputs = guide, model, inputs
        self.chains, self.target = chains, target
        args, kwargs = inputs
        self.latents: Latents = latents(model, guide.init_loc_fn, *args, **kwargs)
        with alone():
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        points = unconstrained(latent_sites(trace).values())
        self.shapes = {name: point.shape for name, point in points.items()}

    def run(
        self, stage: Stage, plain: bool = False, **options: Any
    ) -> tuple[Chains, np.ndarray, int, int]:
        """Return draws, whether each diverged, and the gradients of the warm-up and of the draws.

        The chains start at draws of the base.
        """
        found, diverging, counts = [], [], np.zeros(2, int)
        with _still(self.guide), alone():
            for _ in range(self.chains):
                points, diverged, taken = self._chain(stage, plain, options)
                found.append(self._values(points))
                diverging.append(diverged)
                counts += taken
        drawn = {name: np.stack([chain[name] for chain in found]) for name in found[0]}
        return drawn, np.stack(diverging), int(counts[0]), int(counts[1])

    def _chain(
        self, stage: Stage, plain: bool, options: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Return one chain's draws in the model's unconstrained coordinates."""
        if plain:
            potential: Potential = self._plain
            name, start = "latent", self._begin()
        else:
            name, potential = self._pulled_back()
            start = self.guide.get_base_dist().sample()
            options = {**options, "adapt_mass_matrix": False}
        calls, at = 0, [0, 0]

        def counted(points: dict[str, Tensor]) -> Tensor:
            nonlocal calls
            calls += 1
            return potential(points)

        def note(kernel: Any, samples: Any, when: str, i: int) -> None:
            at[not when.startswith("Warmup")] = calls

        mcmc = MCMC(
            NUTS(potential_fn=counted, target_accept_prob=self.target, **options),
            num_samples=stage.kept,
            warmup_steps=stage.lost,
            initial_params={name: start},
            hook_fn=note,
            disable_progbar=True,
        )
        mcmc.run()
        draws = mcmc.get_samples()[name].detach()
        diverging = np.zeros(stage.kept, bool)
        diverging[mcmc.diagnostics()["divergences"]["chain 0"]] = True
        if not plain:
            with torch.no_grad():
                x = self.guide.get_transform()(draws)
                sites = self.guide.prototype_trace.iter_stochastic_nodes()
                own = torch.cat([self.latents.where[name] for name, _ in sites])
                draws = x[:, own.argsort()]
        return draws, diverging, np.array([at[0], at[1] - at[0]])

    def _begin(self) -> Tensor:
        """Return a point near the model's own start where its log-density is finite."""
        loc = self.latents.loc
        for spread in (2.0, 2.0, 1.0, 1.0, 0.5, 0.1):
            point = spread * (2.0 * torch.rand_like(loc) - 1.0)
            if self.latents.log_density(point[None]).isfinite().all():
                return point
        return loc.clone()

    def _plain(self, points: dict[str, Tensor]) -> Tensor:
        """Return the potential of the model's unconstrained coordinates."""
        return -self.latents.log_density(points["latent"][None])[0]

    def _pulled_back(self) -> tuple[str, Potential]:
        """Return the name and the potential of the flow's base variable.

        It is compiled if that changes no number.
        """
        args, kwargs = self.inputs
        plain, fast = (
            initialize_model(
                NeuTraReparam(self.guide).reparam(self.model),
                args,
                kwargs,
                jit_compile=compiled,
                skip_jit_warnings=True,
            )
            for compiled in (False, True)
        )
        (name,) = plain[0]
        points = self.guide.get_base_dist().sample((8,))
        try:
            with warnings.catch_warnings():
                # Pyro compiles by torch.jit.trace, at the first call.
                warnings.simplefilter("ignore", DeprecationWarning)
                for z in points:
                    one, other = plain[1]({name: z}), fast[1]({name: z})
                    if not torch.isclose(one, other, rtol=CLOSE, atol=CLOSE):
                        return name, plain[1]
        except (ArithmeticError, RuntimeError, ValueError):  # a model may raise any in a trace
            return name, plain[1]
        return name, fast[1]

    def _values(self, points: Tensor) -> Chains:
        """Return the latent and deterministic sites at unconstrained coordinates."""
        args, kwargs = self.inputs

        def values(point: Tensor) -> dict[str, Tensor]:
            at = {n: point[i].reshape(self.shapes[n]) for n, i in self.latents.where.items()}
            nodes = placed(self.model, at, *args, **kwargs).nodes
            chosen = (
                name
                for name, site in nodes.items()
                if name in at or site.get("infer", {}).get("_deterministic")
            )
            return {name: nodes[name]["value"] for name in chosen}

        with torch.no_grad(), seeded(0):
            found = mapped(values, points, randomness="same")
        return {name: value.numpy(force=True) for name, value in found.items()}


@contextmanager
def _still(guide: torch.nn.Module) -> Iterator[None]:
    """Hold the parameters of a guide still, of which no gradient is needed."""
    asked = {parameter: parameter.requires_grad for parameter in guide.parameters()}
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)
