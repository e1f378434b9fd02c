"""Coupling layers (NICE, section 3.2; RealNVP, section 3.3)."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import BackwardCFunction
from typing_extensions import override

from pyroflows.layers.scales import SCALES
from pyroflows.networks import ConvNet, DataDependent, DenseNet
from pyroflows.transform import Context, Pair, TransformModule
from pyroflows_common.checks import as_event_shape, as_scale
from pyroflows_common.partition import Partition, as_partition

# Below so many numbers, a call costs more than the arithmetic.
FEW = 2048


class Asinh(torch.autograd.Function):
    """`asinh(x)`, equal to `torch.asinh` up to rounding, in a tenth of its time on a CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Evaluate `sign(x) · log(|x| + √(1 + x²))`."""
        size = x.abs()
        root = torch.addcmul(size.new_ones(()), size, size).sqrt_()
        root = torch.minimum(root, size + 1.0)  # larger only if the square overflows
        return size.add_(root).log_().copysign_(x)

    @staticmethod
    def setup_context(ctx: BackwardCFunction, inputs: tuple[Tensor], output: Tensor) -> None:
        """Save the argument."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(
        ctx: BackwardCFunction, gradient: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """Multiply by the derivative, `1 / √(1 + x²)`."""
        (x,) = ctx.saved_tensors
        return gradient * torch.addcmul(x.new_ones(()), x, x).rsqrt()


def asinh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `asinh(x)`, fast in eager mode and under `torch.compile`, which fuses its own."""
    if x.numel() < FEW or torch.compiler.is_compiling():
        return torch.asinh(x)
    if torch.finfo(x.dtype).bits < 32 or not _has_storage(x):
        return torch.asinh(x)
    if unpack_dual(x).tangent is not None:  # custom functions do not support nested forward mode
        return torch.asinh(x)
    return Asinh.apply(x)


def _has_storage(tensor: Tensor) -> bool:
    """Return whether a tensor has storage: those inside torch.func's transforms have none."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


