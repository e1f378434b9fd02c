"""Guides of both wings and of their hosts on posteriors that are known.

    python benchmarks/guides.py                      # everything; hours for Pyro on a CPU
    python benchmarks/guides.py --wing numpyro --guides AutoRealNVP --only garch funnel

The hosts' NUTS stands beside the guides: 1000 steps of warm-up and 1000 draws of each of four
chains, which NumPyro runs at once and Pyro one after the other. Each guide has the same budget:
steps of Adam at one learning rate, and so many particles. What comes out is kept in
benchmarks/guides.json, where later runs replace what they measure again, and the tables are written
into docs/benchmarks.md.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from posteriors import POSTERIORS, Posterior, columns
from tqdm import tqdm

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
START, END = "<!-- guides: start -->", "<!-- guides: end -->"

# What counts as right: k-hat, errors of means in standard deviations, factors between deviations.
K_HAT, MEAN, DEVIATION = 0.7, 0.2, 1.2
DRAWS = 4000
GUIDES = {
    "numpyro": [
        "AutoNormal",
        "AutoMultivariateNormal",
        "AutoIAFNormal",
        "AutoBNAFNormal",
        "AutoRealNVP",
        "AutoRealNVP, fit_guide",
        "NUTS",
    ],
    "pyro": [
        "AutoNormal",
        "AutoMultivariateNormal",
        "AutoIAFNormal",
        "AutoNormalizingFlow",
        "AutoRealNVP",
        "AutoRealNVP, fit_guide",
        "NUTS",
    ],
}
# Trained as every other guide; and by `fit_guide`, at its own learning rate.
OURS, FITTED, FITTED_RATE = "AutoRealNVP", "AutoRealNVP, fit_guide", 5e-3
# The hosts' sampler with its defaults, for its time: no guide, so no bound and no k-hat.
SAMPLER, WARMUP, CHAINS = "NUTS", 1000, 4
PACKAGES = ("pyro-ppl", "torch", "numpyro", "jax", "arviz")


def main() -> None:
    """Measure, keep and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wing", choices=GUIDES, nargs="+", default=list(GUIDES))
    parser.add_argument("--guides", nargs="+", help="default: all of the wing")
    parser.add_argument("--only", nargs="+", choices=POSTERIORS, default=list(POSTERIORS))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print, but keep and write nothing")
    options = parser.parse_args()
    for wing in options.wing:
        for guide in options.guides or GUIDES[wing]:
            for name in options.only:
                run = measured(wing, guide, POSTERIORS[name], options)
                print(line(run), flush=True)
                if not options.dry:
                    keep(run)
    if not options.dry:
        write(kept())


def measured(wing: str, guide: str, posterior: Posterior, options: Any) -> dict[str, Any]:
    """Train a guide and compare it with the reference."""
    run: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "wing": wing,
        "guide": guide,
        "posterior": posterior.name,
        "steps": options.steps,
        "particles": options.particles,
        "learning_rate": FITTED_RATE if guide == FITTED else options.learning_rate,
        "seed": options.seed,
    }
    train = {"numpyro": in_numpyro, "pyro": in_pyro}[wing]
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if guide == SAMPLER:
                draws = {"numpyro": nuts_numpyro, "pyro": nuts_pyro}[wing](posterior, options)
                seconds = round(time.perf_counter() - begin, 1)
                return {**run, "seconds": seconds, **compared(posterior, draws)}
            found, run["made"] = train(guide, posterior, options)
        except (ValueError, RuntimeError, ArithmeticError) as error:  # a guide that blew up
            return {**run, "error": f"{type(error).__name__}: {error}"[:200]}
    run["seconds"] = round(time.perf_counter() - begin, 1)
    run |= {name: float(found.posterior.attrs[name]) for name in ("elbo", "pareto_k")}
    draws = {site: values.values[0] for site, values in found.posterior.data_vars.items()}
    return run | compared(posterior, draws)


