"""Laws of weighted rows: a row of weight two is two rows."""

from itertools import combinations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.wings.training import SMALL, UNHELPFUL, fit, plain_descent, same, small, unchanged

RNG = np.random.default_rng(0)
WEIGHTS = RNG.integers(0, 4, len(SMALL))
CONTEXT = RNG.normal(size=(len(SMALL), 1)).astype("float32")
WHOLE = {"batch_size": 1000, "steps": 5, "learning_rate": 1e-2}


@pytest.mark.parametrize("standardize", [False, True])
def test_a_weight_counts_rows(wing, standardize):
    """The optimiser is plain, since Adam magnifies gradients that are zero up to rounding."""
    x, context = SMALL / SMALL.std(0), CONTEXT
    options = {**WHOLE, "standardize": standardize, "optimizer": plain_descent(wing, 1e-3)}
    repeated = np.repeat(x, WEIGHTS, axis=0), np.repeat(context, WEIGHTS, axis=0)
    flow = {"context_dim": 1}
    expected = fit(wing, small(wing, **flow), repeated, validation=repeated, **options)
    for unit in (1.0, 1e-3):
        held_out = x, context, 7.0 * WEIGHTS
        found = fit(
            wing,
            small(wing, **flow),
            x,
            context=context,
            weights=unit * WEIGHTS,
            validation=held_out,
            **options,
        )
        assert_allclose(found.losses, expected.losses, rtol=1e-6)
        assert_allclose(found.validation_losses, expected.validation_losses, rtol=1e-6)
        for name, value in wing.state(found.flow).items():
            assert_allclose(value, wing.state(expected.flow)[name], rtol=1e-4, atol=1e-6)


@UNHELPFUL
def test_held_out_rows_keep_their_weights(wing):
    """The rows are far apart, so that the loss of each tells which were held out."""
    x = np.arange(0.5, 10, dtype="float32")[:, None] * np.ones(2, dtype="float32")
    weights = np.arange(10.0)
    frozen = {"validation": 0.3, "batch_size": 7, "learning_rate": 1e-12, "steps": 1}
    result = fit(wing, small(wing), x, weights=weights, **frozen)
    losses = -wing.log_prob(wing.density(small(wing)), x)
    total = result.losses[0], result.validation_losses[0]
    kept = np.isin(np.arange(10), held_out_of(losses, weights, total[1]), invert=True)
    assert kept.sum() == 7
    assert_allclose(np.average(losses[kept], weights=weights[kept]), total[0], rtol=1e-5)


def held_out_of(losses, weights, found):
    """The three rows whose weighted mean loss was found."""
    rows = [list(three) for three in combinations(range(10), 3)]
    means = [np.average(losses[three], weights=weights[three]) for three in rows]
    return rows[np.abs(np.array(means) - found).argmin()]


def test_the_weighted_maximum_is_the_closed_form(wing):
    """Weighted mean and deviation of each coordinate."""
    rng = np.random.default_rng(2)
    x, weights = rng.normal(size=(200, 2)).astype("float32"), rng.exponential(size=200)
    weights *= x[:, 0] > 0
    flow = wing.cast(wing.new("ActNorm", 2), "float32")
    options = {"weights": weights, "validation": None, "schedule": "cosine", "learning_rate": 0.03}
    result = fit(wing, flow, x, batch_size=200, steps=300, **options)
    state = wing.state(result.flow)
    mean = np.average(x, axis=0, weights=weights)
    variance = np.average((x - mean) ** 2, axis=0, weights=weights)
    assert_allclose(state["loc"], mean, atol=2e-3)
    assert_allclose(state["log_scale"], 0.5 * np.log(variance), atol=2e-3)


def test_a_weighted_run_resumes(wing, tmp_path):
    def run(path, cut=None, weights=WEIGHTS):
        def schedule(step):
            if step == cut:
                raise KeyboardInterrupt
            return 1.0

        options = {"validate_every": 2, "schedule": schedule, "weights": weights}
        return fit(wing, small(wing), SMALL, checkpoint=path, **options)

    path = tmp_path / "run"
    assert run(path, cut=5).stopped == "interrupted"
    with pytest.raises(ValueError, match="data"):
        run(path, weights=WEIGHTS + 1)
    same(wing, run(path), run(None))


def test_weights_that_do_not_fit(wing):
    flow = small(wing)
    before = wing.state(flow)
    bad = [np.where(np.arange(96) == 7, value, 1.0) for value in (-1.0, np.nan, np.inf)]
    for weights in bad:
        with pytest.raises(
            ValueError, match="`weights` of `data` has 1 of 96 rows .* the first is row 7"
        ):
            fit(wing, flow, SMALL, weights=weights)
    for weights, message in [
        (np.ones(95), r"`weights` of `data` have shape \(95,\), expected \(96,\)"),
        (np.ones((96, 1)), r"`weights` of `data` have shape \(96, 1\)"),
        (np.zeros(96), "`weights` are 0 for all rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(wing, flow, SMALL, weights=weights)
    with pytest.raises(ValueError, match="`weights` go with an array, but `data` is a list"):
        fit(wing, flow, [SMALL], weights=np.ones(96))
    with pytest.raises(ValueError, match=r"is \(x, context, weights\): pass neither of them again"):
        fit(wing, flow, (SMALL, None, np.ones(96)), weights=np.ones(96))
    with pytest.raises(TypeError, match="`weights` of `data` have dtype .*, expected numbers"):
        fit(wing, flow, SMALL, weights=np.ones(96, complex))
    unchanged(wing, flow, before)
