"""Laws of the data that `fit` takes: rows, streams, loaders, files, of any kind of number."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.wings.training import (
    SMALL,
    UNHELPFUL,
    Dataset,
    batches,
    fit,
    loss,
    noisy,
    same,
    small,
    with_nan,
)


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


def test_a_dataset_is_its_rows(wing):
    same(wing, fit(wing, small(wing), Dataset()), fit(wing, small(wing), SMALL))


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
        fit(wing, small(wing), x, standardize=True, validation=None),
        fit(wing, small(wing), SMALL, standardize=True, validation=None),
    )
    same(wing, fit(wing, small(wing), [x], steps=2), fit(wing, small(wing), [SMALL], steps=2))
    with pytest.raises(ValueError, match="`data` has 2 of 96 rows.*row 4"):
        fit(wing, small(wing), with_nan(x))


def test_whole_numbers_of_any_byte_order(wing):
    x = np.arange(64).reshape(32, 2)
    plain = fit(wing, small(wing), x, augment=noisy(wing))
    same(wing, fit(wing, small(wing), x.astype(">i2"), augment=noisy(wing)), plain)


@UNHELPFUL
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


def test_columns_of_whole_numbers_are_warned_of(wing):
    """There, a density grows without bound; noise of a cell's width makes it a bound on masses."""
    x = np.concatenate([SMALL, np.round(SMALL)], axis=1)
    with pytest.warns(UserWarning, match=r"whole numbers only in columns \[2, 3\].*`augment`"):
        fit(wing, small(wing, size=4), x, steps=1, validation=None)
    fit(wing, small(wing, size=4), x, augment=noisy(wing), steps=1, validation=None)
    x[5, 2:] += 0.5
    fit(wing, small(wing, size=4), x, steps=1, validation=None)
    image = np.round(SMALL[:, :1, None, None] * np.ones((1, 2, 2), dtype="float32"))
    with pytest.warns(UserWarning, match="`data` holds whole numbers only: a density"):
        fit(wing, wing.cast(wing.new("ActNorm", (1, 2, 2)), "float32"), image, validation=None)
