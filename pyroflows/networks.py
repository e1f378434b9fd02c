"""Conditioner networks: the functions of the untouched part that a coupling evaluates."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.checks import as_widths

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "tanh": torch.tanh,
}


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """Look an activation function up by its name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"`activation` is {name!r}, expected one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class DenseNet(nn.Module):
    """A fully connected network, by default starting as the zero function.

    Shapes: `x` is `(*batch, in_dim)`, the result `(*batch, out_dim)`. The network computes in the
    dtype of `x`.

    Args:
        in_dim: number of inputs: the coordinates that are looked at, and the context.
        out_dim: number of outputs.
        hidden: widths of the hidden layers.
        activation: `"relu"`, `"silu"`, `"gelu"`, `"elu"` or `"tanh"`.
        init_scale: standard deviation of the last layer's initial weights; 0 makes every flow
            that is built on this network start as the identity (Glow, section 3.3).

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
        activation_named(activation)
        widths = [in_dim, *as_widths(hidden), out_dim]
        layers = [Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)]
        nn.init.normal_(layers[-1].weight, std=init_scale)
        nn.init.zeros_(layers[-1].bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the network."""
        activation = ACTIVATIONS[self.activation]
        *inner, last = self.layers
        for layer in inner:
            x = activation(layer(x))
        return last(x)


class Linear(nn.Linear):
    """PyTorch's linear layer, computing in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)
