"""Learn the handwritten digits with RealNVP in Pyro and in NumPyro, beside Gaussian mixtures.

Prints a table of held-out bits per dimension and draws pictures into out/. Run by `make demo`;
`make demo ARGS=--docs` also puts the pictures into docs/assets/, and `ARGS="--seed 1"` starts from
other random numbers. Fails where a flow does not win, or where the two disagree.
"""

import argparse
import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.special import expit, logit
from sklearn.datasets import load_digits, make_moons
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

ROOT = Path(__file__).resolve().parent.parent
SIDE, LEVELS, ALPHA = 8, 17, 0.05
DRAWS = 10  # of dequantisation noise, over which the scores of held-out digits are averaged
TOLERANCE = 0.05  # bits per dimension by which the two flows may differ


def squeeze(grey: Any) -> Any:
    """Map dequantised grey levels from (0, 17) into (0, 1), at a distance from its ends."""
    return ALPHA / 2 + (1 - ALPHA) * grey / LEVELS


def unsqueeze(probability: np.ndarray) -> np.ndarray:
    """Map back to whole grey levels."""
    grey = LEVELS * (probability - ALPHA / 2) / (1 - ALPHA)
    return np.clip(np.floor(grey), 0, LEVELS - 1)


def bits_per_dim(log_prob: Callable[[np.ndarray], np.ndarray], grey: np.ndarray) -> float:
    """Return the bits that a pixel costs under a density of the logits.

    Args:
        log_prob: natural logarithm of that density.
        grey: dequantised digits; a unit of grey is one level, so the density at one of them is a
            lower bound on the probability of the level.
    """
    p = squeeze(grey)
    ladj = np.log((1 - ALPHA) / LEVELS) - np.log(p) - np.log1p(-p)
    nats = log_prob(logit(p)) + ladj.sum(axis=1)
    return -float(nats.mean()) / (SIDE**2 * math.log(2))


