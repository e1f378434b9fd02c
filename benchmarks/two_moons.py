"""Two moons: conditional flows of both wings beside the reference posteriors.

    python benchmarks/two_moons.py --data sbibm_two_moons.npz
    python benchmarks/two_moons.py --data sbibm_two_moons.npz --wing numpyro --simulations 1000

The task is the one of Lueckmann, Boelts, Greenberg, Gonçalves and Macke, "Benchmarking
simulation-based inference" (arXiv:2101.04653), appendix T.8. A conditional flow q(θ | x) is fitted
to simulated pairs and then asked for the posteriors of ten observations that it has never seen.
What comes out is kept in docs/tutorials/two-moons.json, where later runs replace what they measure
again, and the table is written into docs/benchmarks.md.

`--data` is an `.npz` file with `observation_k` (2,), `true_parameters_k` (2,) and `posterior_k`
(10000, 2) for k = 1 … 10: the task's files of the repository sbi-benchmark/sbibm, folder
`sbibm/tasks/two_moons/files`.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
RESULTS = PAGE.parent / "tutorials" / "two-moons.json"
START, END = "<!-- two moons: start -->", "<!-- two moons: end -->"

OBSERVATIONS = range(1, 11)
DRAWS = 10_000
# The crescents are a hundred times narrower than the prior: the couplings' scales need room, which
# robust=True would not give them.
FLOW: dict[str, Any] = {"layers": 8, "hidden": (64, 64), "robust": False}
TRAINING: dict[str, Any] = {
    "steps": 8000,
    "batch_size": 256,
    "learning_rate": 5e-3,
    "schedule": "cosine",
    "standardize": True,
}
SUBSAMPLE = 2000  # of each side, for the discrepancy, whose cost is quadratic
PACKAGES = ("pyro-ppl", "torch", "numpyro", "jax", "scikit-learn")

# Draws and log-densities of a fitted flow: (observation, count or parameters) → array.
Posterior = tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]


def main() -> None:
    """Simulate, fit, compare, keep and write."""
    options = arguments()
    data = load(options.data)
    print("simulator beside the reference draws, C2ST:", f"{agreement(data):.3f}", flush=True)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"about": {}, "runs": []}
    for wing in WINGS if options.wing == "both" else [options.wing]:
        run = measured(wing, data, options)
        print(line(run), flush=True)
        if not options.dry:
            keep(kept, run)
    print("\n" + report(kept))
    if not options.dry:
        write(kept)


def arguments() -> argparse.Namespace:
    first, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=first)
    parser.add_argument("--data", type=Path, required=True, help="sbibm's observations and draws")
    parser.add_argument("--wing", choices=[*WINGS, "both"], default="both")
    parser.add_argument("--simulations", type=int, choices=(1000, 10_000, 100_000), default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print, but keep and write nothing")
    return parser.parse_args()


def load(path: Path) -> dict[str, np.ndarray]:
    """Read observations and reference draws."""
    if not path.exists():
        raise SystemExit(
            f"{path} is missing: pass --data an .npz file with observation_k, true_parameters_k "
            "and posterior_k for k = 1 … 10, the two-moons files of sbi-benchmark/sbibm."
        )
    with np.load(path) as file:
        return {name: file[name].astype(float) for name in file.files}


# The task


def simulate(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an observation for each row of parameters."""
    return moon(len(theta), rng) + turned(theta)


