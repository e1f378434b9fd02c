"""RealNVP and Glow on images: the levels of the builders' multi-scale flows."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from numpyro_flows.chain import Chain, Stack
from numpyro_flows.checks import as_count
from numpyro_flows.coupling import AdditiveCoupling, AffineCoupling
from numpyro_flows.image import MultiScale, Squeeze
from numpyro_flows.linear import InvertibleConv1x1, shared_gain
from numpyro_flows.networks import ConvNet, ResNet
from numpyro_flows.normalization import ActNorm, BatchNorm
from numpyro_flows.partition import Partition, channels, checkerboard
from numpyro_flows.transform import TransformModule

COUPLINGS: dict[str, Any] = {"affine": AffineCoupling, "additive": AdditiveCoupling}
CHECKERBOARDS, LAST_CHECKERBOARDS, CHANNELS = 3, 4, 3  # couplings of RealNVP's scales


def realnvp_levels(
    shape: tuple[int, ...],
    end: list[TransformModule],
    *,
    scales: int | None,
    network: Callable[..., Any] | None,
    blocks: int,
    width: int,
    norm: str | None,
    batch_norm: bool,
    activation: str,
    init_scale: float,
    budget: float | None,
    key: Array,
    **options: Any,
) -> MultiScale:
    """Return RealNVP's scales; `budget` is shared by the log-scales of all couplings."""
    if scales is None:
        scales = 1 + min(2, halvings(shape) - (shape[1] == shape[2] == 2 ** halvings(shape)))
    check_size(shape, scales, scales - 1, "scales")
    count = (scales - 1) * (CHECKERBOARDS + CHANNELS) + LAST_CHECKERBOARDS
    keys = iter(jax.random.split(key, count))

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
            key = next(keys)
            if network:
                net = network(sees, gives, key)
            else:
                net = ResNet(sees, gives, width, blocks, **more, key=key)
            limit = None if budget is None else budget / count
            layers.append(coupling_of("affine", shape, part, net, limit, options, key))
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
    network: Callable[..., Any] | None,
    width: int,
    coupling: str,
    learned_prior: bool,
    activation: str,
    init_scale: float,
    budget: float | None,
    key: Array,
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

    def step(shape: tuple[int, ...], key: Array) -> Chain:
        net_key, matrix_key = jax.random.split(key)
        part = channels(shape)
        outputs = COUPLINGS[coupling].outputs
        sees, gives = part.sizes[0] + options["context_dim"], outputs * part.sizes[1]
        if network:
            net = network(sees, gives, net_key)
        else:
            net = ConvNet(sees, gives, (width, width), **more, key=net_key)
        layer = coupling_of(coupling, shape, part, net, limit, options, net_key)
        matrix = InvertibleConv1x1(shape, gain=gain, key=matrix_key)
        return Chain([layer, matrix, ActNorm(shape)])

    def prior(shape: tuple[int, ...], coarsest: bool, key: Array) -> list[TransformModule]:
        if not learned_prior:
            return []
        if coarsest:
            return [ActNorm(shape)]
        return [
            AffineCoupling(shape, hidden=(), init_scale=init_scale, **context_of(options), key=key)
        ]

    built: list[TransformModule] = []
    for level in range(levels):
        c, h, w = shape
        inner = (4 * c, h // 2, w // 2)
        key, prior_key, *keys = jax.random.split(key, 2 + steps)
        layers = [
            *prior(inner, level == levels - 1, prior_key),
            Stack([step(inner, k) for k in keys]),
            Squeeze(shape),
        ]
        built.insert(0, Chain([*layers, *(end if level == 0 else [])]))
        shape = (2 * c, h // 2, w // 2)
    return MultiScale(built)


def coupling_of(
    kind: str,
    shape: tuple[int, ...],
    partition: Partition,
    network: Any,
    limit: float | None,
    options: dict[str, Any],
    key: Array,
) -> TransformModule:
    """Return a coupling with the network given."""
    more = {"scale": options["scale"], "limit": limit} if kind == "affine" else {}
    return COUPLINGS[kind](
        shape, partition=partition, network=network, **context_of(options), **more, key=key
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
