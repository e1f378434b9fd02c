"""Coupling layers (NICE, section 3.2; RealNVP, section 3.3) and their scale functions."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from numpyro_flows.checks import as_event_shape, as_scale
from numpyro_flows.event import Event
from numpyro_flows.networks import ConvNet, DenseNet
from numpyro_flows.partition import Partition, as_partition
from numpyro_flows.transform import OnEvents, TransformModule
from numpyro_flows.tree import replace


class TanhScale(eqx.Module):
    """`log_scale = factor · tanh(r)` with learned factors (RealNVP, section 4.1).

    Args:
        shape: shape of the factors: `(D,)`, one per coordinate, or `(C, 1, 1)`, one per channel.
        limit: bound that the factor approaches smoothly but never passes; None for none, as in
            the paper.
    """

    weight: Array
    limit: float | None = eqx.field(static=True)

    def __init__(self, shape: Sequence[int], limit: float | None = None) -> None:
        self.limit = limit
        self.weight = jnp.full(tuple(shape), 1.0 if limit is None else min(1.0, limit), dtype=float)

    @property
    def factor(self) -> Array:
        """The factor, bounded by the limit."""
        if self.limit is None:
            return self.weight
        return self.limit * jnp.tanh(self.weight / self.limit)

    def penalty(self) -> Array:
        """Sum of the squared factors."""
        return jnp.square(self.factor).sum()

    def __call__(self, r: Array) -> Array:
        """Map the network's output to a log-scale."""
        return jnp.broadcast_to(self.factor, r.shape) * jnp.tanh(r)


class SigmoidScale(eqx.Module):
    """`log_scale = softplus(−(r + 2))`: encoding multiplies by `sigmoid(r + 2)`, as Glow's code.

    Args:
        shape: not used.
        limit: bound on the distance from the value at `r = 0`; None for none.
    """

    limit: float | None = eqx.field(static=True)

    def __init__(self, shape: Sequence[int], limit: float | None = None) -> None:
        self.limit = limit

    def __call__(self, r: Array) -> Array:
        """Map the network's output to a log-scale."""
        log_scale = jax.nn.softplus(-(r + 2.0))
        if self.limit is None:
            return log_scale
        start = math.log1p(math.exp(-2.0))
        # No steeper than the limit asks for: rounding errors of far-out inputs pass this slope.
        return start + self.limit * jnp.tanh((log_scale - start) / max(self.limit, 0.5))


class ClampScale(eqx.Module):
    """`log_scale = 2/π · c · arctan(r/c)`, with `c = 0.1` for positive r and 2 for negative.

    The asymmetric soft clamp of Andrade, "Stable training of normalizing flows for
    high-dimensional variational inference" (2024), section 4.1.

    Args:
        shape: not used.
        limit: a smaller bound for both sides; None for none.
    """

    upper: float = eqx.field(static=True)
    lower: float = eqx.field(static=True)

    def __init__(self, shape: Sequence[int], limit: float | None = None) -> None:
        limit = math.inf if limit is None else limit
        self.upper, self.lower = min(0.1, limit), min(2.0, limit)

    def __call__(self, r: Array) -> Array:
        """Map the network's output to a log-scale."""
        upper = self.upper * jnp.arctan(jnp.maximum(r, 0.0) / self.upper)
        lower = self.lower * jnp.arctan(jnp.minimum(r, 0.0) / self.lower)
        return 2.0 / math.pi * (upper + lower)


class ExpScale(eqx.Module):
    """`log_scale = r`: unbounded, the papers' formula.

    Args:
        shape: not used.
        limit: not used.
    """

    def __init__(self, shape: Sequence[int], limit: float | None = None) -> None:
        pass

    def __call__(self, r: Array) -> Array:
        """Map the network's output to a log-scale."""
        return r


class FunctionScale(eqx.Module):
    """A plain function as a scale: static, so that a flow's leaves are arrays alone.

    Args:
        function: maps the network's output to a log-scale.
    """

    function: Callable[[Array], Array] = eqx.field(static=True)

    def __call__(self, r: Array) -> Array:
        """Map the network's output to a log-scale."""
        return self.function(r)


