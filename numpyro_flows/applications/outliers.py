"""Outlier scores: how unusual an event is under a flow."""

import math

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from numpyro_flows.applications.inputs import joined
from numpyro_flows.distribution import FlowDistribution, flow_distribution
from numpyro_flows.inputs import Events, check_finite
from numpyro_flows.transform import Context, TransformModule
from pyroflows_common import outliers as common
from pyroflows_common.bits import bits_per_dim
from pyroflows_common.checks import as_count


def outlier_scores(
    flow: TransformModule,
    x: Events,
    *,
    kind: str = "log_density",
    reference: Events | tuple[Events, Events] | None = None,
    background: TransformModule | None = None,
    levels: int = 256,
    base: str | dist.Distribution | None = None,
    context: Context = None,
    batch_size: int = 256,
) -> Float[Array, "*batch"]:
    r"""Score events by how unusual they are under a flow: high scores are outlying.

    | kind | score |
    |---|---|
    | `"log_density"` | $-\log p(x)$, in nats |
    | `"typicality"` | distance of $\log p(x)$ from its mean over `reference`, in nats |
    | `"complexity"` | $-\log_2 P(x) - L(x)$ of pixels, in bits per dimension |
    | `"ratio"` | $\log p_0(x) - \log p(x)$ with the density $p_0$ of `background`, in nats |

    A density alone can be high where no data lie: images that are simpler than the training data
    often have a higher one. `"typicality"` calls these outlying, too. `"complexity"` takes off the
    code length L of a lossless coder, the shorter one of PNG and WebP, from that under the flow, in
    which P is the probability of the pixels. `"ratio"` divides by a flow that has learned what all
    images share, from data most of whose content has been destroyed; see `corrupt`.

    Args:
        flow: the flow; a conditional one with `context`.
        x: events `(*batch, *event_shape)`, on the scale of the flow's data. Pixels of whole numbers
            go through `dequantize` first.
        kind: kind of the score.
        reference: events `(n, *event_shape)` like the flow's training data, for `"typicality"`; for
            a conditional flow the pair `(events, contexts)`.
        background: background flow, for `"ratio"`. Its base is that of its last fit.
        levels: number of possible values of a pixel, at most 256, for `"complexity"`.
        base: base distribution of `flow`, as for `flow_distribution`.
        context: contexts `(*batch, context_dim)` of conditional flows.
        batch_size: number of events to evaluate at a time.

    Returns:
        Scores `(*batch,)`; infinity for events to which the flow gives no density.

    Raises:
        ValueError: if an argument does not suit the flow or the kind of score, if `x` or
            `reference` has NaN or inf, if the flow gives a reference event no density, or if pixels
            are not on the unit interval.
        TypeError: if `flow` is not a `TransformModule`, or `x` not an array of real numbers.
        ImportError: if `kind` is `"complexity"` and Pillow is not installed.

    References:
        Nalisnick et al., "Detecting out-of-distribution inputs to deep generative models using
        typicality" (arXiv:1906.02994), section 4; Serrà et al., "Input complexity and
        out-of-distribution detection with likelihood-based generative models" (arXiv:1909.11480),
        section 3; Ren et al., "Likelihood ratios for out-of-distribution detection"
        (arXiv:1906.02845), section 2.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from numpyro_flows import Standardization, outlier_scores, threshold
        >>> flow = Standardization(2)  # the identity: a standard normal density
        >>> regular = jax.random.normal(jax.random.key(0), (1000, 2))
        >>> limit = threshold(outlier_scores(flow, regular), false_positive_rate=0.01)
        >>> (outlier_scores(flow, jnp.array([[0.0, 0.0], [0.0, 9.0]])) > limit).tolist()
        [False, True]
    """
    common.check_kind(kind, {"reference": reference, "background": background})
    common.check_flow(background, TransformModule, "background")
    batch_size = as_count(batch_size, "batch_size")
    log_p = _log_probs(flow, x, base, context, batch_size, "x")
    if kind == "log_density":
        return -log_p
    if reference is not None:
        known, given = reference if isinstance(reference, tuple) else (reference, None)
        if given is None and flow.context_dim:
            raise ValueError("`reference` has no contexts: pass (events, contexts)")
        regular = _log_probs(flow, known, base, given, batch_size, "reference")
        common.check_regular(np.asarray(regular).reshape(-1))
        return jnp.abs(log_p - regular.mean())
    if background is not None:
        if background.event_shape != flow.event_shape:
            raise ValueError(
                f"`background` has events of shape {background.event_shape}, but `flow` has "
                f"{flow.event_shape}"
            )
        given = context if background.context_dim else None
        ratio = _log_probs(background, x, None, given, batch_size, "x") - log_p
        # Outside of both supports this is infinity less infinity.
        return jnp.where(log_p == -jnp.inf, jnp.inf, ratio)
    common.check_coded(flow.event_shape, levels)
    images = np.asarray(x).reshape(-1, *flow.event_shape)
    lengths = common.code_lengths(images, levels) / math.prod(flow.event_shape)
    bits = bits_per_dim(log_p, flow.event_shape, levels=levels)
    batch = x.shape[: x.ndim - len(flow.event_shape)]
    return bits - jnp.asarray(lengths.reshape(batch), bits.dtype)


def _log_probs(
    flow: TransformModule,
    x: Events,
    base: str | dist.Distribution | None,
    context: Context,
    batch_size: int,
    name: str,
) -> Float[Array, "*batch"]:
    """Return log-densities of events, evaluated in parts; −inf outside of the support."""
    flow, x, context = joined(flow, x, context, name)
    check_finite(x, flow.event_shape, f"`{name}`")
    batch = x.shape[: x.ndim - len(flow.event_shape)]
    events = x.reshape(-1, *flow.event_shape)
    contexts = None if context is None else context.reshape(-1, flow.context_dim)
    log_probs = []
    for start in range(0, len(events), batch_size):
        part = events[start : start + batch_size]
        given = None if contexts is None else contexts[start : start + batch_size]
        density = flow_distribution(flow, base, context=given)
        # Events outside the support get a score, not an error.
        density = FlowDistribution(density.base_dist, density.transforms, validate_args=False)
        log_probs.append(density.log_prob(part))
    return jnp.concatenate(log_probs).reshape(batch)
