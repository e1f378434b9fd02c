"""Flows as transforms of JAX and NumPyro: pytrees, distributions, modules."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro.infer.util import log_density

from numpyro_flows import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Chain,
    InvertibleConv1x1,
    InvertibleLinear,
    Stack,
    TransformModule,
    flow_distribution,
)
from numpyro_flows.networks import DataDependent
from numpyro_flows.tree import replace
from tests.hosts.numpyro.flows import FLOWS, KEY, every_flow, make, normal, perturbed

# The host's distributions


@every_flow
def test_composes_with_the_hosts_transforms(name):
    flow = make(name)
    base = dist.Normal(jnp.zeros(3), 1.0).to_event(1)
    host = dist.transforms.ExpTransform()
    density = dist.TransformedDistribution(base, [flow, host])
    x = density.sample(KEY, (4,))
    expected = flow_distribution(flow).log_prob(jnp.log(x)) - jnp.log(x).sum(-1)
    assert_allclose(density.log_prob(x), expected, rtol=1e-4, atol=1e-4)
    chained = dist.transforms.ComposeTransform([flow, host])
    z = normal((4, 3))
    y, intermediates = chained.call_with_intermediates(z)
    assert_allclose(y, jnp.exp(flow(z)), rtol=1e-5)
    ladj = flow.forward_and_ladj(z)[1] + flow(z).sum(-1)
    assert_allclose(chained.log_abs_det_jacobian(z, y), ladj, rtol=1e-4, atol=1e-4)
    assert_allclose(chained.log_abs_det_jacobian(z, y, intermediates), ladj, rtol=1e-4, atol=1e-4)
    assert_allclose(chained.inv(y), z, rtol=1e-3, atol=1e-3)


@every_flow
def test_validation(name):
    flow = make(name)
    with numpyro.validation_enabled():
        density = flow_distribution(flow)
        assert density.log_prob(density.sample(KEY, (2,))).shape == (2,)
        broken = jnp.array([[1.0, jnp.nan, 0.0], [0.0, 0.0, 0.0]])
        with pytest.warns(UserWarning, match="Out-of-support"):
            found = density.log_prob(broken)
        assert (found == -jnp.inf).tolist() == [True, False]
        assert jax.jit(density.log_prob)(jnp.ones((2, 3))).shape == (2,)

        def model():
            with numpyro.plate("rows", 5):
                numpyro.sample("x", flow_distribution(flow), obs=jnp.zeros((5, 3)))

        assert jnp.isfinite(log_density(model, (), {}, {})[0])


@every_flow
def test_expand_to_event_and_mask(name):
    flow = make(name)
    density = flow_distribution(flow)
    expanded = density.expand([4])
    assert expanded.batch_shape == (4,)
    assert expanded.event_shape == (3,)
    x = expanded.sample(KEY, (2,))
    assert x.shape == (2, 4, 3)
    assert_allclose(expanded.log_prob(x), density.log_prob(x), rtol=1e-5)
    whole = expanded.to_event(1).log_prob(x)
    assert_allclose(whole, density.log_prob(x).sum(-1), rtol=1e-5)
    assert expanded.expand_by([6]).batch_shape == (6, 4)
    masked = expanded.mask(jnp.array([True, False, True, False]))
    assert (masked.log_prob(x)[:, 1::2] == 0).all()
    contexts = flow_distribution(make(name, context_dim=2), context=normal((4, 2)))
    assert contexts.expand([5, 4]).sample(KEY).shape == (5, 4, 3)
    assert contexts.expand([5, 4]).log_prob(jnp.zeros((5, 4, 3))).shape == (5, 4)


def test_batch_shapes_of_bases():
    flow = make("realnvp")
    density = flow_distribution(flow, dist.Normal(jnp.zeros((4, 3)), 1.0).to_event(1))
    assert density.batch_shape == (4,)
    assert density.log_prob(density.sample(KEY, (2,))).shape == (2, 4)


# Precision


@every_flow
def test_float64_where_it_is_enabled(name):
    with jax.enable_x64(True):
        flow = FLOWS[name]().astype("float64")
        density = flow_distribution(flow)
        x = density.sample(KEY, (4,))
        assert x.dtype == density.log_prob(x).dtype == jnp.float64
        assert_allclose(flow(flow.inv(x)), x, rtol=1e-10, atol=1e-10)


@every_flow
def test_float32_by_default(name):
    flow = FLOWS[name]()
    kinds = {array.dtype.name for array in flow.state_dict().values()}
    assert kinds <= {"float32", "int32", "bool"}
    x = flow_distribution(flow).sample(KEY, (4,))
    assert x.dtype == flow_distribution(flow).log_prob(x).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@every_flow
def test_half_precision(name, dtype):
    flow = make(name).astype(dtype)
    x = flow(normal((5, 3)).astype(dtype))
    assert x.dtype == dtype
    assert jnp.isfinite(flow_distribution(flow).log_prob(x)).all()


@every_flow
def test_types_are_not_weak(name):
    """Training would compile twice: an update makes a weak type strong."""
    assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(FLOWS[name]()))


@pytest.mark.parametrize("build", [InvertibleLinear, InvertibleConv1x1])
def test_matrices_are_multiplied_exactly(build):
    """Whatever the device's default is, and whatever the user chooses for the networks."""
    shape = (4,) if build is InvertibleLinear else (4, 2, 2)
    layer = build(shape, key=KEY)
    with jax.default_matmul_precision("bfloat16"):
        program = str(jax.make_jaxpr(layer.inverse_and_ladj)(jnp.ones(shape)))
    assert program.count("dot_general") == program.count("Precision.HIGHEST, ") >= 2


