"""What is timed on JAX: the floor, this library and its peer, all jitted, on the same work."""

import math
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from timing import FLOOR, Contender, ImageSettings, Settings, VectorSettings


def contenders(settings: VectorSettings) -> dict[str, Contender]:
    """Build every contender."""
    return {
        FLOOR: floor(settings),
        "numpyro_flows": numpyro_flows(settings),
        "flowjax": flowjax(settings),
    }


def glows(settings: ImageSettings) -> dict[str, Contender]:
    """Build Glow on images."""
    return {FLOOR: convolutions(settings), "numpyro_flows": glow(settings)}


def floor(settings: VectorSettings) -> Contender:
    """The conditioners alone: each sees the two halves of the one before, added."""
    half = settings.dim // 2
    widths = [half, *settings.hidden, settings.dim]

    def network(key: Array) -> list[tuple[Array, Array]]:
        return [
            (jax.random.normal(key, (o, i)) / i**0.5, jnp.zeros(o))
            for i, o in zip(widths[:-1], widths[1:], strict=True)
        ]

    def chained(networks: Any, a: Array) -> Array:
        for *inner, (last, last_bias) in networks:
            for weight, bias in inner:
                a = jax.nn.relu(a @ weight.T + bias)
            shift, scale = jnp.split(a @ last.T + last_bias, 2, axis=-1)
            a = shift + scale
        return a

    networks = [network(key) for key in jax.random.split(jax.random.key(1), settings.couplings)]
    start = jax.random.normal(jax.random.key(2), (settings.batch, half))
    return _networks_alone(chained, networks, start)


def convolutions(settings: ImageSettings) -> Contender:
    """Glow's networks alone: each sees the two halves of the one before, added."""
    keys = iter(jax.random.split(jax.random.key(1), 3 * settings.levels * settings.steps))
    width = settings.channels

    def network(inputs: int, outputs: int) -> list[tuple[Array, Array]]:
        shapes = [(3, 3, inputs, width), (1, 1, width, width), (3, 3, width, outputs)]
        return [
            (jax.random.normal(next(keys), s) / math.prod(s[:3]) ** 0.5, jnp.zeros(s[-1]))
            for s in shapes
        ]

    def convolved(a: Array, layer: tuple[Array, Array]) -> Array:
        kernel, bias = layer
        layout = ("NHWC", "HWIO", "NHWC")
        return (
            jax.lax.conv_general_dilated(a, kernel, (1, 1), "SAME", (1, 1), (1, 1), layout) + bias
        )

    def chained(levels: Any, a: Array) -> Array:
        for level, networks in enumerate(levels):
            if level:
                n, h, w, c = a.shape
                a = a.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
                a = a.reshape(n, h // 2, w // 2, 4 * c)[..., : networks[0][0][0].shape[2]]
            for *inner, last in networks:
                for layer in inner:
                    a = jax.nn.relu(convolved(a, layer))
                shift, scale = jnp.split(convolved(a, last), 2, axis=-1)
                a = shift + scale
        return a

    levels = [[network(i, o) for _ in range(settings.steps)] for i, o in settings.networks()]
    c, h, w = settings.shape
    start = jax.random.normal(jax.random.key(2), (settings.batch, h // 2, w // 2, 2 * c))
    return _networks_alone(chained, levels, start)


def glow(settings: ImageSettings) -> Contender:
    from numpyro_flows import flow_distribution

    return _works(
        _glow(settings.steps, settings),
        lambda flow, x: flow_distribution(flow).log_prob(x),
        lambda flow, key: flow_distribution(flow).sample(key, (settings.batch,)),
        settings,
    )


def numpyro_flows(settings: VectorSettings) -> Contender:
    from numpyro_flows import flow_distribution

    return _works(
        _realnvp(settings.couplings, settings),
        lambda flow, x: flow_distribution(flow).log_prob(x),
        lambda flow, key: flow_distribution(flow).sample(key, (settings.batch,)),
        settings,
    )


def flowjax(settings: VectorSettings) -> Contender:
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    flow = coupling_flow(
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(settings.dim)),
        flow_layers=settings.couplings,
        nn_width=settings.hidden[0],
        nn_depth=len(settings.hidden),
    )
    return _works(
        flow,
        lambda flow, x: flow.log_prob(x),
        lambda flow, key: flow.sample(key, (settings.batch,)),
        settings,
    )


def compile_seconds(depth: int, settings: Settings) -> float:
    """Time what comes before the first step of training; to be called in a fresh process."""
    from numpyro_flows import flow_distribution

    images = isinstance(settings, ImageSettings)
    flow = _glow(depth, settings) if images else _realnvp(depth, settings)
    step, parameters = _training_step(flow, lambda flow, x: flow_distribution(flow).log_prob(x))
    x = jnp.ones((settings.batch, *settings.shape))
    start = time.perf_counter()
    jax.jit(step).lower(parameters, x).compile()
    return time.perf_counter() - start


def _realnvp(couplings: int, settings: VectorSettings) -> Any:
    from numpyro_flows import realnvp

    return realnvp(settings.dim, layers=couplings, hidden=settings.hidden, key=jax.random.key(0))


def _glow(steps: int, settings: ImageSettings) -> Any:
    from numpyro_flows import glow

    size = {"levels": settings.levels, "steps": steps, "channels": settings.channels}
    return glow(settings.shape, **size, key=jax.random.key(0))


def _works(flow: Any, log_prob: Callable, sample: Callable, settings: Settings) -> Contender:
    x = jax.random.normal(jax.random.key(3), (settings.batch, *settings.shape))
    step, parameters = _training_step(flow, log_prob)
    arrays, static = eqx.partition(flow, eqx.is_array)

    def of_arrays(function: Callable) -> Callable:
        return lambda arrays, argument: function(eqx.combine(arrays, static), argument)

    return {
        "train": _ready(step, parameters, x),
        "log_prob": _ready(of_arrays(log_prob), arrays, x),
        "sample": _ready(of_arrays(sample), arrays, jax.random.key(4)),
    }


def _networks_alone(chained: Callable, networks: Any, start: Array) -> Contender:
    forward = _ready(chained, networks, start)
    return {
        "train": _ready(jax.value_and_grad(lambda n, a: chained(n, a).sum()), networks, start),
        "log_prob": forward,
        "sample": forward,
    }


def _training_step(flow: Any, log_prob: Callable) -> tuple[Callable, Any]:
    parameters, rest = eqx.partition(flow, eqx.is_inexact_array)

    def loss(parameters: Any, x: Array) -> Array:
        return -log_prob(eqx.combine(parameters, rest), x).mean()

    return jax.value_and_grad(loss), parameters


def _ready(function: Callable, *args: Any) -> Callable[[], Any]:
    """Jit a function, and return the call that waits for its result."""
    jitted = jax.jit(function)
    return lambda: jax.block_until_ready(jitted(*args))
