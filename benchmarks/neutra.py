"""NUTS in a guide's coordinates beside plain NUTS: effective sample size per gradient.

    python benchmarks/neutra.py                       # both wings; Pyro takes most of the time
    python benchmarks/neutra.py --wing numpyro --seed 1

samples Neal's funnel and the centred eight schools three ways: as they are, by hand in their
non-centred form, and by NeuTra with a trained AutoRealNVP. What comes out is written into
docs/tutorials/neutra.json, from which the tutorial makes its tables; a later run of a wing replaces
what the file has of it.

Gradients are counted alike in both hosts: one for each leapfrog step. Those of the warm-up are kept
apart, and so are those of training the guide: a gradient for each particle of each step.

    python benchmarks/neutra.py --counted --wing numpyro

compares `sample_neutra` with plain NUTS on five posteriors with all gradients counted: those of the
search, the training, the warm-up and the draws. Among them is the funnel in 101 dimensions of
nutpie's documentation (nf-adapt), which reports 1836 effective draws from 42,527 gradients with its
flow, 43 for 1000, and 31.5 from 124,219 without, 0.25 for 1000. In Pyro, `sample_neutra` runs
alone.
"""

import argparse
import functools
import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
from posteriors import POSTERIORS, Posterior

OUTPUT = Path(__file__).parents[1] / "docs" / "tutorials" / "neutra.json"
PARTICLES, LEARNING_RATE = 16, 3e-3


@dataclass(frozen=True)
class Settings:
    """What a wing can afford: steps of training, couplings, chains and their lengths."""

    steps: int
    layers: int
    chains: int
    warmup: int
    draws: int


SETTINGS = {
    "numpyro": Settings(steps=5000, layers=20, chains=4, warmup=1000, draws=2000),
    "pyro": Settings(steps=1500, layers=8, chains=2, warmup=300, draws=500),
}
# The site of many numbers, and what its non-centred form is multiplied by and added to.
SITES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "funnel": ("x", lambda d: np.exp(d["v"] / 2)[..., None] * d["x_decentered"]),
    "eight_schools_centered": (
        "theta",
        lambda d: d["mu"][..., None] + d["tau"][..., None] * d["theta_decentered"],
    ),
}
WAYS = ("plain", "non-centred", "NeuTra")
# The posteriors on which all gradients are counted.
COUNTED = ("funnel101", "eight_schools_centered", "volatility", "horseshoe", "funnel")


@dataclass(frozen=True)
class Lengths:
    """Chains and their lengths, the same for both ways; plain NUTS has a longer warm-up."""

    layers: int
    chains: int
    plain_warmup: int
    draws: int


LENGTHS = {
    "numpyro": Lengths(layers=8, chains=4, plain_warmup=1000, draws=2000),
    "pyro": Lengths(layers=4, chains=2, plain_warmup=300, draws=500),
}


@dataclass
class Run:
    """Draws by site, `(chains, draws, *shape)`, and what they took."""

    draws: dict[str, np.ndarray]
    gradients: int
    warmup_gradients: int
    divergences: int
    training_gradients: int = 0


def main() -> None:
    """Sample, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wing", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--only", choices={*SITES, *COUNTED}, nargs="+")
    parser.add_argument("--counted", action="store_true", help="all gradients counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    kept = json.loads(options.output.read_text()) if options.output.exists() else {}
    for wing in options.wing if options.counted else ():
        entry = kept.setdefault(wing, {}).setdefault("counted", {})
        entry["settings"] = {**asdict(LENGTHS[wing]), "seed": options.seed}
        for name in options.only or COUNTED:
            begin = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                entry[name] = found = counted(wing, name, LENGTHS[wing], options.seed)
            seconds = time.perf_counter() - begin
            print(f"{wing:8}{name:24}", found, f" {seconds:.0f} s", flush=True)
            options.output.write_text(json.dumps(kept, indent=2) + "\n")
    for wing in () if options.counted else options.wing:
        settings = SETTINGS[wing]
        about = {**asdict(settings), "particles": PARTICLES, "learning_rate": LEARNING_RATE}
        entry = kept.setdefault(wing, {})
        entry["settings"] = {**about, "seed": options.seed}
        for name in options.only or SITES:
            entry[name] = {"reference": reference(name)}
            for way in WAYS:
                begin = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    run = {"numpyro": in_numpyro, "pyro": in_pyro}[wing](
                        POSTERIORS[name], way, settings, options.seed
                    )
                entry[name][way] = found = summary(name, run)
                print(f"{wing:8}{name:24}{way:12}", found, end="", flush=True)
                print(f"  {time.perf_counter() - begin:.0f} s", flush=True)
            options.output.write_text(json.dumps(kept, indent=2) + "\n")


def depth(name: str, draws: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the number that says how far into the neck of the funnel a draw is."""
    return draws["v"] if name == "funnel" else np.log(draws["tau"])


