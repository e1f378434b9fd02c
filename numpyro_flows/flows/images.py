"""RealNVP and Glow on images: the levels of multi-scale flows."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx

from numpyro_flows.layers.chain import Chain, Stack
from numpyro_flows.layers.coupling import Coupling
from numpyro_flows.layers.elementwise import ActNorm, BatchNorm
from numpyro_flows.layers.linear import InvertibleConv1x1
from numpyro_flows.layers.multiscale import MultiScale, Squeeze
from numpyro_flows.rng import RandomKey, split
from numpyro_flows.transform import TransformModule
from pyroflows_common.levels import CHANNELS, CHECKERBOARDS, LAST_CHECKERBOARDS, realnvp_depth
from pyroflows_common.partition import Partition, channels, checkerboard

# Makes a coupling from an event shape, a partition, the width of its network and a random key.
CouplingOfWidth = Callable[[tuple[int, ...], Partition, int, RandomKey], TransformModule]


def coupling_of(
    kind: type[Coupling],
    network: Callable[[int, int, RandomKey], eqx.Module] | None,
    shape: int | tuple[int, ...],
    partition: Partition,
    key: RandomKey,
    *,
    context_dim: int,
    **options: Any,
) -> TransformModule:
    """Return a coupling with its own network, made by a function if one is given."""
    if network is not None:
        size_a, size_b = partition.sizes
        options["network"] = network(size_a + context_dim, kind.outputs * size_b, key)
    return kind(shape, partition=partition, context_dim=context_dim, key=key, **options)


def realnvp_levels(
    shape: tuple[int, ...],
    coupling: CouplingOfWidth,
    end: list[TransformModule],
    *,
    scales: int,
    width: int,
    batch_norm: bool,
    key: RandomKey,
) -> MultiScale:
    """Return RealNVP's scales; the width of the networks doubles from scale to scale."""
    keys = iter(split(key, realnvp_depth(scales)))

    def couplings(
        partition: Partition, shape: tuple[int, ...], width: int, count: int
    ) -> Iterator[TransformModule]:
        for i in range(count):
            yield coupling(shape, partition.swap if i % 2 else partition, width, next(keys))
            if batch_norm:
                yield BatchNorm(shape)

    levels: list[TransformModule] = []
    for scale in range(scales):
        c, h, w = shape
        if scale == scales - 1:
            layers = [*couplings(checkerboard(shape), shape, width, LAST_CHECKERBOARDS)]
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
    coupling: CouplingOfWidth,
    end: list[TransformModule],
    *,
    levels: int,
    steps: int,
    width: int,
    gain: Callable[[int], float],
    prior: Callable[..., TransformModule] | None,
    key: RandomKey,
) -> MultiScale:
    """Return Glow's levels; `prior`, if any, makes the layer of the factored-out variables.

    `gain` gives the gain of the matrices on a number of channels.
    """

    def step(shape: tuple[int, ...], key: RandomKey) -> Chain:
        net_key, matrix_key = split(key, 2)
        layer = coupling(shape, channels(shape), width, net_key)
        matrix = InvertibleConv1x1(shape, gain=gain(shape[0]), key=matrix_key)
        return Chain([layer, matrix, ActNorm(shape)])

    built: list[TransformModule] = []
    for level in range(levels):
        c, h, w = shape
        inner = (4 * c, h // 2, w // 2)
        key, prior_key, *keys = split(key, 2 + steps)
        priors: list[TransformModule] = []
        if prior is not None:
            priors = [ActNorm(inner) if level == levels - 1 else prior(inner, key=prior_key)]
        layers = [*priors, Stack([step(inner, k) for k in keys]), Squeeze(shape)]
        built.insert(0, Chain([*layers, *(end if level == 0 else [])]))
        shape = (2 * c, h // 2, w // 2)
    return MultiScale(built)
