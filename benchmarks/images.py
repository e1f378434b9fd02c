"""Train NICE, RealNVP or Glow on images, in Pyro or in NumPyro.

    python benchmarks/images.py --data digits --flow glow --wing pyro
    python benchmarks/images.py --data mnist.npz --flow realnvp --wing numpyro --preset small

Prints held-out bits per dimension and writes into `--output` a sheet of samples, the flow, and the
figures as JSON. Run again with the same arguments it goes on where it was interrupted.

`--data` is `digits` (scikit-learn's, 8 × 8), `mnist`, `fashion_mnist` or `cifar10`, fetched by
Hugging Face's `datasets` where that is installed, or the path of an `.npz` file with `x_train` and
`x_test`, or with `x` alone, of whole numbers: (n, H, W) or (n, H, W, C).
"""

import argparse
import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

ON_THE_HUB = {
    "mnist": ("ylecun/mnist", "image"),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", "image"),
    "cifar10": ("uoft-cs/cifar10", "img"),
}
HELD_OUT = 0.1  # of data that come without a test set
DRAWS = 4  # of dequantisation noise, over which held-out bits are averaged
ALPHA = 0.05  # RealNVP, section 4.1

# What is built and how it is trained. "paper" is the papers' size, for a GPU and for days.
FLOWS = {
    "nice": {
        "quick": {"hidden": (200, 200)},
        "small": {"hidden": (500, 500, 500)},
        "paper": {"hidden": (1000,) * 5},
    },
    "realnvp": {
        "quick": {"channels": 16, "blocks": 1, "logit": ALPHA},
        "small": {"channels": 32, "blocks": 2, "logit": ALPHA},
        "paper": {"channels": 64, "blocks": 8, "norm": "instance", "logit": ALPHA},
    },
    "glow": {
        "quick": {"levels": 2, "steps": 4, "channels": 32},
        "small": {"levels": 2, "steps": 8, "channels": 64},
        "paper": {"levels": 3, "steps": 32, "channels": 512},
    },
}
TRAINING = {
    "quick": {"steps": 200, "batch_size": 64, "learning_rate": 2e-3},
    "small": {"steps": 500, "batch_size": 64, "learning_rate": 1e-3},
    "paper": {"steps": 200_000, "batch_size": 64, "learning_rate": 1e-3},
}


def main() -> None:
    """Load, train, score, draw and write down."""
    options = arguments()
    train, test, levels = load(options.data)
    shape = train.shape[1:]
    training = dict(TRAINING[options.preset])
    for name in training:
        if getattr(options, name) is not None:
            training[name] = getattr(options, name)
    output = options.output or Path("out") / f"{options.flow}-{Path(options.data).stem}"
    output.mkdir(parents=True, exist_ok=True)
    print(f"{options.flow} on {len(train)} images {shape} of {levels} levels, {options.wing}")

    wing = WINGS[options.wing](levels, options)
    base = "logistic" if options.flow == "nice" else "normal"
    flow = wing.build(options.flow, shape, FLOWS[options.flow][options.preset])
    checkpoint = output / f"{options.wing}.checkpoint"
    begin = time.perf_counter()
    flow, steps, skipped = wing.fit(flow, *validation(train), checkpoint, training, base)
    seconds = time.perf_counter() - begin

    bits = held_out_bits(wing, flow, test, shape, levels)
    sheet(output / f"{options.wing}.png", wing.sample(flow, 64, options.temperature))
    wing.package.save(flow, output / f"{options.wing}.safetensors")
    nats = (math.log2(levels) - bits) * math.prod(shape) * math.log(2)
    figures = {
        "bits_per_dim": round(bits, 4),
        "log_likelihood_on_the_unit_interval": round(nats, 2),
        "steps_taken": steps,
        "steps_skipped": skipped,
        "seconds": round(seconds, 1),
        **{name: getattr(options, name) for name in ("data", "flow", "wing", "preset", "seed")},
        **training,
    }
    (output / f"{options.wing}.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"held out: {bits:.3f} bits/dim; {seconds:.0f} s; written to {output}/")


def arguments() -> argparse.Namespace:
    first, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=first)
    parser.add_argument("--data", default="digits", help="digits, mnist, … or a path (digits)")
    parser.add_argument("--flow", choices=FLOWS, default="glow")
    parser.add_argument("--wing", choices=("pyro", "numpyro"), default="pyro")
    parser.add_argument("--preset", choices=TRAINING, default="quick")
    parser.add_argument("--steps", type=int, help="in place of the preset's")
    parser.add_argument("--batch-size", type=int, help="in place of the preset's")
    parser.add_argument("--learning-rate", type=float, help="in place of the preset's")
    parser.add_argument("--flips", action="store_true", help="mirror every second image")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sheet (1)")
    parser.add_argument("--device", default="cpu", help="Pyro: where to train (cpu)")
    parser.add_argument("--compile", action="store_true", help="Pyro: train by torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder (out/FLOW-DATA)")
    return parser.parse_args()


# Data


