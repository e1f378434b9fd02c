"""The convolutions that the conditioners of images are built from."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from numpyro_flows.rng import RandomKey, weight_and_bias


class Conv2d(eqx.Module):
    """A size-preserving convolution of one image."""

    weight: Float[Array, "out_channels in_channels size size"]
    bias: Float[Array, " out_channels"]

    def __init__(self, in_channels: int, out_channels: int, size: int, *, key: RandomKey) -> None:
        self.weight, self.bias = weight_and_bias(key, (out_channels, in_channels, size, size))

    def kernel(self) -> Float[Array, "out_channels in_channels size size"]:
        """Return the kernel `(out, in, size, size)`."""
        return self.weight

    def __call__(self, x: Float[Array, "in_channels h w"]) -> Float[Array, "out_channels h w"]:
        """Apply the layer."""
        kernel = self.kernel()
        dtype = jnp.result_type(x, kernel)
        # Channels last: XLA runs this faster on a CPU, and cancels the inner transpositions.
        x, kernel = x.astype(dtype).transpose(1, 2, 0), kernel.astype(dtype).transpose(2, 3, 1, 0)
        return (_convolved(x, kernel) + self.bias).transpose(2, 0, 1)


class NormalizedConv2d(Conv2d):
    """A convolution with weight normalisation: `gain · weight / ‖weight‖` for each output."""

    gain: Float[Array, "out_channels 1 1 1"]

    def __init__(self, in_channels: int, out_channels: int, size: int, *, key: RandomKey) -> None:
        super().__init__(in_channels, out_channels, size, key=key)
        self.gain = _norms(self.weight)

    def kernel(self) -> Float[Array, "out_channels in_channels size size"]:
        """Return the normalised kernel."""
        return self.weight * (self.gain / _norms(self.weight))


@jax.jit
def _norms(kernel: Array) -> Array:
    """Return the norm of a kernel's weights for each output channel."""
    return jnp.sqrt(jnp.square(kernel).sum((1, 2, 3), keepdims=True))


def _convolved(x: Array, kernel: Array) -> Array:
    """Convolve a zero-padded image `(H, W, in)` with a kernel `(size, size, in, out)`.

    Uses matrix products where they take no more memory than input and result: within a scan on a
    CPU, XLA's gradients of convolutions are ten times slower, those of products are not.
    """
    size, _, inputs, outputs = kernel.shape
    if size == 1:
        return x @ kernel[0, 0]
    if inputs < outputs:
        seen = jnp.concatenate(_shifted([x] * size**2, size), axis=-1)
        return seen @ kernel.reshape(-1, outputs)
    if inputs > outputs:
        parts = x @ kernel.transpose(2, 0, 1, 3).reshape(inputs, -1)
        first, *rest = _shifted(jnp.split(parts, size**2, axis=-1), size)
        return sum(rest, first)
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=layout)[0]


def _shifted(images: Sequence[Array], size: int) -> list[Array]:
    """Shift image k of `size²` images `(H, W, channels)` to position k of a kernel."""
    height, width, _ = images[0].shape
    edge = size // 2
    padded = [jnp.pad(image, ((edge, edge), (edge, edge), (0, 0))) for image in images]
    return [
        image[k // size : k // size + height, k % size : k % size + width]
        for k, image in enumerate(padded)
    ]
