"""Conditioner networks: functions of the part of an event that a coupling leaves unchanged."""

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from numpyro_flows.convolutions import Conv2d, NormalizedConv2d
from numpyro_flows.rng import RandomKey, normal, split, weight_and_bias
from numpyro_flows.tree import replace
from pyroflows_common.checks import as_count, as_scale, as_widths, check_activation

Moments = TypeVar("Moments", bound="RunningMoments")

Activation = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]

ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
}

# Weight of a new batch in the running averages of `norm="batch"`, and name of the batch axis.
MOMENTUM = 0.1
BATCH = "batch"


class DataDependent(eqx.Module):
    """Base class of networks with state that a flow's `initialize` and `update` learn from data."""

    def absorb(self, x: Float[Array, "..."], first: bool) -> "DataDependent":
        """Return the network after a batch of inputs.

        Args:
            x: `(n, in_dim)`, for images `(n, in_channels, H, W)`.
            first: true in `initialize`, which sets state that is not yet initialised; false in
                `update`, which updates it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement absorb")


class RunningMoments(eqx.Module):
    """Running averages of mean and variance, which are state, not parameters."""

    buffers: ClassVar[tuple[str, ...]] = ("running_mean", "running_var")

    running_mean: Float[Array, "..."]
    running_var: Float[Array, "..."]
    initialized: Bool[Array, ""]

    def _start_moments(self, shape: tuple[int, ...]) -> None:
        self.running_mean, self.running_var = jnp.zeros(shape), jnp.ones(shape)
        self.initialized = jnp.array(False)

    def _move_moments(
        self: Moments, mean: Array, variance: Array, momentum: float, first: bool
    ) -> Moments:
        """Return the module with averages updated with the moments of a batch, or set to them."""
        start = jnp.where(variance > 0, variance, jnp.ones_like(variance))
        # One row says nothing about the variance.
        old, kind = (self.running_mean, self.running_var), self.running_mean.dtype
        mean, variance = (
            jnp.where(self.initialized, o if first else o + momentum * (n - o), s).astype(kind)
            for o, n, s in zip(old, (mean, variance), (mean, start), strict=True)
        )
        done = jnp.ones_like(self.initialized)
        return replace(self, running_mean=mean, running_var=variance, initialized=done)


class DenseNet(eqx.Module):
    """A fully connected network, by default the zero function before training.

    Shapes: `(in_dim,)` to `(out_dim,)`. Like Equinox's networks, it maps one event; couplings
    vectorise it over the batch.

    Args:
        in_dim: number of inputs: conditioning coordinates and context.
        out_dim: number of outputs.
        hidden: widths of the hidden layers.
        activation: `"relu"`, `"silu"`, `"gelu"`, `"elu"` or `"tanh"`.
        init_scale: standard deviation of the last layer's initial weights; with 0, every flow built
            on this network is initially the identity (Glow, section 3.3).
        key: random key for the initial weights.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import DenseNet
        >>> DenseNet(3, 2, key=jax.random.key(0))(jnp.ones(3)).shape
        (2,)
    """

    layers: "tuple[Linear, ...]"
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: Sequence[int] = (64, 64),
        *,
        activation: str = "relu",
        init_scale: float = 0.0,
        key: RandomKey,
    ) -> None:
        self.activation = activation
        check_activation(activation, ACTIVATIONS)
        as_scale(init_scale, "init_scale")
        widths = [in_dim, *as_widths(hidden), out_dim]
        keys = split(key, len(widths))
        *inner, last = (
            Linear(i, o, key=k) for i, o, k in zip(widths[:-1], widths[1:], keys[1:], strict=True)
        )
        weight = normal(keys[0], last.weight.shape, init_scale)
        self.layers = (*inner, replace(last, weight=weight, bias=jnp.zeros(out_dim)))

    def __call__(self, x: Float[Array, " in_dim"]) -> Float[Array, " out_dim"]:
        """Evaluate the network."""
        activation = ACTIVATIONS[self.activation]
        *inner, last = self.layers
        for layer in inner:
            x = activation(layer(x))
        return last(x)


class Linear(eqx.Module):
    """An affine map of one vector."""

    weight: Float[Array, "out_dim in_dim"]
    bias: Float[Array, " out_dim"]

    def __init__(self, in_dim: int, out_dim: int, *, key: RandomKey) -> None:
        self.weight, self.bias = weight_and_bias(key, (out_dim, in_dim))

    def __call__(self, x: Float[Array, " in_dim"]) -> Float[Array, " out_dim"]:
        """Apply the layer."""
        # With the input on the left, vmap makes one product in the batch's layout.
        return x @ self.weight.T + self.bias


class ConvNet(eqx.Module):
    """Glow's convolutional network: 3×3, 1×1 and 3×3 convolutions, the last initially zero.

    The outputs of the last convolution are multiplied by `exp(3 · log_scale)` with a learned
    `log_scale` for each channel. Unlike in Glow's code, no ActNorm follows the hidden convolutions.

    Shapes: `(in_channels, H, W)` to `(out_channels, H, W)`; use `jax.vmap` for a batch, as with
    Equinox's networks.

    Args:
        in_channels: number of conditioning channels, including those of the context.
        out_channels: number of output channels.
        hidden: numbers of hidden channels; empty for a single 3×3 convolution.
        activation: as in `DenseNet`.
        init_scale: standard deviation of the last convolution's initial weights.
        key: random key for the initial weights.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), sections 3.3 and 5; its published code for
        `log_scale`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import ConvNet
        >>> ConvNet(3, 2, key=jax.random.key(0))(jnp.ones((3, 8, 8))).shape
        (2, 8, 8)
    """

    layers: tuple[Conv2d, ...]
    log_scale: Float[Array, "out_channels 1 1"]
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: Sequence[int] = (64, 64),
        *,
        activation: str = "relu",
        init_scale: float = 0.0,
        key: RandomKey,
    ) -> None:
        self.activation = activation
        check_activation(activation, ACTIVATIONS)
        as_scale(init_scale, "init_scale")
        widths = [in_channels, *as_widths(hidden), out_channels]
        sizes = [3, *[1] * (len(widths) - 3), 3][: len(widths) - 1]
        keys = split(key, len(widths))
        *inner, last = (
            Conv2d(i, o, size, key=k)
            for i, o, size, k in zip(widths[:-1], widths[1:], sizes, keys[1:], strict=True)
        )
        weight = normal(keys[0], last.weight.shape, init_scale)
        self.layers = (*inner, replace(last, weight=weight, bias=jnp.zeros(out_channels)))
        self.log_scale = jnp.zeros((out_channels, 1, 1))

    def __call__(self, x: Float[Array, "in_channels h w"]) -> Float[Array, "out_channels h w"]:
        """Evaluate the network."""
        activation = ACTIVATIONS[self.activation]
        *inner, last = self.layers
        for layer in inner:
            x = activation(layer(x))
        return last(x) * jnp.exp(3.0 * self.log_scale)


class ResNet(DataDependent):
    """RealNVP's residual network: blocks of two weight-normalised 3×3 convolutions.

    The network is a 3×3 convolution, `blocks` times `x + conv(act(norm(conv(act(norm(x))))))`, and
    a 1×1 convolution that is initially zero. Every kernel is `gain · v / ‖v‖`, with one norm for
    each output channel.

    Shapes: as in `ConvNet`.

    Args:
        in_channels: number of conditioning channels, including those of the context.
        out_channels: number of output channels.
        channels: number of hidden channels.
        blocks: number of residual blocks.
        norm: normalisation of each channel before the activations: `"instance"`, by the moments of
            each image; `"batch"`, by running averages, updated like those of `BatchNorm`; or None.
        activation: as in `DenseNet`.
        init_scale: standard deviation of the last convolution's initial gains.
        key: random key for the initial weights.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803),
        section 4.1; Salimans and Kingma, "Weight normalization" (arXiv:1602.07868).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import ResNet
        >>> network = ResNet(3, 2, channels=8, blocks=1, key=jax.random.key(0))
        >>> network(jnp.ones((3, 8, 8))).shape
        (2, 8, 8)
    """

    first: NormalizedConv2d
    blocks: tuple[tuple[NormalizedConv2d, ...], ...]
    norms: "tuple[RunningNorm, ...]"
    last: NormalizedConv2d
    activation: str = eqx.field(static=True)
    norm: str | None = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 32,
        blocks: int = 2,
        *,
        norm: str | None = None,
        activation: str = "relu",
        init_scale: float = 0.0,
        key: RandomKey,
    ) -> None:
        self.activation, self.norm = activation, norm
        check_activation(activation, ACTIVATIONS)
        as_scale(init_scale, "init_scale")
        channels = as_count(channels, "channels", 1)
        blocks = as_count(blocks, "blocks", 0)
        if norm not in (None, "instance", "batch"):
            raise ValueError(f"`norm` is {norm!r}, expected 'batch', 'instance' or None")
        first, final, gain, *keys = split(key, 3 + 2 * blocks)
        self.first = NormalizedConv2d(in_channels, channels, 3, key=first)
        self.blocks = tuple(
            tuple(NormalizedConv2d(channels, channels, 3, key=k) for k in keys[2 * i : 2 * i + 2])
            for i in range(blocks)
        )
        self.norms = tuple(
            RunningNorm(channels) for _ in range(2 * blocks + 1 if norm == "batch" else 0)
        )
        last = NormalizedConv2d(channels, out_channels, 1, key=final)
        gains = normal(gain, last.gain.shape, init_scale)
        self.last = replace(last, gain=gains, bias=jnp.zeros(out_channels))

    def __call__(self, x: Float[Array, "in_channels h w"]) -> Float[Array, "out_channels h w"]:
        """Evaluate the network."""
        return self._evaluate(x, self._normalized)

    def absorb(self, x: Float[Array, "n in_channels h w"], first: bool) -> "ResNet":
        """Update or initialise the running averages with a batch `(n, in_channels, H, W)`."""

        def moved(x: Array) -> tuple[RunningNorm, ...]:
            norms = list(self.norms)

            def normalized(i: int, x: Array) -> Array:
                norms[i] = norms[i].absorb(x, first)
                return norms[i](x)

            self._evaluate(x, normalized)
            return tuple(norms)

        if not self.norms:
            return self
        norms = jax.vmap(moved, axis_name=BATCH, out_axes=None)(x)
        return replace(self, norms=norms)

    def _evaluate(self, x: Array, normalized: Callable[[int, Array], Array]) -> Array:
        activation = ACTIVATIONS[self.activation]
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            step = x
            for j, layer in enumerate(block):
                step = layer(activation(normalized(2 * i + j, step)))
            x = x + step
        return self.last(activation(normalized(2 * len(self.blocks), x)))

    def _normalized(self, i: int, x: Array) -> Array:
        if self.norm == "batch":
            return self.norms[i](x)
        if self.norm is None:
            return x
        centred = x - x.mean((-2, -1), keepdims=True)
        variance = jnp.square(centred).mean((-2, -1), keepdims=True)
        return centred * jax.lax.rsqrt(variance + 1e-5)


class RunningNorm(RunningMoments):
    """`(x − running_mean) / √(running_var + 1e-5)` for each channel, with moments as state."""

    def __init__(self, channels: int) -> None:
        self._start_moments((channels, 1, 1))

    def __call__(self, x: Float[Array, "channels h w"]) -> Float[Array, "channels h w"]:
        """Normalise `(channels, H, W)`."""
        return (x - self.running_mean) / jnp.sqrt(self.running_var + 1e-5)

    def absorb(self, x: Float[Array, "channels h w"], first: bool) -> "RunningNorm":
        """Update the averages with a batch, or initialise them if they are not initialised yet.

        `x` is one image of the batch: call this under `vmap` with the axis name `BATCH`.
        """
        mean = jax.lax.pmean(x.mean((1, 2), keepdims=True), BATCH)
        variance = jax.lax.pmean(jnp.square(x - mean).mean((1, 2), keepdims=True), BATCH)
        return self._move_moments(mean, variance, MOMENTUM, first)
