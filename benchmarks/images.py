"""Train NICE, RealNVP or Glow on images, in Pyro or in NumPyro.

    python benchmarks/images.py --data digits --flow glow --wing pyro
    python benchmarks/images.py --data mnist.npz --flow realnvp --wing numpyro --preset small

Prints held-out bits per dimension and writes into `--output` a sheet of samples, the flow, and the
figures as JSON. Run again with the same arguments it goes on where it was interrupted.

`--data` is `digits` (scikit-learn's, 8 × 8); `mnist`, `fashion_mnist`, `cifar10` or `celeba`,
fetched by Hugging Face's `datasets` where that is installed; or the path of an `.npz` file with
`x_train` and `x_test`, or with `x` alone, of whole numbers: (n, H, W) or (n, H, W, C).

`--wing normflows` trains that library's Glow, for comparison.
"""

import argparse
import contextlib
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from image_data import load, middle, validation
from matplotlib.figure import Figure

DRAWS = 4  # of dequantisation noise, over which held-out bits are averaged
# Of the logit. RealNVP takes 0.05; so small a one spreads out what hardly varies, as the background
# of handwritten digits (Papamakarios et al., "Masked autoregressive flow", arXiv:1705.07057).
ALPHA = 1e-6

# What is built and how it is trained. "long" takes an hour or two on one core; "paper", the papers'
# size, days on a GPU.
FLOWS = {
    "nice": {
        "quick": {"hidden": (200, 200)},
        "small": {"hidden": (500, 500, 500)},
        "long": {"hidden": (1000,) * 5},
        "paper": {"hidden": (1000,) * 5},
    },
    "realnvp": {
        "quick": {"channels": 8, "blocks": 1, "logit": ALPHA},
        "small": {"channels": 16, "blocks": 1, "logit": ALPHA},
        "long": {"channels": 16, "blocks": 1, "logit": ALPHA},
        "paper": {"channels": 64, "blocks": 8, "norm": "instance", "logit": ALPHA},
    },
    "glow": {
        "quick": {"levels": 2, "steps": 4, "channels": 32, "logit": ALPHA},
        "small": {"levels": 2, "steps": 8, "channels": 64, "logit": ALPHA},
        "long": {"levels": 2, "steps": 8, "channels": 64, "logit": ALPHA},
        "paper": {"levels": 3, "steps": 32, "channels": 512},
    },
}
TRAINING = {
    "quick": {"steps": 200, "batch_size": 64, "learning_rate": 3e-3, "schedule": "cosine"},
    "small": {"steps": 500, "batch_size": 64, "learning_rate": 3e-3, "schedule": "cosine"},
    "long": {"steps": 16_000, "batch_size": 64, "learning_rate": 5e-3, "schedule": "cosine"},
    "paper": {"steps": 200_000, "batch_size": 64, "learning_rate": 1e-3, "schedule": None},
}
# Where "long" differs from that.
LONG = {
    "nice": {"steps": 8000, "batch_size": 256, "learning_rate": 1e-3},
    "realnvp": {"steps": 18_000},
}