def load(name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Return images to train on and to hold out, (n, C, H, W), and their number of grey levels."""
    if name == "digits":
        from sklearn.datasets import load_digits

        return (*split(channels_first(load_digits().images.astype("uint8"))), 17)
    if name in ON_THE_HUB:
        return (*from_the_hub(*ON_THE_HUB[name]), 256)
    path = Path(name)
    if not path.is_file():
        raise SystemExit(
            f"--data {name}: no such file; pass digits, {', '.join(ON_THE_HUB)} or an .npz file "
            "with x_train and x_test"
        )
    with np.load(path) as file:
        if "x_train" in file:
            return channels_first(file["x_train"]), channels_first(file["x_test"]), 256
        return (*split(channels_first(file["x"])), 256)


def from_the_hub(repository: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    if not importlib.util.find_spec("datasets"):
        raise SystemExit(
            "--data: this set comes from the Hugging Face hub: pip install datasets, or pass the "
            "path of an .npz file with x_train and x_test"
        )
    from datasets import load_dataset

    sets = load_dataset(repository)
    return tuple(
        channels_first(np.stack([np.asarray(image) for image in sets[part][column]]))
        for part in ("train", "test")
    )


def channels_first(x: np.ndarray) -> np.ndarray:
    return x[:, None] if x.ndim == 3 else np.moveaxis(x, -1, 1)


def validation(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep some of the training images back, to stop by and to choose the parameters by."""
    count = min(500, int(HELD_OUT * len(x)))
    return x[:-count], x[-count:]


def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the last of data that come without a test set."""
    count = int(HELD_OUT * len(x))
    return x[:-count], x[-count:]


# Wings. Each has the same few verbs.


class PyroWing:
    """Pyro on PyTorch."""

    def __init__(self, levels: int, options: argparse.Namespace) -> None:
        import torch

        import pyroflows

        self.torch, self.package = torch, pyroflows
        self.levels, self.options = levels, options
        torch.manual_seed(options.seed)

    def build(self, name: str, shape: tuple[int, ...], given: dict[str, Any]) -> Any:
        return getattr(self.package, name)(shape, **given).to(self.options.device)

    def fit(self, flow, train, held_out, checkpoint, training, base) -> tuple[Any, int, int]:
        def augment(x, generator):
            x = self.package.dequantize(x, generator, levels=self.levels)
            if self.options.flips:
                turned = self.torch.rand(len(x), generator=generator, device=x.device) < 0.5
                x = self.torch.where(turned[:, None, None, None], x.flip(-1), x)
            return x

        result = self.package.fit(
            flow,
            self.torch.from_numpy(np.ascontiguousarray(train)),
            validation=self.torch.from_numpy(np.ascontiguousarray(held_out)),
            augment=augment,
            standardize=True,
            checkpoint=checkpoint,
            seed=self.options.seed,
            compile=self.options.compile,
            base=base,
            **training,
        )
        return result.flow, len(result.losses), result.skipped

    def log_prob(self, flow, pixels) -> np.ndarray:
        x = self.torch.from_numpy(pixels.astype("float32")).to(self.options.device)
        with self.torch.no_grad():
            return self.package.flow_distribution(flow).log_prob(x).cpu().numpy()

    def sample(self, flow, count, temperature) -> np.ndarray:
        with self.torch.no_grad():
            density = self.package.flow_distribution(flow, temperature=temperature)
            return density.sample((count,)).cpu().numpy()


class NumPyroWing:
    """NumPyro on JAX, which finds its device itself."""

    def __init__(self, levels: int, options: argparse.Namespace) -> None:
        import jax

        import numpyro_flows

        self.jax, self.package = jax, numpyro_flows
        self.levels, self.options = levels, options
        self.keys = jax.random.split(jax.random.key(options.seed), 3)

    def build(self, name: str, shape: tuple[int, ...], given: dict[str, Any]) -> Any:
        return getattr(self.package, name)(shape, **given, key=self.keys[0])

    def fit(self, flow, train, held_out, checkpoint, training, base) -> tuple[Any, int, int]:
        jnp = self.jax.numpy

        def augment(x, key):
            x = self.package.dequantize(x, key, levels=self.levels)
            if self.options.flips:
                turned = self.jax.random.bernoulli(self.jax.random.fold_in(key, 1), 0.5, (len(x),))
                x = jnp.where(turned[:, None, None, None], x[..., ::-1], x)
            return x

        result = self.package.fit(
            flow,
            train,
            validation=held_out,
            augment=augment,
            standardize=True,
            checkpoint=checkpoint,
            key=self.keys[1],
            base=base,
            **training,
        )
        return result.flow, len(result.losses), result.skipped

    def log_prob(self, flow, pixels) -> np.ndarray:
        return np.asarray(self.package.flow_distribution(flow).log_prob(pixels.astype("float32")))

    def sample(self, flow, count, temperature) -> np.ndarray:
        density = self.package.flow_distribution(flow, temperature=temperature)
        return np.asarray(density.sample(self.keys[2], (count,)))


WINGS: dict[str, Any] = {"pyro": PyroWing, "numpyro": NumPyroWing}


# Results


def held_out_bits(wing: Any, flow: Any, test: np.ndarray, shape: Any, levels: int) -> float:
    """Return mean bits per dimension, with the same dequantisation noise in both wings."""
    rng, size, total = np.random.default_rng(0), 250, 0.0
    for _ in range(DRAWS):
        for begin in range(0, len(test), size):
            x = test[begin : begin + size]
            total += wing.log_prob(flow, (x + rng.random(x.shape)) / levels).sum(dtype="float64")
    mean = total / (DRAWS * len(test))
    return float(wing.package.bits_per_dim(mean, shape, levels=levels))


def sheet(path: Path, images: np.ndarray) -> None:
    """Draw a sheet of 8 × 8 images."""
    images = np.moveaxis(np.clip(np.nan_to_num(images), 0, 1), 1, -1)
    height, width, channels = images.shape[1:]
    rows = images.reshape(8, 8, height, width, channels).swapaxes(1, 2)
    figure = Figure(figsize=(6, 6 * height / width), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(rows.reshape(8 * height, 8 * width, channels), cmap="gray_r", vmin=0, vmax=1)
    axes.axis("off")
    figure.savefig(path)


if __name__ == "__main__":
    main()
