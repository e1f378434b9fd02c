"""Builders: NICE, RealNVP and Glow for vectors and images, each in one call."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
from jax import Array
from jaxtyping import Float

from numpyro_flows.flows.images import coupling_of, glow_levels, realnvp_levels
from numpyro_flows.layers.chain import Chain, Stack
from numpyro_flows.layers.coupling import AdditiveCoupling, AffineCoupling
from numpyro_flows.layers.elementwise import ActNorm, BatchNorm, DiagonalScaling, Standardization
from numpyro_flows.layers.linear import InvertibleLinear
from numpyro_flows.layers.multiscale import Flatten
from numpyro_flows.layers.pixels import Logit
from numpyro_flows.networks import ConvNet, ResNet
from numpyro_flows.rng import RandomKey, check_key, split
from numpyro_flows.transform import TransformModule
from numpyro_flows.tree import replace
from pyroflows_common import recipe
from pyroflows_common.budgets import IMAGE_BUDGET, LOG_SCALE_BUDGET, shared_gain
from pyroflows_common.checks import as_count, as_event_shape
from pyroflows_common.levels import glow_depth, realnvp_depth, realnvp_scales
from pyroflows_common.partition import Partition, as_partition, check_conditioned
from pyroflows_common.recipe import Recipe

COUPLINGS: dict[str, type[AdditiveCoupling | AffineCoupling]] = {
    "affine": AffineCoupling,
    "additive": AdditiveCoupling,
}


def _note(flow: TransformModule, recipe: Recipe) -> TransformModule:
    return replace(flow, recipe=recipe)


builder = functools.partial(recipe.builder, eqx.Module, _note)


@builder()
def nice(
    event_shape: int | Sequence[int],
    *,
    layers: int = 4,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    partition: str | Sequence[bool] | Partition = "alternating",
    network: Callable[[int, int, RandomKey], eqx.Module] | None = None,
    logit: float | None = None,
    context_dim: int = 0,
    robust: bool = True,
    init_scale: float = 0.0,
    key: RandomKey,
) -> TransformModule:
    """Build NICE: alternating additive couplings and a diagonal scaling at the base end.

    With a context, D may be 1: each coupling then shifts the number given the context alone.

    Args:
        event_shape: D or `(D,)`, D at least 2 without a context; or `(C, H, W)` for images, treated
            as vectors.
        layers: number of couplings; four in the paper.
        hidden: widths of the hidden layers of each conditioner.
        activation: activation of the conditioners.
        partition: `"alternating"` (the paper's), `"halves"`, a boolean mask or a `Partition`; every
            second coupling swaps the parts.
        network: function that makes a custom conditioner from its numbers of inputs and outputs and
            a random key.
        logit: α of a `Logit` at the data end, for pixels in the unit interval; None for no `Logit`.
        context_dim: size of the context; 0 for a flow without context.
        robust: whether conditioners see asinh of their input; False for the form in the paper.
        init_scale: initial standard deviation of the last layer of each conditioner.
        key: random key of the weights.

    Returns:
        The flow, which is initially the identity up to `init_scale`.

    Raises:
        ValueError: if an argument is out of range; the message names it.

    References:
        Dinh, Krueger and Bengio, "NICE" (arXiv:1410.8516), sections 3.2 to 3.4 and 5.1.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import flow_distribution, nice
        >>> density = flow_distribution(nice(4, key=jax.random.key(0)), "logistic")
        >>> density.log_prob(density.sample(jax.random.key(1), (3,))).shape
        (3,)
    """
    check_key(key)
    shape = as_event_shape(event_shape)
    size = math.prod(shape)
    check_conditioned(shape, context_dim)  # an image, too, in the shape that was given
    coupling = functools.partial(
        coupling_of,
        AdditiveCoupling,
        network,
        size,
        hidden=hidden,
        activation=activation,
        init_scale=init_scale,
        squash=robust,
        context_dim=context_dim,
    )
    partition, layers = as_partition(partition, size, context_dim), as_count(layers, "layers")
    couplings = _in_pairs(coupling, partition, layers, key)
    image = [Flatten(shape)] if len(shape) == 3 else []
    return Chain([DiagonalScaling(size), *couplings, *image, *_data_end(shape, logit)])


@builder(
    vectors=("layers", "hidden", "partition"),
    images=("scales", "blocks", "channels", "norm"),
)
def realnvp(
    event_shape: int | Sequence[int],
    *,
    layers: int = 8,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    scale: str | Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]] = "tanh",
    partition: str | Sequence[bool] | Partition = "halves",
    scales: int | None = None,
    blocks: int = 2,
    channels: int = 32,
    norm: str | None = None,
    network: Callable[[int, int, RandomKey], eqx.Module] | None = None,
    batch_norm: bool = False,
    logit: float | None = None,
    context_dim: int = 0,
    robust: bool = True,
    init_scale: float = 0.0,
    key: RandomKey,
) -> TransformModule:
    """Build RealNVP: alternating affine couplings, for images on several scales.

    On images, each scale has three couplings on a checkerboard, a `Squeeze` and three couplings on
    channels, and passes half of the channels on; the last scale has four couplings on a
    checkerboard. The width of the conditioners doubles from scale to scale.

    With a context, D may be 1: each coupling then scales and shifts the number given the context
    alone, and the density has the base's shape. For other shapes, alternate such flows with
    `SinhArcsinh` layers in a `Chain`.

    Args:
        event_shape: D or `(D,)`, D at least 2 without a context; or `(C, H, W)`.
        layers: vectors: number of couplings, L.
        hidden: vectors: widths of the hidden layers of each conditioner.
        activation: activation of the conditioners.
        scale: `"tanh"` (as in the paper, with a learned factor), `"sigmoid"`, `"clamp"`, `"exp"`
            or a callable.
        partition: vectors: `"halves"`, `"alternating"`, a boolean mask or a `Partition`; every
            second coupling swaps the parts.
        scales: images: number of scales. Default: up to 3, as the size allows.
        blocks: images: number of residual blocks in each `ResNet`.
        channels: images: width of the residual networks in the first scale.
        norm: images: normalisation in the residual networks, `"instance"`, `"batch"` or None.
        network: function that makes a custom conditioner from its numbers of inputs and outputs,
            for images of input and output channels, and a random key.
        batch_norm: whether a `BatchNorm` follows each coupling.
        logit: α of a `Logit` at the data end, for pixels in the unit interval; None for no `Logit`.
        context_dim: size of the context; 0 for a flow without context.
        robust: whether the log-scales of each coupling stay within 4 / L (images: 16 / L) of their
            initial values and conditioners see asinh of their input, which keeps deep flows
            invertible in float32 after any training; False for the form in the paper, which
            conditional densities of very different widths need.
        init_scale: initial standard deviation of the last layer of each conditioner.
        key: random key of the weights.

    Returns:
        The flow, which is initially the identity up to `init_scale`.

    Raises:
        ValueError: if an argument is out of range; the message names it.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import flow_distribution, realnvp
        >>> density = flow_distribution(realnvp(2, layers=4, key=jax.random.key(0)))
        >>> density.log_prob(jnp.zeros(2)).shape
        ()
    """
    check_key(key)
    shape = as_event_shape(event_shape)
    options: dict[str, Any] = {"scale": scale, "squash": robust, "context_dim": context_dim}
    conditioner: dict[str, Any] = {"activation": activation, "init_scale": init_scale}
    if len(shape) == 3:
        scales = realnvp_scales(shape, scales)
        limit = IMAGE_BUDGET / realnvp_depth(scales) if robust else None

        def coupling(
            shape: tuple[int, ...], partition: Partition, width: int, key: RandomKey
        ) -> TransformModule:
            def make(inputs: int, outputs: int, key: RandomKey) -> ResNet:
                return ResNet(inputs, outputs, width, blocks, norm=norm, **conditioner, key=key)

            net = network or make
            return coupling_of(AffineCoupling, net, shape, partition, key, limit=limit, **options)

        return realnvp_levels(
            shape,
            coupling,
            _data_end(shape, logit),
            scales=scales,
            width=channels,
            batch_norm=batch_norm,
            key=key,
        )
    partition, layers = as_partition(partition, shape, context_dim), as_count(layers, "layers")
    vector_coupling = functools.partial(
        coupling_of,
        AffineCoupling,
        network,
        shape,
        limit=LOG_SCALE_BUDGET / layers if robust else None,
        hidden=hidden,
        **conditioner,
        **options,
    )
    couplings = _in_pairs(vector_coupling, partition, layers, key, batch_norm)
    return Chain([*couplings, *_data_end(shape, logit)])


@builder(
    vectors=("layers", "hidden", "partition"),
    images=("levels", "steps", "channels", "coupling", "learned_prior"),
)
def glow(
    event_shape: int | Sequence[int],
    *,
    layers: int = 8,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    scale: str | Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]] = "sigmoid",
    partition: str | Sequence[bool] | Partition = "halves",
    levels: int | None = None,
    steps: int = 8,
    channels: int = 64,
    coupling: str = "affine",
    learned_prior: bool = True,
    network: Callable[[int, int, RandomKey], eqx.Module] | None = None,
    logit: float | None = None,
    context_dim: int = 0,
    robust: bool = True,
    init_scale: float = 0.0,
    key: RandomKey,
) -> TransformModule:
    """Build Glow: steps of ActNorm, an invertible matrix and AffineCoupling.

    This is the order in the paper, from data to base. On vectors, the matrix is an
    `InvertibleLinear`. On images, it is an `InvertibleConv1x1`, and each level squeezes the image,
    applies `steps` steps and passes half of the channels on.

    With a context, D may be 1, as in `realnvp`.

    Args:
        event_shape: D or `(D,)`, D at least 2 without a context; or `(C, H, W)`, with even height
            and width.
        layers: vectors: number of steps, L.
        hidden: vectors: widths of the hidden layers of each conditioner.
        activation: activation of the conditioners.
        scale: `"sigmoid"` (as in Glow's code), `"tanh"`, `"clamp"`, `"exp"` (as in the paper) or a
            callable.
        partition: vectors: `"halves"`, `"alternating"`, a boolean mask or a `Partition`.
        levels: images: number of levels. Default: up to 3, as the size allows.
        steps: images: number of steps in each level, K in the paper.
        channels: images: width of the convolutional networks.
        coupling: images: `"affine"` or `"additive"`.
        learned_prior: images: whether the variables that are factored out have a mean and a scale
            that depend on the remaining ones, and those of the last level an ActNorm.
        network: function that makes a custom conditioner from its numbers of inputs and outputs,
            for images of input and output channels, and a random key.
        logit: α of a `Logit` at the data end, for pixels in the unit interval; None for no `Logit`.
        context_dim: size of the context; 0 for a flow without context.
        robust: whether the log-scales of each coupling stay within 4 / L (images: 16 / L) of their
            initial values, conditioners see asinh of their input, and the matrices of flows that
            are deep (L > 16) or wide (D > 48) learn at a fraction of the rate; False for the form
            in the paper.
        init_scale: initial standard deviation of the last layer of each conditioner.
        key: random key of the weights.

    Returns:
        The flow, in which each matrix is initially a random rotation of blocks of coordinates and
        `fit` initialises each ActNorm from data; for images, a `MultiScale`.

    Raises:
        ValueError: if an argument is out of range; the message names it.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 3.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import flow_distribution, glow
        >>> flow = glow(3, layers=2, key=jax.random.key(0))
        >>> flow = flow.initialize(jax.random.normal(jax.random.key(1), (100, 3)))
        >>> flow_distribution(flow).sample(jax.random.key(2), (5,)).shape
        (5, 3)
    """
    check_key(key)
    shape = as_event_shape(event_shape)
    options: dict[str, Any] = {"squash": robust, "context_dim": context_dim}
    conditioner: dict[str, Any] = {"activation": activation, "init_scale": init_scale}
    if len(shape) == 3:
        if coupling not in COUPLINGS:
            raise ValueError(f"`coupling` is {coupling!r}, expected one of {sorted(COUPLINGS)}")
        levels, depth = glow_depth(shape, levels, steps)
        kind = COUPLINGS[coupling]
        scaled: dict[str, Any] = {}
        if kind is AffineCoupling:
            scaled = {"scale": scale, "limit": IMAGE_BUDGET / depth if robust else None}

        def coupling_(
            shape: tuple[int, ...], partition: Partition, width: int, key: RandomKey
        ) -> TransformModule:
            def make(inputs: int, outputs: int, key: RandomKey) -> ConvNet:
                return ConvNet(inputs, outputs, (width, width), **conditioner, key=key)

            return coupling_of(kind, network or make, shape, partition, key, **options, **scaled)

        prior = functools.partial(AffineCoupling, hidden=(), init_scale=init_scale, **options)
        return glow_levels(
            shape,
            coupling_,
            _data_end(shape, logit),
            levels=levels,
            steps=steps,
            width=channels,
            gain=functools.partial(shared_gain, depth) if robust else lambda _: 1.0,
            prior=prior if learned_prior else None,
            key=key,
        )
    partition, layers = as_partition(partition, shape, context_dim), as_count(layers, "layers")
    gain = shared_gain(layers, *shape) if robust else 1.0
    affine = functools.partial(
        coupling_of,
        AffineCoupling,
        network,
        shape,
        partition,
        scale=scale,
        limit=LOG_SCALE_BUDGET / layers if robust else None,
        hidden=hidden,
        **conditioner,
        **options,
    )

    def step(key: RandomKey) -> Chain:
        net_key, matrix_key = split(key, 2)
        matrix = InvertibleLinear(shape, gain=gain, key=matrix_key)
        return Chain([affine(key=net_key), matrix, ActNorm(shape)])

    steps_ = [step(k) for k in split(key, layers)]
    return Chain([Stack(steps_), *_data_end(shape, logit)])


def _data_end(shape: tuple[int, ...], logit: float | None) -> list[TransformModule]:
    """Return the layers at the data end of every flow."""
    pixels = [] if logit is None else [Logit(shape, logit)]
    return [Standardization(shape), *pixels]


def _in_pairs(
    coupling: Callable[[Partition, RandomKey], TransformModule],
    partition: Partition,
    layers: int,
    key: RandomKey,
    batch_norm: bool = False,
) -> list[TransformModule]:
    """Stack couplings in pairs with swapped parts; the last of an odd number stands alone."""
    keys = iter(split(key, layers))

    def block(partition: Partition) -> Iterator[TransformModule]:
        layer = coupling(partition, next(keys))
        yield layer
        if batch_norm:
            yield BatchNorm(layer.event_shape)

    pairs, single = divmod(layers, 2)
    blocks = [Chain([*block(partition), *block(partition.swap)]) for _ in range(pairs)]
    return [*([Stack(blocks)] if blocks else []), *(block(partition) if single else [])]
