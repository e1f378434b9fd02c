"""Coupling layers (NICE, section 3.2; RealNVP, section 3.3)."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeGuard, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from typing_extensions import override

from numpyro_flows.layers.scales import SCALES, FunctionScale
from numpyro_flows.networks import ConvNet, DataDependent, DenseNet
from numpyro_flows.rng import RandomKey
from numpyro_flows.transform import Context, EventPair, TransformModule
from numpyro_flows.tree import replace
from pyroflows_common.checks import as_event_shape, as_scale
from pyroflows_common.partition import Partition, as_partition


class Coupling(TransformModule):
    """Base class of the couplings: a partition, and a network that sees part `a` of the event."""

    _learns: ClassVar[bool] = False
    outputs: ClassVar[int]  # network outputs for each transformed coordinate

    network: Callable[..., Array]
    partition: Partition = eqx.field(static=True)
    squash: bool = eqx.field(static=True)

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        partition: str | Sequence[bool] | Partition = "halves",
        network: Callable[..., Array] | None = None,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        init_scale: float = 0.0,
        squash: bool = True,
        context_dim: int = 0,
        key: RandomKey,
    ) -> None:
        shape = as_event_shape(event_shape)
        super().__init__(shape, context_dim=context_dim)
        self.partition = as_partition(partition, shape, context_dim)
        size_a, size_b = self.partition.sizes
        net = DenseNet if len(shape) == 1 else ConvNet
        self.squash = squash
        self.network = network or net(
            size_a + context_dim,
            self.outputs * size_b,
            hidden,
            activation=activation,
            init_scale=init_scale,
            key=key,
        )

    @override
    def forward_and_ladj(self, x: Float[Array, "..."], context: Context = None) -> EventPair:
        return coupled([self], x, context, True)

    @override
    def inverse_and_ladj(self, y: Float[Array, "..."], context: Context = None) -> EventPair:
        return coupled([self], y, context, False)

    def _transformed(self, a: Array, b: Array, context: Context, forward: bool) -> EventPair:
        """Transform part `b` given part `a`, and return it with the log-determinant."""
        raise NotImplementedError

    def _absorb(self, y: Array, context: Context, first: bool) -> tuple[TransformModule, Array]:
        layer, network = self, cast(object, self.network)
        if isinstance(network, DataDependent):
            seen = jax.vmap(self._seen)(self.partition.split(y)[0], context)
            layer = replace(self, network=network.absorb(seen, first))
        return layer, layer._encoded(y, context)

    def _seen(self, a: Array, context: Context) -> Array:
        """Return the network's input: part `a` and the context."""
        # The network may see any function of the unchanged part. asinh keeps extreme inputs from
        # driving the shift, and with it the rounding error, beyond the precision of float32.
        seen = jnp.arcsinh(a) if self.squash else a
        if context is not None and self.context_dim:
            pixels = seen.shape[1:]
            context = context.astype(seen.dtype)[(..., *[None] * len(pixels))]
            context = jnp.broadcast_to(context, (self.context_dim, *pixels))
            seen = jnp.concatenate([seen, context])
        return seen

    def _parameters_given(self, a: Array, context: Context) -> Array:
        """Evaluate the network on part `a`."""
        raw = self.network(self._seen(a, context))
        expected = self.outputs * self.partition.sizes[1]
        if raw.shape[0] != expected:
            raise ValueError(
                f"`network` gave {raw.shape[0]} outputs, but this coupling needs {expected}: "
                f"{self.outputs} for each of {self.partition.sizes[1]} transformed "
                + ("coordinates" if raw.ndim == 1 else "channels")
            )
        return raw