def moments(values: np.ndarray) -> dict[str, float]:
    """Return what two sets of draws of that number are compared by."""
    low = np.quantile(values, 0.05)
    return {name: round(float(value), 3) for name, value in
            {"mean": values.mean(), "sd": values.std(), "low": low}.items()}  # fmt: skip


def reference(name: str) -> dict[str, float]:
    """Return what is right: known for the funnel, of a long run for the schools."""
    if name == "funnel":
        return {"mean": 0.0, "sd": 3.0, "low": -4.935}
    known = POSTERIORS[name].reference()
    tau = known.names.index("tau")
    low = round(float(np.log(known.quantiles[0, tau])), 3)  # of all draws of that run
    return {**moments(np.log(known.draws[:, tau])), "low": low}


def summary(name: str, run: Run) -> dict[str, Any]:
    """Return effective sample sizes, for 1000 gradients, and the moments of the depth."""
    draws = {site: np.asarray(value, float) for site, value in run.draws.items()}
    scalars = [v.reshape(*v.shape[:2], -1) for v in draws.values()]
    table = np.concatenate(scalars, -1)
    ess = functools.partial(az.ess, method="bulk"), functools.partial(az.ess, method="tail")
    per = 1000.0 / run.gradients
    worst = [min(float(of(column)) for column in np.moveaxis(table, -1, 0)) for of in ess]
    neck = [float(of(depth(name, draws))) for of in ess]
    return {
        "gradients": run.gradients,
        "warmup_gradients": run.warmup_gradients,
        "training_gradients": run.training_gradients,
        "divergences": run.divergences,
        "draws": int(np.prod(table.shape[:2])),
        "worst": {"bulk": round(per * worst[0], 2), "tail": round(per * worst[1], 2)},
        "depth": {
            "bulk": round(per * neck[0], 2),
            "tail": round(per * neck[1], 2),
            **moments(depth(name, draws)),
        },
    }


def in_numpyro(posterior: Posterior, way: str, settings: Settings, seed: int) -> Run:
    """Sample in NumPyro."""
    import jax
    import numpyro
    from numpyro.handlers import reparam
    from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
    from numpyro.infer.reparam import LocScaleReparam, NeuTraReparam

    from numpyro_flows import AutoRealNVP

    model, site = posterior.numpyro_model, SITES[posterior.name][0]
    train_key, key = jax.random.split(jax.random.key(seed))
    neutra = None
    if way == "non-centred":
        model = reparam(model, {site: LocScaleReparam(0.0)})
    elif way == "NeuTra":
        guide = AutoRealNVP(model, layers=settings.layers)
        svi = SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), Trace_ELBO(PARTICLES))
        result = svi.run(train_key, settings.steps, progress_bar=False, **posterior.data)
        neutra = NeuTraReparam(guide, result.params)
        model = neutra.reparam(model)
    mcmc = MCMC(
        NUTS(model),
        num_warmup=settings.warmup,
        num_samples=settings.draws,
        num_chains=settings.chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.warmup(key, extra_fields=("num_steps",), collect_warmup=True, **posterior.data)
    warmup = int(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(mcmc.last_state.rng_key, extra_fields=("num_steps", "diverging"), **posterior.data)
    fields, draws = mcmc.get_extra_fields(), mcmc.get_samples(group_by_chain=True)
    if neutra is not None:
        (shared,) = (value for name, value in draws.items() if name.endswith("shared_latent"))
        draws = neutra.transform_sample(shared)
    sites = {"funnel": ("v", "x")}.get(posterior.name, ("mu", "tau", "theta"))
    return Run(
        {name: np.asarray(draws[name]) for name in sites},
        int(fields["num_steps"].sum()),
        warmup,
        int(fields["diverging"].sum()),
        settings.steps * PARTICLES if neutra else 0,
    )


def in_pyro(posterior: Posterior, way: str, settings: Settings, seed: int) -> Run:
    """Sample in Pyro."""
    import pyro
    import torch
    from pyro import poutine
    from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
    from pyro.infer.mcmc.util import initialize_model
    from pyro.infer.reparam import LocScaleReparam, NeuTraReparam

    from pyroflows import AutoRealNVP

    model, data = posterior.pyro_model, posterior.pyro_data()
    site, centred = SITES[posterior.name]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    neutra = None
    if way == "non-centred":
        model = poutine.reparam(model, {site: LocScaleReparam(0.0)})
    elif way == "NeuTra":
        guide = AutoRealNVP(model, layers=settings.layers)
        elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), elbo)
        for _ in range(settings.steps):
            svi.step(**data)
        guide.requires_grad_(False)
        neutra = NeuTraReparam(guide)
        model = neutra.reparam(model)
    chains, counts, divergences = [], [0, 0], 0
    for _ in range(settings.chains):
        start, potential, transforms, _ = initialize_model(
            model, (), data, jit_compile=True, skip_jit_warnings=True
        )
        calls = [0]
        at = dict.fromkeys(("Warmup", "Sample"), 0)

        def counted(z, potential=potential, calls=calls):
            calls[0] += 1
            return potential(z)

        def note(kernel, samples, stage, i, calls=calls, at=at):
            at["Warmup" if stage.startswith("Warmup") else "Sample"] = calls[0]

        mcmc = MCMC(
            NUTS(potential_fn=counted),
            num_samples=settings.draws,
            warmup_steps=settings.warmup,
            initial_params=start,
            transforms=transforms,
            hook_fn=note,
            disable_progbar=True,
        )
        mcmc.run()
        counts[0] += at["Warmup"]
        counts[1] += at["Sample"] - at["Warmup"]
        divergences += len(mcmc.diagnostics()["divergences"]["chain 0"])
        draws = mcmc.get_samples()
        if neutra is not None:
            (shared,) = draws.values()
            # An empty dimension for the plate, which draws must not take.
            with torch.no_grad():
                draws = neutra.transform_sample(shared[:, None])
            draws = {n: v.reshape(len(shared), *([] if v[0].numel() == 1 else [-1]))
                     for n, v in draws.items()}  # fmt: skip
        values = {name: value.detach().numpy() for name, value in draws.items()}
        if way == "non-centred":
            values[site] = centred(values)
            del values[f"{site}_decentered"]
        chains.append(values)
    joined = {name: np.stack([chain[name] for chain in chains]) for name in chains[0]}
    training = settings.steps * PARTICLES if neutra else 0
    return Run(joined, counts[1], counts[0], divergences, training)


