"""What is timed on JAX: the floor, this library and its peer, all jitted, on the same work."""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from timing import FLOOR, Contender, Settings


def contenders(settings: Settings) -> dict[str, Contender]:
    """Build every contender."""
    return {
        FLOOR: floor(settings),
        "numpyro_flows": numpyro_flows(settings),
        "flowjax": flowjax(settings),
    }


def floor(settings: Settings) -> Contender:
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
    forward = _ready(chained, networks, start)
    return {
        "train": _ready(jax.value_and_grad(lambda n, a: chained(n, a).sum()), networks, start),
        "log_prob": forward,
        "sample": forward,
    }


def numpyro_flows(settings: Settings) -> Contender:
    from numpyro_flows import flow_distribution

    return _works(
        _realnvp(settings.couplings, settings),
        lambda flow, x: flow_distribution(flow).log_prob(x),
        lambda flow, key: flow_distribution(flow).sample(key, (settings.batch,)),
        settings,
    )


def flowjax(settings: Settings) -> Contender:
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


def compile_seconds(couplings: int, settings: Settings) -> float:
    """Time the first call of a jitted training step; to be called in a fresh process."""
    from numpyro_flows import flow_distribution

    flow = _realnvp(couplings, settings)
    step, parameters = _training_step(flow, lambda flow, x: flow_distribution(flow).log_prob(x))
    x = jnp.ones((settings.batch, settings.dim))
    start = time.perf_counter()
    jax.block_until_ready(jax.jit(step)(parameters, x))
    return time.perf_counter() - start


def _realnvp(couplings: int, settings: Settings) -> Any:
    from numpyro_flows import realnvp

    return realnvp(settings.dim, layers=couplings, hidden=settings.hidden, key=jax.random.key(0))


def _works(flow: Any, log_prob: Callable, sample: Callable, settings: Settings) -> Contender:
    x = jax.random.normal(jax.random.key(3), (settings.batch, settings.dim))
    step, parameters = _training_step(flow, log_prob)
    arrays, static = eqx.partition(flow, eqx.is_array)

    def of_arrays(function: Callable) -> Callable:
        return lambda arrays, argument: function(eqx.combine(arrays, static), argument)

    return {
        "train": _ready(step, parameters, x),
        "log_prob": _ready(of_arrays(log_prob), arrays, x),
        "sample": _ready(of_arrays(sample), arrays, jax.random.key(4)),
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
