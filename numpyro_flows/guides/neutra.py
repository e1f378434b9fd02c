"""`sample_neutra`: NUTS in the coordinates of a guide's flow."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import NeuTraReparam

from numpyro_flows.guides.autoflow import AutoFlow
from numpyro_flows.guides.fit import GuideFitResult, fit_guide
from numpyro_flows.guides.mixture import AutoFlowMixture
from numpyro_flows.guides.model import is_latent, unblocked
from numpyro_flows.rng import RandomKey, check_key
from pyroflows_common.arviz import ArviZ
from pyroflows_common.checks import Inputs, as_count, as_inputs
from pyroflows_common.guides import model_of
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
        params: its parameters.

    `divergences` counts those of all draws, `ess_per_1000` is the effective sample size for 1000
    gradients of all parts, and `to_arviz()` hands the draws to ArviZ.
    """

    guide: Any
    params: dict[str, Any]


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
    key: RandomKey | None = None,
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
        fitted: the result of `fit_guide` for this guide; None to train it here, from new.
        args: positional arguments of the model.
        kwargs: its keyword arguments.
        steps: number of steps of each training.
        warmup: number of steps of each chain before the draws, at least 60, and 160 of all chains.
        draws: number of draws of each chain, at least 8.
        chains: number of chains, which run together.
        target_accept_prob: that of NUTS.
        progress: whether to show bars of the training.
        key: random key; by default always the same one.

    Returns:
        The draws, how far they can be trusted, and what they took. Warnings tell of divergences,
        of chains that disagree and of too few effective draws.

    Raises:
        ValueError: if an argument is out of its range, if `fitted` is of another guide, if the
            guide has local sites or is a mixture, or if it leaves latent sites of the model out.
        TypeError: if `guide`, `fitted`, `model`, `args` or `key` has the wrong type.
        ImportError: if ArviZ is not installed.

    References:
        Hoffman, Sountsov, Dillon, Langmore, Tran and Vasudevan, "NeuTra-lizing bad geometry in
        Hamiltonian Monte Carlo using neural transport" (arXiv:1903.03704); Seyboldt, Carlson and
        Carpenter, "If only my posterior were normal" (arXiv:2603.18845), for slopes.

    Examples:
        >>> import numpyro, numpyro.distributions as dist
        >>> from numpyro_flows import AutoRealNVP, sample_neutra
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(5.0, 0.1).expand([2]).to_event(1))
        >>> guide = AutoRealNVP(model, layers=2)
        >>> result = sample_neutra(guide, steps=30, progress=False)
        >>> result.samples["x"].shape
        (4, 1000, 2)
        >>> result.divergences
        0
    """
    arviz = ArviZ("sample_neutra")
    check_sampled(guide, AutoFlow, AutoFlowMixture, fitted, GuideFitResult)
    target = as_target(target_accept_prob)
    seen, inputs = model_of(guide, model, "guide"), as_inputs(args, kwargs)
    model = unblocked(seen)
    steps, lengths = as_count(steps, "steps"), plan(warmup, draws, chains, fitted is not None)
    key = jax.random.key(0) if key is None else key
    check_key(key)
    params = {} if fitted is None else dict(fitted.params)
    set_up_key, *keys = jax.random.split(key, 2 * len(lengths.stages) + 2)
    _set_up(guide, model, inputs, set_up_key)
    chain = _Sampler(guide, model, params, inputs, chains, target)
    training = warmed = 0
    kept: list[Chains] = []
    for stage in lengths.stages:
        stage_key, fit_key = keys.pop(), keys.pop()
        plain = not chain.params
        found, _, before, after = chain.run(stage, stage_key, plain, max_tree_depth=SHALLOW)
        warmed += before + after
        kept.append({name: found[name] for name in guide._init_locs})
        learned = fit_guide(
            guide,
            seen,
            draws=joined(kept),
            slopes=True,
            params=chain.params,
            args=args,
            kwargs=kwargs,
            steps=steps,
            learning_rate=RATE,
            progress=progress,
            key=fit_key,
        )
        chain.params = learned.params
        training += learned.gradients
    samples, diverging, before, after = chain.run(Stage(lengths.warmup, draws), keys.pop())
    searched = 0
    if fitted is not None:
        training, searched = fitted.gradients, guide._searched
    gradients = Gradients(searched, training, warmed + before, after)
    ess, rhat = quality({name: samples[name] for name in guide._init_locs}, arviz)
    result = NeuTraResult(samples, gradients, diverging, ess, rhat, guide, chain.params)
    warn_of_draws(result)
    return result


def _set_up(guide: AutoFlow, model: Callable[..., Any], inputs: Inputs, key: Array) -> None:
    """Set a guide up, without a search, and check that it draws all of the model's sites."""
    args, kwargs = inputs
    with handlers.block():
        if guide.prototype_trace is None:
            with handlers.seed(rng_seed=key):
                guide._setup_prototype(*args, **kwargs)
        trace = handlers.trace(handlers.seed(model, key)).get_trace(*args, **kwargs)
    if guide._groups is not None:
        raise ValueError(LOCAL_NEUTRA)
    sites = guide._init_locs
    check_complete(sorted(n for n, s in trace.items() if is_latent(s) and n not in sites))


class _Sampler:
    """Chains of a model, as it is or in the coordinates of a guide with parameters."""

    def __init__(
        self,
        guide: AutoFlow,
        model: Callable[..., Any],
        params: dict[str, Any],
        inputs: Inputs,
        chains: int,
        target: float,
    ) -> None:
        self.guide, self.model, self.params, self.inputs = guide, model, params, inputs
        self.chains, self.target = chains, target

    def run(
        self, stage: Stage, key: Array, plain: bool = False, **options: Any
    ) -> tuple[Chains, np.ndarray, int, int]:
        """Return draws, whether each diverged, and the gradients of the warm-up and of the draws.

        The chains start at draws of the base.
        """
        args, kwargs = self.inputs
        own = {n: v for n, v in self.params.items() if not n.startswith(f"{self.guide.prefix}_")}
        model, start = handlers.substitute(self.model, own), None
        init_key, warm_key = jax.random.split(key)
        latent = f"{self.guide.prefix}_shared_latent"
        if plain:
            options["init_strategy"] = self.guide.init_loc_fn
        else:
            model = NeuTraReparam(self.guide, self.params).reparam(model)
            start = {latent: self.guide.get_base_dist().sample(init_key, (self.chains,))}
            if self.chains == 1:
                start = {latent: start[latent][0]}
            options["adapt_mass_matrix"] = False
        mcmc = MCMC(
            NUTS(model, target_accept_prob=self.target, **options),
            num_warmup=stage.lost,
            num_samples=stage.kept,
            num_chains=self.chains,
            chain_method="vectorized",
            progress_bar=False,
        )
        fields = ("num_steps", "diverging")
        mcmc.warmup(
            warm_key, *args, extra_fields=fields, collect_warmup=True, init_params=start, **kwargs
        )
        before = int(np.asarray(mcmc.get_extra_fields()["num_steps"]).sum())
        mcmc.run(mcmc.last_state.rng_key, *args, extra_fields=fields, **kwargs)
        extra = mcmc.get_extra_fields(group_by_chain=True)
        drawn = mcmc.get_samples(group_by_chain=True)
        drawn = {name: np.asarray(value) for name, value in drawn.items() if name != latent}
        after = int(np.asarray(extra["num_steps"]).sum())
        return drawn, np.asarray(extra["diverging"]), before, after
