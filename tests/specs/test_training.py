"""Laws of `fit`: what it learns, what it leaves alone and what it shows."""

import functools
import tracemalloc

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.datasets import make_moons

from pyroflows_common import rows
from tests.wings.base import disturbed
from tests.wings.training import (
    FAR,
    GAUSSIAN,
    SMALL,
    UNHELPFUL,
    Dataset,
    batches,
    fit,
    loss,
    plain_descent,
    same,
    small,
    unchanged,
)

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


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow"])
def test_one_number_given_a_context(wing, name):
    """Near the entropy of y | c ~ N(sin c, σ(c)²), for NICE with one σ for all contexts."""
    rng = np.random.default_rng(0)
    c = rng.uniform(-3, 3, (4000, 1)).astype("float32")
    deviation = 0.2 + 0.1 * c**2
    y = (np.sin(c) + deviation * rng.standard_normal(c.shape)).astype("float32")
    flow = small(wing, name, 1, context_dim=1, hidden=(32,))
    options = {"learning_rate": 2e-2, "standardize": True, "schedule": "cosine"}
    train = slice(0, 2000)
    result = fit(wing, flow, y[train], context=c[train], steps=200, batch_size=256, **options)
    rest = deviation[2000:]
    width = np.log(np.mean(rest**2)) / 2 if name == "nice" else np.log(rest).mean()
    entropy = 0.5 * np.log(2 * np.pi * np.e) + width
    assert abs(loss(wing, result.flow, y[2000:], c[2000:]) - entropy) < 0.05


def test_one_number_of_another_shape(wing):
    """Between conditional flows, SinhArcsinh gives the density a shape that no normal has."""
    rng = np.random.default_rng(0)
    c = rng.uniform(-3, 3, (4000, 1)).astype("float32")
    deviation = 0.2 + 0.1 * c**2
    y = (np.sin(c) + deviation * rng.standard_exponential(c.shape)).astype("float32")
    blocks = [small(wing, size=1, context_dim=1, hidden=(32,)) for _ in range(2)]
    layers = [layer for block in blocks for layer in (wing.new("SinhArcsinh", 1), block)]
    flow = wing.cast(wing.new("Chain", layers), "float32")
    options = {"learning_rate": 1e-2, "schedule": "cosine"}
    train = slice(0, 2000)
    result = fit(wing, flow, y[train], context=c[train], steps=400, batch_size=256, **options)
    entropy = 1 + np.log(deviation[2000:]).mean()
    assert abs(loss(wing, result.flow, y[2000:], c[2000:]) - entropy) < 0.1


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
    assert_allclose(result.losses, result.validation_losses[:-1], rtol=1e-4)
    for value in (result.losses, result.validation_losses, result.validation_steps):
        assert isinstance(value, np.ndarray)
    assert result.validation_steps.tolist() == [0, 1, 2, 3]
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


@UNHELPFUL
def test_standardization_is_of_the_training_rows(wing):
    far = np.concatenate([SMALL, SMALL + 100.0])
    result = fit(wing, small(wing), far[:96], standardize=True, validation=far[96:], steps=1)
    state = wing.state(result.flow)
    assert_allclose(state["layers.1.loc"], SMALL.mean(0), rtol=1e-4)


def test_standardization_of_a_stream_is_of_its_first_batch(wing):
    rows = batches(4)
    result = fit(wing, small(wing), rows, standardize=True, steps=2)
    assert_allclose(wing.state(result.flow)["layers.1.loc"], rows[0].mean(0), rtol=1e-4, atol=1e-6)


def test_standardization_of_a_stack_is_that_of_its_last_block(wing):
    """The one next to the data, whether blocks are held one by one or stacked."""
    for kind in ("Chain", "Stack"):
        parts = [[wing.new("ActNorm", 2), wing.new("Standardization", 2)] for _ in range(2)]
        blocks = [wing.package.Chain(part) for part in parts]
        flow = wing.cast(wing.new(kind, blocks), "float32")
        state = wing.state(fit(wing, flow, GAUSSIAN, standardize=True, steps=1).flow)
        assert_allclose(state["layers.1.layers.1.loc"], [3.0, -1.0], rtol=0.2)
        assert_array_equal(state["layers.0.layers.1.loc"], [0.0, 0.0])


def test_standardization_goes_through_the_data_in_parts(wing, monkeypatch):
    """Sorted, so that each part has moments of its own."""
    x = np.sort(GAUSSIAN, axis=0).astype("float32")
    whole = fit(wing, small(wing), x, standardize=True, steps=1)
    taken = []

    class Sorted(Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, index):
            taken.append(index)
            return x[index]

    monkeypatch.setattr(rows, "CHUNK", 64)
    parts = fit(wing, small(wing), x, standardize=True, steps=1)
    items = fit(wing, small(wing), Sorted(), standardize=True, steps=1)
    assert len(np.unique(taken)) == len(x)
    for result in (parts, items):
        for name, value in wing.state(result.flow).items():
            assert_allclose(value, wing.state(whole.flow)[name], rtol=1e-5, err_msg=name)
    constant = np.full((200, 2), 0.1, dtype="float32")
    state = wing.state(fit(wing, small(wing), constant, standardize=True, steps=1).flow)
    assert_array_equal(state["layers.1.log_scale"], 0.0)