def counted(wing: str, name: str, lengths: Lengths, seed: int) -> dict[str, Any]:
    """Return what plain NUTS and `sample_neutra` give for 1000 gradients, all of them counted."""
    both = {"numpyro": counted_in_numpyro, "pyro": counted_in_pyro}[wing]
    return {
        way: {
            "ess": round(ess),
            "rhat": round(rhat, 3),
            "divergences": divergences,
            "gradients": gradients,
            "ess_per_1000": round(1000 * ess / sum(gradients), 2),
        }
        for way, (ess, rhat, divergences, gradients) in both(name, lengths, seed).items()
    }


def quality_of(draws: Mapping[str, Any]) -> tuple[float, float]:
    """Return the least bulk effective sample size and the highest R-hat of all numbers."""
    from pyroflows_common.arviz import ArviZ
    from pyroflows_common.neutra import quality

    return quality({name: np.asarray(value) for name, value in draws.items()}, ArviZ())


def counted_in_numpyro(name: str, lengths: Lengths, seed: int) -> dict[str, Any]:
    """Sample in NumPyro."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS

    from numpyro_flows import AutoRealNVP, sample_neutra

    def funnel101() -> None:
        log_sigma = numpyro.sample("log_sigma", dist.Normal(0.0, 1.0))
        scale = jnp.exp(log_sigma / 2)
        numpyro.sample("x", dist.Normal(0.0, scale).expand([100]).to_event(1))

    model, data = funnel101, {}
    if name != "funnel101":
        model, data = POSTERIORS[name].numpyro_model, POSTERIORS[name].data
    key = jax.random.key(seed)
    mcmc = MCMC(
        NUTS(model),
        num_warmup=lengths.plain_warmup,
        num_samples=lengths.draws,
        num_chains=lengths.chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.warmup(key, extra_fields=("num_steps",), collect_warmup=True, **data)
    warmup = int(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(mcmc.last_state.rng_key, extra_fields=("num_steps", "diverging"), **data)
    fields = mcmc.get_extra_fields()
    taken = [0, 0, warmup, int(fields["num_steps"].sum())]
    ess, rhat = quality_of(mcmc.get_samples(group_by_chain=True))
    guide = AutoRealNVP(model, layers=lengths.layers)
    found = sample_neutra(
        guide, kwargs=data, draws=lengths.draws, chains=lengths.chains, progress=False, key=key
    )
    return {
        "plain": (ess, rhat, int(fields["diverging"].sum()), taken),
        "sample_neutra": (found.ess, found.rhat, found.divergences, [*found.gradients]),
    }


def counted_in_pyro(name: str, lengths: Lengths, seed: int) -> dict[str, Any]:
    """Sample in Pyro, without plain NUTS, which the gradients of NumPyro stand for."""
    import pyro
    import pyro.distributions as dist
    import torch

    from pyroflows import AutoRealNVP, sample_neutra

    def funnel101() -> None:
        log_sigma = pyro.sample("log_sigma", dist.Normal(0.0, 1.0))
        scale = torch.exp(log_sigma / 2)[..., None].expand(log_sigma.shape + (100,))
        pyro.sample("x", dist.Normal(0.0, scale).to_event(1))

    model, data = funnel101, {}
    if name != "funnel101":
        model, data = POSTERIORS[name].pyro_model, POSTERIORS[name].pyro_data()
    pyro.clear_param_store()
    guide = AutoRealNVP(model, layers=lengths.layers)
    found = sample_neutra(
        guide, kwargs=data, draws=lengths.draws, chains=lengths.chains, progress=False, seed=seed
    )
    return {"sample_neutra": (found.ess, found.rhat, found.divergences, [*found.gradients])}


if __name__ == "__main__":
    main()
