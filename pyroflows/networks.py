"""Conditioner networks: functions of the part of an event that a coupling leaves unchanged."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.convolutions import Conv2d, NormalizedConv2d
from pyroflows_common.checks import as_count, as_scale, as_widths, check_activation

Activation = Callable[[Float[Tensor, "*shape"]], Float[Tensor, "*shape"]]

ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "tanh": torch.tanh,
}

# Weight of a new batch in the running averages of `norm="batch"`.
MOMENTUM = 0.1


class DataDependent(nn.Module):
    """Base class of networks with state that a flow's `initialize` and `update` learn from data."""

    def absorb(self, x: Float[Tensor, "..."], first: bool) -> None:
        """Learn from a batch of inputs.

        Args:
            x: `(n, in_dim)`, for images `(n, in_channels, H, W)`.
            first: true in `initialize`, which sets state that is not yet initialised; false in
                `update`, which updates it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement absorb")


class RunningMoments(nn.Module):
    """Running averages of mean and variance, which are state, not parameters."""

    running_mean: Float[Tensor, "..."]
    running_var: Float[Tensor, "..."]
    initialized: Bool[Tensor, ""]

    def _register_moments(self, shape: Sequence[int]) -> None:
        """Register mean 0 and variance 1, not yet initialised."""
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))
        self.register_buffer("initialized", torch.tensor(False))

    def _move_moments(self, mean: Tensor, variance: Tensor, momentum: float) -> None:
        """Update the averages with the moments of a batch, or initialise them from these."""
        if not self.initialized:  # one row says nothing about the variance
            variance = torch.where(variance > 0, variance, torch.ones_like(variance))
        weight = momentum if self.initialized else 1.0
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)
        self.initialized.fill_(True)


class DenseNet(nn.Module):
    """A fully connected network, by default the zero function before training.

    Shapes: `(*batch, in_dim)` to `(*batch, out_dim)`. The network computes in the dtype of `x`.

    Args:
        in_dim: number of inputs: conditioning coordinates and context.
        out_dim: number of outputs.
        hidden: widths of the hidden layers.
        activation: `"relu"`, `"silu"`, `"gelu"`, `"elu"` or `"tanh"`.
        init_scale: standard deviation of the last layer's initial weights; with 0, every flow built
            on this network is initially the identity (Glow, section 3.3).

    Examples:
        >>> import torch
        >>> from pyroflows import DenseNet
        >>> DenseNet(3, 2)(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: Sequence[int] = (64, 64),
        *,
        activation: str = "relu",
        init_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        check_activation(activation, ACTIVATIONS)
        as_scale(init_scale, "init_scale")
        widths = [in_dim, *as_widths(hidden), out_dim]
        layers = [Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)]
        nn.init.normal_(layers[-1].weight, std=init_scale)
        nn.init.zeros_(layers[-1].bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Evaluate the network."""
        activation = ACTIVATIONS[self.activation]
        *inner, last = self.layers
        for layer in inner:
            x = activation(layer(x))
        return last(x)


class Linear(nn.Linear):
    """PyTorch's linear layer, evaluated in the dtype of its input."""

    def forward(self, input: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Apply the layer."""
        if self.weight.dtype == input.dtype:
            return F.linear(input, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class ConvNet(nn.Module):
    """Glow's convolutional network: 3×3, 1×1 and 3×3 convolutions, the last initially zero.

    The outputs of the last convolution are multiplied by `exp(3 · log_scale)` with a learned
    `log_scale` for each channel. Unlike in Glow's code, no ActNorm follows the hidden convolutions.

    Shapes: `(*batch, in_channels, H, W)` to `(*batch, out_channels, H, W)`, with at most one batch
    dimension. The network computes in the dtype of `x`.

    Args:
        in_channels: number of conditioning channels, including those of the context.
        out_channels: number of output channels.
        hidden: numbers of hidden channels; empty for a single 3×3 convolution.
        activation: as in `DenseNet`.
        init_scale: standard deviation of the last convolution's initial weights.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), sections 3.3 and 5; its published code for
        `log_scale`.

    Examples:
        >>> import torch
        >>> from pyroflows import ConvNet
        >>> ConvNet(3, 2)(torch.ones(5, 3, 8, 8)).shape
        torch.Size([5, 2, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: Sequence[int] = (64, 64),
        *,
        activation: str = "relu",
        init_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        check_activation(activation, ACTIVATIONS)
        as_scale(init_scale, "init_scale")
        widths = [in_channels, *as_widths(hidden), out_channels]
        sizes = [3, *[1] * (len(widths) - 3), 3][: len(widths) - 1]
        layers = [Conv2d(i, o, k) for i, o, k in zip(widths[:-1], widths[1:], sizes, strict=True)]
        nn.init.normal_(layers[-1].weight, std=init_scale)
        nn.init.zeros_(layers[-1].bias)
        self.layers = nn.ModuleList(layers)
        self.log_scale = nn.Parameter(torch.zeros(out_channels, 1, 1))

    def forward(
        self, x: Float[Tensor, "*batch in_channels h w"]
    ) -> Float[Tensor, "*batch out_channels h w"]:
        """Evaluate the network."""
        activation = ACTIVATIONS[self.activation]
        *inner, last = self.layers
        for layer in inner:
            x = activation(layer(x))
        y = last(x)
        return y * (3.0 * self.log_scale).exp().to(y.dtype)


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

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803),
        section 4.1; Salimans and Kingma, "Weight normalization" (arXiv:1602.07868).

    Examples:
        >>> import torch
        >>> from pyroflows import ResNet
        >>> ResNet(3, 2, channels=8, blocks=1)(torch.ones(5, 3, 8, 8)).shape
        torch.Size([5, 2, 8, 8])
    """

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
    ) -> None:
        super().__init__()
        self.activation, self.norm = activation, norm
        check_activation(activation, ACTIVATIONS)
        as_scale(init_scale, "init_scale")
        channels = as_count(channels, "channels", 1)
        blocks = as_count(blocks, "blocks", 0)
        if norm not in (None, "instance", "batch"):
            raise ValueError(f"`norm` is {norm!r}, expected 'batch', 'instance' or None")
        self.first = NormalizedConv2d(in_channels, channels, 3)
        self.blocks: Any = nn.ModuleList(
            nn.ModuleList(NormalizedConv2d(channels, channels, 3) for _ in range(2))
            for _ in range(blocks)
        )
        self.norms: Any = nn.ModuleList(
            RunningNorm(channels) for _ in range(2 * blocks + 1 if norm == "batch" else 0)
        )
        self.last = NormalizedConv2d(channels, out_channels, 1)
        nn.init.normal_(self.last.gain, std=init_scale)
        nn.init.zeros_(self.last.bias)

    def forward(
        self, x: Float[Tensor, "*batch in_channels h w"]
    ) -> Float[Tensor, "*batch out_channels h w"]:
        """Evaluate the network."""
        return self._evaluate(x, self._normalized)

    def absorb(self, x: Float[Tensor, "n in_channels h w"], first: bool) -> None:
        """Update or initialise the running averages with a batch `(n, in_channels, H, W)`."""

        def normalized(i: int, x: Tensor) -> Tensor:
            self.norms[i].absorb(x, first)
            return self.norms[i](x)

        if self.norm == "batch":
            self._evaluate(x, normalized)

    def _evaluate(self, x: Tensor, normalized: Callable[[int, Tensor], Tensor]) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            step = x
            for j, layer in enumerate(block):
                step = layer(activation(normalized(2 * i + j, step)))
            x = x + step
        return self.last(activation(normalized(2 * len(self.blocks), x)))

    def _normalized(self, i: int, x: Tensor) -> Tensor:
        if self.norm == "batch":
            return self.norms[i](x)
        return x if self.norm is None else F.instance_norm(x)


class RunningNorm(RunningMoments, DataDependent):
    """`(x − running_mean) / √(running_var + 1e-5)` for each channel, with moments as state."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._register_moments((channels, 1, 1))

    def forward(
        self, x: Float[Tensor, "*batch channels h w"]
    ) -> Float[Tensor, "*batch channels h w"]:
        """Normalise `(*batch, channels, H, W)`."""
        deviation = (self.running_var + 1e-5).sqrt().to(x.dtype)
        return (x - self.running_mean.to(x.dtype)) / deviation

    def absorb(self, x: Float[Tensor, "n channels h w"], first: bool) -> None:
        """Update the averages with a batch, or initialise them if they are not initialised yet."""
        if not (first and self.initialized):
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            self._move_moments(mean[0], variance[0], MOMENTUM)
