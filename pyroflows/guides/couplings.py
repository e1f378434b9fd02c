"""Ready-to-use guides for Pyro models: couplings as variational posteriors."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from pyroflows.flows.builders import glow
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.layers.chain import Chain, Stack
from pyroflows.layers.coupling import AdditiveCoupling, AffineCoupling
from pyroflows.layers.linear import Permutation
from pyroflows.layers.scales import TanhScale
from pyroflows.layers.tails import LogTails
from pyroflows.transform import TransformModule
from pyroflows_common.budgets import GUIDE_BUDGET
from pyroflows_common.checks import as_count
from pyroflows_common.guides import INIT_SCALE, permutations
from pyroflows_common.partition import as_partition


class AutoNICE(AutoFlow):
    """A guide of additive couplings.

    The couplings form pairs that swap their halves. A fixed random permutation precedes each pair.

    Args:
        model: as in `AutoFlow`.
        layers: number of couplings.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        options: as in `AutoFlow`.

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
    """A guide of affine couplings: the first guide to try.

    The couplings form pairs that swap their halves. A fixed random permutation precedes each pair.

    Args:
        model: as in `AutoFlow`.
        layers: number of couplings.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        preset: None, or `"high_dim"` for thousands of latent numbers. That gives a soft asymmetric
            clamp as the scale, and a limit on far-out draws.
        options: as in `AutoFlow`.

    Raises:
        ValueError: if an argument is out of its range; the message names it.

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
            limit=GUIDE_BUDGET / as_count(layers, "layers"),
        )
        build = functools.partial(_pairs, coupling, layers)
        super().__init__(model, functools.partial(_limited, build) if preset else build, **options)


class AutoGlow(AutoFlow):
    """A guide of Glow's steps: `AutoFlow` with `glow`.

    Args:
        model: as in `AutoFlow`.
        layers: number of steps.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        options: as in `AutoFlow`.

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
            scale=TanhScale((1,), GUIDE_BUDGET / as_count(layers, "layers")),
            init_scale=INIT_SCALE,
        )
        super().__init__(model, build, **options)


def _pairs(coupling: Callable[..., TransformModule], layers: int, size: int) -> TransformModule:
    """Stack pairs of couplings that swap their halves, each after a random permutation.

    Without the permutations, coordinates of one half would see each other only through the other
    half.
    """
    halves = as_partition("halves", size)
    shuffles, restoring = permutations(size, as_count(layers, "layers") // 2)
    pairs = []
    for shuffle in shuffles:
        pair = [coupling(size, partition=part) for part in (halves, halves.swap)]
        pairs.append(Chain([Permutation(shuffle), *pair]))
    stack = [Stack(pairs)] if pairs else []
    single = [coupling(size, partition=halves)] if layers % 2 else []
    return Chain([*stack, *single, Permutation(restoring)])


def _limited(build: Callable[..., TransformModule], size: int) -> TransformModule:
    """Return a flow with a limit at its data's end."""
    return Chain([build(size), LogTails(size)])