def dequantize(digits: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Repeat the digits with fresh uniform noise."""
    digits = np.concatenate([digits] * draws)
    return digits + np.random.default_rng(seed).random(digits.shape)


@dataclasses.dataclass
class Task:
    """What to learn, and the settings that both wings share."""

    train: np.ndarray
    validation: np.ndarray
    flow: dict[str, Any]  # arguments of `realnvp`
    fit: dict[str, Any]  # arguments of `fit`
    rate: float
    decay: float = 0.0  # of the networks' matrices, which keeps them from learning by heart
    grey: bool = False  # whether to dequantise, afresh in each batch


@dataclasses.dataclass
class Learned:
    """A density that one of the wings has learned, with arrays of NumPy in and out."""

    log_prob: Callable[[np.ndarray], np.ndarray]
    sample: Callable[[int], np.ndarray]
    steps: int
    seconds: float


def learn_in_pyro(task: Task, seed: int) -> Learned:
    """Fit a RealNVP in Pyro."""
    import torch

    from pyroflows import fit, flow_distribution, realnvp

    def augment(x, generator):
        return torch.logit(squeeze(x + torch.rand(x.shape, generator=generator)))

    def adam(parameters):
        matrices = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": task.decay}, {"params": others}]
        return torch.optim.AdamW(groups, lr=task.rate, weight_decay=0.0, fused=True)

    begin = time.perf_counter()
    torch.manual_seed(seed)
    result = fit(
        realnvp(task.train.shape[1], **task.flow),
        task.train,
        validation=task.validation,
        augment=augment if task.grey else None,
        optimizer=adam,
        seed=seed,
        **task.fit,
    )
    density = flow_distribution(result.flow)

    def log_prob(x):
        with torch.no_grad():
            return density.log_prob(torch.from_numpy(x).float()).numpy()

    def sample(count):
        return density.sample((count,)).numpy()

    return Learned(log_prob, sample, result.best_step, time.perf_counter() - begin)


def learn_in_numpyro(task: Task, seed: int) -> Learned:
    """Fit a RealNVP in NumPyro."""
    import jax
    import jax.numpy as jnp
    import optax

    from numpyro_flows import fit, flow_distribution, realnvp

    def augment(x, key):
        return jax.scipy.special.logit(squeeze(x + jax.random.uniform(key, x.shape)))

    def matrices(parameters):  # which have one dimension more here, the place in the stack
        return jax.tree.map(lambda p: p.ndim > 2, parameters)

    begin = time.perf_counter()
    start, train, draw = jax.random.split(jax.random.key(seed), 3)
    result = fit(
        realnvp(task.train.shape[1], key=start, **task.flow),
        task.train,
        validation=task.validation,
        augment=augment if task.grey else None,
        optimizer=optax.adamw(task.rate, weight_decay=task.decay, mask=matrices),
        key=train,
        **task.fit,
    )
    density = flow_distribution(result.flow)

    def log_prob(x):
        return np.asarray(jax.jit(density.log_prob)(jnp.asarray(x, jnp.float32)))

    def sample(count):
        return np.asarray(density.sample(draw, (count,)))

    return Learned(log_prob, sample, result.best_step, time.perf_counter() - begin)


WINGS = {"Pyro": learn_in_pyro, "NumPyro": learn_in_numpyro}


def digits_task() -> tuple[Task, np.ndarray]:
    """Return the digits to learn, and those that nothing sees before the table is made."""
    digits = load_digits().data.astype("float32")
    order = np.random.default_rng(0).permutation(len(digits))
    train, validation, test = np.split(digits[order], [1297, 1497])
    row, column = np.divmod(np.arange(SIDE**2), SIDE)
    checkerboard = ((row + column) % 2 == 0).tolist()
    task = Task(
        train,
        np.concatenate([validation] * 5),  # five draws of noise
        flow={"layers": 8, "hidden": (256,), "partition": checkerboard},
        fit={"steps": 1200, "batch_size": 128, "schedule": "cosine", "standardize": True}
        | {"validate_every": 50, "patience": 10},
        rate=2e-3,
        decay=3.0,
        grey=True,
    )
    return task, test


def moons_task() -> Task:
    """Return two moons to learn."""
    points = make_moons(2000, noise=0.08, random_state=0)[0].astype("float32")
    return Task(
        points[:1800],
        points[1800:],
        flow={"layers": 8, "hidden": (64, 64), "activation": "silu"},
        fit={"steps": 1000, "batch_size": 256, "schedule": "cosine", "standardize": True}
        | {"validate_every": 50, "patience": 10},
        rate=5e-3,
    )


def best_mixture(task: Task) -> tuple[GaussianMixture, GaussianMixture]:
    """Return a Gaussian, and the mixture of Gaussians that suits the validation data best."""
    # Five draws of noise, from which a mixture gains much; from ten it gains no more.
    train = logit(squeeze(dequantize(task.train, 5, seed=1)))
    held_out = logit(squeeze(dequantize(task.validation, 1, seed=2)))
    grid = [("full", k, floor) for k in (8, 10, 12, 15, 20) for floor in (0.03, 0.05, 0.1)]
    grid += [("tied", 30, 1e-3), ("diag", 40, 1e-3), ("diag", 80, 0.03), ("spherical", 80, 1e-3)]

    def mixture(kind: str, components: int, floor: float) -> GaussianMixture:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return GaussianMixture(
                components, covariance_type=kind, reg_covar=floor, random_state=0
            ).fit(train)

    best = max((mixture(*choice) for choice in grid), key=lambda m: m.score(held_out))
    return mixture("full", 1, 1e-6), best


def draw_digits(path: Path, sheets: dict[str, np.ndarray]) -> None:
    """Draw sheets of 6 × 8 digits side by side."""
    figure = Figure(figsize=(9, 2.5), dpi=150, layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    panels = figure.subplots(1, len(sheets))
    for axes, (caption, digits) in zip(panels, sheets.items(), strict=True):
        cells = np.pad(digits[:48].reshape(6, 8, SIDE, SIDE), ((0, 0), (0, 0), (1, 1), (1, 1)))
        axes.imshow(cells.transpose(0, 2, 1, 3).reshape(6 * (SIDE + 2), -1), cmap="gray_r")
        axes.set_title(caption, fontsize=10)
        axes.axis("off")
    figure.savefig(path)


def draw_moons(path: Path, points: np.ndarray, flows: dict[str, Learned]) -> None:
    """Draw points, and the densities that have been learned from them."""
    figure = Figure(figsize=(9, 2.2), dpi=110, layout="constrained")
    first, *others = figure.subplots(1, 1 + len(flows), sharex=True, sharey=True)
    box = (-1.5, 2.5, -1.0, 1.5)
    x, y = np.meshgrid(np.linspace(*box[:2], 320), np.linspace(*box[2:], 200))
    first.scatter(*points.T, s=1.5, color="#4d004b", linewidths=0)
    first.set_title(f"{len(points)} points", fontsize=10)
    first.set(aspect="equal", xticks=[], yticks=[])
    for axes, (name, flow) in zip(others, flows.items(), strict=True):
        density = np.exp(flow.log_prob(np.stack([x.ravel(), y.ravel()], axis=1)))
        axes.imshow(density.reshape(x.shape), origin="lower", extent=box, cmap="BuPu")
        axes.set_title(f"density learned in {name}", fontsize=10)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the flows and their training")
    parser.add_argument("--docs", action="store_true", help="also write docs/assets/demo-*.png")
    options = parser.parse_args()
    begin = time.perf_counter()

    task, test = digits_task()
    grey = dequantize(test, DRAWS, seed=3)
    flows = {}
    for name, learn in WINGS.items():
        print(f"Digits, RealNVP in {name}", flush=True)
        flows[name] = learn(task, options.seed)
    print("Digits, Gaussian mixtures", flush=True)
    gaussian, mixture = best_mixture(task)
    moons, moon_flows = moons_task(), {}
    for name, learn in WINGS.items():
        print(f"Two moons, RealNVP in {name}", flush=True)
        moon_flows[name] = learn(moons, options.seed)

    scores = {
        "Gaussian, full covariance": bits_per_dim(gaussian.score_samples, grey),
        f"best Gaussian mixture ({mixture.n_components} components, {mixture.covariance_type})": (
            bits_per_dim(mixture.score_samples, grey)
        ),
    }
    to_beat = min(scores.values())
    ours = {name: bits_per_dim(flow.log_prob, grey) for name, flow in flows.items()}
    notes = {name: f"{flow.seconds:4.0f} s, {flow.steps} steps" for name, flow in flows.items()}
    print(f"\nBits per dimension of {len(test)} digits held out; lower is better\n")
    for name, score in scores.items():
        print(f"  {name:<46} {score:.3f}")
    for name, score in ours.items():
        print(f"  {f'RealNVP in {name}':<46} {score:.3f}   {notes[name]}")

    sheets = {"digits held out": test}
    for name, flow in flows.items():
        sheets[f"drawn from the flow in {name}"] = unsqueeze(expit(flow.sample(48)))
    folders = [ROOT / "out"] + [ROOT / "docs" / "assets"] * options.docs
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        draw_digits(folder / "demo-digits.png", sheets)
        draw_moons(folder / "demo-moons.png", moons.train, moon_flows)
        print(f"\nPictures: {folder / 'demo-digits.png'}, {folder / 'demo-moons.png'}")
    print(f"{time.perf_counter() - begin:.0f} s in all, {time.process_time():.0f} s of a processor")

    for name, score in ours.items():
        if not score < to_beat:
            sys.exit(f"the flow in {name} does not beat the best Gaussian mixture")
    if max(ours.values()) - min(ours.values()) > TOLERANCE:
        sys.exit(f"the flows differ by more than {TOLERANCE} bits per dimension")


if __name__ == "__main__":
    main()