def compared(posterior: Posterior, draws: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the worst errors of means and deviations; of heavy tails those of the quartiles."""
    reference = posterior.reference()
    sites = {name.partition("[")[0] for name in reference.names}
    names, table = columns({site: draws[site] for site in sites})
    table = np.asarray(table, float)[:, [names.index(name) for name in reference.names]]
    heavy = np.array([n.partition("[")[0] in posterior.heavy_tailed for n in reference.names])
    means = np.abs(table.mean(0) - reference.mean) / reference.sd
    ratios = table.std(0) / reference.sd
    light = ~heavy
    return {
        "mean": float(means[light].max()),
        "deviation": float(np.maximum(ratios, 1 / ratios)[light].max()),
    }


def passes(run: Mapping[str, Any]) -> bool:
    """Whether a guide may be believed."""
    return (
        "error" not in run
        and run.get("pareto_k", 0.0) < K_HAT
        and run["mean"] < MEAN
        and run["deviation"] < DEVIATION
    )


def in_numpyro(guide: str, posterior: Posterior, options: Any) -> tuple[Any, int]:
    """Train a guide in NumPyro and weigh its draws; return the number of steps, too."""
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO, autoguide

    import numpyro_flows

    data = {name: jax.numpy.asarray(x) for name, x in posterior.data.items()}
    model = posterior.numpyro_model
    key = jax.random.key(options.seed)
    score = functools.partial(
        numpyro_flows.to_arviz, kwargs=data, draws=DRAWS, key=jax.random.key(1)
    )
    if guide == FITTED:
        made = numpyro_flows.AutoRealNVP(model)
        how = {"steps": options.steps, "learning_rate": FITTED_RATE, "progress": False}
        fitted = numpyro_flows.fit_guide(made, kwargs=data, key=key, **how)
        return score(made, params=fitted.params), len(fitted.losses)
    made = getattr(numpyro_flows if guide == OURS else autoguide, guide)(model)
    svi = SVI(
        model,
        made,
        numpyro.optim.Adam(options.learning_rate),
        Trace_ELBO(num_particles=options.particles),
    )
    result = svi.run(key, options.steps, progress_bar=False, **data)
    return score(made, params=result.params), options.steps


def nuts_numpyro(posterior: Posterior, options: Any) -> dict[str, np.ndarray]:
    """Sample in NumPyro, all chains at once."""
    import jax
    from numpyro.infer import MCMC, NUTS

    data = {name: jax.numpy.asarray(x) for name, x in posterior.data.items()}
    mcmc = MCMC(
        NUTS(posterior.numpyro_model),
        num_warmup=WARMUP,
        num_samples=DRAWS // CHAINS,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(options.seed), **data)
    return {site: np.asarray(values) for site, values in mcmc.get_samples().items()}


def in_pyro(guide: str, posterior: Posterior, options: Any) -> tuple[Any, int]:
    """Train a guide in Pyro and weigh its draws; return the number of steps, too."""
    import pyro
    from pyro.distributions import transforms
    from pyro.infer import SVI, Trace_ELBO, autoguide

    import pyroflows

    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    data, model = posterior.pyro_data(), posterior.pyro_model
    if guide == FITTED:
        made = pyroflows.AutoRealNVP(model)
        how = {"steps": options.steps, "learning_rate": FITTED_RATE}
        fitted = pyroflows.fit_guide(made, model, kwargs=data, seed=options.seed, **how)
        found = pyroflows.to_arviz(made, model, kwargs=data, draws=DRAWS, seed=1)
        return found, len(fitted.losses)
    if guide == "AutoNormalizingFlow":  # with its own couplings, of the same size as ours
        coupling = functools.partial(transforms.affine_coupling, hidden_dims=[32, 32])
        made = autoguide.AutoNormalizingFlow(model, functools.partial(own_couplings, coupling))
    elif guide == "AutoIAFNormal":
        made = autoguide.AutoIAFNormal(model, num_transforms=3)
    else:
        made = getattr(pyroflows if guide == OURS else autoguide, guide)(model)
    svi = SVI(
        model,
        made,
        pyro.optim.Adam({"lr": options.learning_rate}),
        Trace_ELBO(num_particles=options.particles, vectorize_particles=True),
    )
    for _ in tqdm(range(options.steps), desc=f"{guide} {posterior.name}", leave=False):
        svi.step(**data)
    return pyroflows.to_arviz(made, model, kwargs=data, draws=DRAWS, seed=1), options.steps


def nuts_pyro(posterior: Posterior, options: Any) -> dict[str, np.ndarray]:
    """Sample in Pyro, one chain after the other."""
    import pyro
    from pyro.infer import MCMC, NUTS

    pyro.set_rng_seed(options.seed)
    draws: list[dict[str, Any]] = []
    for _ in range(CHAINS):
        kernel = NUTS(posterior.pyro_model, jit_compile=True, ignore_jit_warnings=True)
        mcmc = MCMC(kernel, DRAWS // CHAINS, warmup_steps=WARMUP, disable_progbar=True)
        mcmc.run(**posterior.pyro_data())
        draws.append(mcmc.get_samples())
    return {site: np.concatenate([chain[site].numpy() for chain in draws]) for site in draws[0]}


def own_couplings(coupling: Callable[..., Any], size: int) -> Any:
    """Return Pyro's couplings in pairs of which the second one sees the coordinates reversed."""
    import torch
    from pyro.distributions import transforms

    back = torch.arange(size).flip(0)
    layers = [layer for _ in range(20) for layer in (coupling(size), transforms.Permute(back))]
    return transforms.ComposeTransformModule(layers)


def kept() -> dict[str, Any]:
    """Return all that has been measured, also by others that run at the same time."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": {}, "runs": []}


def keep(run: dict[str, Any]) -> None:
    """Store a run in place of an earlier one of the same guide on the same posterior."""
    same, all_ = ("wing", "guide", "posterior"), kept()
    all_["runs"] = [r for r in all_["runs"] if any(r[field] != run[field] for field in same)]
    all_["runs"].append(run)
    all_["runs"].sort(key=lambda r: tuple(r[field] for field in same))
    all_["machine"] = {
        "machine": platform.machine(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    RESULTS.write_text(json.dumps(all_, indent=1) + "\n")


def line(run: Mapping[str, Any]) -> str:
    """Return a run in one line."""
    head = f"{run['wing']:8s} {run['guide']:24s} {run['posterior']:26s}"
    if "error" in run:
        return f"{head} {run['error']}"
    verdict = "passes" if passes(run) else "fails"
    errors = f"mean {run['mean']:8.3f}  deviation {run['deviation']:8.2f}  {run['seconds']:6.1f} s"
    if "elbo" in run:
        fit = f"elbo {run['elbo']:9.2f}  k-hat {run['pareto_k']:6.2f}  steps {run['made']:5d}"
        head = f"{head} {fit}"
    return f"{head} {errors}  {verdict}"


def write(kept: Mapping[str, Any]) -> None:
    """Write the tables into the page."""
    text = PAGE.read_text()
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n\n{report(kept)}\n\n{END}{after}")


def report(kept: Mapping[str, Any]) -> str:
    """Return all tables."""
    versions = kept["machine"]["versions"]
    installed = ", ".join(f"{package} {version}" for package, version in versions.items())
    parts = [f"Measured with {installed}."]
    for wing, title in (("numpyro", "NumPyro"), ("pyro", "Pyro")):
        runs = [run for run in kept["runs"] if run["wing"] == wing]
        if runs:
            parts += [f"### {title}", summary(wing, runs), details(runs)]
    return "\n\n".join(parts)


def summary(wing: str, runs: list[dict[str, Any]]) -> str:
    """Return how many posteriors each guide gets right; another page includes the table."""
    mark = f"<!-- --8<-- [{{}}:guides-{wing}] -->"
    rows = [mark.format("start"), "", "| guide | passes | seconds, median | measured |"]
    rows.append("|---|---|---|---|")
    for guide in GUIDES[wing]:
        own = [run for run in runs if run["guide"] == guide]
        if own:
            days = [run["date"] for run in own]
            seconds = np.median([run["seconds"] for run in own if "seconds" in run])
            dates = " to ".join(sorted({min(days), max(days)}))
            passed = f"{sum(map(passes, own))} of {len(own)}"
            rows.append(f"| {guide} | {passed} | {seconds:.0f} | {dates} |")
    return "\n".join([*rows, "", mark.format("end")])


def details(runs: list[dict[str, Any]]) -> str:
    """Return a collapsed table with a row for each guide and posterior."""
    rows = [
        '??? note "Every run"',
        "",
        "    | | posterior | guide | ELBO | k̂ | mean | deviation | steps | s |",
        "    |---|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=lambda r: (r["posterior"], r["guide"])):
        head = f"    | {'✓' if passes(run) else ''} | {run['posterior']} | {run['guide']} |"
        if "error" in run:
            rows.append(f"{head} {run['error'].partition(':')[0]} | | | | | |")
            continue
        fit, steps = "– | –", "–"
        if "elbo" in run:
            fit = f"{run['elbo']:.2f} | {run['pareto_k']:.2f}"
            # Runs of `fit_guide` before it kept the number tell nothing.
            steps = run.get("made", "" if run["guide"] == FITTED else run["steps"])
        rows.append(
            f"{head} {fit} | {run['mean']:.2f} | {run['deviation']:.2f} | {steps} | "
            f"{run['seconds']:.0f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