class AdditiveCoupling(Coupling):
    r"""NICE's coupling: one part of the event is shifted by a function of the other.

    $$y_a = x_a, \qquad y_b = x_b + \mathrm{shift}(x_a), \qquad \log|\det dy/dx| = 0.$$

    Shapes: `(*batch, *event_shape)` to the same, ladj `(*batch,)`.

    Args:
        event_shape: D or `(D,)` for vectors, D at least 2 without a context; `(C, H, W)` for
            images.
        partition: `"halves"`, `"alternating"`, a boolean mask (true: part a) or a `Partition`;
            for images `"channels"` (as `"halves"`), `"checkerboard"` or a mask of the channels.
            With a context, part a may be empty, as it is for D = 1: the network then sees the
            context alone.
        network: maps part a of one event and the context, `(D_a + context_dim,)`, to the shift
            `(D_b,)`, as Equinox's networks do; for images, C replaces D and `(H, W)` follows.
            Default: a `DenseNet`, for images a `ConvNet`.
        hidden: widths of the default network's hidden layers.
        activation: the default network's activation.
        init_scale: initial standard deviation of the default network's last layer.
        squash: whether the network sees `asinh(x_a)` in place of `x_a`.
        context_dim: size of the context; 0 for none.
        key: random key for the default network's weights.

    Raises:
        ValueError: if there is no context and part a is empty, or if partition or network does not
            fit the event.

    References:
        Dinh, Krueger and Bengio, "NICE: Non-linear Independent Components Estimation"
        (arXiv:1410.8516), section 3.2.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import AdditiveCoupling
        >>> layer = AdditiveCoupling(3, key=jax.random.key(0))
        >>> layer.inv(layer(jnp.ones(3)))
        Array([1., 1., 1.], dtype=float32)
    """

    outputs: ClassVar[int] = 1

    def _transformed(self, a: Array, b: Array, context: Context, forward: bool) -> EventPair:
        shift = self.partition.only_b(self._parameters_given(a, context))
        y = b + shift if forward else b - shift
        return y, jnp.zeros((), y.dtype)


