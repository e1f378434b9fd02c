"""Guides: flows as variational posteriors of Pyro models, ready to use."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyroflows.flows.builders import glow
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.layers.chain import Chain, Stack
from pyroflows.layers.coupling import AdditiveCoupling, AffineCoupling
from pyroflows.layers.linear import Permutation
from pyroflows.layers.scales import TanhScale
from pyroflows.layers.tails import LogTails, SinhArcsinh
from pyroflows.transform import TransformModule
from pyroflows_common.checks import as_count
from pyroflows_common.partition import as_partition

# Bound of a guide's log-scales over all its couplings: posteriors like funnels need a wide one.
LOG_SCALE_BUDGET = 24.0
# Standard deviation of the first weights of each conditioner's last layer.
INIT_SCALE = 1e-3


class AutoNICE(AutoFlow):
    """A guide of additive couplings.

    Pairs of couplings that swap their halves, each behind a fixed random permutation.

    Args:
        model: as `AutoFlow`'s.
        layers: number of couplings.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        options: as `AutoFlow`'s.

    References:
        Dinh, Krueger and Bengio, "NICE" (arXiv:1410.8516).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        layers: int = 20,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
        **options: Any,
    ) -> None:
        coupling = functools.partial(
            AdditiveCoupling, hidden=hidden, activation=activation, init_scale=INIT_SCALE
        )
        super().__init__(model, functools.partial(_pairs, coupling, layers), **options)


class AutoRealNVP(AutoFlow):
    """A guide of affine couplings: the one to try first.

    Pairs of couplings that swap their halves, each behind a fixed random permutation.

    Args:
        model: as `AutoFlow`'s.
        layers: number of couplings.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        preset: None, or `"high_dim"` for thousands of latent numbers: a soft asymmetric clamp for
            a scale, learned tails of each base coordinate, and a limit to what far-out draws
            become.
        options: as `AutoFlow`'s.

    Raises:
        ValueError: where an argument is out of its range; the message names it.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803);
        Agrawal, Sheldon and Domke, "Advances in black-box VI" (arXiv:2006.10343), for the size;
        Andrade, "Stable training of normalizing flows for high-dimensional variational inference"
        (2024), for the preset.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        layers: int = 20,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
        preset: str | None = None,
        **options: Any,
    ) -> None:
        if preset not in (None, "high_dim"):
            raise ValueError(f"`preset` is {preset!r}, expected 'high_dim' or None")
        coupling = functools.partial(
            AffineCoupling,
            hidden=hidden,
            activation=activation,
            init_scale=INIT_SCALE,
            scale="clamp" if preset else "tanh",
            limit=LOG_SCALE_BUDGET / as_count(layers, "layers"),
        )
        build = functools.partial(_pairs, coupling, layers)
        super().__init__(model, functools.partial(_tailed, build) if preset else build, **options)


class AutoGlow(AutoFlow):
    """A guide of Glow's steps: `AutoFlow` with `glow`.

    Args:
        model: as `AutoFlow`'s.
        layers: number of steps.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        options: as `AutoFlow`'s.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        layers: int = 10,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
        **options: Any,
    ) -> None:
        build = functools.partial(
            glow,
            layers=layers,
            hidden=hidden,
            activation=activation,
            scale=TanhScale((1,), LOG_SCALE_BUDGET / as_count(layers, "layers")),
            init_scale=INIT_SCALE,
        )
        super().__init__(model, build, **options)


def _pairs(coupling: Callable[..., TransformModule], layers: int, size: int) -> TransformModule:
    """Stack couplings in pairs that swap their halves, each pair behind a random permutation.

    Without the permutations, coordinates of one half would see each other only through the other.
    """
    halves = as_partition("halves", size)
    random, order, pairs = np.random.default_rng(0), np.arange(size), []
    for _ in range(as_count(layers, "layers") // 2):
        permutation = random.permutation(size)
        order = order[permutation]
        pair = [coupling(size, partition=part) for part in (halves, halves.swap)]
        pairs.append(Chain([Permutation(permutation.tolist()), *pair]))
    stack = [Stack(pairs)] if pairs else []
    single = [coupling(size, partition=halves)] if layers % 2 else []
    return Chain([*stack, *single, Permutation(np.argsort(order).tolist())])


def _tailed(build: Callable[..., TransformModule], size: int) -> TransformModule:
    """Return a flow with learned tails at the base and a limit at the other end."""
    return Chain([SinhArcsinh(size), build(size), LogTails(size)])