def moon(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return points on a thin half circle."""
    angle = rng.uniform(-np.pi / 2, np.pi / 2, count)
    radius = rng.normal(0.1, 0.01, count)
    return np.stack([radius * np.cos(angle) + 0.25, radius * np.sin(angle)], axis=1)


def turned(theta: np.ndarray) -> np.ndarray:
    """Return the parameters turned by 45 degrees and folded, which is where the moon lies."""
    sum_, difference = theta[:, 0] + theta[:, 1], theta[:, 1] - theta[:, 0]
    return np.stack([-abs(sum_), difference], axis=1) / np.sqrt(2)


def exact_draws(x: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Return about `count` draws of the posterior, and what the likelihood integrates to.

    The map from θ to where the moon lies is an isometry two to one, so a draw of the moon is, seen
    from x, a draw of it; either of its two origins will do, if it lies in the prior's square.
    """
    place = x - moon(count, rng)
    sum_ = -np.sqrt(2) * place[:, 0] * rng.choice([-1.0, 1.0], count)
    difference = np.sqrt(2) * place[:, 1]
    theta = np.stack([sum_ - difference, sum_ + difference], axis=1) / 2
    possible = (place[:, 0] <= 0) & inside(theta)
    return theta[possible], 2 * possible.mean()


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return log p(x | θ) of one observation for each row of parameters."""
    across, along = (x - turned(theta) - [0.25, 0.0]).T
    radius = np.hypot(across, along)
    normal = -0.5 * ((radius - 0.1) / 0.01) ** 2 - np.log(0.01 * np.sqrt(2 * np.pi))
    return np.where(across > 0, normal - np.log(np.pi * radius), -np.inf)


def inside(theta: np.ndarray) -> np.ndarray:
    """Whether parameters lie in the prior's square."""
    return (abs(theta) <= 1).all(axis=1)


# Comparison


def classifier_test(one: np.ndarray, other: np.ndarray, seed: int) -> float:
    """Return how often a network tells two sets of draws apart, held out: 0.5 is not at all."""
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    mean, deviation = one.mean(0), one.std(0)
    x = (np.concatenate([one, other]) - mean) / deviation
    y = np.repeat([0, 1], [len(one), len(other)])
    width = 10 * x.shape[1]
    network = MLPClassifier(
        activation="relu", hidden_layer_sizes=(width, width), max_iter=1000, random_state=seed
    )
    folds = KFold(n_splits=5, shuffle=True, random_state=seed)
    return float(cross_val_score(network, x, y, cv=folds, scoring="accuracy").mean())


def discrepancy(one: np.ndarray, other: np.ndarray, seed: int) -> float:
    """Return the squared maximum mean discrepancy, without bias, so that it may be negative.

    The kernel is a Gaussian whose width is the median distance of the draws.
    """
    rng = np.random.default_rng(seed)
    one, other = (rows[rng.permutation(len(rows))[:SUBSAMPLE]] for rows in (one, other))
    rows = np.concatenate([one, other])
    squares = (rows**2).sum(1)
    distances = np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0.0)
    width = np.median(distances[np.triu_indices(len(rows), 1)])
    kernel, n, m = np.exp(-distances / (2 * width)), len(one), len(other)
    within = [(part.sum() - len(part)) for part in (kernel[:n, :n], kernel[n:, n:])]
    between = kernel[:n, n:].mean()
    return float(within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * between)


