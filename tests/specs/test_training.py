"""Laws of `fit`: what it learns, what it leaves alone, what it refuses, and how it goes on."""

import functools
import os
import signal
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.datasets import make_moons

from tests.wings import WINGS
from tests.wings.base import disturbed

GAUSSIAN = np.random.default_rng(0).normal([3.0, -1.0], [5.0, 0.1], size=(1000, 2))
SMALL = GAUSSIAN[:96].astype("float32")
FAR = np.full((32, 2), 1e30, dtype="float32")  # finite, but its square is not


def fit(wing, flow, data, *, seed=0, **options):
    """Call a wing's `fit`, without a bar and with the wing's own kind of seed."""
    options = {"steps": 12, "batch_size": 32, "progress": False, **options}
    options.update({"key": wing.key(seed)} if wing.name == "numpyro" else {"seed": seed})
    return wing.package.fit(flow, data, **options)


def small(wing, name="realnvp", size=2, **options):
    """A flow that is trained in no time."""
    flow = wing.new(name, size, **{"layers": 2, "hidden": (8,), **options})
    return wing.cast(flow, "float32")


def loss(wing, flow, x, context=None):
    """The loss of a flow, computed by the user's own means."""
    density = wing.density(flow, context=context)
    return -wing.log_prob(density, x.astype("float32")).mean()


def same(wing, one, other):
    """Assert that two results are equal to the last bit."""
    for name in ("losses", "validation_losses", "validation_steps"):
        assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for name in ("skipped", "best_step", "stopped"):
        assert getattr(one, name) == getattr(other, name), name
    theirs = wing.state(other.flow)
    for name, value in wing.state(one.flow).items():
        assert_array_equal(value, theirs[name], err_msg=name)


def unchanged(wing, flow, before, base="normal"):
    """Assert that a flow is as it was."""
    assert flow.base == base
    for name, value in wing.state(flow).items():
        assert_array_equal(value, before[name], err_msg=name)


def batches(count, size=32, seed=1):
    rows = np.random.default_rng(seed).normal(size=(count * size, 2)).astype("float32")
    return list(rows.reshape(count, size, 2))


def noisy(wing):
    """A function that adds uniform noise in [0, 1) to a batch."""
    if wing.name == "pyro":
        import torch

        return lambda x, generator: x + torch.rand(x.shape, generator=generator)
    import jax

    return lambda x, key: x + jax.random.uniform(key, x.shape)


def logit(wing):
    """A function that maps numbers between 0 and 1 to the real line, and 0 and 1 to infinity."""
    if wing.name == "pyro":
        return lambda x, generator: x.logit()
    import jax

    return lambda x, key: jax.scipy.special.logit(x)


@functools.cache  # NumPyro compiles a step anew for another optimiser
def plain_descent(wing, rate):
    """Stochastic gradient descent, as the wing's users pass an optimiser."""
    if wing.name == "pyro":
        import torch

        return lambda parameters: torch.optim.SGD(parameters, lr=rate)
    import optax

    return optax.sgd(rate)


# What is learned


def test_two_moons(wing):
    x, _ = make_moons(3000, noise=0.05, random_state=0)
    train, test = x[:2000], x[2000:]
    flow = small(wing, layers=6, hidden=(32, 32))
    options = {"learning_rate": 1e-2, "standardize": True, "schedule": "cosine"}
    result = fit(wing, flow, train, steps=400, batch_size=256, **options)
    gaussian = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * np.cov(train.T))[1]
    assert loss(wing, result.flow, test) < gaussian - 0.8
    assert result.stopped == "steps"
    assert result.skipped == 0
    assert len(result.losses) == 400
    assert_allclose(result.losses[-50:].mean(), result.validation_losses.min(), atol=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [8, 64])
def test_student_t(wing, depth):
    x = np.random.default_rng(0).standard_t(2.0, size=(4000, 8))
    flow = small(wing, size=8, layers=depth, hidden=(64, 64))
    result = fit(wing, flow, x, steps=200, batch_size=256, learning_rate=1e-2, standardize=True)
    assert result.skipped == 0
    assert np.isfinite(result.losses).all()
    assert result.losses[-20:].mean() < result.losses[:20].mean()
    far = np.full((1, 8), 1e6, dtype="float32")
    assert np.isfinite(wing.log_prob(wing.density(result.flow), far)).all()


def test_losses_are_nats_per_event(wing):
    flow = small(wing)
    before = loss(wing, flow, SMALL)
    result = fit(wing, flow, SMALL, batch_size=96, validation=SMALL, validate_every=1, steps=3)
    assert_allclose(result.losses[0], before, rtol=1e-5)
    assert_allclose(result.losses[1:], result.validation_losses[:-1], rtol=1e-4)
    for value in (result.losses, result.validation_losses, result.validation_steps):
        assert isinstance(value, np.ndarray)
    assert result.validation_steps.tolist() == [1, 2, 3]
    assert result.validation_steps.dtype.kind == "i"


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow"])
def test_standardization(wing, name):
    result = fit(wing, small(wing, name), GAUSSIAN, steps=1, standardize=True, validation=None)
    state = wing.state(result.flow)
    layer = max(key for key in state if key.endswith(".loc")).removesuffix("loc")
    assert_allclose(state[layer + "loc"], GAUSSIAN.mean(0), rtol=1e-4)
    assert_allclose(state[layer + "log_scale"], np.log(GAUSSIAN.std(0)), rtol=1e-3)
    entropy = np.log(2 * np.pi * np.e) + np.log([5.0, 0.1]).sum()
    assert abs(loss(wing, result.flow, GAUSSIAN) - entropy) < 0.3


def test_standardization_is_of_the_training_rows(wing):
    far = np.concatenate([SMALL, SMALL + 100.0])
    result = fit(wing, small(wing), far[:96], standardize=True, validation=far[96:], steps=1)
    state = wing.state(result.flow)
    assert_allclose(state["layers.1.loc"], SMALL.mean(0), rtol=1e-4)


