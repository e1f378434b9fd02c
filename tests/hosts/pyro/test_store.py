"""Guides in Pyro's parameter store: begun, interrupted, stored, copied and gone on with."""

import copy
import io
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList
from torch.testing import assert_close

from pyroflows import AutoGlow, AutoNICE, AutoRealNVP, fit_guide
from tests.hosts.pyro.line import MEAN, SCALE, drawn, learn, line, small


def test_a_parameter_store_loaded_after_the_set_up(tmp_path):
    """All of the guide is as it was, also what is no parameter and comes of another seed."""
    guide = small(make=AutoGlow, layers=4)
    learn(guide)
    expected = drawn(guide)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    new = small(make=AutoGlow, layers=4, seed=5)
    learn(new)
    assert drawn(new) != expected
    state = torch.load(tmp_path / "store", weights_only=False)
    pyro.get_param_store().set_state(state)
    assert_close(drawn(new), expected)


@pytest.mark.filterwarnings("ignore:the search for a start found no")
def test_a_failed_set_up_leaves_nothing():
    def model(sign):
        scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0)))
        pyro.sample("y", dist.Normal(0.0, sign * scale), obs=torch.tensor(1.0))

    guide = small(model)
    with pytest.raises(ValueError, match="scale"):
        guide(-1.0)
    assert not list(pyro.get_param_store())
    guide(1.0)
    fresh = small(model, name="fresh")
    fresh(1.0)
    assert_allclose(guide.median()["scale"], fresh.median()["scale"], rtol=0.05)


def test_an_interrupted_set_up_starts_again(monkeypatch):
    """Ctrl-C during a search leaves a guide as if it had never been called."""

    def interrupted(*args):
        raise KeyboardInterrupt

    guide = small()
    with monkeypatch.context() as patch:
        patch.setattr("pyroflows.guides.autoflow.searched", interrupted)
        with pytest.raises(KeyboardInterrupt):
            guide()
    guide()
    assert_allclose(guide.median()["level"], MEAN[0], atol=0.2 * SCALE[0])


def test_two_guides_of_different_names():
    """Each has its own parameters."""
    guide, other = small(), small(name="other")
    learn(guide)
    expected = drawn(guide)
    learn(other)
    assert_close(drawn(guide), expected)
    assert {key.partition(".")[0] for key in pyro.get_param_store()} == {"AutoRealNVP", "other"}