SCALES: dict[str, Callable[..., Any]] = {
    "tanh": TanhScale,
    "sigmoid": SigmoidScale,
    "clamp": ClampScale,
    "exp": ExpScale,
}


class Coupling(OnEvents):
    """What the couplings share: a partition, and a network that sees part `a` of the event.

    To be subclassed, not used: see `AdditiveCoupling` and `AffineCoupling`.
    """

    outputs: ClassVar[int]  # numbers that the conditioner gives for each transformed coordinate

    network: Callable[..., Array]
    partition: Partition = eqx.field(static=True)
    squash: bool = eqx.field(static=True)

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        partition: Any = "halves",
        network: Callable[..., Array] | None = None,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        init_scale: float = 0.0,
        squash: bool = True,
        context_dim: int = 0,
        key: Array,
    ) -> None:
        shape = as_event_shape(event_shape)
        super().__init__(shape, context_dim=context_dim)
        self.partition = as_partition(partition, shape)
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

    def _end_partition(self, last: bool) -> Partition | None:
        return self.partition

    def _absorb(self, event: Event, first: bool) -> tuple[TransformModule, Event]:
        layer = self
        absorb = getattr(self.network, "absorb", None)
        if absorb is not None:
            seen = self._seen(event.parts(self.partition)[0], event.context)
            rows = seen.reshape(-1, *seen.shape[-len(self.event_shape) :])
            layer = replace(self, network=absorb(rows, first))
        return layer, layer._inverse_event(event)[0]

    def _seen(self, a: Array, context: Array | None) -> Array:
        """Return what the network sees of part `a` and the context."""
        # The network may see any function of the untouched part. asinh keeps far-out inputs from
        # driving the shift, and with it the rounding error, beyond what float32 holds.
        seen = jnp.arcsinh(a) if self.squash else a
        axis, rank = self.partition.axis, len(self.event_shape)
        if context is not None and self.context_dim:
            context = context.astype(seen.dtype)[(..., *[None] * (rank - 1))]
            pixels = seen.shape[seen.ndim - rank + 1 :]
            shape = (*seen.shape[:-rank], self.context_dim, *pixels)
            seen = jnp.concatenate([seen, jnp.broadcast_to(context, shape)], axis=axis)
        return seen

    def _parameters_given(self, a: Array, context: Array | None) -> Array:
        """Evaluate the network on part `a`."""
        seen, axis, rank = self._seen(a, context), self.partition.axis, len(self.event_shape)
        signature = "(a)->(r)" if rank == 1 else "(a,h,w)->(r,h,w)"
        raw = jnp.vectorize(self.network, signature=signature)(seen)
        expected = self.outputs * self.partition.sizes[1]
        if raw.shape[axis] != expected:
            raise ValueError(
                f"`network` gave {raw.shape[axis]} outputs, but this coupling needs {expected}: "
                f"{self.outputs} for each of {self.partition.sizes[1]} transformed "
                + ("coordinates" if rank == 1 else "channels")
            )
        return raw

    def _unchanged(self, y: Array) -> Array:
        """Return the log-determinant of a shift."""
        return jnp.zeros_like(y, shape=y.shape[: y.ndim - len(self.event_shape)])


