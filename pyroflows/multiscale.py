"""RealNVP and Glow on images: the levels of the builders' multi-scale flows."""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from pyroflows.chain import Chain, Stack
from pyroflows.checks import as_count
from pyroflows.coupling import AdditiveCoupling, AffineCoupling
from pyroflows.image import MultiScale, Squeeze
from pyroflows.linear import InvertibleConv1x1, shared_gain
from pyroflows.networks import ConvNet, ResNet
from pyroflows.normalization import ActNorm, BatchNorm
from pyroflows.partition import Partition, channels, checkerboard
from pyroflows.transform import TransformModule

COUPLINGS: dict[str, Any] = {"affine": AffineCoupling, "additive": AdditiveCoupling}
CHECKERBOARDS, LAST_CHECKERBOARDS, CHANNELS = 3, 4, 3  # couplings of RealNVP's scales


def realnvp_levels(
    shape: tuple[int, ...],
    end: list[TransformModule],
    *,
    scales: int | None,
    network: Callable[[int, int], nn.Module] | None,
    blocks: int,
    width: int,
    norm: str | None,
    batch_norm: bool,
    activation: str,
    init_scale: float,
    budget: float | None,
    **options: Any,
) -> MultiScale:
    """Return RealNVP's scales; `budget` is shared by the log-scales of all couplings."""
    if scales is None:
        scales = 1 + min(2, halvings(shape) - (shape[1] == shape[2] == 2 ** halvings(shape)))
    check_size(shape, scales, scales - 1, "scales")
    count = (scales - 1) * (CHECKERBOARDS + CHANNELS) + LAST_CHECKERBOARDS

    def couplings(partition: Partition, shape: tuple[int, ...], width: int, n: int) -> list[Any]:
        layers: list[TransformModule] = []
        for i in range(n):
            part = partition.swap if i % 2 else partition
            sees, gives = part.sizes[0] + options["context_dim"], 2 * part.sizes[1]
            more: dict[str, Any] = {
                "norm": norm,
                "activation": activation,
                "init_scale": init_scale,
            }
            if network:
                net = network(sees, gives)
            else:
                net = ResNet(sees, gives, width, blocks, **more)
            limit = None if budget is None else budget / count
            layers.append(coupling_of("affine", shape, part, net, limit, options))
            layers += [BatchNorm(shape)] if batch_norm else []
        return layers

    levels: list[TransformModule] = []
    for scale in range(scales):
        c, h, w = shape
        if scale == scales - 1:
            layers = couplings(checkerboard(shape), shape, width, LAST_CHECKERBOARDS)
        else:
            inner = (4 * c, h // 2, w // 2)
            layers = [
                *couplings(channels(inner), inner, 2 * width, CHANNELS),
                Squeeze(shape),
                *couplings(checkerboard(shape), shape, width, CHECKERBOARDS),
            ]
            shape, width = (2 * c, h // 2, w // 2), 2 * width
        levels.insert(0, Chain([*layers, *(end if scale == 0 else [])]))
    return MultiScale(levels)


def glow_levels(
    shape: tuple[int, ...],
    end: list[TransformModule],
    *,
    levels: int | None,
    steps: int,
    network: Callable[[int, int], nn.Module] | None,
    width: int,
    coupling: str,
    learned_prior: bool,
    activation: str,
    init_scale: float,
    budget: float | None,
    **options: Any,
) -> MultiScale:
    """Return Glow's levels; couplings share the `budget` of log-scales, None for no bound."""
    if coupling not in COUPLINGS:
        raise ValueError(f"`coupling` is {coupling!r}, expected one of {sorted(COUPLINGS)}")
    if levels is None:
        levels = max(1, min(3, halvings(shape)))
    check_size(shape, levels, levels, "levels")
    depth = levels * as_count(steps, "steps")
    limit, gain = (None, 1.0) if budget is None else (budget / depth, shared_gain(depth))
    more: dict[str, Any] = {"activation": activation, "init_scale": init_scale}

    def step(shape: tuple[int, ...]) -> Chain:
        part = channels(shape)
        outputs = COUPLINGS[coupling].outputs
        sees, gives = part.sizes[0] + options["context_dim"], outputs * part.sizes[1]
        if network:
            net = network(sees, gives)
        else:
            net = ConvNet(sees, gives, (width, width), **more)
        layer = coupling_of(coupling, shape, part, net, limit, options)
        return Chain([layer, InvertibleConv1x1(shape, gain=gain), ActNorm(shape)])

    def prior(shape: tuple[int, ...], coarsest: bool) -> list[TransformModule]:
        if not learned_prior:
            return []
        if coarsest:
            return [ActNorm(shape)]
        return [AffineCoupling(shape, hidden=(), init_scale=init_scale, **context_of(options))]

    built: list[TransformModule] = []
    for level in range(levels):
        c, h, w = shape
        inner = (4 * c, h // 2, w // 2)
        layers = [
            *prior(inner, level == levels - 1),
            Stack([step(inner) for _ in range(steps)]),
            Squeeze(shape),
        ]
        built.insert(0, Chain([*layers, *(end if level == 0 else [])]))
        shape = (2 * c, h // 2, w // 2)
    return MultiScale(built)


def coupling_of(
    kind: str,
    shape: tuple[int, ...],
    partition: Partition,
    network: nn.Module,
    limit: float | None,
    options: dict[str, Any],
) -> TransformModule:
    """Return a coupling with the network given."""
    more = {"scale": copy.deepcopy(options["scale"]), "limit": limit} if kind == "affine" else {}
    return COUPLINGS[kind](
        shape, partition=partition, network=network, **context_of(options), **more
    )


def context_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return what a prior's coupling has in common with the others."""
    return {name: options[name] for name in ("squash", "context_dim")}


def halvings(shape: tuple[int, ...]) -> int:
    """Count how often height and width can be halved."""
    _, h, w = shape
    return min((n & -n).bit_length() - 1 for n in (h, w))


def check_size(shape: tuple[int, ...], count: int, halved: int, name: str) -> None:
    """Refuse images that cannot be halved so often, and name the next size that can."""
    as_count(count, name)
    c, *sides = shape
    if halved > halvings(shape):
        factor = 2**halved
        good = tuple(-(-side // factor) * factor for side in sides)
        raise ValueError(
            f"`event_shape` is {shape}, but {name}={count} needs a height and width that are "
            f"multiples of {factor}: pad the images, to {(c, *good)} for example, or take fewer"
        )