def test_standardization_needs_no_memory(wing, tmp_path):
    np.save(tmp_path / "x.npy", np.full((2**20, 8), 0.5, dtype="float32"))
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
    result = fit(wing, small(wing, "glow"), SMALL, steps=1, validation=None)
    flags = [v for k, v in wing.state(result.flow).items() if k.endswith("initialized")]
    assert flags
    assert all(flags)
    again = fit(wing, result.flow, SMALL + 100.0, steps=1, learning_rate=1e-9, validation=None)
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
    train, held_out = rng.normal(1.0, 2.0, size=(40, 2)), rng.normal(1.0, 2.0, size=(400, 2))
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
    assert len(stopped.losses) == 3 * (len(found) - 1) == stopped.best_step + 4 * 3
    assert_allclose(loss(wing, stopped.flow, held_out), found.min(), rtol=1e-5)


@pytest.mark.parametrize("rate", [0.3, 1e3])
def test_no_result_is_worse_than_its_start(wing, rate):
    """A new flow of couplings is the identity, and so starts at the truth of these rows."""
    x = np.random.default_rng(0).normal(size=(96, 2)).astype("float32")
    flow = small(wing)
    before = wing.state(flow)
    with pytest.warns(UserWarning, match="training did not help: no validation loss was below"):
        result = fit(wing, flow, x[:32], validation=x[32:], learning_rate=rate, steps=20)
    assert result.validation_steps[0] == result.best_step == 0
    assert_allclose(result.validation_losses[0], loss(wing, flow, x[32:]), rtol=1e-5)
    assert result.validation_losses.min() == result.validation_losses[0]
    unchanged(wing, result.flow, before)


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
    assert rows.validation_steps.tolist() == [0, 2, 4, 6, 7]
    stream = fit(wing, small(wing), batches(3), validation=SMALL, steps=7)
    assert stream.validation_steps.tolist() == [0, 3, 6, 7]


def test_an_epoch_gives_each_row_once(wing):
    """Each row is the only one of its kind, so that a batch's loss tells which it had."""
    x = np.arange(0.5, 10, dtype="float32")[:, None] * np.ones((1, 2), dtype="float32")
    frozen = {"validation": None, "batch_size": 1, "learning_rate": 1e-12}
    result = fit(wing, small(wing), x, steps=20, **frozen)
    first, second = result.losses[:10], result.losses[10:]
    assert_allclose(np.sort(first), np.sort(second), rtol=1e-5)
    assert len(np.unique(first.round(3))) == 10
    assert not np.allclose(first, second)


@UNHELPFUL
def test_validation_rows_are_not_trained_on(wing):
    x = np.arange(0.5, 10, dtype="float32")[:, None] * np.ones((1, 2), dtype="float32")
    result = fit(wing, small(wing), x, validation=0.3, batch_size=1, learning_rate=1e-12, steps=14)
    trained = np.unique(result.losses.round(3))
    assert len(trained) == 7
    of_all = -wing.log_prob(wing.density(small(wing)), x)
    assert_allclose(trained.sum() + 3 * result.validation_losses[0], of_all.sum(), rtol=1e-4)


# Options of the step


def test_schedules(wing):
    still = fit(wing, small(wing), SMALL, schedule=lambda step: 0.0, validation=None)
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
        options = {"clip_norm": clip, "optimizer": plain_descent(wing, 1.0), "validation": None}
        result = fit(wing, flow, SMALL, steps=1, **options)
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
    fit(wing, flow, SMALL, penalty=0.0, steps=1, validation=None)


def test_one_evaluation_a_step(wing):
    flow, count = wing.spied(small(wing))
    fit(wing, flow, SMALL, steps=5, validation=None)
    # Two couplings. The last parameters are tried once. `initialize` evaluates the first batch in
    # Pyro; in NumPyro it returns a flow at once that learns nothing there.
    assert count() == 5 * 2 + 2 + (2 if wing.name == "pyro" else 0)


# Reproducibility


def test_seeds(wing):
    one = fit(wing, small(wing), GAUSSIAN, seed=1)
    np.random.seed(5)
    if wing.name == "pyro":
        import torch

        torch.manual_seed(123)
    same(wing, one, fit(wing, small(wing), GAUSSIAN, seed=1))
    assert not np.array_equal(one.losses, fit(wing, small(wing), GAUSSIAN, seed=2).losses)


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
    assert "skipped" not in err
    fit(wing, small(wing), [*batches(11), FAR], progress=True)
    assert "skipped=1" in capsys.readouterr().err


def test_progress_as_the_user_writes_it(wing, capsys):
    bits = functools.partial(wing.package.bits_per_dim, event_shape=2)
    result = fit(wing, small(wing), SMALL, progress=lambda loss: f"{bits(-loss):.4f} bits/dim")
    shown = capsys.readouterr().err
    assert f"loss={bits(-result.losses.mean()):.4f} bits/dim" in shown
    assert f"validation={bits(-result.validation_losses[-1]):.4f} bits/dim" in shown