def best_accuracy(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """Return how often one who knows both densities tells them apart, given draws of the first."""
    return float(0.5 + np.maximum(0.0, 1.0 - np.exp(log_q - log_p)).mean() / 2)


def agreement(data: Mapping[str, np.ndarray]) -> float:
    """Return the classifier's accuracy between draws by this simulator's inverse and sbibm's."""
    rng, k = np.random.default_rng(0), 1
    for k in OBSERVATIONS:
        if not np.isfinite(log_likelihood(data[f"posterior_{k}"], data[f"observation_{k}"])).all():
            raise SystemExit(f"posterior_{k} has draws from which observation_{k} cannot come")
    draws, _ = exact_draws(data["observation_1"], DRAWS, rng)
    return classifier_test(data["posterior_1"], draws, 1)


def measured(wing: str, data: Mapping[str, np.ndarray], options: Any) -> dict[str, Any]:
    """Fit a flow and compare its posteriors with the reference."""
    rng = np.random.default_rng(options.seed)
    theta = rng.uniform(-1.0, 1.0, (options.simulations, 2))
    x = simulate(theta, rng)
    begin = time.perf_counter()
    draw, log_prob = WINGS[wing](theta, x, options.seed)
    seconds = time.perf_counter() - begin
    found: dict[str, list[float]] = {}
    for k in tqdm(OBSERVATIONS, desc=f"{wing}, observations", leave=False):
        observed, reference = data[f"observation_{k}"], data[f"posterior_{k}"]
        draws, kept = in_prior(draw, observed)
        _, mass = exact_draws(observed, 100_000, np.random.default_rng(0))
        log_p = log_likelihood(reference, observed) - np.log(mass)
        log_q = log_prob(observed, reference) - np.log(kept)
        for name, value in {
            "c2st": classifier_test(reference, draws, 1),
            "mmd2": discrepancy(reference, draws, 1),
            "best": best_accuracy(log_p, log_q),
            "inside": kept,
        }.items():
            found.setdefault(name, []).append(round(value, 5))
    return {
        "wing": wing,
        "simulations": options.simulations,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        **found,
    }


def in_prior(draw: Callable[..., np.ndarray], x: np.ndarray) -> tuple[np.ndarray, float]:
    """Return draws in the prior's square, and the fraction of all draws that is there."""
    parts, found, tried = [], 0, 0
    while found < DRAWS:
        theta = draw(x, DRAWS, len(parts))
        parts.append(theta[inside(theta)])
        found, tried = found + len(parts[-1]), tried + DRAWS
        if tried >= 100 * DRAWS:
            raise SystemExit("the flow has put nearly all of a posterior outside the prior")
    return np.concatenate(parts)[:DRAWS], found / tried


# Wings


def in_pyro(theta: np.ndarray, x: np.ndarray, seed: int) -> Posterior:
    """Fit in Pyro."""
    import torch

    from pyroflows import fit, flow_distribution, realnvp

    def density(observed: np.ndarray) -> Any:
        return flow_distribution(flow, context=torch.tensor(observed, dtype=torch.float32))

    @torch.no_grad()
    def draw(observed: np.ndarray, count: int, number: int) -> np.ndarray:
        torch.manual_seed(number)
        return density(observed).sample((count,)).numpy().astype(float)

    @torch.no_grad()
    def log_prob(observed: np.ndarray, theta: np.ndarray) -> np.ndarray:
        found = density(observed).log_prob(torch.tensor(theta, dtype=torch.float32))
        return found.numpy().astype(float)

    torch.manual_seed(seed)
    flow = realnvp(2, context_dim=2, **FLOW)
    fit(flow, theta, context=x, seed=seed, **TRAINING)
    return draw, log_prob


def in_numpyro(theta: np.ndarray, x: np.ndarray, seed: int) -> Posterior:
    """Fit in NumPyro."""
    import jax
    import jax.numpy as jnp

    from numpyro_flows import fit, flow_distribution, realnvp

    def density(observed: np.ndarray) -> Any:
        return flow_distribution(flow, context=jnp.asarray(observed, jnp.float32))

    def draw(observed: np.ndarray, count: int, number: int) -> np.ndarray:
        found = density(observed).sample(jax.random.key(number), (count,))
        return np.asarray(found, float)

    def log_prob(observed: np.ndarray, theta: np.ndarray) -> np.ndarray:
        return np.asarray(density(observed).log_prob(jnp.asarray(theta, jnp.float32)), float)

    start, training = jax.random.split(jax.random.key(seed))
    flow = realnvp(2, context_dim=2, key=start, **FLOW)
    flow = fit(flow, theta, context=x, key=training, **TRAINING).flow
    return draw, log_prob


WINGS: dict[str, Callable[..., Posterior]] = {"pyro": in_pyro, "numpyro": in_numpyro}


# Results


def keep(kept: dict[str, Any], run: dict[str, Any]) -> None:
    """Store a run in place of an earlier one of the same wing and as many simulations."""
    same = ("wing", "simulations")
    kept["runs"] = [r for r in kept["runs"] if any(r[field] != run[field] for field in same)]
    kept["runs"].append(run)
    kept["runs"].sort(key=lambda r: tuple(r[field] for field in same))
    kept["about"] = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "flow": FLOW,
        "training": TRAINING,
        "draws": DRAWS,
    }
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def line(run: Mapping[str, Any]) -> str:
    """Return a run in one line."""
    means = {name: np.mean(run[name]) for name in ("c2st", "best", "mmd2", "inside")}
    return (
        f"{run['wing']:8s} {run['simulations']:7d} simulations: C2ST {means['c2st']:.3f} (at best "
        f"{means['best']:.3f}), MMD² {means['mmd2']:.5f}, {means['inside']:.1%} of draws in the "
        f"prior, {run['seconds']:.0f} s"
    )


def write(kept: Mapping[str, Any]) -> None:
    """Write the table into the page."""
    text = PAGE.read_text()
    if START not in text or END not in text:
        raise SystemExit(f"{PAGE} has lost the lines {START!r} and {END!r}")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n\n{report(kept)}\n\n{END}{after}")


def report(kept: Mapping[str, Any]) -> str:
    """Return the summary, and a collapsed table with a row for each observation."""
    about = kept["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    rows = [
        f"Measured on {about['date']} with {versions}.",
        "",
        "| | simulations | C2ST, mean | least and most | best possible | MMD² | in the prior "
        "| seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in kept["runs"]:
        c2st, best, mmd2, part = (np.array(run[n]) for n in ("c2st", "best", "mmd2", "inside"))
        rows.append(
            f"| {run['wing']} | {run['simulations']} | {c2st.mean():.3f} | {c2st.min():.3f} to "
            f"{c2st.max():.3f} | {best.mean():.3f} | {mmd2.mean():.1e} | {part.mean():.1%} | "
            f"{run['seconds']:.0f} |"
        )
    rows += [
        "",
        '??? note "Every observation"',
        "",
        "    | | simulations | observation | C2ST | best possible | MMD² | in the prior |",
        "    |---|---|---|---|---|---|---|",
    ]
    for run in kept["runs"]:
        for k, values in enumerate(
            zip(run["c2st"], run["best"], run["mmd2"], run["inside"], strict=True), 1
        ):
            c2st, best, mmd2, part = values
            rows.append(
                f"    | {run['wing']} | {run['simulations']} | {k} | {c2st:.3f} | {best:.3f} | "
                f"{mmd2:.1e} | {part:.1%} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    with warnings.catch_warnings():
        # scikit-learn says of each network that it could be trained for longer.
        warnings.filterwarnings("ignore", module="sklearn")
        main()
