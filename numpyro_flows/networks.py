"""Conditioner networks: the functions of the untouched part that a coupling evaluates."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from numpyro_flows.checks import as_widths

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
}


def activation_named(name: str) -> Callable[[Array], Array]:
    """Look an activation function up by its name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"`activation` is {name!r}, expected one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class DenseNet(eqx.Module):
    """A fully connected network, by default starting as the zero function.

    Shapes: as Equinox's networks it maps one event: `x` is `(in_dim,)`, the result `(out_dim,)`.
    Couplings vectorise it over the batch.

    Args:
        in_dim: number of inputs: the coordinates that are looked at, and the context.
        out_dim: number of outputs.
        hidden: widths of the hidden layers.
        activation: `"relu"`, `"silu"`, `"gelu"`, `"elu"` or `"tanh"`.
        init_scale: standard deviation of the last layer's initial weights; 0 makes every flow
            that is built on this network start as the identity (Glow, section 3.3).
        key: random key of the initial weights.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import DenseNet
        >>> DenseNet(3, 2, key=jax.random.key(0))(jnp.ones(3)).shape
        (2,)
    """

    layers: tuple[eqx.nn.Linear, ...]
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: Sequence[int] = (64, 64),
        *,
        activation: str = "relu",
        init_scale: float = 0.0,
        key: Array,
    ) -> None:
        self.activation = activation
        activation_named(activation)
        widths = [in_dim, *as_widths(hidden), out_dim]
        keys = jax.random.split(key, len(widths))
        *inner, last = (
            eqx.nn.Linear(i, o, key=k)
            for i, o, k in zip(widths[:-1], widths[1:], keys[1:], strict=True)
        )
        weight = init_scale * jax.random.normal(keys[0], last.weight.shape, last.weight.dtype)
        bias = jnp.zeros(out_dim, weight.dtype)
        last = eqx.tree_at(lambda linear: (linear.weight, linear.bias), last, (weight, bias))
        self.layers = (*inner, last)

    def __call__(self, x: Array) -> Array:
        """Evaluate the network."""
        activation = ACTIVATIONS[self.activation]
        *inner, last = self.layers
        for layer in inner:
            x = activation(_linear(layer, x))
        return _linear(last, x)


def _linear(layer: eqx.nn.Linear, x: Array) -> Array:
    # Not `layer(x)`: under vmap the input on the left makes one product in the batch's layout.
    product = x @ layer.weight.T
    return product if layer.bias is None else product + layer.bias
