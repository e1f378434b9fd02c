"""Builders: NICE, RealNVP and Glow for vectors and for images, from one call."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from pyroflows.flows.images import coupling_of, glow_levels, realnvp_levels
from pyroflows.layers.chain import Chain, Stack
from pyroflows.layers.coupling import AdditiveCoupling, AffineCoupling
from pyroflows.layers.elementwise import ActNorm, BatchNorm, DiagonalScaling, Standardization
from pyroflows.layers.linear import InvertibleLinear, shared_gain
from pyroflows.layers.multiscale import Flatten
from pyroflows.layers.pixels import Logit
from pyroflows.networks import ConvNet, ResNet
from pyroflows.transform import TransformModule
from pyroflows_common import recipe
from pyroflows_common.checks import as_count, as_event_shape
from pyroflows_common.levels import glow_depth, realnvp_depth, realnvp_scales
from pyroflows_common.partition import Partition, as_partition
from pyroflows_common.recipe import Recipe

# Log-scales of all couplings together, along one path through the flow: see `robust`.
LOG_SCALE_BUDGET = 4.0
# Of images, which have no far-out values, but pixels that hardly vary.
IMAGE_BUDGET = 16.0
COUPLINGS: dict[str, Any] = {"affine": AffineCoupling, "additive": AdditiveCoupling}


def _note(flow: TransformModule, recipe: Recipe) -> TransformModule:
    flow.recipe = recipe
    return flow


builder = functools.partial(recipe.builder, nn.Module, _note)


@builder()
def nice(
    event_shape: int | Sequence[int],
    *,
    layers: int = 4,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    partition: str | Sequence[bool] | Partition = "alternating",
    network: Callable[[int, int], nn.Module] | None = None,
    logit: float | None = None,
    context_dim: int = 0,
    robust: bool = True,
    init_scale: float = 0.0,
) -> TransformModule:
    """Build NICE: additive couplings that alternate, and a diagonal scaling next to the base.

    Args:
        event_shape: D or `(D,)`, at least 2; or `(C, H, W)`, images that are seen as vectors.
        layers: number of couplings; the paper has four.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        partition: `"alternating"` (the paper's), `"halves"`, a boolean mask or a `Partition`; every
            second coupling swaps its parts.
        network: makes a custom conditioner, given its numbers of inputs and outputs.
        logit: α of a `Logit` at the data's end, for pixels in the unit interval; None for none.
        context_dim: size of the context of a conditional flow.
        robust: whether conditioners see asinh of their input; False for the paper's exact form.
        init_scale: standard deviation of each conditioner's last layer at the start.

    Returns:
        The flow: at the start the identity, up to `init_scale`.

    Raises:
        ValueError: where an argument is out of its range; the message names it.

    References:
        Dinh, Krueger and Bengio, "NICE" (arXiv:1410.8516), sections 3.2 to 3.4 and 5.1.

    Examples:
        >>> import torch
        >>> from pyroflows import flow_distribution, nice
        >>> density = flow_distribution(nice(4), "logistic")
        >>> density.log_prob(density.sample((3,))).shape
        torch.Size([3])
    """
    shape = as_event_shape(event_shape)
    size = math.prod(shape)
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
    couplings = _in_pairs(coupling, as_partition(partition, size), as_count(layers, "layers"))
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
    scale: str | Callable[..., Any] = "tanh",
    partition: str | Sequence[bool] | Partition = "halves",
    scales: int | None = None,
    blocks: int = 2,
    channels: int = 32,
    norm: str | None = None,
    network: Callable[[int, int], nn.Module] | None = None,
    batch_norm: bool = False,
    logit: float | None = None,
    context_dim: int = 0,
    robust: bool = True,
    init_scale: float = 0.0,
) -> TransformModule:
    """Build RealNVP: affine couplings that alternate; for images, over several scales.

    On images each scale has three couplings on a checkerboard, a `Squeeze`, three couplings on
    channels, and passes half of the channels on; the last one has four on a checkerboard. The
    width of the conditioners doubles from scale to scale.

    Args:
        event_shape: D or `(D,)`, at least 2; or `(C, H, W)`.
        layers: vectors: number of couplings L.
        hidden: vectors: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        scale: `"tanh"` (the paper's, with a learned factor), `"sigmoid"`, `"clamp"`, `"exp"` or a
            callable.
        partition: vectors: `"halves"`, `"alternating"`, a boolean mask or a `Partition`; every
            second coupling swaps its parts.
        scales: images: number of scales; by default up to 3, as the size allows.
        blocks: images: number of residual blocks of each `ResNet`.
        channels: images: width of the residual networks of the first scale.
        norm: images: normalisation within the residual networks, `"instance"`, `"batch"` or None.
        network: makes a custom conditioner, given its numbers of inputs and outputs; for images
            the numbers of channels.
        batch_norm: whether a `BatchNorm` follows each coupling.
        logit: α of a `Logit` at the data's end, for pixels in the unit interval; None for none.
        context_dim: size of the context of a conditional flow.
        robust: whether each coupling's log-scales stay within 4 / L (images: 16 / L) of their
            start and conditioners see asinh of their input, which keeps deep flows invertible in
            float32 whatever the training; False for the paper's exact form, which conditional
            densities of very unlike widths need.
        init_scale: standard deviation of each conditioner's last layer at the start.

    Returns:
        The flow: at the start the identity, up to `init_scale`.

    Raises:
        ValueError: where an argument is out of its range; the message names it.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803).

    Examples:
        >>> import torch
        >>> from pyroflows import flow_distribution, realnvp
        >>> density = flow_distribution(realnvp(2, layers=4, hidden=(32, 32)))
        >>> density.log_prob(torch.zeros(2)).shape
        torch.Size([])
    """
    shape = as_event_shape(event_shape)
    options: dict[str, Any] = {"scale": scale, "squash": robust, "context_dim": context_dim}
    conditioner: dict[str, Any] = {"activation": activation, "init_scale": init_scale}
    if len(shape) == 3:
        scales = realnvp_scales(shape, scales)
        limit = IMAGE_BUDGET / realnvp_depth(scales) if robust else None

        def coupling(shape: tuple[int, ...], partition: Partition, width: int) -> TransformModule:
            def make(inputs: int, outputs: int) -> ResNet:
                return ResNet(inputs, outputs, width, blocks, norm=norm, **conditioner)

            net = network or make
            return coupling_of(AffineCoupling, net, shape, partition, limit=limit, **options)

        return realnvp_levels(
            shape,
            coupling,
            _data_end(shape, logit),
            scales=scales,
            width=channels,
            batch_norm=batch_norm,
        )
    layers = as_count(layers, "layers")
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
    couplings = _in_pairs(vector_coupling, as_partition(partition, shape), layers, batch_norm)
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
    scale: str | Callable[..., Any] = "sigmoid",
    partition: str | Sequence[bool] | Partition = "halves",
    levels: int | None = None,
    steps: int = 8,
    channels: int = 64,
    coupling: str = "affine",
    learned_prior: bool = True,
    network: Callable[[int, int], nn.Module] | None = None,
    logit: float | None = None,
    context_dim: int = 0,
    robust: bool = True,
    init_scale: float = 0.0,
) -> TransformModule:
    """Build Glow: steps of ActNorm, an invertible matrix and AffineCoupling.

    The steps are named in the paper's order, from data to base. On vectors the matrix is an
    `InvertibleLinear`. On images it is an `InvertibleConv1x1`, and each level squeezes the image,
    takes `steps` steps and passes half of the channels on.

    Args:
        event_shape: D or `(D,)`, at least 2; or `(C, H, W)`, with even height and width.
        layers: vectors: number of steps L.
        hidden: vectors: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        scale: `"sigmoid"` (Glow's code), `"tanh"`, `"clamp"`, `"exp"` (the paper) or a callable.
        partition: vectors: `"halves"`, `"alternating"`, a boolean mask or a `Partition`.
        levels: images: number of levels; by default up to 3, as the size allows.
        steps: images: number of steps of each level, the paper's K.
        channels: images: width of the convolutional networks.
        coupling: images: `"affine"` or `"additive"`.
        learned_prior: images: whether what is factored out gets a mean and a scale that are
            functions of what goes on, and the last level those of an ActNorm.
        network: makes a custom conditioner, given its numbers of inputs and outputs; for images
            the numbers of channels.
        logit: α of a `Logit` at the data's end, for pixels in the unit interval; None for none.
        context_dim: size of the context of a conditional flow.
        robust: whether each coupling's log-scales stay within 4 / L (images: 16 / L) of their
            start, conditioners see asinh of their input and the matrices of more than 16 steps
            learn at 16 / L of the rate; False for the paper's exact form.
        init_scale: standard deviation of each conditioner's last layer at the start.

    Returns:
        The flow, with each matrix a random rotation; `fit` initialises each ActNorm from data. On
        images it is a `MultiScale`.

    Raises:
        ValueError: where an argument is out of its range; the message names it.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 3.

    Examples:
        >>> import torch
        >>> from pyroflows import flow_distribution, glow
        >>> flow = glow(3, layers=2).initialize(torch.randn(100, 3))
        >>> flow_distribution(flow).sample((5,)).shape
        torch.Size([5, 3])
    """
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

        def coupling_(shape: tuple[int, ...], partition: Partition, width: int) -> TransformModule:
            def make(inputs: int, outputs: int) -> ConvNet:
                return ConvNet(inputs, outputs, (width, width), **conditioner)

            return coupling_of(kind, network or make, shape, partition, **options, **scaled)

        prior = functools.partial(AffineCoupling, hidden=(), init_scale=init_scale, **options)
        return glow_levels(
            shape,
            coupling_,
            _data_end(shape, logit),
            levels=levels,
            steps=steps,
            width=channels,
            gain=shared_gain(depth) if robust else 1.0,
            prior=prior if learned_prior else None,
        )
    partition, layers = as_partition(partition, shape), as_count(layers, "layers")
    gain = shared_gain(layers) if robust else 1.0
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

    def step() -> Chain:
        return Chain([affine(), InvertibleLinear(shape, gain=gain), ActNorm(shape)])

    return Chain([Stack([step() for _ in range(layers)]), *_data_end(shape, logit)])


def _data_end(shape: tuple[int, ...], logit: float | None) -> list[TransformModule]:
    """Return what every flow has next to the data."""
    pixels = [] if logit is None else [Logit(shape, logit)]
    return [Standardization(shape), *pixels]


def _in_pairs(
    coupling: Callable[[Partition], TransformModule],
    partition: Partition,
    layers: int,
    batch_norm: bool = False,
) -> list[TransformModule]:
    """Stack couplings in pairs that swap their parts, and a last one by itself if there is."""

    def block(partition: Partition) -> Iterator[TransformModule]:
        layer = coupling(partition)
        yield layer
        if batch_norm:
            yield BatchNorm(layer.event_shape)

    pairs, single = divmod(layers, 2)
    blocks = [Chain([*block(partition), *block(partition.swap)]) for _ in range(pairs)]
    return [*([Stack(blocks)] if blocks else []), *(block(partition) if single else [])]
