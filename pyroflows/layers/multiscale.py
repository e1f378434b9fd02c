"""Multi-scale image flows: squeezing pixels into channels, and factoring out latents."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from pyro.distributions import constraints
from torch import Tensor, nn
from typing_extensions import override

from pyroflows.inputs import check_event
from pyroflows.layers.chain import check_modules
from pyroflows.transform import Context, Pair, Parts, TransformModule
from pyroflows_common.checks import check_context_dims
from pyroflows_common.partition import channels, image_shape


class Squeeze(TransformModule):
    r"""A reshape of each square of 2 × 2 pixels into one pixel with four times the channels.

    This describes the direction from data to base, as in the papers; the direction from base to
    data restores the squares. With row `i` and column `j` in the square,

    $$x_{(2i + j) C + c,\, h,\, w} = y_{c,\, 2h + i,\, 2w + j}, \qquad \log|\det dy/dx| = 0.$$

    Channels are ordered by their position in the square first, as in RealNVP's code, so that their
    two halves are two rows of pixels; after a 1×1 convolution the order does not matter.

    Shapes: `(*batch, 4 C, H / 2, W / 2)` to `(*batch, C, H, W)`, ladj `(*batch,)`.

    Args:
        event_shape: `(C, H, W)`, with H and W even.

    Raises:
        ValueError: if height or width is odd.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803),
        section 3.6 and figure 3.

    Examples:
        >>> import torch
        >>> from pyroflows import Squeeze
        >>> squeeze = Squeeze((1, 2, 4))
        >>> squeeze.inv(torch.arange(8.0).reshape(1, 2, 4)).flatten(-2).tolist()
        [[0.0, 2.0], [1.0, 3.0], [4.0, 6.0], [5.0, 7.0]]
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        c, h, w = image_shape(event_shape)
        if h % 2 or w % 2:
            raise ValueError(
                f"`event_shape` is {(c, h, w)}, but Squeeze needs an even height and width, such "
                f"as {(c, h + h % 2, w + w % 2)}"
            )
        super().__init__((c, h, w), base_shape=(4 * c, h // 2, w // 2))

    @override
    def forward_and_ladj(self, x: Float[Tensor, "*batch c h w"]) -> Pair:
        c, h, w = self.event_shape
        squares = x.reshape(*x.shape[:-3], 2, 2, c, h // 2, w // 2)
        y = squares.movedim((-5, -4), (-3, -1))  # (c, h/2, 2, w/2, 2)
        return y.reshape(*x.shape[:-3], c, h, w), x.new_zeros(()).expand(x.shape[:-3])

    @override
    def inverse_and_ladj(self, y: Float[Tensor, "*batch c h w"]) -> Pair:
        c, h, w = self.event_shape
        squares = y.reshape(*y.shape[:-3], c, h // 2, 2, w // 2, 2)
        x = squares.movedim((-3, -1), (-5, -4))
        return x.reshape(*y.shape[:-3], *self.base_shape), y.new_zeros(()).expand(y.shape[:-3])


class Flatten(TransformModule):
    r"""A reshape between a vector and an image, channel by channel and row by row.

    $$y_{c,h,w} = x_{(c H + h) W + w}, \qquad \log|\det dy/dx| = 0.$$

    Shapes: `(*batch, C · H · W)` to `(*batch, C, H, W)`, ladj `(*batch,)`.

    Args:
        event_shape: `(C, H, W)`, or any other shape.

    Examples:
        >>> import torch
        >>> from pyroflows import Flatten
        >>> Flatten((1, 2, 2)).inv(torch.ones(5, 1, 2, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape, base_shape=math.prod(event_shape))

    @override
    def forward_and_ladj(self, x: Float[Tensor, "*batch d"]) -> Pair:
        batch = x.shape[:-1]
        return x.reshape(*batch, *self.event_shape), x.new_zeros(()).expand(batch)

    @override
    def inverse_and_ladj(self, y: Float[Tensor, "..."]) -> Pair:
        batch = y.shape[: y.ndim - len(self.event_shape)]
        return y.reshape(*batch, *self.base_shape), y.new_zeros(()).expand(batch)


class MultiScale(TransformModule):
    """A flow of several scales, each of which passes half of its channels on to the next.

    From data to base, the finest level encodes the image; one half of its channels, part `b` of
    `channels`, is factored out, the other goes through the next level, and so on. The latents of
    all levels form one flat base vector, the coarsest first.

    The first layer of a level may be an `AffineCoupling` on `channels`: it makes mean and scale of
    the channels that are factored out functions of the others, as Glow's learned prior does.

    Shapes: `(*batch, C · H · W)` to `(*batch, C, H, W)`, ladj `(*batch,)`.

    Args:
        levels: flows on images in order from base to data; each gives half of the channels that the
            next one takes.

    Raises:
        ValueError: if there are no levels, or if they do not fit.
        TypeError: if an element is not a `TransformModule`.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803),
        section 3.6, equations 13 to 16; Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 3.

    Examples:
        >>> import torch
        >>> from pyroflows import ActNorm, MultiScale, Squeeze
        >>> flow = MultiScale([ActNorm((2, 2, 2)), Squeeze((1, 4, 4))])
        >>> z = flow.inv(torch.ones(5, 1, 4, 4))
        >>> z.shape, [part.shape[1:] for part in flow.split_latent(z)]
        (torch.Size([5, 16]), [torch.Size([2, 2, 2]), torch.Size([2, 2, 2])])
    """

    levels: Any  # an nn.ModuleList, whose items are typed only as modules

    @property
    def codomain(self) -> constraints.Constraint:
        """The codomain of the finest level."""
        return self.levels[-1].codomain

    def __init__(self, levels: Iterable[TransformModule]) -> None:
        levels = list(levels)
        check_modules(levels, "levels")
        shape = image_shape(levels[-1].event_shape)
        context_dim = check_context_dims(levels, "levels")
        super().__init__(shape, base_shape=(math.prod(shape),), context_dim=context_dim)
        self.partitions = tuple(channels(level.base_shape) for level in levels[1:])
        shapes = [levels[0].base_shape]
        for i, (coarse, fine) in enumerate(pairwise(levels)):
            own, done = self.partitions[i].sizes
            if coarse.event_shape != (own, *fine.base_shape[1:]):
                raise ValueError(
                    f"`levels` do not fit: level {i} gives events of shape {coarse.event_shape}, "
                    f"but level {i + 1} takes {(own, *fine.base_shape[1:])} from it"
                )
            shapes.append((done, *fine.base_shape[1:]))
        self.latent_shapes = tuple(shapes)
        self.levels = nn.ModuleList(levels)

    def split_latent(self, z: Float[Tensor, "*batch d"]) -> list[Float[Tensor, "*batch _ _ _"]]:
        """Split a base vector into the latents of the levels, the coarsest first.

        Args:
            z: `(*batch, C · H · W)`.

        Returns:
            Latents `(*batch, *shape)`, one for each of `latent_shapes`.
        """
        check_event(z, self.base_shape, "z")
        parts = z.split([math.prod(shape) for shape in self.latent_shapes], dim=-1)
        pairs = zip(parts, self.latent_shapes, strict=True)
        return [part.reshape(*z.shape[:-1], *shape) for part, shape in pairs]

    def join_latent(
        self, parts: Sequence[Float[Tensor, "*batch _ _ _"]]
    ) -> Float[Tensor, "*batch d"]:
        """Join the latents of the levels to a base vector: the inverse of `split_latent`."""
        return torch.cat([part.flatten(-3) for part in parts], dim=-1)

    def forward_and_ladj(self, x: Float[Tensor, "*batch d"], context: Context = None) -> Pair:
        """Map base to data, starting with the coarsest level."""
        first, *rest = self.split_latent(x)
        coarsest, *levels = self.levels
        y, ladj = coarsest._forward_pair(first, context)
        for level, partition, part in zip(levels, self.partitions, rest, strict=True):
            y, step = level._forward_pair(partition.join(y, part), context)
            ladj = ladj + step
        return y, ladj

    def inverse_and_ladj(self, y: Float[Tensor, "*batch c h w"], context: Context = None) -> Pair:
        """Map data to base, starting with the finest level."""
        ladj: Any = 0.0

        def encode(level: TransformModule, y: Tensor) -> Tensor:
            nonlocal ladj
            x, step = level._inverse_pair(y, context)
            ladj = ladj + step
            return x

        return self._latent(encode, y), ladj

    def _latent(self, encode: Callable[[TransformModule, Tensor], Tensor], y: Tensor) -> Tensor:
        """Encode each level by a function, and return the latents of all levels as one vector."""
        parts: list[Tensor] = []
        coarsest, *levels = self.levels
        for level, partition in reversed(list(zip(levels, self.partitions, strict=True))):
            y, part = partition.split(encode(level, y))
            parts.insert(0, part)
        return self.join_latent([encode(coarsest, y), *parts])

    def _absorb(self, y: Tensor, context: Context, first: bool) -> Tensor:
        return self._latent(lambda level, y: level._absorb(y, context, first), y)

    def _standardize(self, parts: Parts) -> None:
        if self.levels[-1]._standardize(parts) is not None:
            super()._standardize(parts)
