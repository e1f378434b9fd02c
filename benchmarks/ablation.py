"""What each component of Glow is worth: the flow without it, on the digits of scikit-learn.

    python benchmarks/ablation.py

trains every variant with two seeds, in NumPyro, prints held-out bits/dim, and writes the file
that the tutorial on Glow draws its figure from. It takes some ten minutes on two cores.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from image_data import load

from numpyro_flows import (
    AffineCoupling,
    Chain,
    MultiScale,
    Stack,
    TransformModule,
    bits_per_dim,
    channels,
    dequantize,
    fit,
    flow_distribution,
    glow,
)

OUTPUT = Path(__file__).parents[1] / "docs" / "tutorials" / "glow-ablation.json"
SHAPE, LEVELS = (1, 8, 8), 17
WIDTH = 32
TRAINING = {"steps": 300, "batch_size": 64, "learning_rate": 3e-3, "schedule": "cosine"}
DRAWS = 8  # of dequantisation noise, over which held-out bits are averaged

# The whole: two levels of four steps.
whole = functools.partial(glow, SHAPE, levels=2, steps=4, channels=WIDTH, logit=1e-6)
VARIANTS: dict[str, Any] = {
    "Glow": whole,
    "one level of eight steps": functools.partial(whole, levels=1, steps=8),
    "no learned prior": functools.partial(whole, learned_prior=False),
    "additive couplings": functools.partial(whole, coupling="additive"),
    "unbounded scale": functools.partial(whole, scale="exp", robust=False),
    "no ActNorm": lambda key: by_step(lambda block, k: Chain(block.layers[:2]), whole(key=key)),
    "halves swapped, no matrix": lambda key: by_step(swapped, whole(key=key)),
}


def by_step(change: Any, flow: MultiScale) -> MultiScale:
    """Rebuild a Glow with each of its steps changed."""
    levels = []
    for level in flow.levels:
        layers: list[TransformModule] = []
        for layer in level.layers:
            if isinstance(layer, Stack):
                layers += [change(block, k) for k, block in enumerate(layer.layers)]
            else:
                layers.append(layer)
        levels.append(Chain(layers))
    return MultiScale(levels)


def swapped(block: Chain, k: int) -> Chain:
    """Let the halves of the channels swap their parts from step to step, as RealNVP does."""
    coupling, _, actnorm = block.layers
    part = channels(block.event_shape)
    return Chain([
        AffineCoupling(
            block.event_shape,
            partition=part.swap if k % 2 else part,
            network=coupling.network,
            scale="sigmoid",
            limit=0.5,
            key=jax.random.key(0),
        ),
        actnorm,
    ])  # fmt: skip


def held_out_bits(flow: TransformModule, test: np.ndarray) -> float:
    log_prob = jax.jit(flow_distribution(flow).log_prob)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    mean = np.mean([log_prob(dequantize(test, key, levels=LEVELS)).mean() for key in keys])
    return float(bits_per_dim(mean, SHAPE, levels=LEVELS))


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description="Glow without each of its components.")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=TRAINING["steps"])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    train, test, _ = load("digits")
    found: dict[str, list[float]] = {}
    for name, build in VARIANTS.items():
        begin = time.perf_counter()
        for seed in range(options.seeds):
            key = jax.random.key(seed)
            result = fit(
                build(key=key),
                train,
                augment=functools.partial(dequantize, levels=LEVELS),
                standardize=True,
                progress=False,
                key=key,
                **{**TRAINING, "steps": options.steps},
            )
            found.setdefault(name, []).append(round(held_out_bits(result.flow, test), 4))
        seconds = (time.perf_counter() - begin) / options.seeds
        bits = found[name]
        print(f"{name:28} {statistics.mean(bits):.3f}  {bits}  {seconds:.0f} s", flush=True)
    about = {
        "levels": 2,
        "steps_of_a_level": 4,
        "channels": WIDTH,
        **TRAINING,
        "steps": options.steps,
    }
    options.output.write_text(json.dumps({"settings": about, "bits": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