def main() -> None:
    """Load, train, score, draw and write down."""
    options = arguments()
    train, test, levels = load(options.data)
    test = middle(test, options.crop)
    shape = test.shape[1:]
    training = dict(TRAINING[options.preset])
    if options.preset == "long":
        training.update(LONG.get(options.flow, {}))
    for name in training:
        if getattr(options, name, None) is not None:
            training[name] = getattr(options, name)
    output = options.output or Path("out") / f"{options.flow}-{Path(options.data).stem}"
    output.mkdir(parents=True, exist_ok=True)
    print(f"{options.flow} on {len(train)} images {shape} of {levels} levels, {options.wing}")

    wing = WINGS[options.wing](levels, options)
    wing.bits = functools.partial(progress, wing, shape, levels)
    base = "logistic" if options.flow == "nice" else "normal"
    given = dict(FLOWS[options.flow][options.preset])
    if options.alpha is not None:
        given["logit"] = options.alpha or None
    flow = wing.build(options.flow, shape, given)
    training["standardize"] = options.flow != "nice"
    if options.flow == "nice":
        flow = wing.scaled(flow, log_scales(train, levels))
    checkpoint = output / f"{options.wing}.checkpoint"
    begin = time.perf_counter()
    flow, steps, skipped = wing.fit(
        flow, *validation(train, options.crop), checkpoint, training, base
    )
    seconds = time.perf_counter() - begin

    bits = held_out_bits(wing, flow, test, shape, levels)
    sheet(output / f"{options.wing}.png", wing.sample(flow, 64, options.temperature))
    wing.save(flow, output / f"{options.wing}.safetensors")
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
    parser.add_argument("--wing", choices=WINGS, default="pyro")
    parser.add_argument("--preset", choices=TRAINING, default="quick")
    parser.add_argument("--steps", type=int, help="in place of the preset's")
    parser.add_argument("--batch-size", type=int, help="in place of the preset's")
    parser.add_argument("--learning-rate", type=float, help="in place of the preset's")
    parser.add_argument("--flips", action="store_true", help="mirror every second image")
    parser.add_argument("--crop", type=int, help="train on random windows of so many pixels")
    parser.add_argument("--alpha", type=float, help="of the logit; 0 for none")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sheet (1)")
    parser.add_argument("--device", default="cpu", help="Pyro: where to train (cpu)")
    parser.add_argument("--compile", action="store_true", help="Pyro: train by torch.compile")
    parser.add_argument(
        "--mixed",
        action="store_true",
        help="networks in half precision: bfloat16 in Pyro, in NumPyro TensorFloat32",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder (out/FLOW-DATA)")
    return parser.parse_args()


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

    def scaled(self, flow, log_scale) -> Any:
        flow.layers[0].log_scale.data.copy_(self.torch.from_numpy(log_scale))
        return flow

    def fit(self, flow, train, held_out, checkpoint, training, base) -> tuple[Any, int, int]:
        def augment(x, generator):
            x = self.package.dequantize(x, generator, levels=self.levels)
            if self.options.crop and x.shape[-1] != self.options.crop:
                x = self.windows(x, generator)
            if self.options.flips:
                turned = self.torch.rand(len(x), generator=generator, device=x.device) < 0.5
                x = self.torch.where(turned[:, None, None, None], x.flip(-1), x)
            return x

        with self.mixed():
            result = self.package.fit(
                flow,
                self.torch.from_numpy(np.ascontiguousarray(train)),
                validation=self.torch.from_numpy(np.ascontiguousarray(held_out)),
                augment=augment,
                checkpoint=checkpoint,
                progress=self.bits,
                seed=self.options.seed,
                compile=self.options.compile,
                base=base,
                **training,
            )
        return result.flow, len(result.losses), result.skipped

    def mixed(self) -> contextlib.AbstractContextManager:
        kind, torch = self.options.device, self.torch
        return torch.autocast(kind.partition(":")[0], torch.bfloat16, self.options.mixed)

    def windows(self, x, generator) -> Any:
        """Cut a random window out of each image."""
        size, torch = self.options.crop, self.torch
        windows = x.unfold(2, size, 1).unfold(3, size, 1)  # (n, C, places, places, size, size)
        rows, columns = (
            torch.randint(count, (len(x),), generator=generator, device=x.device)
            for count in windows.shape[2:4]
        )
        return windows[torch.arange(len(x), device=x.device), :, rows, columns]

    def save(self, flow, path: Path) -> None:
        self.package.save(flow, path)

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

    def scaled(self, flow, log_scale) -> Any:
        import equinox

        log_scale = self.jax.numpy.asarray(log_scale)
        return equinox.tree_at(lambda flow: flow.layers[0].log_scale, flow, log_scale)

    def fit(self, flow, train, held_out, checkpoint, training, base) -> tuple[Any, int, int]:
        jnp = self.jax.numpy

        def augment(x, key):
            x = self.package.dequantize(x, key, levels=self.levels)
            if self.options.crop and x.shape[-1] != self.options.crop:
                x = self.windows(x, self.jax.random.fold_in(key, 2))
            if self.options.flips:
                turned = self.jax.random.bernoulli(self.jax.random.fold_in(key, 1), 0.5, (len(x),))
                x = jnp.where(turned[:, None, None, None], x[..., ::-1], x)
            return x

        with self.mixed():
            result = self.package.fit(
                flow,
                train,
                validation=held_out,
                augment=augment,
                checkpoint=checkpoint,
                progress=self.bits,
                key=self.keys[1],
                base=base,
                **training,
            )
        return result.flow, len(result.losses), result.skipped

    def mixed(self) -> contextlib.AbstractContextManager:
        return self.jax.default_matmul_precision("tensorfloat32" if self.options.mixed else None)

    def windows(self, x, key) -> Any:
        """Cut a random window out of each image."""
        size = self.options.crop
        places = self.jax.numpy.array([side - size + 1 for side in x.shape[-2:]])
        corners = self.jax.random.randint(key, (len(x), 2), 0, places)

        def window(image, corner):
            return self.jax.lax.dynamic_slice(image, (0, *corner), (len(image), size, size))

        return self.jax.vmap(window)(x, corners)

    def save(self, flow, path: Path) -> None:
        self.package.save(flow, path)

    def log_prob(self, flow, pixels) -> np.ndarray:
        return np.asarray(self.package.flow_distribution(flow).log_prob(pixels.astype("float32")))

    def sample(self, flow, count, temperature) -> np.ndarray:
        density = self.package.flow_distribution(flow, temperature=temperature)
        return np.asarray(density.sample(self.keys[2], (count,)))


def normflows_wing(levels: int, options: argparse.Namespace) -> Any:
    """Another library's Glow, for comparison."""
    for name in ("crop", "flips", "mixed", "compile"):
        if getattr(options, name):
            raise SystemExit(f"--{name} is not for --wing normflows")
    from images_normflows import NormflowsWing

    return NormflowsWing(levels, options)


WINGS: dict[str, Any] = {
    "pyro": PyroWing,
    "numpyro": NumPyroWing,
    "normflows": normflows_wing,
}


def log_scales(train: np.ndarray, levels: int) -> np.ndarray:
    """Return the log-scales with which NICE's logistic base has the spread of each pixel.

    NICE takes pixels as they are, not standardised: its conditioners would otherwise see the
    dequantisation noise of the background as large as the digits.
    """
    variance = (train.reshape(len(train), -1).var(0) + 1 / 12) / levels**2
    return (0.5 * np.log(3 * variance) - math.log(math.pi)).astype("float32")


# Results


def progress(wing: Any, shape: Any, levels: int, loss: float) -> str:
    """Write a loss as the progress bar shows it."""
    return f"{wing.package.bits_per_dim(-loss, shape, levels=levels):.3f} bits/dim"


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