# A user's own layer


class Shear(TransformModule):
    """Two methods are all that a layer needs."""

    slope: jax.Array

    def __init__(self):
        super().__init__(2)
        self.slope = jnp.array(0.5)

    def forward_and_ladj(self, x):
        a, b = x[..., 0], x[..., 1]
        return jnp.stack([a, 2 * b + self.slope * a], -1), jnp.full(a.shape, np.log(2))

    def inverse_and_ladj(self, y):
        a, b = y[..., 0], y[..., 1]
        return jnp.stack([a, (b - self.slope * a) / 2], -1), jnp.full(a.shape, -np.log(2))


def test_a_layer_of_ones_own():
    coupling = AffineCoupling(2, hidden=(4,), key=KEY)
    flow = perturbed(Chain([Shear(), coupling, InvertibleLinear(2, key=KEY)]))
    density = flow_distribution(flow)
    x = density.sample(KEY, (5,))
    jacobian = jax.jacfwd(flow.inv)(x[0])
    expected = density.base_dist.log_prob(flow.inv(x[0])) + jnp.linalg.slogdet(jacobian)[1]
    assert_allclose(density.log_prob(x)[0], expected, rtol=1e-4, atol=1e-4)
    assert "layers.0.slope" in flow.state_dict()
    with pytest.raises(NotImplementedError, match="forward_and_ladj"):
        TransformModule(2)(jnp.ones(2))


class Turn(TransformModule):
    """A layer that takes a context has it as a second argument."""

    def __init__(self):
        super().__init__(2, context_dim=1)

    def forward_and_ladj(self, x, context):
        return x + context, jnp.zeros_like((x + context)[..., 0])

    def inverse_and_ladj(self, y, context):
        return y - context, jnp.zeros_like((y - context)[..., 0])


def test_a_layer_of_ones_own_sees_the_context():
    for flow in (Turn(), Chain([Turn(), ActNorm(2)])):
        y = flow.condition(jnp.array([[1.0], [2.0]]))(jnp.zeros(2))
        assert_allclose(y, jnp.array([[1.0, 1.0], [2.0, 2.0]]))
        back = flow.condition(jnp.array([2.0])).inv(y)
        assert_allclose(back, jnp.array([[-1.0, -1.0], [0.0, 0.0]]))


def test_a_layer_that_would_ignore_its_context():
    class Deaf(TransformModule):
        def forward_and_ladj(self, x):
            return x, jnp.zeros(())

        def inverse_and_ladj(self, y):
            return self.forward_and_ladj(y)

    assert Deaf(2)(jnp.ones((3, 2))).shape == (3, 2)

    class HalfDeaf(Deaf):
        def inverse_and_ladj(self, y, context):
            return self.forward_and_ladj(y)

    with pytest.raises(TypeError, match="HalfDeaf"):
        HalfDeaf(2, context_dim=1)
    with pytest.raises(TypeError, match="Deaf's forward_and_ladj and inverse_and_ladj take no"):
        Deaf(2, context_dim=1)


# Modules and imports


class Centring:
    """What a layer learns from data may come from another base."""

    def _absorb(self, y, context, first):
        layer = replace(self, loc=y.mean(0))
        return layer, y - layer.loc


class Centred(Centring, TransformModule):
    """A shift to the mean of the last batch."""

    loc: jax.Array

    def __init__(self, event_shape):
        super().__init__(event_shape)
        self.loc = jnp.zeros(event_shape)

    def forward_and_ladj(self, x):
        return x + self.loc, jnp.zeros(())

    def inverse_and_ladj(self, y):
        return y - self.loc, jnp.zeros(())


class Latest(DataDependent):
    """A network that gives what it has seen last."""

    seen: jax.Array

    def __call__(self, a):
        return jnp.broadcast_to(self.seen, (2,))

    def absorb(self, x, first):
        return replace(self, seen=x.mean(0))