class Coupling(TransformModule):
    """Base class of the couplings: a partition, and a network that sees part `a` of the event."""

    outputs: int  # network outputs for each transformed coordinate

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        partition: str | Sequence[bool] | Partition = "halves",
        network: nn.Module | None = None,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        init_scale: float = 0.0,
        squash: bool = True,
        context_dim: int = 0,
    ) -> None:
        shape = as_event_shape(event_shape)
        self.partition = as_partition(partition, shape, context_dim)
        size_a, size_b = self.partition.sizes
        net = DenseNet if len(shape) == 1 else ConvNet
        super().__init__(shape, context_dim=context_dim)
        self.squash = squash
        self.network = network or net(
            size_a + context_dim,
            self.outputs * size_b,
            hidden,
            activation=activation,
            init_scale=init_scale,
        )

    @override
    def forward_and_ladj(self, x: Float[Tensor, "..."], context: Context = None) -> Pair:
        return coupled([self], x, context, True)

    @override
    def inverse_and_ladj(self, y: Float[Tensor, "..."], context: Context = None) -> Pair:
        return coupled([self], y, context, False)

    def _transformed(self, a: Tensor, b: Tensor, context: Context, forward: bool) -> Pair:
        """Transform part `b` given part `a`, and return it with the log-determinant."""
        raise NotImplementedError

    def _absorb(self, y: Tensor, context: Context, first: bool) -> Tensor:
        if isinstance(self.network, DataDependent):
            seen = self._seen(self.partition.split(y)[0], context)
            self.network.absorb(seen.reshape(-1, *seen.shape[-len(self.event_shape) :]), first)
        return super()._absorb(y, context, first)

    def _seen(self, a: Tensor, context: Context) -> Tensor:
        """Return the network's input: part `a` and the context."""
        # The network may see any function of the unchanged part. asinh keeps extreme inputs from
        # driving the shift, and with it the rounding error, beyond the precision of float32.
        seen = asinh(a) if self.squash else a
        axis, rank = self.partition.axis, len(self.event_shape)
        if context is not None and self.context_dim:
            context = context.to(seen.dtype)[(..., *[None] * (rank - 1))]
            pixels = seen.shape[seen.ndim - rank + 1 :]
            context = context.expand(*seen.shape[:-rank], self.context_dim, *pixels)
            seen = torch.cat([seen, context], dim=axis)
        return seen

    def _parameters_given(self, a: Tensor, context: Context) -> Tensor:
        """Evaluate the network on part `a`."""
        seen, axis, rank = self._seen(a, context), self.partition.axis, len(self.event_shape)
        if rank == 1:
            raw = self.network(seen)
        else:  # convolutions take one batch dimension
            raw = self.network(seen.reshape(-1, *seen.shape[-rank:]))
            raw = raw.reshape(*seen.shape[:-rank], *raw.shape[1:])
        # Under autocast the network's output has fewer bits; the transform keeps those of its
        # input.
        if raw.dtype != seen.dtype and torch.finfo(raw.dtype).bits < torch.finfo(seen.dtype).bits:
            raw = raw.to(seen.dtype)
        expected = self.outputs * self.partition.sizes[1]
        if raw.shape[axis] != expected:
            raise ValueError(
                f"`network` gave {raw.shape[axis]} outputs, but this coupling needs {expected}: "
                f"{self.outputs} for each of {self.partition.sizes[1]} transformed "
                + ("coordinates" if rank == 1 else "channels")
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
        network: module that maps part a and the context, `(*batch, D_a + context_dim)`, to the
            shift `(*batch, D_b)`; for images, C replaces D and `(H, W)` follows. Default: a
            `DenseNet`, for images a `ConvNet`.
        hidden: widths of the default network's hidden layers.
        activation: the default network's activation.
        init_scale: initial standard deviation of the default network's last layer.
        squash: whether the network sees `asinh(x_a)` in place of `x_a`.
        context_dim: size of the context; 0 for none.

    Raises:
        ValueError: if there is no context and part a is empty, or if partition or network does not
            fit the event.

    References:
        Dinh, Krueger and Bengio, "NICE: Non-linear Independent Components Estimation"
        (arXiv:1410.8516), section 3.2.

    Examples:
        >>> import torch
        >>> from pyroflows import AdditiveCoupling
        >>> layer = AdditiveCoupling(3)
        >>> layer.inv(layer(torch.ones(3))).tolist()
        [1.0, 1.0, 1.0]
    """

    outputs = 1

    def _transformed(self, a: Tensor, b: Tensor, context: Context, forward: bool) -> Pair:
        shift = self.partition.only_b(self._parameters_given(a, context))
        y = b + shift if forward else b - shift
        return y, self._zero_ladj(y)

    def _zero_ladj(self, y: Tensor) -> Tensor:
        return y.new_zeros(()).expand(y.shape[: y.ndim - len(self.event_shape)])


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
        network: module that maps part a and the context, `(*batch, D_a + context_dim)`, to
            `(*batch, 2 D_b)`; for images, C replaces D and `(H, W)` follows. Default: a `DenseNet`,
            for images a `ConvNet`.
        hidden: widths of the default network's hidden layers.
        activation: the default network's activation.
        init_scale: initial standard deviation of the default network's last layer.
        squash: whether the network sees `asinh(x_a)` in place of `x_a`.
        context_dim: size of the context; 0 for none.

    Raises:
        ValueError: if there is no context and part a is empty, or if partition, network or scale
            does not fit the event.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803),
        sections 3.2 to 3.4; Kingma and Dhariwal, "Glow" (arXiv:1807.03039), table 1.

    Examples:
        >>> import torch
        >>> from pyroflows import AffineCoupling
        >>> layer = AffineCoupling(4, scale="tanh", partition="alternating")
        >>> y, ladj = layer.forward_and_ladj(torch.ones(5, 4))
        >>> y.shape, ladj.shape
        (torch.Size([5, 4]), torch.Size([5]))
    """

    outputs = 2

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        scale: str | Callable[[Float[Tensor, "*shape"]], Float[Tensor, "*shape"]] = "tanh",
        limit: float | None = 2.0,
        partition: str | Sequence[bool] | Partition = "halves",
        network: nn.Module | None = None,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        init_scale: float = 0.0,
        squash: bool = True,
        context_dim: int = 0,
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
        )
        if isinstance(scale, str):
            if scale not in SCALES:
                raise ValueError(
                    f"`scale` is {scale!r}, expected one of {sorted(SCALES)} or a callable"
                )
            if limit is not None:
                as_scale(limit, "limit", zero=False)
            ones = [1] * (len(self.event_shape) - 1)  # one parameter per image channel
            scale = SCALES[scale]((self.partition.sizes[1], *ones), limit)
        self.scale = scale

    def _shift_and_log_scale(self, a: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        shift, r = self._parameters_given(a, context).chunk(2, dim=self.partition.axis)
        return self.partition.only_b(shift), self.partition.only_b(self.scale(r))

    def _transformed(self, a: Tensor, b: Tensor, context: Context, forward: bool) -> Pair:
        shift, log_scale = self._shift_and_log_scale(a, context)
        if forward:
            return torch.addcmul(shift, b, log_scale.exp()), self._sum(log_scale)
        return (b - shift) * (-log_scale).exp(), -self._sum(log_scale)

    def _sum(self, log_scale: Tensor) -> Tensor:
        return log_scale.sum(tuple(range(-len(self.event_shape), 0)))


def coupled(run: "Sequence[Coupling]", x: Tensor, context: Context, forward: bool) -> Pair:
    """Map events through couplings on the same two parts, which are split and joined once."""
    partition, ladj = run[0].partition, cast(Any, 0.0)
    a, b = partition.split(x)
    for coupling in run:
        if coupling.partition != partition:  # then it is the swap
            (a, b), partition = (b, a), coupling.partition
        b, step = coupling._transformed(a, b, context, forward)
        ladj = ladj + step
    return partition.join(a, b), ladj


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