def test_standardization_of_a_stream_is_of_its_first_batch(wing):
    rows = batches(4)
    result = fit(wing, small(wing), rows, standardize=True, steps=2)
    assert_allclose(wing.state(result.flow)["layers.1.loc"], rows[0].mean(0), rtol=1e-4, atol=1e-6)


def test_standardization_goes_through_the_data_in_parts(wing, monkeypatch):
    """Sorted, so that each part has moments of its own."""
    x = np.sort(GAUSSIAN, axis=0).astype("float32")
    whole = fit(wing, small(wing), x, standardize=True, steps=1)
    taken = []

    class Sorted(Squares):
        def __len__(self):
            return len(x)

        def __getitem__(self, index):
            taken.append(index)
            return x[index]

    monkeypatch.setattr(sys.modules[f"{wing.package.__name__}.data"], "CHUNK", 64)
    parts = fit(wing, small(wing), x, standardize=True, steps=1)
    rows = fit(wing, small(wing), Sorted(), standardize=True, steps=1)
    assert len(np.unique(taken)) == len(x)
    for result in (parts, rows):
        for name, value in wing.state(result.flow).items():
            assert_allclose(value, wing.state(whole.flow)[name], rtol=1e-5, err_msg=name)
    constant = np.full((200, 2), 0.1, dtype="float32")
    state = wing.state(fit(wing, small(wing), constant, standardize=True, steps=1).flow)
    assert_array_equal(state["layers.1.log_scale"], 0.0)


def test_standardization_needs_no_memory(wing, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2**20, 8), dtype="float32"))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    tracemalloc.start()
    fit(wing, small(wing, size=8), mapped, standardize=True, steps=1, validation=None)
    assert tracemalloc.get_traced_memory()[1] < mapped.nbytes
    tracemalloc.stop()


@pytest.mark.parametrize("far", [1e25, 1e-30])
def test_numbers_whose_squares_are_out_of_range(wing, far):
    x = SMALL * np.array([1.0, far], dtype="float32")
    result = fit(wing, small(wing), x, standardize=True, validation=None)
    assert result.skipped == 0
    expected = np.log(x.astype(float).std(0))
    assert_allclose(wing.state(result.flow)["layers.1.log_scale"], expected, rtol=1e-4)
    if far > 1.0:  # the gradient in what is learned of a scale is as large as it is small
        assert fit(wing, small(wing, "glow"), x, batch_size=96, validation=None).skipped == 0


def test_layers_that_start_from_data(wing):
    result = fit(wing, small(wing, "glow"), SMALL, steps=1)
    flags = [v for k, v in wing.state(result.flow).items() if k.endswith("initialized")]
    assert flags
    assert all(flags)
    again = fit(wing, result.flow, SMALL + 100.0, steps=1, learning_rate=1e-9)
    locs = [k for k in wing.state(again.flow) if k.endswith(".loc")]
    for name in locs:
        assert_allclose(wing.state(again.flow)[name], wing.state(result.flow)[name], atol=1e-6)


def test_running_averages(wing):
    rows = batches(40)
    flow = small(wing, batch_norm=True)
    result = fit(wing, flow, rows, steps=40, learning_rate=1e-9)
    state = wing.state(result.flow)
    mean, var = rows[0].mean(0), rows[0].var(0)
    for batch in rows:
        mean, var = 0.9 * mean + 0.1 * batch.mean(0), 0.9 * var + 0.1 * batch.var(0)
    (name,) = (
        k for k in state if k.endswith("1.layers.3.running_mean") or "0.layers.3.running_mean" in k
    )
    assert_allclose(state[name], mean, atol=1e-4)
    assert_allclose(state[name.replace("mean", "var")], var, rtol=1e-3)