def test_an_early_interruption_keeps_what_is_learned(monkeypatch):
    """That of the unfinished stretch."""
    guide, calls = small(), []

    def step(self, closure=None, step=torch.optim.Adam.step):
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return step(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    result = fit_guide(guide, steps=5000, progress=False)
    assert (result.stopped, len(result.losses)) == ("interrupted", 60)
    assert np.isfinite(result.loss)


def test_a_state_makes_the_same_guide():
    """Of a new one that has been called once."""
    for make in (AutoNICE, AutoRealNVP, AutoGlow):
        guide, new = small(make=make), small(make=make)
        learn(guide)
        pyro.clear_param_store()
        new()
        new.load_state_dict(guide.state_dict())
        assert_close(drawn(new), drawn(guide))


def test_copies():
    """By pickle, by copy and by torch, as far as the host keeps a guide without its model."""
    guide = small()
    learn(guide)
    expected, medians = drawn(guide), guide.median()
    stream = io.BytesIO()
    torch.save(guide, stream)
    stream.seek(0)
    copies = [
        pickle.loads(pickle.dumps(guide)),
        copy.deepcopy(guide),
        torch.load(stream, weights_only=False),
    ]
    for copied in copies:
        assert_close(drawn(copied), expected)
        assert_close(copied.median(), medians)


@pytest.mark.parametrize("make", [AutoRealNVP, AutoGlow])
def test_the_parameter_store(make, tmp_path):
    """Saved and loaded, it makes the same guide of a new one."""
    guide = small(make=make)
    learn(guide)
    expected = drawn(guide)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    state = torch.load(tmp_path / "store", weights_only=False)
    pyro.get_param_store().set_state(state)
    new = small(make=make)
    pyro.set_rng_seed(1)
    with pytest.warns(UserWarning, match=f"{make.__name__}'.* goes on with its parameters"):
        new()
    assert_close(drawn(new), expected)


def test_a_guide_that_the_parameter_store_has_loaded_goes_on_learning(tmp_path):
    """What the optimiser changes is what the guide draws with; another one joins it."""
    learn(small())
    loaded(tmp_path)
    guide, other = small(), small()
    for this in (guide, other):
        with pytest.warns(UserWarning, match="goes on with its parameters"):
            this()
    before = drawn(guide)
    learn(guide)
    assert drawn(guide) != before
    assert_close(drawn(other), drawn(guide))


def test_a_loaded_guide_of_another_model(tmp_path):
    """It is refused, and stays as it is."""
    learn(small())
    loaded(tmp_path)
    state = {name: value.clone() for name, value in pyro.get_param_store().items()}
    with pytest.raises(ValueError, match="holds another guide by the name of 'AutoRealNVP'"):
        small(triple)()
    assert_close(dict(pyro.get_param_store().items()), state)


def triple():
    pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def loaded(tmp_path):
    """Save the store, and load it as another process would."""
    store = pyro.get_param_store()
    store.save(tmp_path / "store")
    store.clear()
    store.load(tmp_path / "store")


@pytest.mark.parametrize("model", [line, triple])
def test_a_new_guide_takes_the_name_of_an_earlier_one(model, tmp_path):
    """It starts anew, as in a cell that is run again, and its parameters are what is saved."""
    learn(small(), steps=30)
    new, fresh = small(model), small(model, name="fresh")
    with pytest.warns(UserWarning, match="takes the name 'AutoRealNVP'"):
        assert np.isfinite(learn(new, model, steps=1)).all()
    learn(fresh, model, steps=1)
    for name, value in fresh.median().items():
        assert_close(new.median()[name], value, rtol=0.1, atol=0.1)
    expected = drawn(new)
    loaded(tmp_path)
    again = small(model)
    with pytest.warns(UserWarning, match="goes on with its parameters"):
        again()
    assert_close(drawn(again), expected)


@pytest.mark.filterwarnings("ignore:a new guide takes the name")
@pytest.mark.parametrize("model", [line, triple])
def test_the_earlier_guide_keeps_its_parameters(model):
    """Used again beside the new one, it moves to another name, and each learns on its own."""
    first, second = small(), small(model)
    learn(first)
    expected = drawn(first)
    learn(second, model)
    assert_close(drawn(first), expected)
    for (this, own), other in [((first, line), second), ((second, model), first)]:
        before, kept = drawn(this), drawn(other)
        learn(this, own)
        assert any((value != before[name]).any() for name, value in drawn(this).items())
        assert_close(drawn(other), kept)
    names = {key.partition(".")[0] for key in pyro.get_param_store()}
    assert names == {"AutoRealNVP", "AutoRealNVP_1"}


@pytest.mark.filterwarnings("ignore:a new guide takes the name")
def test_an_earlier_guide_in_a_store_that_was_cleared():
    """It does not take the parameters of a newer one."""
    first, second = small(), small()
    learn(first)
    expected = drawn(first)
    pyro.clear_param_store()
    learn(second)
    assert_close(drawn(first), expected)


@pytest.mark.filterwarnings("ignore:a new guide takes the name")
def test_guides_in_lists_start_anew():
    """By the names of their places."""

    def guides():
        guide = AutoGuideList(line)
        for name in ("level", "slope"):
            guide.append(small(poutine.block(line, expose=[name])))
        return guide

    first, second = guides(), guides()
    learn(first)
    medians = first.median()
    learn(second)
    assert_close(first.median(), medians)
    before = second.median()
    learn(first)
    assert_close(second.median(), before)
    places = {key.rpartition(".transform$$$")[0] for key in pyro.get_param_store()} - {""}
    assert places == {f"AutoGuideList.{place}" for place in ("0", "1", "0_1", "1_1")}


def test_parameters_of_modules_are_their_own():
    """Without the store, guides of one name do not meet."""
    earlier = small()
    earlier()
    stored = set(pyro.get_param_store())
    with pyro.settings.context(module_local_params=True):
        new = small(triple)
        assert new()["x"].shape == (3,)
    assert set(pyro.get_param_store()) == stored


def test_copies_learn_on_their_own():
    """And the guide keeps the model that the copy has not."""
    guide = small()
    learn(guide)
    copied = copy.deepcopy(guide)
    assert guide.model is not None
    for this, other in [(copied, guide), (guide, copied)]:
        before, expected = drawn(this), drawn(other)
        learn(this)
        assert drawn(this) != before
        assert_close(drawn(other), expected)
    assert not list(pyro.get_param_store().keys() ^ expected_names("AutoRealNVP", "AutoRealNVP_1"))


def expected_names(*names):
    """What the parameter store holds of guides of these names."""
    shared = {key.partition(".")[2] for key in pyro.get_param_store()}
    return {f"{name}.{part}" for name in names for part in shared}