class AffineCoupling(Coupling):
    r"""RealNVP's coupling: one part of the event is scaled and shifted given the other.

    $$y_a = x_a, \qquad y_b = x_b \odot \exp(\mathrm{log\_scale}(x_a)) + \mathrm{shift}(x_a),
    \qquad \log|\det dy/dx| = \sum_j \mathrm{log\_scale}_j(x_a).$$

    One network gives the shifts and the values r that determine the log-scales, the shifts first.

    Shapes: `(*batch, *event_shape)` to the same, ladj `(*batch,)`.

    Args:
        event_shape: D or `(D,)` for vectors, D at least 2 without a context; `(C, H, W)` for
            images.
        scale: the map from r to the log-scale: `"tanh"` (RealNVP, learned factor), `"sigmoid"`
            (Glow), `"clamp"` (soft asymmetric clamp), `"exp"` (none) or a callable.
        limit: bound on the log-scale of the named scales except `"exp"`; None for the papers' form.
            A flow of L couplings is numerically most accurate with a limit of about 4 / L.
        partition: `"halves"`, `"alternating"`, a boolean mask (true: part a) or a `Partition`;
            for images `"channels"` (as `"halves"`), `"checkerboard"` or a mask of the channels.
            With a context, part a may be empty, as it is for D = 1: the network then sees the
            context alone.
        network: maps part a of one event and the context, `(D_a + context_dim,)`, to `(2 D_b,)`, as
            Equinox's networks do; for images, C replaces D and `(H, W)` follows. Default: a
            `DenseNet`, for images a `ConvNet`.
        hidden: widths of the default network's hidden layers.
        activation: the default network's activation.
        init_scale: initial standard deviation of the default network's last layer.
        squash: whether the network sees `asinh(x_a)` in place of `x_a`.
        context_dim: size of the context; 0 for none.
        key: random key for the default network's weights.

    Raises:
        ValueError: if there is no context and part a is empty, or if partition, network or scale
            does not fit the event.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803),
        sections 3.2 to 3.4; Kingma and Dhariwal, "Glow" (arXiv:1807.03039), table 1.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import AffineCoupling
        >>> layer = AffineCoupling(4, scale="tanh", key=jax.random.key(0))
        >>> y, ladj = layer.forward_and_ladj(jnp.ones((5, 4)))
        >>> y.shape, ladj.shape
        ((5, 4), (5,))
    """

    outputs: ClassVar[int] = 2

    scale: Callable[[Array], Array]

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        scale: str | Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]] = "tanh",
        limit: float | None = 2.0,
        partition: str | Sequence[bool] | Partition = "halves",
        network: Callable[..., Array] | None = None,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        init_scale: float = 0.0,
        squash: bool = True,
        context_dim: int = 0,
        key: RandomKey,
    ) -> None:
        super().__init__(
            event_shape,
            partition=partition,
            network=network,
            hidden=hidden,
            activation=activation,
            init_scale=init_scale,
            squash=squash,
            context_dim=context_dim,
            key=key,
        )
        if isinstance(scale, str):
            if scale not in SCALES:
                raise ValueError(
                    f"`scale` is {scale!r}, expected one of {sorted(SCALES)} or a callable"
                )
            if limit is not None:
                as_scale(limit, "limit", zero=False)
            ones = [1] * (len(self.event_shape) - 1)  # one parameter per image channel
            self.scale = SCALES[scale]((self.partition.sizes[1], *ones), limit)
        else:
            self.scale = scale if isinstance(scale, eqx.Module) else FunctionScale(scale)

    def _transformed(self, a: Array, b: Array, context: Context, forward: bool) -> EventPair:
        shift, log_scale = self._shift_and_log_scale(a, context)
        if forward:
            return b * jnp.exp(log_scale) + shift, log_scale.sum()
        return (b - shift) * jnp.exp(-log_scale), -log_scale.sum()

    def _shift_and_log_scale(self, a: Array, context: Context) -> tuple[Array, Array]:
        shift, r = jnp.split(self._parameters_given(a, context), 2)
        return self.partition.only_b(shift), self.partition.only_b(self.scale(r))


def coupled(run: "Sequence[Coupling]", x: Array, context: Context, forward: bool) -> EventPair:
    """Map an event through couplings on the same two parts, which are split and joined once."""
    a, b, ladj = parts_coupled(run, *run[0].partition.split(x), context, forward)
    return run[0].partition.join(a, b), ladj


def parts_coupled(
    run: "Sequence[Coupling]", a: Array, b: Array, context: Context, forward: bool
) -> tuple[Array, Array, Array]:
    """Map the two parts of an event, as the first coupling splits it, through couplings."""
    ladj: Any = 0.0
    for coupling in run:
        straight = coupling.partition == run[0].partition  # otherwise it is the swap
        seen, other = (a, b) if straight else (b, a)
        other, step = coupling._transformed(seen, other, context, forward)
        (a, b), ladj = (seen, other) if straight else (other, seen), ladj + step
    return a, b, ladj


def runs(layers: Sequence[TransformModule], forward: bool) -> list[list[TransformModule]]:
    """Group consecutive couplings on the same two parts; every other layer stands alone."""
    found: list[list[TransformModule]] = []
    for layer in layers if forward else reversed(layers):
        if found and _share_parts(found[-1][-1], layer):
            found[-1].append(layer)
        else:
            found.append([layer])
    return found


def _share_parts(one: TransformModule, other: TransformModule) -> bool:
    if not (_is_plain(one) and _is_plain(other)):
        return False
    return other.partition in (one.partition, one.partition.swap)


def _is_plain(layer: TransformModule) -> TypeGuard[Coupling]:
    """Whether a layer is a coupling whose methods are those of the base class."""
    own, base = type(layer), Coupling
    return isinstance(layer, base) and (
        (own._forward_pair, own._inverse_pair) == (base._forward_pair, base._inverse_pair)
    )