def test_running_averages_of_a_conditional_flow(wing):
    """What a coupling in front of the normalisation makes of each row depends on its context."""
    rows = batches(4)
    contexts = [np.float32(2.0) * x[:, ::-1].copy() for x in batches(4, seed=2)]
    options = {"batch_norm": True, "context_dim": 2}
    state = disturbed(wing.state(small(wing, **options)))
    result = fit(
        wing,
        wing.load(small(wing, **options), state),
        list(zip(rows, contexts, strict=True)),
        steps=4,
        learning_rate=1e-9,
    )
    flow = wing.initialize(wing.load(small(wing, **options), state), rows[0], contexts[0])
    for x, context in zip(rows, contexts, strict=True):
        flow = wing.update(flow, x, context)
    found = wing.state(result.flow)
    names = [name for name in found if ".running_" in name]
    assert names
    for name in names:
        assert_allclose(found[name], wing.state(flow)[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow"])
def test_the_optimiser_moves_parameters_only(wing, name):
    flow = small(wing, name, size=3)
    rows = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    options = {"optimizer": plain_descent(wing, 0.1), "validation": None}
    before = wing.state(fit(wing, flow, rows, steps=1, **options).flow)
    after = wing.state(fit(wing, flow, rows, steps=20, **options).flow)
    for key in before:
        part = key.rsplit(".", 1)[1]
        if part in ("permutation", "signs", "initialized") or key.startswith("layers.2."):
            assert_array_equal(before[key], after[key], err_msg=key)
    assert any((before[k] != after[k]).any() for k in before if k.endswith("weight"))


def test_conditional(wing):
    rng = np.random.default_rng(0)
    context = rng.normal(size=(600, 1))
    x = rng.normal(size=(600, 2)) * 0.1 + context
    flow = small(wing, context_dim=1, hidden=(16,))
    result = fit(wing, flow, x, context=context, steps=150, learning_rate=3e-2)
    c = context.astype("float32")
    right, wrong = loss(wing, result.flow, x, c), loss(wing, result.flow, x, c[::-1].copy())
    assert right < wrong - 1.0
    paired = fit(wing, small(wing, context_dim=1), (x, context), steps=3)
    apart = fit(wing, small(wing, context_dim=1), x, context=context, steps=3)
    same(wing, paired, apart)
    stream = [(x[:32], context[:32]), (x[32:64], context[32:64])]
    streamed = fit(wing, small(wing, context_dim=1), stream, validation=(x, context), steps=3)
    assert len(streamed.losses) == 3
    assert np.isfinite(streamed.validation_losses).all()


def test_base(wing):
    result = fit(wing, small(wing, "nice"), SMALL, base="logistic", steps=1, batch_size=200)
    assert result.flow.base == "logistic"
    expected = loss(wing, result.flow, SMALL)
    again = fit(wing, result.flow, SMALL, steps=1, batch_size=200, validation=None)
    assert again.flow.base == "logistic"
    assert_allclose(again.losses[0], expected, rtol=1e-5)
    own = wing.normal_base((2,), 3.0, 5.0, "float32")
    result = fit(wing, small(wing), SMALL, base=own, steps=1, validation=None, batch_size=200)
    density = wing.package.flow_distribution(small(wing), own)
    assert_allclose(result.losses[0], -wing.log_prob(density, SMALL).mean(), rtol=1e-5)
    assert result.flow.base == "custom"
    with pytest.raises(ValueError, match="`base` is missing"):
        wing.package.flow_distribution(result.flow)
    with pytest.raises(ValueError, match="`base` is missing"):
        fit(wing, result.flow, SMALL)


# Held-out data


def test_the_best_parameters_are_restored(wing):
    rng = np.random.default_rng(0)
    train, held_out = rng.normal(size=(40, 2)), rng.normal(size=(400, 2))
    options = {"validation": held_out, "validate_every": 3, "learning_rate": 5e-2, "steps": 60}
    result = fit(wing, small(wing, hidden=(32,)), train, **options)
    best = result.validation_losses.argmin()
    assert best < len(result.validation_losses) - 1
    assert result.best_step == result.validation_steps[best]
    assert_allclose(loss(wing, result.flow, held_out), result.validation_losses[best], rtol=1e-5)
    short = fit(
        wing, small(wing, hidden=(32,)), train, **{**options, "steps": int(result.best_step)}
    )
    for name, value in wing.state(short.flow).items():
        assert_array_equal(value, wing.state(result.flow)[name], err_msg=name)
    stopped = fit(wing, small(wing, hidden=(32,)), train, patience=4, **options)
    assert stopped.stopped == "patience"
    found = stopped.validation_losses
    assert_array_equal(found, result.validation_losses[: len(found)])
    waited = [number - found[: number + 1].argmin() for number in range(len(found))]
    assert waited.index(4) == len(found) - 1
    assert len(stopped.losses) == 3 * len(found) == stopped.best_step + 4 * 3
    assert_allclose(loss(wing, stopped.flow, held_out), found.min(), rtol=1e-5)


def test_without_validation_the_last_parameters_stay(wing):
    result = fit(wing, small(wing), SMALL, validation=None, learning_rate=1e-2, steps=7)
    assert result.best_step == 7
    assert len(result.validation_losses) == 0
    more = fit(wing, small(wing), SMALL, validation=0, learning_rate=1e-2, steps=7)
    same(wing, result, more)


def test_a_fraction_of_any_kind(wing):
    plain = fit(wing, small(wing), SMALL, validation=0.25)
    for fraction in (np.float32(0.25), np.array(0.25), wing.array(0.25)):
        same(wing, fit(wing, small(wing), SMALL, validation=fraction), plain)
    with pytest.raises(ValueError, match="`validation` is 1.5, expected a fraction"):
        fit(wing, small(wing), SMALL, validation=np.float32(1.5))


def test_once_an_epoch(wing):
    rows = fit(wing, small(wing), GAUSSIAN[:100], validation=0.2, batch_size=32, steps=7)
    assert rows.validation_steps.tolist() == [2, 4, 6, 7]
    stream = fit(wing, small(wing), batches(3), validation=SMALL, steps=7)
    assert stream.validation_steps.tolist() == [3, 6, 7]


def test_an_epoch_gives_each_row_once(wing):
    """Each row is the only one of its kind, so that a batch's loss tells which it had."""
    x = np.arange(1, 11, dtype="float32")[:, None] * np.ones((1, 2), dtype="float32")
    frozen = {"validation": None, "batch_size": 1, "learning_rate": 1e-12}
    result = fit(wing, small(wing), x, steps=20, **frozen)
    first, second = result.losses[:10], result.losses[10:]
    assert_allclose(np.sort(first), np.sort(second), rtol=1e-5)
    assert len(np.unique(first.round(3))) == 10
    assert not np.allclose(first, second)


def test_validation_rows_are_not_trained_on(wing):
    x = np.arange(1, 11, dtype="float32")[:, None] * np.ones((1, 2), dtype="float32")
    result = fit(wing, small(wing), x, validation=0.3, batch_size=1, learning_rate=1e-12, steps=14)
    trained = np.unique(result.losses.round(3))
    assert len(trained) == 7
    of_all = -wing.log_prob(wing.density(small(wing)), x)
    assert_allclose(trained.sum() + 3 * result.validation_losses[0], of_all.sum(), rtol=1e-4)


# Sources of batches


def test_streams(wing):
    rows = batches(3)
    listed = fit(wing, small(wing), rows, steps=5)
    expected = [loss(wing, small(wing), rows[0])]
    assert_allclose(listed.losses[:1], expected, rtol=1e-5)
    assert listed.stopped == "steps"
    once = fit(wing, small(wing), (batch for batch in rows), steps=5)
    assert once.stopped == "data exhausted"
    assert_array_equal(once.losses, listed.losses[:3])
    wrapped = fit(wing, small(wing), [[batch] for batch in rows], steps=5)
    same(wing, wrapped, listed)


class Rewound:
    """A loader that gives the same iterator at each pass, as those with lasting workers do."""

    class Iterator:
        def __init__(self, rows):
            self.rows, self.position = rows, 0

        def __iter__(self):
            return self

        def __next__(self):
            if self.position == len(self.rows):
                raise StopIteration
            self.position += 1
            return self.rows[self.position - 1]

    def __init__(self, rows):
        self.iterator = self.Iterator(rows)

    def __iter__(self):
        self.iterator.position = 0
        return self.iterator


def test_a_loader_that_rewinds_its_iterator(wing, tmp_path):
    listed = fit(wing, small(wing), batches(3), steps=8)
    same(wing, fit(wing, small(wing), Rewound(batches(3)), steps=8), listed)


def test_a_whole_batch_of_rows_is_a_stream_of_one(wing):
    rows = fit(wing, small(wing), SMALL, validation=None, batch_size=200, steps=5)
    stream = fit(wing, small(wing), [SMALL], steps=5)
    assert_allclose(rows.losses, stream.losses, rtol=1e-4)


class Squares:
    """A dataset of rows, as PyTorch's are: with a length, and items by their numbers."""

    def __len__(self):
        return len(SMALL)

    def __getitem__(self, index):
        return SMALL[index]


def test_a_dataset_is_its_rows(wing):
    same(wing, fit(wing, small(wing), Squares()), fit(wing, small(wing), SMALL))


def test_rows_in_a_file(wing, tmp_path):
    np.save(tmp_path / "x.npy", SMALL)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    same(wing, fit(wing, small(wing), mapped), fit(wing, small(wing), SMALL))


def test_double_precision_data_are_converted(wing):
    same(wing, fit(wing, small(wing), SMALL.astype(float)), fit(wing, small(wing), SMALL))


@pytest.mark.parametrize("order", [">f4", ">f8"])
def test_any_byte_order(wing, order):
    x = SMALL.astype(order)
    same(
        wing,
        fit(wing, small(wing), x, standardize=True),
        fit(wing, small(wing), SMALL, standardize=True),
    )
    same(wing, fit(wing, small(wing), [x], steps=2), fit(wing, small(wing), [SMALL], steps=2))
    with pytest.raises(ValueError, match="`data` has 2 of 96 rows.*row 4"):
        fit(wing, small(wing), with_nan(x))


def test_whole_numbers_of_any_byte_order(wing):
    x = np.arange(64).reshape(32, 2)
    plain = fit(wing, small(wing), x, augment=noisy(wing))
    same(wing, fit(wing, small(wing), x.astype(">i2"), augment=noisy(wing)), plain)


def test_augmentation(wing):
    """All rows are the same, so that only the noise can make losses differ."""
    whole = np.full((64, 2), 3)
    options = {"steps": 6, "batch_size": 32, "learning_rate": 1e-9, "validate_every": 2}
    with pytest.raises(TypeError, match="augment"):
        fit(wing, small(wing), whole, **options)
    result = fit(wing, small(wing), whole, augment=noisy(wing), **options)
    assert np.diff(np.sort(result.losses)).min() > 1e-4
    assert np.ptp(result.validation_losses) < 1e-5
    same(wing, result, fit(wing, small(wing), whole, augment=noisy(wing), **options))
    other = fit(wing, small(wing), whole, augment=noisy(wing), seed=1, **options)
    assert not np.isclose(result.losses, other.losses, rtol=1e-5).any()
    standardized = fit(wing, small(wing), whole, augment=noisy(wing), standardize=True, **options)
    state = wing.state(standardized.flow)
    assert_allclose(state["layers.1.loc"], 3.5, atol=0.1)
    assert_allclose(np.exp(state["layers.1.log_scale"]), 12**-0.5, rtol=0.2)


# Options of the step


def test_schedules(wing):
    still = fit(wing, small(wing), SMALL, schedule=lambda step: 0.0)
    for name, value in wing.state(small(wing)).items():
        assert_array_equal(value, wing.state(still.flow)[name])
    cosine = fit(wing, small(wing), SMALL, schedule="cosine", steps=6, validation=None)
    own = fit(
        wing,
        small(wing),
        SMALL,
        schedule=lambda step: 0.5 * (1 + np.cos(np.pi * step / 6)),
        steps=6,
        validation=None,
    )
    assert_allclose(own.losses, cosine.losses, rtol=1e-6)
    half = fit(wing, small(wing), SMALL, schedule=lambda step: 0.5, learning_rate=2e-2)
    assert_allclose(
        half.losses, fit(wing, small(wing), SMALL, learning_rate=1e-2).losses, rtol=1e-4
    )


def test_clipping(wing):
    """One step of plain descent is as long as the gradient: from far out, that is far."""
    moved = {}
    for clip in (None, 0.25):
        flow = small(wing)
        before = wing.state(flow)
        result = fit(wing, flow, SMALL, steps=1, clip_norm=clip, optimizer=plain_descent(wing, 1.0))
        after = wing.state(result.flow)
        moved[clip] = np.sqrt(sum(((after[k] - before[k]) ** 2).sum() for k in before))
    assert moved[None] > 1.0
    assert_allclose(moved[0.25], 0.25, rtol=1e-3)


def test_penalty(wing):
    free = fit(wing, small(wing), SMALL, steps=30, learning_rate=1e-2)
    tied = fit(wing, small(wing), SMALL, steps=30, learning_rate=1e-2, penalty=10.0)
    size = {r: wing.numpy(r.flow.scale_penalty()) for r in (free, tied)}
    assert size[tied] < 0.8 * size[free]
    assert_array_equal(tied.losses[0], free.losses[0])


@pytest.mark.parametrize("options", [{"name": "nice"}, {"name": "glow"}, {"scale": "exp"}], ids=str)
def test_a_penalty_without_effect(wing, options):
    flow = small(wing, **options)
    before = wing.state(flow)
    with pytest.raises(ValueError, match="`penalty` is 0.1, but .* no tanh scales"):
        fit(wing, flow, SMALL, penalty=0.1, base="logistic")
    unchanged(wing, flow, before)
    fit(wing, flow, SMALL, penalty=0.0, steps=1)


def test_one_evaluation_a_step(wing):
    flow, count = wing.spied(small(wing))
    fit(wing, flow, SMALL, steps=5, validation=None)
    # Two couplings; `initialize` looks at the first batch, and the last parameters are tried once.
    assert count() == 5 * 2 + 2 + 2


# Steps that fail


def test_bad_steps_are_skipped(wing):
    good = batches(6)
    bad = [good[0], FAR, good[1], good[2], FAR, FAR, *good[3:]]
    without = fit(wing, small(wing), iter(good), steps=20)
    with pytest.warns(UserWarning, match="3 of 9 steps were skipped"):
        with_bad = fit(wing, small(wing), iter(bad), steps=20)
    assert with_bad.skipped == 3
    assert with_bad.best_step == without.best_step == 6
    assert not np.isfinite(with_bad.losses[[1, 4, 5]]).any()
    assert_array_equal(np.delete(with_bad.losses, [1, 4, 5]), without.losses)
    unchanged(wing, with_bad.flow, wing.state(without.flow))


def test_a_bad_batch_in_the_end(wing):
    """It says nothing against the parameters."""
    good = batches(19)
    without = fit(wing, small(wing), iter(good), steps=20)
    with_bad = fit(wing, small(wing), iter([*good, FAR]), steps=20)  # few: no warning
    assert with_bad.skipped == 1
    assert with_bad.best_step == 19
    unchanged(wing, with_bad.flow, wing.state(without.flow))


def test_skipped_steps_leave_the_running_averages(wing):
    good = batches(3)
    without = fit(wing, small(wing, batch_norm=True), iter(good), steps=20)
    far = np.float32(1e25) * (1 + good[0])
    rows = [*good[:2], far, good[2]]
    with pytest.warns(UserWarning, match="1 of 4 steps were skipped"):
        with_bad = fit(wing, small(wing, batch_norm=True), iter(rows), steps=20)
    assert with_bad.skipped == 1
    for name, value in wing.state(without.flow).items():
        assert_array_equal(value, wing.state(with_bad.flow)[name], err_msg=name)


def test_training_that_cannot_recover(wing):
    good = batches(4)
    with pytest.warns(UserWarning, match="not finite"):
        result = fit(
            wing,
            small(wing),
            iter([*good, *[FAR] * 100]),
            validation=good[0],
            validate_every=2,
            steps=200,
        )
    assert result.stopped == "not finite"
    assert len(result.losses) == 54
    assert result.skipped == 50
    assert result.best_step <= 4
    assert_allclose(loss(wing, result.flow, good[0]), result.validation_losses.min(), rtol=1e-5)
    before = wing.state(small(wing))
    with pytest.warns(UserWarning, match="not finite"):
        never = fit(wing, small(wing), [FAR], steps=5)
    assert never.stopped == "not finite"
    for name, value in wing.state(never.flow).items():
        assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    "options",
    [
        {"validation": None, "steps": 200},
        {"validation": None, "steps": 30},
        {"validation": SMALL, "steps": 200, "validate_every": 100},
        {"validation": None, "steps": 200, "model": {"batch_norm": True}},
    ],
    ids=str,
)
def test_parameters_that_diverge(wing, options):
    """The flow goes back to the last ones whose loss was finite."""
    options = dict(options)
    model = options.pop("model", {})
    with pytest.warns(UserWarning, match="parameters of step 0|29 of 30 steps were skipped"):
        result = fit(wing, small(wing, **model), SMALL, learning_rate=1e20, **options)
    assert result.skipped == len(result.losses) - 1 == min(50, options["steps"] - 1)
    assert result.best_step == 0
    assert np.isfinite(result.losses[0])
    assert np.isfinite(loss(wing, result.flow, SMALL))


def cut_off(count):
    """Batches, and then Ctrl-C."""
    yield from batches(count)
    raise KeyboardInterrupt


def test_a_run_that_has_diverged_resumes(wing, tmp_path):
    options = {
        "optimizer": plain_descent(wing, 1e10),
        "validation": None,
        "validate_every": 5,
        "steps": 90,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = fit(wing, small(wing), cut_off(80), **options)
        options["checkpoint"] = tmp_path / "run"
        cut = fit(wing, small(wing), cut_off(23), **options)
        resumed = fit(wing, small(wing), cut_off(80), **options)
        again = fit(wing, small(wing), cut_off(80), **options)
    assert whole.stopped == "not finite"
    assert cut.stopped == "interrupted"
    assert np.isfinite(loss(wing, whole.flow, batches(1)[0]))
    for result in (resumed, again):
        same(wing, result, whole)
    unchanged(wing, cut.flow, wing.state(whole.flow))


def test_gradients_that_are_not_finite(wing):
    """The square root is finite at 0, its slope is not."""
    if wing.name == "pyro":
        from torch import sqrt
    else:
        from jax.numpy import sqrt
    flow = small(wing, scale=lambda r: 0.0 * sqrt(abs(r)))
    before = wing.state(flow)
    with pytest.warns(UserWarning, match="not finite"):
        result = fit(wing, flow, SMALL, steps=4)
    assert np.isfinite(result.losses).all()
    assert result.skipped == 4
    for name, value in wing.state(result.flow).items():
        assert_array_equal(value, before[name])


def test_an_own_base_that_is_validated(wing):
    """Hosts' validation raises at an event that is not finite; `fit` skips the step."""
    own = wing.normal_base((2,), 0.0, 1.0, "float32")
    rows = batches(3)
    flow = small(wing, "nice")
    huge = np.full((32, 2), 3e38, dtype="float32")
    with pytest.warns(UserWarning, match="1 of 3 steps were skipped"):
        result = fit(wing, flow, iter([rows[0], huge, rows[1]]), base=own, steps=10)
    assert result.skipped == 1


def test_control_c(wing):
    def until_interrupted():
        yield from batches(5)
        raise KeyboardInterrupt

    result = fit(wing, small(wing), until_interrupted(), steps=50)
    assert result.stopped == "interrupted"
    assert len(result.losses) == 5
    assert result.best_step == 5
    reference = fit(wing, small(wing), batches(5), steps=5)
    for name, value in wing.state(reference.flow).items():
        assert_array_equal(value, wing.state(result.flow)[name])


def test_control_c_validates(wing):
    def until_interrupted():
        yield from batches(7)
        raise KeyboardInterrupt

    held_out = batches(1, size=200, seed=2)[0] + np.float32(2.0)
    rows = {"validation": held_out, "validate_every": 5, "learning_rate": 1e-2, "steps": 50}
    result = fit(wing, small(wing), (x + np.float32(2.0) for x in until_interrupted()), **rows)
    assert result.stopped == "interrupted"
    assert result.validation_steps.tolist() == [5, 7]
    assert result.best_step == 7
    assert_allclose(loss(wing, result.flow, held_out), result.validation_losses[1], rtol=1e-5)
    rows["learning_rate"] = 1.0
    worse = fit(wing, small(wing), until_interrupted(), **rows)
    assert worse.best_step == worse.validation_steps[worse.validation_losses.argmin()]
    assert_allclose(loss(wing, worse.flow, held_out), worse.validation_losses.min(), rtol=1e-5)


def press(r):
    """A scale function that presses Ctrl-C."""
    raise KeyboardInterrupt


def test_control_c_before_the_first_step(wing):
    """Nothing has been learned yet: the flow stays as it is."""
    flow = small(wing, "glow", scale=press)
    before = wing.state(flow)
    result = fit(wing, flow, SMALL, base="logistic", standardize=True)
    assert result.stopped == "interrupted"
    assert len(result.losses) == result.best_step == 0
    unchanged(wing, result.flow, before)


def test_an_error_in_the_first_step(wing):
    flow = small(wing, "glow")
    before = wing.state(flow)
    options = {"base": "logistic", "standardize": True, "schedule": lambda step: {}[step]}
    with pytest.raises(KeyError):
        fit(wing, flow, SMALL, **options)
    unchanged(wing, flow, before)


# Reproducibility


def test_seeds(wing):
    one = fit(wing, small(wing), GAUSSIAN, seed=1)
    np.random.seed(5)
    if wing.name == "pyro":
        import torch

        torch.manual_seed(123)
    same(wing, one, fit(wing, small(wing), GAUSSIAN, seed=1))
    assert not np.array_equal(one.losses, fit(wing, small(wing), GAUSSIAN, seed=2).losses)


# Checkpoints


interrupt_at = None


def interrupting(step):
    """A schedule that presses Ctrl-C, or worse."""
    if step == interrupt_at:
        raise KeyboardInterrupt
    if os.environ.get("KILL_AT") == str(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0 / (1 + step)


SOURCES = {
    "rows": lambda: (GAUSSIAN, {}),
    "validated rows": lambda: (GAUSSIAN, {"validation": 0.3}),
    "short epochs": lambda: (GAUSSIAN, {"batch_size": 300, "validate_every": None}),
    "list": lambda: (batches(4), {"validation": SMALL}),
    "iterator": lambda: (iter(batches(20)), {}),
}


def checkpointed(wing, source, path, name="realnvp", **options):
    data, own = SOURCES[source]()
    flow = small(wing, name, **({"batch_norm": True} if name == "realnvp" else {}))
    options = {
        "steps": 17,
        "validate_every": 3,
        "learning_rate": 3e-2,
        "schedule": interrupting,
        "validation": None,
        "batch_size": 64,
        "checkpoint": path,
        **own,
        **options,
    }
    return fit(wing, flow, data, **options)


@pytest.mark.parametrize("source", SOURCES)
def test_resuming_gives_the_same_numbers(wing, source, tmp_path, monkeypatch):
    whole = checkpointed(wing, source, None)
    monkeypatch.setattr(sys.modules[__name__], "interrupt_at", 11)
    cut = checkpointed(wing, source, tmp_path / "run")
    assert cut.stopped == "interrupted"
    monkeypatch.setattr(sys.modules[__name__], "interrupt_at", None)
    resumed = checkpointed(wing, source, tmp_path / "run")
    same(wing, resumed, whole)
    assert os.listdir(tmp_path) == ["run"]


def test_augmented_glow_resumes(wing, tmp_path, monkeypatch):
    options = {"name": "glow", "augment": noisy(wing), "standardize": True}
    whole = checkpointed(wing, "validated rows", None, **options)
    monkeypatch.setattr(sys.modules[__name__], "interrupt_at", 10)
    checkpointed(wing, "validated rows", tmp_path / "run", **options)
    monkeypatch.setattr(sys.modules[__name__], "interrupt_at", None)
    same(wing, checkpointed(wing, "validated rows", tmp_path / "run", **options), whole)


def killed_run(name, path):
    """What the killed process does."""
    (wing,) = (wing for wing in WINGS if wing.name == name)
    warnings.simplefilter("ignore")
    checkpointed(wing, "validated rows", path)


def test_kill_nine(wing, tmp_path):
    path = tmp_path / "run"
    call = f"killed_run({wing.name!r}, {str(path)!r})"
    # The set-up of the tests goes first: it settles how programs are compiled, to the last bit.
    code = f"import tests.conftest; from tests.specs.test_training import killed_run; {call}"
    environment = {**os.environ, "KILL_AT": "11", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.exists()
    same(
        wing, checkpointed(wing, "validated rows", path), checkpointed(wing, "validated rows", None)
    )


def test_a_finished_run_returns_at_once(wing, tmp_path):
    whole = checkpointed(wing, "validated rows", tmp_path / "run")
    written = (tmp_path / "run").stat().st_mtime_ns
    same(wing, checkpointed(wing, "validated rows", tmp_path / "run"), whole)
    assert (tmp_path / "run").stat().st_mtime_ns == written


def test_a_checkpoint_of_another_run(wing, tmp_path, monkeypatch):
    path = tmp_path / "run"
    checkpointed(wing, "rows", path, steps=2)
    for options, word in [
        ({"steps": 3}, "`steps` was 2 there and is 3 here"),
        ({"steps": 2, "learning_rate": 0.5}, "`learning_rate`"),
        ({"steps": 2, "base": "logistic"}, "`base`"),
        ({"steps": 2, "name": "glow"}, "`flow`"),
        ({"steps": 2, "validation": 0.2}, "`validation`"),
        ({"steps": 2, "seed": 3}, "`(seed|key)`"),
    ]:
        with pytest.raises(ValueError, match=word):
            checkpointed(wing, "rows", path, **options)
    with pytest.raises(ValueError, match="`data`"):
        checkpointed(wing, "list", path, steps=2, validation=None)
    other = {**SOURCES, "rows": lambda: (GAUSSIAN[::-1].copy(), {})}
    monkeypatch.setattr(sys.modules[__name__], "SOURCES", other)
    with pytest.raises(ValueError, match="another run: `data` differs"):
        checkpointed(wing, "rows", path, steps=2)


def test_a_file_that_is_no_checkpoint(wing, tmp_path):
    path = tmp_path / "run"
    checkpointed(wing, "rows", path, steps=2)
    content = path.read_bytes()
    before = wing.state(small(wing))
    for broken in (b"", b"hello", content[: len(content) // 2], b"\x80\x04N."):
        path.write_bytes(broken)
        flow = small(wing)
        with pytest.raises(ValueError, match="`checkpoint`"):
            fit(wing, flow, GAUSSIAN, checkpoint=path)
        assert path.read_bytes() == broken
        for name, value in wing.state(flow).items():
            assert_array_equal(value, before[name])
    with pytest.raises(ValueError, match="`checkpoint`"):
        fit(wing, small(wing), GAUSSIAN, checkpoint=tmp_path / "nowhere" / "run")


# Refusals


def with_nan(rows):
    return with_number(rows, np.nan)


def with_number(rows, number):
    rows = rows.copy()
    rows[[4, 7], 1] = number
    return rows


HUGE = with_number(SMALL.astype(float), 1e300)


C = np.ones((96, 3), dtype="float32")
FAR_APART = np.float32(3e38) * np.sign(SMALL)  # finite, but their differences are not
REFUSED = [
    ({"steps": 0}, "`steps` is 0"),
    ({"steps": 2.5}, "`steps` is 2.5"),
    ({"batch_size": 0}, "`batch_size` is 0"),
    ({"learning_rate": 0.0}, "`learning_rate` is 0"),
    ({"learning_rate": float("nan")}, "`learning_rate` is nan"),
    ({"validation": 1.0}, "`validation` is 1.0"),
    ({"validation": -0.1}, "`validation` is -0.1"),
    ({"validation": 0.999}, "`validation` is 0.999"),
    ({"validation": with_nan(SMALL)}, "`validation` has 2 of 96 rows.*row 4"),
    ({"validation": iter([SMALL])}, "`validation` is an iterator"),
    ({"patience": 0}, "`patience` is 0"),
    ({"patience": 3, "validation": None}, "`patience` needs"),
    ({"data": [SMALL], "patience": 3}, "`patience` needs"),
    ({"data": [SMALL], "validation": 0.2}, "`validation` is 0.2"),
    ({"validate_every": 0}, "`validate_every` is 0"),
    ({"schedule": "linear"}, "`schedule` is 'linear'"),
    ({"clip_norm": 0.0}, "`clip_norm` is 0.0"),
    ({"penalty": -1.0}, "`penalty` is -1.0"),
    ({"base": "cauchy"}, "`base` is 'cauchy'"),
    ({"data": SMALL[:, :1]}, r"`data` has shape \(96, 1\).*events of shape \(2,\)"),
    ({"data": SMALL[0]}, r"`data` has shape \(2,\)"),
    ({"data": SMALL[:0]}, "no rows"),
    ({"data": SMALL[:1]}, "`validation` is 0.1"),
    ({"data": with_nan(SMALL)}, "`data` has 2 of 96 rows with NaN or inf; the first is row 4"),
    ({"data": HUGE}, "`data` has 2 of 96 rows with NaN or inf as float32; the first is row 4"),
    ({"data": HUGE, "standardize": True}, "`data` has 2 of 96 rows with NaN or inf as float32"),
    ({"data": [HUGE]}, "batch 0 of `data` has 2 of 96 rows with NaN or inf as float32"),
    ({"validation": HUGE}, "`validation` has 2 of 96 rows with NaN or inf as float32"),
    ({"data": FAR_APART, "batch_size": 96, "validation": None}, "`data` .* would not be finite"),
    ({"data": FAR_APART, "standardize": True}, "data's moments are not finite as float32"),
    ({"data": []}, "`data` has no batches"),
    ({"data": [with_nan(SMALL)]}, "batch 0 of `data` has 2 of 96 rows"),
    ({"data": [SMALL[:, :1]]}, r"batch 0 of `data` has shape \(96, 1\)"),
    ({"data": [SMALL[0]]}, "one event"),
    ({"context": C}, "without"),
    ({"data": (SMALL, C)}, "without"),
    ({"data": [(SMALL, C)]}, "without"),
    ({"data": [SMALL], "context": C}, "`context` goes with an array"),
    ({"flow": {"context_dim": 3}}, "context_dim=3"),
    ({"flow": {"context_dim": 3}, "data": [SMALL]}, "context_dim=3"),
    ({"flow": {"context_dim": 3}, "context": C[:95]}, r"\(95, 3\), expected \(96, 3\)"),
    ({"flow": {"context_dim": 2}, "context": C}, r"\(96, 3\), expected \(96, 2\)"),
    ({"flow": {"context_dim": 3}, "context": np.nan * C}, "`context` of `data` has 96 of 96 rows"),
    ({"flow": {"context_dim": 3}, "data": (SMALL, C), "context": C}, "already"),
]
WRONG_TYPES = [
    ({"data": (10 * SMALL).astype(int)}, "augment"),
    ({"data": [(10 * SMALL).astype(int)]}, "augment"),
    ({"data": SMALL.astype(complex)}, "complex"),
    ({"data": 3}, "`data` is a int"),
    ({"data": ["moon"]}, "batch 0 of `data` is a str"),
    ({"data": [(SMALL, C, C)]}, "3 items"),
    ({"data": SMALL.tolist()}, "`data` is a list of numbers, expected an array or tensor of rows"),
    ({"data": C.tolist()}, r"`data` is a list of numbers.*(torch.tensor|numpy.array) makes one"),
    ({"data": [SMALL.tolist()]}, "`data` is a list of numbers"),
    ({"data": tuple(SMALL[:3].tolist())}, "`data` is a tuple of numbers"),
    ({"data": iter(SMALL.tolist())}, "batch 0 of `data` is a list of numbers"),
    ({"data": (SMALL.tolist(), C.tolist())}, "`data` is a list of numbers"),
    ({"flow": {"context_dim": 3}, "context": C.tolist()}, "`context` is a list of numbers"),
    ({"data": "file.csv"}, "^`data` is a str, expected an array"),
    ({"data": {"x": SMALL}}, "^`data` is a dict, expected an array"),
    ({"augment": 3}, "`augment` is 3"),
]


@pytest.mark.parametrize(
    ("options", "message", "kind"),
    [(*case, ValueError) for case in REFUSED] + [(*case, TypeError) for case in WRONG_TYPES],
    ids=[str(case[1]) for case in REFUSED + WRONG_TYPES],
)
def test_refusals(wing, options, message, kind):
    options = dict(options)
    flow = small(wing, "glow", **options.pop("flow", {}))
    before, base = wing.state(flow), flow.base
    with pytest.raises(kind, match=message):
        fit(wing, flow, options.pop("data", SMALL), **options)
    assert flow.base == base
    for name, value in wing.state(flow).items():
        assert_array_equal(value, before[name])


def test_refused_flows(wing):
    with pytest.raises(ValueError, match="ends in AffineCoupling.*append Standardization"):
        fit(wing, wing.new("AffineCoupling", 2), SMALL, standardize=True)
    with pytest.raises(ValueError, match="no parameters"):
        fit(wing, wing.new("Permutation", [1, 0]), SMALL)
    with pytest.raises(TypeError, match="`flow` is a str"):
        fit(wing, "flow", SMALL)
    given = wing.given(small(wing, context_dim=3), C)
    with pytest.raises(ValueError, match="context"):
        fit(wing, given, SMALL)


@pytest.mark.parametrize("standardize", [True, False])
def test_augmented_rows_that_are_not_finite(wing, standardize):
    x = np.random.default_rng(0).uniform(size=(96, 2)).astype("float32")
    x[5, 0], x[9, 1] = 0.0, 1.0
    flow = small(wing, "glow")
    before = wing.state(flow)
    options = {"standardize": standardize, "validation": None, "base": "logistic"}
    with pytest.raises(ValueError, match="`data` after `augment` has 2 of 96 rows with NaN or inf"):
        fit(wing, flow, x, augment=logit(wing), batch_size=96, **options)
    unchanged(wing, flow, before)
    x[[5, 9]] = 0.5
    good = fit(wing, flow, x, augment=logit(wing), batch_size=96, **options)
    assert good.skipped == 0


def test_data_out_of_a_logits_range(wing):
    flow = small(wing, "glow", logit=0.05)
    before = wing.state(flow)
    x = np.full((32, 2), 2.0, dtype="float32")
    with pytest.raises(ValueError, match="`data` behind Logit has 28 of 28 rows"):
        fit(wing, flow, x, standardize=True, validation=0.125)
    unchanged(wing, flow, before)


def test_a_bad_batch_on_the_way(wing):
    flow = small(wing)
    with pytest.raises(ValueError, match="batch 3 of `data` has 2 of 32 rows"):
        fit(wing, flow, [*batches(3), with_nan(batches(1)[0])], steps=10)
    assert all(np.isfinite(value).all() for value in wing.state(flow).values())


# What is shown


def test_results_are_short_to_read(wing):
    result = fit(wing, small(wing), SMALL, steps=3)
    shown = repr(result)
    assert len(shown) < 200
    assert "\n" not in shown
    assert shown.startswith("FitResult(flow=Chain, steps=3, last_loss=")
    assert "best_validation_loss=" in shown
    assert shown.endswith("stopped='steps')")
    assert "validation" not in repr(fit(wing, small(wing), SMALL, steps=3, validation=None))


def test_progress(wing, capsys):
    fit(wing, small(wing), SMALL)
    assert capsys.readouterr() == ("", "")
    fit(wing, small(wing), SMALL, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "12/12" in err
    assert "loss=" in err
    assert "validation=" in err


def test_progress_as_the_user_writes_it(wing, capsys):
    bits = functools.partial(wing.package.bits_per_dim, event_shape=2)
    result = fit(wing, small(wing), SMALL, progress=lambda loss: f"{bits(-loss):.4f} bits/dim")
    shown = capsys.readouterr().err
    assert f"loss={bits(-result.losses.mean()):.4f} bits/dim" in shown
    assert f"validation={bits(-result.validation_losses[-1]):.4f} bits/dim" in shown