class AdditiveCoupling(Coupling):
    r"""NICE's coupling: one part of the event is shifted by a function of the other.

    $$y_a = x_a, \qquad y_b = x_b + \mathrm{shift}(x_a), \qquad \log|\det dy/dx| = 0.$$

    Shapes: `(*batch, *event_shape)` to the same, ladj `(*batch,)`.

    Args:
        event_shape: D or `(D,)`, at least 2; or `(C, H, W)`, an image.
        partition: `"halves"`, `"alternating"`, a boolean mask (true: part a) or a `Partition`;
            for images `"channels"` (as `"halves"`), `"checkerboard"` or a mask of the channels.
        network: maps part a of one event, joined by the context, `(D_a + context_dim,)`, to the
            shift `(D_b,)`, as Equinox's networks do; for images C in place of D, and `(H, W)`
            after it. Default: a `DenseNet`, for images a `ConvNet`.
        hidden: widths of the default network's hidden layers.
        activation: the default network's activation.
        init_scale: standard deviation of the default network's last layer at the start.
        squash: whether the network sees `asinh(x_a)` in place of `x_a`.
        context_dim: size of the context; 0 for none.
        key: random key of the default network's weights.

    Raises:
        ValueError: where the event has fewer than two coordinates, or partition or network do
            not fit it.

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

    def _forward_event(self, event: Event) -> tuple[Event, Array]:
        a, b = event.parts(self.partition)
        y = b + self.partition.only_b(self._parameters_given(a, event.context))
        return event.to((a, y), self.partition), self._unchanged(y)

    def _inverse_event(self, event: Event) -> tuple[Event, Array]:
        a, b = event.parts(self.partition)
        x = b - self.partition.only_b(self._parameters_given(a, event.context))
        return event.to((a, x), self.partition), self._unchanged(x)


class AffineCoupling(Coupling):
    r"""RealNVP's coupling: one part of the event is scaled and shifted given the other.

    $$y_a = x_a, \qquad y_b = x_b \odot \exp(\mathrm{log\_scale}(x_a)) + \mathrm{shift}(x_a),
    \qquad \log|\det dy/dx| = \sum_j \mathrm{log\_scale}_j(x_a).$$

    Shift and the number r behind the log-scale come out of one network, the shifts first.

    Shapes: `(*batch, *event_shape)` to the same, ladj `(*batch,)`.

    Args:
        event_shape: D or `(D,)`, at least 2; or `(C, H, W)`, an image.
        scale: how r becomes the log-scale: `"tanh"` (RealNVP, learned factor), `"sigmoid"`
            (Glow), `"clamp"` (soft asymmetric clamp), `"exp"` (none) or a callable.
        limit: bound on the log-scale of the named scales but `"exp"`; None for the papers' form.
            A flow of L couplings holds its numbers best with about 4 / L.
        partition: `"halves"`, `"alternating"`, a boolean mask (true: part a) or a `Partition`;
            for images `"channels"` (as `"halves"`), `"checkerboard"` or a mask of the channels.
        network: maps part a of one event, joined by the context, `(D_a + context_dim,)`, to
            `(2 D_b,)`, as Equinox's networks do; for images C in place of D, and `(H, W)` after
            it. Default: a `DenseNet`, for images a `ConvNet`.
        hidden: widths of the default network's hidden layers.
        activation: the default network's activation.
        init_scale: standard deviation of the default network's last layer at the start.
        squash: whether the network sees `asinh(x_a)` in place of `x_a`.
        context_dim: size of the context; 0 for none.
        key: random key of the default network's weights.

    Raises:
        ValueError: where the event has fewer than two coordinates, or partition, network or
            scale do not fit it.

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
        scale: str | Callable[[Array], Array] = "tanh",
        limit: float | None = 2.0,
        partition: Any = "halves",
        network: Callable[..., Array] | None = None,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        init_scale: float = 0.0,
        squash: bool = True,
        context_dim: int = 0,
        key: Array,
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
            ones = [1] * (len(self.event_shape) - 1)  # one parameter for a channel of an image
            self.scale = SCALES[scale]((self.partition.sizes[1], *ones), limit)
        else:
            self.scale = scale if isinstance(scale, eqx.Module) else FunctionScale(scale)

    def _shift_and_log_scale(self, a: Array, context: Array | None) -> tuple[Array, Array]:
        raw = self._parameters_given(a, context)
        shift, r = jnp.split(raw, 2, axis=self.partition.axis)
        return self.partition.only_b(shift), self.partition.only_b(self.scale(r))

    def _forward_event(self, event: Event) -> tuple[Event, Array]:
        a, b = event.parts(self.partition)
        shift, log_scale = self._shift_and_log_scale(a, event.context)
        y = b * jnp.exp(log_scale) + shift
        return event.to((a, y), self.partition), self._sum(log_scale)

    def _inverse_event(self, event: Event) -> tuple[Event, Array]:
        a, b = event.parts(self.partition)
        shift, log_scale = self._shift_and_log_scale(a, event.context)
        x = (b - shift) * jnp.exp(-log_scale)
        return event.to((a, x), self.partition), -self._sum(log_scale)

    def _sum(self, log_scale: Array) -> Array:
        return log_scale.sum(tuple(range(-len(self.event_shape), 0)))
