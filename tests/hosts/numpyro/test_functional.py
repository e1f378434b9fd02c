"""Flows as pytrees in the transformations of JAX, and what their programs cost."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from numpyro_flows import flow_distribution, glow, nice, realnvp
from numpyro_flows.tree import trainable
from tests.hosts.numpyro.flows import FLOWS, KEY, every_flow, make, normal, perturbed

every_density = pytest.mark.parametrize("given", [False, True], ids=["plain", "conditional"])


def density_of(name, given):
    return flow_distribution(make(name, **options(given)), context=context_of(given))


def options(given):
    return {"context_dim": 2} if given else {}


def context_of(given):
    return normal((2,)) if given else None


@every_flow
def test_jit(name):
    density, x = density_of(name, True), normal((5, 3))
    assert_allclose(jax.jit(density.log_prob)(x), density.log_prob(x), rtol=1e-4, atol=1e-4)
    draw = jax.jit(lambda key: density.sample(key, (4,)))
    assert_allclose(draw(KEY), density.sample(KEY, (4,)), rtol=1e-4, atol=1e-4)


@every_flow
@every_density
def test_densities_and_flows_are_arguments_of_jit(name, given):
    """As pytrees; new weights of the same shapes do not compile anew."""
    traces = []

    @jax.jit
    def log_prob(density, x):
        traces.append(1)
        return density.log_prob(x)

    @jax.jit
    def encode(flow, x):
        traces.append(1)
        return flow.inv(x)

    x = normal((5, 3))
    for seed in (1, 2):
        flow, context = perturbed(FLOWS[name](**options(given)), seed), context_of(given)
        density = flow_distribution(flow, context=context)
        assert_allclose(log_prob(density, x), density.log_prob(x), rtol=1e-4, atol=1e-4)
        flow = flow if context is None else flow.condition(context)
        assert_allclose(encode(flow, x), flow.inv(x), rtol=1e-4, atol=1e-4)
    assert len(traces) == 2


@every_flow
def test_vmap(name):
    density, x = density_of(name, True), normal((5, 3))
    flow = density.transforms[0]
    assert_allclose(jax.vmap(density.log_prob)(x), density.log_prob(x), rtol=1e-4, atol=1e-4)
    assert_allclose(jax.vmap(flow)(x), flow(x), rtol=1e-4, atol=1e-4)
    assert_allclose(jax.vmap(flow.inv)(x), flow.inv(x), rtol=1e-4, atol=1e-4)


@every_flow
def test_an_ensemble_by_vmap(name):
    """Many flows at a time, stacked along a first axis of their arrays."""
    flows = [perturbed(FLOWS[name](), seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *flows)
    x = normal((5, 3))
    found = eqx.filter_vmap(lambda flow: flow_distribution(flow).log_prob(x))(stacked)
    for flow, ours in zip(flows, found, strict=True):
        assert_allclose(ours, flow_distribution(flow).log_prob(x), rtol=1e-4, atol=1e-4)


@every_flow
def test_grad_and_hessian(name):
    with jax.enable_x64(True):
        flow = make(name, **options(True)).astype("float64")
        density = flow_distribution(flow, context=context_of(True).astype("float64"))
        x, step = normal((3,)).astype("float64"), 1e-5
        slope = jax.grad(density.log_prob)
        score, curvature = jax.jit(lambda x: (slope(x), jax.hessian(density.log_prob)(x)))(x)
        up, down = (x + sign * step * jnp.eye(3) for sign in (1, -1))
        values, slopes = jax.jit(lambda x: (density.log_prob(x), jax.vmap(slope)(x)))(
            jnp.concatenate([up, down])
        )
        assert_allclose(score, (values[:3] - values[3:]) / (2 * step), rtol=1e-5, atol=1e-6)
        assert_allclose(curvature, (slopes[:3] - slopes[3:]) / (2 * step), rtol=1e-4, atol=1e-5)


def programs(function):
    """Return how many programs a call makes."""
    found = []

    def listen(event, _, **details):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            found.append(details)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(found)


@pytest.mark.parametrize("base", ["normal", "logistic"])
def test_a_named_base_is_one_program(base):
    """Outside `jit`, where JAX would compile each operation for each shape."""
    density = flow_distribution(nice(7, layers=1, hidden=(), key=KEY), base).base_dist
    x = jax.device_put(np.ones((11, 7)))
    assert programs(lambda: density.log_prob(x)) == 1
    assert programs(lambda: density.log_prob(x)) == 0
    assert programs(lambda: density.sample(KEY, (13,))) == 1


def test_no_leaks():
    def all_of_it(density, flow, x):
        score = jax.grad(lambda x: density.log_prob(x).sum())(x)
        return density.log_prob(x), density.sample(KEY, (4,)), score, flow.initialize(x)

    density, flow, x = density_of("glow", True), FLOWS["glow"](), normal((5, 3))
    with jax.checking_leaks():
        jax.eval_shape(all_of_it, density, flow, x)


@every_flow
def test_strict_promotion(name):
    """Neither dtypes nor ranks are promoted silently."""
    density, x = density_of(name, True), normal((2, 5, 3))
    flow = density.transforms[0]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert flow.forward_and_ladj(x)[1].shape == (2, 5)
        assert flow.inverse_and_ladj(x)[1].shape == (2, 5)
        jax.eval_shape(jax.grad(lambda x: flow.inverse_and_ladj(x)[1].sum()), x)
        plain = FLOWS[name]()
        for method in (plain.initialize, plain.update):
            jax.eval_shape(method, x)


@every_flow
def test_training_in_a_scan(name):
    """The whole loop on the device: the flow is the carry."""
    flow, data = FLOWS[name](), 1.0 + 2.0 * normal((100, 3))
    optimizer = optax.adam(1e-2)
    parameters, state = eqx.partition(flow, trainable(flow))

    def loss(parameters):
        return -flow_distribution(eqx.combine(parameters, state)).log_prob(data).mean()

    def step(carry, _):
        parameters, moments = carry
        value, gradients = jax.value_and_grad(loss)(parameters)
        changes, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(parameters, changes), moments), value

    start = (parameters, optimizer.init(parameters))
    _, losses = jax.jit(lambda carry: jax.lax.scan(step, carry, length=60))(start)
    assert jnp.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.2


# Pytrees


@every_flow
@every_density
def test_flatten_and_unflatten(name, given):
    density, x = density_of(name, given), normal((5, 3))
    flow = density.transforms[0]
    for tree in (flow, density):
        leaves, structure = jax.tree.flatten(tree)
        assert all(eqx.is_array(leaf) for leaf in leaves)
        assert structure == jax.tree.structure(jax.tree.unflatten(structure, leaves))
        assert hash(structure) == hash(jax.tree.structure(tree))
    again = jax.tree.unflatten(*reversed(jax.tree.flatten(density)))
    assert_array_equal(again.log_prob(x), density.log_prob(x))
    children, aux = flow.tree_flatten()
    rebuilt = type(flow).tree_unflatten(aux, children)
    assert type(rebuilt) is type(flow)
    assert_array_equal(rebuilt.inv(x), flow.inv(x))
    assert rebuilt.event_shape == flow.event_shape


@every_flow
def test_state_is_not_trained(name):
    flow = glow(3, layers=2, key=KEY) if name == "glow" else FLOWS[name]()
    marks = trainable(flow)
    assert jax.tree.structure(marks) == jax.tree.structure(jax.tree.map(lambda _: True, flow))
    trained = set(eqx.filter(flow, marks).state_dict())
    state = {"loc", "log_scale", "permutation", "signs", "initialized"}
    last = max(int(key.split(".")[1]) for key in flow.state_dict())
    for key in flow.state_dict():
        fixed = key.startswith(f"layers.{last}.") or key.split(".")[-1] in state - {
            "loc", "log_scale"
        }  # fmt: skip
        assert (key in trained) != fixed


# Cost


def equations(jaxpr):
    inner = 0
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            value = getattr(value, "jaxpr", value)
            inner += equations(value) if hasattr(value, "eqns") else 0
    return len(jaxpr.eqns) + inner


@pytest.mark.parametrize("build", [nice, realnvp, glow])
def test_the_program_does_not_grow_with_depth(build):
    sizes = []
    for layers in (8, 32):
        flow = build(4, layers=layers, hidden=(8,), key=KEY)
        density = flow_distribution(flow)
        total = jax.grad(lambda x, density=density: density.log_prob(x).sum())
        sizes.append(equations(jax.make_jaxpr(total)(jnp.ones((5, 4))).jaxpr))
    assert sizes[1] <= 1.1 * sizes[0]


def test_the_program_does_not_grow_with_glows_steps():
    sizes = []
    for steps in (2, 8):
        flow = glow((1, 4, 4), levels=2, steps=steps, channels=3, key=KEY)
        density = flow_distribution(flow)
        total = jax.grad(lambda x, density=density: density.log_prob(x).sum())
        sizes.append(equations(jax.make_jaxpr(total)(jnp.ones((2, 1, 4, 4))).jaxpr))
    assert sizes[1] <= 1.1 * sizes[0]


@pytest.mark.parametrize("build", [nice, realnvp, glow])
def test_log_prob_costs_one_pass(build):
    """The host's own log_prob has two backward passes; `flow_distribution`'s has one."""
    flow = build(8, layers=2, hidden=(64, 64), key=KEY)
    parameters, state = eqx.partition(flow, trainable(flow))
    x = jnp.ones((16, 8))

    def cost(loss):
        compiled = jax.jit(jax.grad(loss)).lower(parameters).compile()
        return compiled.cost_analysis()["flops"]

    def ours(parameters):
        return flow_distribution(eqx.combine(parameters, state)).log_prob(x).sum()

    def least(parameters):
        z, ladj = eqx.combine(parameters, state).inverse_and_ladj(x)
        return (ladj - 0.5 * (z**2).sum(-1)).sum()

    assert cost(ours) <= 1.1 * cost(least)