@pytest.mark.parametrize("context", [None, jnp.zeros(2)], ids=["plain", "conditioned"])
def test_layers_of_ones_own_learn_from_data(context):
    """Whatever holds them."""
    x = 5.0 + normal((9, 3))
    given = {"context_dim": 2} if context is not None else {}
    last = AffineCoupling(3, hidden=(4,), key=KEY, **given)
    for flow in (Chain([last, Centred(3)]), Chain([last, Stack([Centred(3), Centred(3)])])):
        flow = flow if context is None else flow.condition(context)
        for learned, expected in [
            (flow.initialize(x), x.mean(0)), (flow.update(2 * x), 2 * x.mean(0)),
        ]:  # fmt: skip
            locs = [value for name, value in learned.state_dict().items() if "loc" in name]
            assert_allclose(
                np.sum([loc.reshape(-1, 3).sum(0) for loc in locs], 0), expected, rtol=1e-4
            )


def test_networks_of_ones_own_learn_from_data():
    x = 5.0 + normal((9, 3))
    coupling = AdditiveCoupling(3, network=Latest(jnp.zeros(1)), squash=False, key=KEY)
    for learned in (coupling.initialize(x), Chain([coupling]).update(x).layers[0]):
        assert_allclose(learned.network.seen, x[:, :1].mean(0), rtol=1e-5)


def test_load_state_dict_refuses_what_does_not_fit():
    flow = ActNorm(3)
    state = flow.state_dict()
    with pytest.raises(ValueError, match=r"missing \['loc'\]"):
        flow.load_state_dict({key: value for key, value in state.items() if key != "loc"})
    with pytest.raises(ValueError, match=r"unexpected \['more'\]"):
        flow.load_state_dict({**state, "more": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"\(4,\) for loc, expected \(3,\)"):
        flow.load_state_dict({**state, "loc": jnp.ones(4)})


def test_no_side_effects_of_importing():
    """The import changes no default of the host: told by a process of its own."""
    code = (
        "import jax, numpyro, numpyro.distributions as dist\n"
        "def state(): return {**jax.config.values}, dist.Distribution._validate_args\n"
        "before = state()\nimport numpyro_flows\nassert state() == before\n"
        "import sys\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Equality, as the host's own test of transforms demands it

EQUAL = {
    **{name: lambda name=name: make(name) for name in FLOWS},
    "conditioned": lambda: make("realnvp", context_dim=2).condition(jnp.ones(2)),
    "layer": lambda: InvertibleLinear(3, key=KEY),
    "state alone": lambda: ActNorm(3),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equality(name):
    flow, again = EQUAL[name](), EQUAL[name]()
    other = jax.tree.map(lambda a: a + 1 if a.dtype == jnp.float32 else a, again)
    for one, two, three in [(flow, again, other), (flow.inv, again.inv, other.inv)]:
        for eq in (lambda a, b: a.eq(b), lambda a, b: a.eq(b, static=True)):
            assert eq(one, one)
            assert eq(one, two)
            assert not eq(one, three)
        assert one == two
        assert one != three
        assert one != 1.0
        assert jax.jit(lambda a, b: a.eq(b))(one, two)
        assert not jax.jit(lambda a, b: a.eq(b))(one, three)
        assert jax.jit(lambda a: a)(one).eq(one)
    assert not flow.eq(flow.inv)
    assert not make("nice").eq(make("glow"))


def test_equality_of_a_batch_of_flows():
    flow = make("glow")
    several = jax.tree.map(lambda a: jnp.stack([a, a + 1]).astype(a.dtype), flow)
    assert_allclose(jax.vmap(lambda one: one.eq(flow))(several), [True, False])


def test_static_equality_of_traced_flows_is_that_of_objects():
    def equal(one, two):
        assert one.eq(one, static=True) is True
        assert one.eq(two, static=True) is False
        return 0.0

    jax.jit(equal)(make("glow"), make("glow"))


def test_a_chain_refuses_a_batch_of_contexts():
    inner = make("realnvp", context_dim=2)
    assert Chain([inner.condition(jnp.ones(2)), ActNorm(3)])(jnp.ones((4, 3))).shape == (4, 3)
    with pytest.raises(ValueError, match=r"batch of contexts of shape \(5, 2\)"):
        Chain([inner.condition(jnp.ones((5, 2))), ActNorm(3)])


class Doubled(AffineCoupling):
    """A coupling of the user's own, whose methods are not those of the base class."""

    def forward_and_ladj(self, x, context=None):
        y, ladj = super().forward_and_ladj(x, context)
        return 2 * y, ladj + 4 * math.log(2)


def test_a_chain_calls_a_couplings_own_methods():
    """Also between couplings on the same parts, which pass these on."""
    flow = Chain([AffineCoupling(4, key=KEY), Doubled(4, key=KEY), AffineCoupling(4, key=KEY)])
    x = normal((3, 4))
    y, total = x, 0.0
    for layer in flow.layers:
        y, ladj = layer.forward_and_ladj(y)
        total = total + ladj
    found, found_ladj = flow.forward_and_ladj(x)
    assert_allclose(found, y)
    assert_allclose(found_ladj, total)
