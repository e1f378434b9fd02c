"""Latents of events: paths between them, and events with a part of them drawn anew."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from numpyro_flows.applications.inputs import joined
from numpyro_flows.distribution import flow_distribution
from numpyro_flows.inputs import Events, check_event, check_finite
from numpyro_flows.layers.multiscale import MultiScale
from numpyro_flows.rng import RandomKey, check_key
from numpyro_flows.transform import Context, TransformModule
from pyroflows_common.checks import as_count
from pyroflows_common.latents import PARALLEL, as_levels, check_path, one_scale


def interpolate(
    flow: TransformModule,
    start: Events,
    end: Events,
    num: int = 9,
    *,
    path: str = "linear",
    context: Context = None,
) -> Float[Array, "num ..."]:
    r"""Return events on a path between two events, which is simple in latent space.

    With the latents z₀ and z₁ of the two events and their angle ω, for t from 0 to 1,

    $$z_t = (1 - t) z_0 + t z_1 \quad\text{or}\quad
    z_t = \frac{\lvert z_0 \rvert_t}{\sin\omega} \Bigl( \sin((1 - t) \omega)
    \frac{z_0}{\lvert z_0 \rvert} + \sin(t \omega) \frac{z_1}{\lvert z_1 \rvert} \Bigr),
    \qquad \lvert z \rvert_t = (1 - t) \lvert z_0 \rvert + t \lvert z_1 \rvert.$$

    Args:
        flow: the flow; a conditional one with `context`.
        start: events `(*batch, *event_shape)`.
        end: events whose batch shape broadcasts with that of `start`.
        num: number of events on the path, both ends among them; at least 2.
        path: `"linear"`, as in Glow's figures, or `"arc"`, a great circle. In many dimensions, a
            normal base has its mass at one distance from the origin, which an arc keeps and a line
            does not. Ends in opposite directions have a line through the origin on either path.
        context: contexts `(*batch, context_dim)` of a conditional flow.

    Returns:
        Events `(num, *batch, *event_shape)`, the first and last of which are `start` and `end` but
        for rounding.

    Raises:
        ValueError: if shapes do not fit, if an event is not finite, or if `path` is unknown.
        TypeError: if `start` or `end` is not an array of real numbers.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 6.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import Standardization, interpolate
        >>> interpolate(Standardization(2), jnp.zeros(2), jnp.ones(2), 3).tolist()
        [[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]
    """
    num = as_count(num, "num", 2)
    check_path(path)
    if not isinstance(flow, TransformModule):
        raise TypeError(f"`flow` is a {type(flow).__name__}, expected a TransformModule")
    for name, x in (("start", start), ("end", end)):
        check_event(x, flow.event_shape, name)
        check_finite(x, flow.event_shape, f"`{name}`")
    flow = flow if context is None else flow.condition(context)
    ends = jnp.broadcast_arrays(flow.inv(jnp.asarray(start)), flow.inv(jnp.asarray(end)))
    shape = ends[0].shape
    batch = shape[: len(shape) - len(flow.base_shape)]
    first, last = (z.reshape(*batch, -1) for z in ends)
    t = jnp.linspace(0, 1, num, dtype=first.dtype).reshape(-1, *(1 for _ in first.shape))
    z = (1 - t) * first + t * last
    if path == "arc":
        z = _arc(first, last, t, z)
    return flow(z.reshape(num, *shape))


def _arc(
    first: Float[Array, "*batch d"],
    last: Float[Array, "*batch d"],
    t: Float[Array, "num ..."],
    line: Float[Array, "num *batch d"],
) -> Float[Array, "num *batch d"]:
    """Return the points of great circles; of the line where the ends have no angle."""
    lengths = [jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (first, last)]
    least = jnp.finfo(first.dtype).tiny
    units = [z / jnp.maximum(n, least) for z, n in zip((first, last), lengths, strict=True)]
    # By the chord and the sum: the arc cosine loses half of the digits of a small angle.
    chord, total = (
        jnp.linalg.norm(side, axis=-1) for side in (units[0] - units[1], units[0] + units[1])
    )
    angle = 2 * jnp.arctan2(chord, total)[..., None]
    bent = (jnp.sin(angle) > PARALLEL) & (lengths[0] > 0) & (lengths[1] > 0)
    sine = jnp.where(bent, jnp.sin(angle), 1)
    turned = (jnp.sin((1 - t) * angle) * units[0] + jnp.sin(t * angle) * units[1]) / sine
    return jnp.where(bent, ((1 - t) * lengths[0] + t * lengths[1]) * turned, line)


def resample(
    flow: TransformModule,
    x: Events,
    scales: int | Sequence[int],
    *,
    base: str | dist.Distribution | None = None,
    temperature: float = 1.0,
    context: Context = None,
    key: RandomKey,
) -> Float[Array, "*batch c h w"]:
    """Draw the latents of some scales of images anew, and keep those of the others.

    Without the latents of the fine scales, an image keeps its outline; without those of the
    coarsest, its texture.

    Args:
        flow: a multi-scale flow, such as `realnvp` and `glow` build for images; a conditional one
            with `context`.
        x: images `(*batch, C, H, W)`.
        scales: one or several scales, from 0 for the coarsest, as in `flow.latent_shapes`.
        base: base distribution, as for `flow_distribution`.
        temperature: factor on the scale of the new latents of a named base.
        context: contexts `(*batch, context_dim)` of a conditional flow.
        key: random key.

    Returns:
        Images `(*batch, C, H, W)`.

    Raises:
        ValueError: if `flow` has no scales, or not these, or if `x` does not fit it.
        TypeError: if `x` is not an array of real numbers.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803),
        appendix D.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import realnvp, resample
        >>> key = jax.random.key(0)
        >>> flow = realnvp((1, 8, 8), scales=2, channels=4, blocks=1, key=key)
        >>> resample(flow, jnp.zeros((5, 1, 8, 8)), 0, key=key).shape
        (5, 1, 8, 8)
    """
    levels, x, context = joined(flow, x, context)
    if not isinstance(levels, MultiScale):
        raise ValueError(one_scale(levels.event_shape))
    drawn = as_levels(scales, levels.latent_shapes)
    check_finite(x, levels.event_shape)
    check_key(key)
    given = levels if context is None else levels.condition(context)
    z = given.inv(x)
    latent = flow_distribution(given, base, temperature=temperature).base_dist
    anew = latent.sample(key, z.shape[:-1] if context is None else ())
    pairs = zip(levels.split_latent(z), levels.split_latent(anew), strict=True)
    return given(levels.join_latent([pair[i in drawn] for i, pair in enumerate(pairs)]))
