"""Glow as normflows builds it, for `images.py`: the same architecture, data and loop."""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import normflows as nf
import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import trange

import pyroflows


class NormflowsWing:
    """normflows on PyTorch. Its Glow has one mean and scale per latent channel as its base."""

    package = pyroflows  # of which only `bits_per_dim` is used

    def __init__(self, levels: int, options: argparse.Namespace) -> None:
        self.levels, self.seed = levels, options.seed
        torch.manual_seed(options.seed)

    def build(self, name: str, shape: tuple[int, ...], given: dict[str, Any]) -> nn.Module:
        if name != "glow":
            raise SystemExit(f"--wing normflows: has no multi-scale {name}; pass --flow glow")
        flow = multiscale_glow(shape, given["levels"], given["steps"], given["channels"])
        alpha = given["logit"]
        # A Standardization that nothing has set is the identity.
        flow.logit = pyroflows.Logit(shape, alpha) if alpha else pyroflows.Standardization(shape)
        return flow

    def fit(self, flow, train, held_out, checkpoint, training, base) -> tuple[Any, int, int]:
        x = torch.from_numpy(np.ascontiguousarray(train))
        dims = (0, 2, 3)
        # As `standardize=True`: an affine map of each channel behind the logit.
        pixels = flow.logit.inv(pyroflows.dequantize(x, levels=self.levels))
        flow.shift, flow.scale = pixels.mean(dims, keepdim=True), pixels.std(dims, keepdim=True)
        optimizer = torch.optim.Adam(flow.parameters(), lr=training["learning_rate"])
        factor = functools.partial(_factor, **training)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        best, kept = np.inf, {}
        size = training["batch_size"]
        epoch = -(-len(x) // size)
        for step in (bar := trange(training["steps"], desc="fit", unit="step")):
            if step % epoch == 0:
                order = torch.randperm(len(x))
            rows = x[order[(step % epoch) * size :][:size]]
            loss = -log_prob(flow, pyroflows.dequantize(rows, levels=self.levels)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step == training["steps"] - 1 or (step + 1) % epoch == 0:
                value = -self.log_prob(flow, (held_out + 0.5) / self.levels).mean()
                if value < best:
                    best, kept = value, {k: v.clone() for k, v in flow.state_dict().items()}
            bits = pyroflows.bits_per_dim(-loss.item(), train.shape[1:], levels=self.levels)
            bar.set_postfix(loss=f"{bits:.3f} bits/dim", refresh=False)
        flow.load_state_dict(kept)
        return flow, training["steps"], 0

    def log_prob(self, flow, pixels) -> np.ndarray:
        with torch.no_grad():
            return log_prob(flow, torch.from_numpy(pixels.astype("float32"))).numpy()

    def sample(self, flow, count, temperature) -> np.ndarray:
        with torch.no_grad():
            images, _ = flow.sample(count, temperature=temperature)
            return flow.logit(images * flow.scale + flow.shift).numpy()

    def save(self, flow, path: Path) -> None:
        torch.save(flow.state_dict(), path.with_suffix(".pt"))


def _factor(step: int, steps: int, schedule: str | None, **rest: Any) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * step / steps)) if schedule == "cosine" else 1.0


def multiscale_glow(shape: tuple[int, ...], levels: int, steps: int, width: int) -> nn.Module:
    """Build it as the library's own example does, with Glow's base."""
    c, h, w = shape
    bases, flows, merges = [], [], []
    for i in range(levels):
        inner = c * 2 ** (levels + 1 - i)
        blocks = [nf.flows.GlowBlock(inner, width, split_mode="channel") for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        size = 2 ** (levels - i)
        if i > 0:
            merges.append(nf.flows.Merge())
        channels = inner // 2 if i > 0 else inner
        bases.append(nf.distributions.GlowBase((channels, h // size, w // size)))
    flow = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)
    flow.shift, flow.scale = torch.zeros(1, c, 1, 1), torch.ones(1, c, 1, 1)
    return flow


def log_prob(flow: nn.Module, pixels: Tensor) -> Tensor:
    """Return the log-density of pixels in the unit interval, where normflows takes labels, too."""
    y, ladj = flow.logit.inverse_and_ladj(pixels)
    ladj = ladj - math.prod(y.shape[2:]) * flow.scale.log().sum()
    return flow.log_prob((y - flow.shift) / flow.scale, None) + ladj
