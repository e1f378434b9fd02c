"""The convolutions that the conditioners of images are built from."""

from jaxtyping import Float
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """PyTorch's size-preserving convolution, evaluated in the dtype of its input."""

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        super().__init__(in_channels, out_channels, size, padding=size // 2)

    def kernel(self) -> Float[Tensor, "out_channels in_channels size size"]:
        """Return the kernel `(out, in, size, size)`."""
        return self.weight

    def forward(
        self, input: Float[Tensor, "*batch in_channels h w"]
    ) -> Float[Tensor, "*batch out_channels h w"]:
        """Apply the layer."""
        return self._conv_forward(input, self.kernel().to(input.dtype), self.bias.to(input.dtype))


class NormalizedConv2d(Conv2d):
    """A convolution with weight normalisation: `gain · weight / ‖weight‖` for each output."""

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        super().__init__(in_channels, out_channels, size)
        self.gain = nn.Parameter(self._norm().detach())

    def kernel(self) -> Float[Tensor, "out_channels in_channels size size"]:
        """Return the normalised kernel."""
        return self.weight * (self.gain / self._norm())

    def _norm(self) -> Tensor:
        return self.weight.square().sum((1, 2, 3), keepdim=True).sqrt()
