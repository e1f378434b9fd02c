"""What `fit` owes to JAX: flows that stay as they are, keys, and steps that are compiled once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from numpyro_flows import AdditiveCoupling, fit, realnvp
from numpyro_flows.training.step import losses_of, step

# Far enough from the base that a few steps help.
X = np.random.default_rng(0).normal(2.0, 2.0, size=(96, 2)).astype("float32")
QUICK = {"steps": 9, "progress": False, "batch_size": 32, "learning_rate": 1e-2}


def flow(seed=0, **options):
    options = {"layers": 2, "hidden": (8,), **options}
    return realnvp(2, key=jax.random.key(seed), **options).astype("float32")


def same(one, other):
    assert np.array_equal(one.losses, other.losses)
    for a, b in zip(jax.tree.leaves(one.flow), jax.tree.leaves(other.flow), strict=True):
        assert np.array_equal(a, b)


def test_the_flow_stays_as_it_is():
    one = flow(batch_norm=True)
    before = {name: np.array(value) for name, value in one.state_dict().items()}
    result = fit(one, X, base="logistic", standardize=True, **QUICK)
    for name, value in one.state_dict().items():
        assert np.array_equal(before[name], value)
    assert one.base == "normal"
    assert jax.tree.structure(result.flow) != jax.tree.structure(one)
    assert any((before[name] != value).any() for name, value in result.flow.state_dict().items())


def test_steps_are_compiled_once():
    fit(flow(), X, **QUICK)
    steps, losses = step._cache_size(), losses_of._cache_size()
    fit(flow(1), X, key=jax.random.key(3), **{**QUICK, "learning_rate": 0.3, "steps": 5})
    fit(flow(), X, schedule="cosine", clip_norm=0.5, patience=2, **QUICK)
    assert (step._cache_size(), losses_of._cache_size()) == (steps, losses)


def test_keys():
    assert not np.array_equal(
        fit(flow(), X, **QUICK).losses, fit(flow(), X, key=jax.random.key(1), **QUICK).losses
    )
    same(fit(flow(), X, **QUICK), fit(flow(), X, key=jax.random.key(0), **QUICK))
    same(fit(flow(), X, **QUICK), fit(flow(), X, key=jax.random.PRNGKey(0), **QUICK))
    for wrong in (3, jax.random.split(jax.random.key(0)), jnp.zeros(2)):
        with pytest.raises(TypeError, match="`key`"):
            fit(flow(), X, key=wrong, **QUICK)


def test_arrays_on_the_device_and_in_memory():
    same(fit(flow(), jnp.asarray(X), **QUICK), fit(flow(), X, **QUICK))


def test_double_precision():
    with jax.enable_x64(True):
        result = fit(flow().astype("float64"), X.astype("float64"), **QUICK)
        arrays = result.flow.state_dict().values()
        assert all(a.dtype == jnp.float64 for a in arrays if jnp.issubdtype(a.dtype, jnp.floating))
        np.testing.assert_allclose(result.losses, fit(flow(), X, **QUICK).losses, rtol=1e-4)


@pytest.mark.parametrize(
    "optimizer",
    [optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(1e-2, momentum=0.9))],
)
def test_an_optimiser_with_a_key_resumes(tmp_path, optimizer):
    def run(path, cut=None):
        def schedule(step):
            if step == cut:
                raise KeyboardInterrupt
            return 1.0

        options = {**QUICK, "validate_every": 2, "schedule": schedule, "optimizer": optimizer}
        return fit(flow(), X, checkpoint=path, **options)

    whole = run(None)
    assert run(tmp_path / "run", cut=5).stopped == "interrupted"
    same(run(tmp_path / "run"), whole)
    with pytest.raises(TypeError, match="`optimizer`"):
        fit(flow(), X, optimizer=lambda parameters: None, **QUICK)


def test_an_optimiser_that_keeps_the_parameters():
    """Its state is given away at each step; the user's arrays must not go with it."""

    def keep(updates, state, params=None):
        return jax.tree.map(lambda update: -1e-2 * update, updates), params

    keeping = optax.GradientTransformation(lambda params: params, keep)
    one = flow()
    fit(one, X, optimizer=keeping, **QUICK)
    assert all(np.isfinite(value).all() for value in one.state_dict().values())


def test_no_code_from_a_checkpoint_is_run(tmp_path):
    path = tmp_path / "run"
    with open(path, "wb") as file:
        np.savez(file, about=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(ValueError, match="cannot be read: it is damaged, or `fit` has not"):
        fit(flow(), X, checkpoint=path, **QUICK)


def test_under_leak_checks():
    with jax.checking_leaks():
        assert len(fit(flow(), X, **QUICK).losses) == 9


class Named(eqx.Module):
    """A custom network with fields of any name."""

    inputs: int
    buffers: str
    weight: jax.Array

    def __call__(self, x):
        return self.weight * jnp.ones(self.inputs) * x.sum()


def test_a_custom_network_may_name_its_fields_as_it_likes():
    network = Named(1, "none", jnp.array(0.1, "float32"))
    result = fit(AdditiveCoupling(2, network=network, key=jax.random.key(0)), X, **QUICK)
    assert result.flow.network.weight != network.weight


def test_control_c_within_a_step(monkeypatch):
    """Which then has taken the optimiser's memory with it, and given nothing back."""
    calls = []

    def cut(*args):
        calls.append(args)
        result = step(*args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr("numpyro_flows.training.run.step", cut)
    result = fit(flow(), X, validation=None, **QUICK)
    assert result.stopped == "interrupted"
    assert len(result.losses) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.flow))
