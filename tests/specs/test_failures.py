"""Laws of `fit` where something goes wrong: bad steps, Ctrl-C, errors and refusals."""

import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.wings.training import (
    FAR,
    SMALL,
    batches,
    fit,
    logit,
    loss,
    plain_descent,
    same,
    small,
    unchanged,
    with_nan,
    with_number,
)

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
    assert result.validation_steps.tolist() == [0, 5, 7]
    assert result.best_step == 7
    assert_allclose(loss(wing, result.flow, held_out), result.validation_losses[2], rtol=1e-5)
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


# Refusals


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


def test_a_bad_batch_on_the_way(wing):
    flow = small(wing)
    with pytest.raises(ValueError, match="batch 3 of `data` has 2 of 32 rows"):
        fit(wing, flow, [*batches(3), with_nan(batches(1)[0])], steps=10)
    assert all(np.isfinite(value).all() for value in wing.state(flow).values())
