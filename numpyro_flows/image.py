"""Images through several scales: squeezing pixels into channels, and factoring latents out."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from numpyro.distributions import constraints

from numpyro_flows.chain import check_context_dims, check_modules
from numpyro_flows.checks import check_event
from numpyro_flows.event import Event
from numpyro_flows.partition import Partition, channels, image_shape
from numpyro_flows.transform import OnEvents, TransformModule
from numpyro_flows.tree import replace


class Squeeze(TransformModule):
    r"""Each square of 2 × 2 pixels of an image becomes one pixel of four times the channels.

    Seen from data to base, as the papers say it; from base to data the squares come back. With
    `i` and `j` the row and the column in the square,

    $$x_{(2i + j) C + c,\, h,\, w} = y_{c,\, 2h + i,\, 2w + j}, \qquad \log|\det dy/dx| = 0.$$

    Channels are ordered by their place in the square first, as in RealNVP's code, so that two
    halves of them are two rows of pixels; behind a 1×1 convolution the order does not matter.

    Shapes: `(*batch, 4 C, H / 2, W / 2)` to `(*batch, C, H, W)`, ladj `(*batch,)`.

    Args:
        event_shape: `(C, H, W)`, with H and W even.

    Raises:
        ValueError: where height or width is odd.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803),
        section 3.6 and figure 3.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import Squeeze
        >>> squeeze = Squeeze((1, 2, 4))
        >>> squeeze.inv(jnp.arange(8.0).reshape(1, 2, 4)).reshape(4, 2).tolist()
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

    def forward_and_ladj(self, x: Array) -> tuple[Array, Array]:
        """Map base to data."""
        x = self._entry(x, at_base=True).value
        c, h, w = self.event_shape
        squares = x.reshape(*x.shape[:-3], 2, 2, c, h // 2, w // 2)
        y = jnp.moveaxis(squares, (-5, -4), (-3, -1))  # (c, h/2, 2, w/2, 2)
        return y.reshape(*x.shape[:-3], c, h, w), jnp.zeros_like(x, shape=x.shape[:-3])

    def inverse_and_ladj(self, y: Array) -> tuple[Array, Array]:
        """Map data to base."""
        y = self._entry(y).value
        c, h, w = self.event_shape
        squares = y.reshape(*y.shape[:-3], c, h // 2, 2, w // 2, 2)
        x = jnp.moveaxis(squares, (-3, -1), (-5, -4))
        return x.reshape(*y.shape[:-3], *self.base_shape), jnp.zeros_like(y, shape=y.shape[:-3])


class Flatten(TransformModule):
    r"""An image as a vector, row by row and channel by channel.

    $$y_{c,h,w} = x_{(c H + h) W + w}, \qquad \log|\det dy/dx| = 0.$$

    Shapes: `(*batch, C · H · W)` to `(*batch, C, H, W)`, ladj `(*batch,)`.

    Args:
        event_shape: `(C, H, W)`, or any other.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import Flatten
        >>> Flatten((1, 2, 2)).inv(jnp.ones((5, 1, 2, 2))).shape
        (5, 4)
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape, base_shape=math.prod(event_shape))

    def forward_and_ladj(self, x: Array) -> tuple[Array, Array]:
        """Map base to data."""
        x = self._entry(x, at_base=True).value
        batch = x.shape[:-1]
        return x.reshape(*batch, *self.event_shape), jnp.zeros_like(x, shape=batch)

    def inverse_and_ladj(self, y: Array) -> tuple[Array, Array]:
        """Map data to base."""
        y = self._entry(y).value
        batch = y.shape[: y.ndim - len(self.event_shape)]
        return y.reshape(*batch, *self.base_shape), jnp.zeros_like(y, shape=batch)


class MultiScale(OnEvents):
    """Flows of several scales, each of which passes half of its channels on to the next.

    On the way from data to base the finest level encodes the image; one half of its channels, part
    `b` of `channels`, is done, the other goes through the next level, and so on. The latents of
    all levels make up one flat base vector, the coarsest first.

    A level's first layer may be an `AffineCoupling` on `channels`: it gives what is factored out
    a mean and a scale that are functions of what goes on, Glow's learned prior.

    Shapes: `(*batch, C · H · W)` to `(*batch, C, H, W)`, ladj `(*batch,)`.

    Args:
        levels: flows on images, the one next to the base first; each gives half the channels that
            the next one takes.

    Raises:
        ValueError: where there are none, or they do not fit.
        TypeError: where one is not a `TransformModule`.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803),
        section 3.6, equations 13 to 16; Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 3.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import ActNorm, MultiScale, Squeeze
        >>> flow = MultiScale([ActNorm((2, 2, 2)), Squeeze((1, 4, 4))])
        >>> z = flow.inv(jnp.ones((5, 1, 4, 4)))
        >>> z.shape, [part.shape[1:] for part in flow.split_latent(z)]
        ((5, 16), [(2, 2, 2), (2, 2, 2)])
    """

    levels: tuple[TransformModule, ...]
    partitions: tuple[Partition, ...] = eqx.field(static=True)
    latent_shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    @property
    def codomain(self) -> constraints.Constraint:
        """What the finest level gives."""
        return self.levels[-1].codomain

    def __init__(self, levels: Iterable[TransformModule]) -> None:
        levels = tuple(levels)
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
                    f"`levels` do not fit: number {i} gives events of shape {coarse.event_shape}, "
                    f"but number {i + 1} takes {(own, *fine.base_shape[1:])} from it"
                )
            shapes.append((done, *fine.base_shape[1:]))
        self.latent_shapes = tuple(shapes)
        self.levels = levels

    def split_latent(self, z: Array) -> list[Array]:
        """Take a base vector apart into the latents of the levels, the coarsest first.

        Args:
            z: `(*batch, C · H · W)`.

        Returns:
            Latents `(*batch, *shape)`, one for each of `latent_shapes`.
        """
        z = check_event(z, self.base_shape, "z")
        ends = list(accumulate(math.prod(shape) for shape in self.latent_shapes))
        parts = jnp.split(z, ends[:-1], axis=-1)
        pairs = zip(parts, self.latent_shapes, strict=True)
        return [part.reshape(*z.shape[:-1], *shape) for part, shape in pairs]

    def join_latent(self, parts: Sequence[Array]) -> Array:
        """Put the latents of the levels together again: the inverse of `split_latent`."""
        flat = [part.reshape(*part.shape[:-3], math.prod(part.shape[-3:])) for part in parts]
        return jnp.concatenate(flat, axis=-1)

    def _forward_event(self, event: Event) -> tuple[Event, Array]:
        first, *rest = self.split_latent(event.whole())
        coarsest, *levels = self.levels
        event, ladj = coarsest._forward_event(event.to(first))
        for level, partition, part in zip(levels, self.partitions, rest, strict=True):
            event, step = level._forward_event(event.to((event.whole(), part), partition))
            ladj = ladj + step
        return event, ladj

    def _inverse_event(self, event: Event) -> tuple[Event, Array]:
        parts: list[Array] = []
        ladj: Any = 0.0
        coarsest, *levels = self.levels
        for level, partition in reversed(list(zip(levels, self.partitions, strict=True))):
            event, step = level._inverse_event(event)
            ladj = ladj + step
            passed, part = event.parts(partition)
            parts.append(part)
            event = event.to(passed)
        event, step = coarsest._inverse_event(event)
        return event.to(self.join_latent([event.whole(), *reversed(parts)])), ladj + step

    def _absorb(self, event: Event, first: bool) -> tuple[TransformModule, Event]:
        parts, absorbed = [], []
        coarsest, *levels = self.levels
        for level, partition in reversed(list(zip(levels, self.partitions, strict=True))):
            level, event = level._absorb(event, first)
            absorbed.append(level)
            passed, part = event.parts(partition)
            parts.append(part)
            event = event.to(passed)
        coarsest, event = coarsest._absorb(event, first)
        z = self.join_latent([event.whole(), *reversed(parts)])
        return replace(self, levels=(coarsest, *reversed(absorbed))), event.to(z)
