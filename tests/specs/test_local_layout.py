"""Laws on local sites: their rows, where these start, and what is refused."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from pyroflows_common import laplace
from pyroflows_common.laplace import SKEWEST, Gaussian, Responses
from pyroflows_common.local import (
    NO_GLOBAL,
    SKEWED,
    Layout,
    Site,
    Starts,
    check_encoder,
    check_features,
    control,
    layout_of,
    masks,
    no_heights,
    unpacked,
)
from tests.specs.test_laplace import Broken, Normal

MU = Site("mu", (3,), 1, {})
SUBSAMPLED = {"people": (100, 8), "items": (5, 5)}
PRIOR = Gaussian(np.zeros(4), np.eye(4), 0.0)
ALL = {"pool": False, "follow": True}


def drawn(size=30, width=2, numbers=3, seed=0):
    """Return responses of rows, of any numbers."""
    rng = np.random.default_rng(seed)
    factor = np.tril(rng.normal(size=(size, width, width)), -1)
    factor += np.exp(rng.normal(size=(size, 1, width))) * np.eye(width)
    return Responses(
        3 + rng.normal(size=(size, width)),
        factor,
        rng.uniform(-SKEWEST, SKEWEST, (size, width)),
        rng.normal(size=(size, width, numbers)),
        rng.normal(size=(size, width, numbers)),
        5 + rng.normal(size=(size, 1 + numbers)),
    )


def test_a_model_without_subsamples_has_no_local_sites():
    sites = [MU, Site("z", (5,), 0, {"items": -1})]
    assert layout_of(sites, SUBSAMPLED, None) is None
    assert layout_of([], {}, None) is None


def test_the_row_of_each_site():
    sites = [
        MU,
        Site("a", (8,), 0, {"people": -1}),
        Site("b", (8, 2, 3), 2, {"people": -1}),
        Site("c", (5, 8, 4), 1, {"items": -2, "people": -1}),
        Site("other", (5, 1), 0, {"items": -2}),
    ]
    layout = layout_of(sites, SUBSAMPLED, None)
    shapes = {"a": (), "b": (2, 3), "c": (5, 4)}
    assert layout == Layout("people", -1, 100, 8, shapes, {"a": -1, "b": -3, "c": -2})
    assert layout.columns == {"a": slice(0, 1), "b": slice(1, 7), "c": slice(7, 27)}
    assert layout.width == 27


@pytest.mark.parametrize("dims", [(-1, -2), (-2, -1), (-3, -1)])
@given(st.lists(st.integers(1, 4), max_size=2), st.booleans())
def test_nested_plates_of_either_order(dims, event, named):
    """A row of the site is what one index of its plate leaves."""
    outer, inner = dims
    batch = [1] * max(-outer, -inner)
    batch[outer], batch[inner] = 8, 5
    site = Site("z", (*batch, *event), len(event), {"people": outer, "items": inner})
    plates = {"people": (8, 8), "items": (5, 5)} if named else SUBSAMPLED
    layout = layout_of([MU, site], plates, "people" if named else None)
    assert (layout.plate, layout.dim) == ("people", outer)
    assert (layout.size, layout.taken) == plates["people"]
    z = np.zeros(site.shape)
    assert z.shape[layout.axes["z"]] == 8
    assert layout.shapes["z"] == np.take(z, 0, axis=layout.axes["z"]).shape
    assert layout.width == z.size // 8


@given(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4))
def test_columns_share_out_the_row(events):
    sites = [
        Site(f"z{k}", (8, *event), len(event), {"people": -1}) for k, event in enumerate(events)
    ]
    layout = layout_of([MU, *sites], SUBSAMPLED, None)
    row = np.arange(layout.width)
    assert list(layout.columns) == [site.name for site in sites]
    assert_array_equal(np.concatenate([row[part] for part in layout.columns.values()]), row)
    for site in sites:
        assert row[layout.columns[site.name]].size == np.prod(site.shape[1:])


def test_sites_may_come_as_an_iterator():
    sites = [MU, Site("z", (8,), 0, {"people": -1})]
    assert layout_of(iter(sites), SUBSAMPLED, None) == layout_of(sites, SUBSAMPLED, None)


def test_a_plate_of_all_rows_can_be_local():
    sites = [MU, Site("z", (5, 2), 1, {"items": -1})]
    layout = layout_of(sites, SUBSAMPLED, "items")
    assert layout == Layout("items", -1, 5, 5, {"z": (2,)}, {"z": -2})


def test_an_unknown_plate_is_refused():
    sites = [MU, Site("z", (8,), 0, {"people": -1}), Site("w", (5,), 0, {"items": -1})]
    message = "`local` is 'folk', expected .* plate with latent sites: \\['items', 'people'\\]"
    with pytest.raises(ValueError, match=message):
        layout_of(sites, SUBSAMPLED, "folk")
    with pytest.raises(ValueError, match="expected .*: \\[\\]"):
        layout_of([MU], SUBSAMPLED, "people")


def test_two_plates_are_refused():
    plates = {"people": (100, 8), "items": (50, 5), "all": (3, 3)}
    sites = [MU, Site("z", (8,), 0, {"people": -1}), Site("w", (5,), 0, {"items": -1})]
    message = re.escape("the plates ['items', 'people'] have local sites")
    with pytest.raises(ValueError, match=message):
        layout_of(sites, plates, None)
    with pytest.raises(ValueError, match=message):
        layout_of([MU, Site("z", (5, 8), 0, {"items": -2, "people": -1})], plates, None)
    with pytest.raises(ValueError, match=message):
        layout_of(sites, {**plates, "items": (5, 5)}, "items")


def test_a_model_without_global_sites_is_refused():
    sites = [Site("z", (8,), 0, {"people": -1}), Site("w", (8, 2), 1, {"people": -1})]
    with pytest.raises(ValueError, match=re.escape(NO_GLOBAL)):
        layout_of(sites, SUBSAMPLED, None)


def test_an_encoder_needs_features():
    network = np.asarray  # any function
    check_encoder(None, None, None)
    check_encoder("people", network, np.zeros((8, 2)))
    with pytest.raises(TypeError, match="`local` is a int, expected the name"):
        check_encoder(3, None, None)
    with pytest.raises(TypeError, match="`encoder` is a str, expected a network"):
        check_encoder(None, "dense", np.zeros(8))
    with pytest.raises(ValueError, match="`encoder` is given without `features`"):
        check_encoder(None, network, None)
    with pytest.raises(ValueError, match="`features` is given without `encoder`"):
        check_encoder(None, None, np.zeros(8))


def test_features_are_of_the_rows_taken_or_of_all():
    assert check_features((100, 3), 8, 100)
    assert not check_features((8, 3), 8, 100)
    assert check_features((100,), 100, 100)
    for shape in [(), (9, 3), (3, 100)]:
        message = re.escape(f"`features` has shape {shape}") + ".* the 8 rows .* for all 100"
        with pytest.raises(ValueError, match=message):
            check_features(shape, 8, 100)


@given(st.integers(1, 9))
def test_masks_leave_each_part_of_a_row_once(width):
    whole, *halves = masks(width)
    assert whole == [False] * width
    assert len(halves) == (2 if width > 1 else 0)
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        assert [not kept for kept in first] == second
        assert len(first) == width
        assert 0 <= sum(first) - sum(second) <= 1


@given(st.integers(1, 4), st.integers(0, 1000))
def test_skewed_variables_have_the_moments_of_the_rows(width, seed):
    rows = drawn(width=width, seed=seed)
    starts = Starts.of_rows(rows)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights /= weights.sum()
    bend = SKEWED * (np.sqrt(1 + (nodes / SKEWED) ** 2) - 1)
    y = nodes + starts.skewness[..., None] * bend
    mean = y @ weights
    centred = y - mean[..., None]
    variance = centred**2 @ weights
    found = starts.loc + np.einsum("nij,nj->ni", starts.factor, mean)
    assert_allclose(found, rows.loc, atol=1e-5)
    covariance = np.einsum("nij,nj,nkj->nik", starts.factor, variance, starts.factor)
    expected = rows.factor @ rows.factor.swapaxes(1, 2)
    assert_allclose(covariance, expected, rtol=1e-5, atol=1e-5)
    skewness = centred**3 @ weights / variance**1.5
    assert_allclose(skewness, rows.skewness, atol=0.15)
    assert_array_equal(starts.factor, np.tril(starts.factor))


def test_the_moments_hold_for_draws():
    rows = drawn(size=1, width=2, seed=5)
    starts = Starts.of_rows(rows)
    v = stats.qmc.MultivariateNormalQMC(np.zeros(2), seed=0).random(2**15)
    y = v + SKEWED * starts.skewness * (np.sqrt(1 + (v / SKEWED) ** 2) - 1)
    z = starts.loc[0] + y @ starts.factor[0].T
    assert_allclose(z.mean(0), rows.loc[0], atol=5e-3)
    assert_allclose(np.cov(z.T), rows.factor[0] @ rows.factor[0].T, rtol=5e-3, atol=5e-3)


def test_normal_rows_start_at_their_gaussians():
    rows = drawn()._replace(skewness=np.zeros((30, 2)))
    starts = Starts.of_rows(rows)
    assert_allclose(starts.loc, rows.loc)
    assert_allclose(starts.factor, rows.factor)
    assert_allclose(starts.slope, rows.slope)
    assert_array_equal(starts.log_slope, rows.log_slope)


def test_rows_follow_the_global_numbers_as_their_means_do():
    """Slopes are in units of the factor, which is that of the skewed variables."""
    rows = drawn()
    starts = Starts.of_rows(rows)
    assert_allclose(starts.factor @ starts.slope, rows.factor @ rows.slope)
    assert_array_equal(starts.log_slope, rows.log_slope)


@given(st.integers(1, 30), st.integers(0, 3), st.integers(0, 1000))
def test_the_control_of_all_rows_sums_to_zero(size, numbers, seed):
    height = drawn(size, 1, numbers, seed).height
    found = control(height)
    assert found.shape == (size, 2 + numbers)
    assert_array_equal(found[:, -1], 1.0)
    assert_allclose(found[:, :-1].sum(0), 0.0, atol=1e-10)
    assert_allclose(found[:, :-1] - found[0, :-1], height - height[0], atol=1e-12)
    assert_allclose(control(height + 7.0), found, atol=1e-12)


@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
@given(st.sets(st.integers(0, 29)), st.integers(0, 3))
def test_the_control_leaves_out_rows_that_are_not_finite(value, broken, column):
    height, broken = drawn().height, sorted(broken)
    expected = control(np.delete(height, broken, 0))
    height[broken, column] = value
    found = control(height)
    assert_allclose(np.delete(found, broken, 0), expected, atol=1e-12)
    assert_allclose(found[:, :-1].sum(0), 0.0, atol=1e-10)
    assert_array_equal(found[broken, :-1], 0.0)
    assert_array_equal(found[:, -1], 1.0)


@pytest.mark.parametrize("size", [0, 4])
def test_of_rows_of_which_nothing_is_known_the_control_is_zero(monkeypatch, size):
    """It has the columns that rows have, also where they have too many slopes."""
    assert_array_equal(no_heights(6, 2, size), np.zeros((6, 1 + size)))
    monkeypatch.setattr(laplace, "SLOPES", 1)
    assert_array_equal(no_heights(6, 2, size), np.zeros((6, 1)))
    assert_array_equal(control(no_heights(6, 2, size)), np.tile([0.0, 1.0], (6, 1)))


def test_what_the_flow_sees_is_standardised():
    rows = drawn()
    seen = Starts.of_rows(rows).seen
    assert seen.shape == (30, 6)
    assert_allclose(seen.mean(0), 0.0, atol=1e-12)
    assert_allclose(seen.std(0), 1.0)
    logs = np.log(np.diagonal(rows.factor, axis1=1, axis2=2))
    for k, column in enumerate(np.concatenate([rows.loc, logs, rows.skewness], 1).T):
        assert_allclose(np.corrcoef(seen[:, k], column)[0, 1], 1.0)
    same = Starts.of_rows(rows._replace(loc=np.full((30, 2), 7.0)))
    assert_array_equal(same.seen[:, :2], 0.0)
    assert_allclose(same.seen[:, 2:], seen[:, 2:])


@pytest.mark.parametrize("factor", [1.0, 0.3, 7.0])
@given(st.integers(1, 4), st.integers(0, 3))
def test_what_is_packed_is_unpacked(factor, width, numbers):
    """Also after a decay of all numbers."""
    starts = Starts.of_rows(drawn(width=width, numbers=numbers))
    packed = starts.packed()
    assert packed.shape[0] == 30
    assert_array_equal(packed[:, -1], 1.0)
    found = unpacked(factor * packed, width, numbers)
    for one, other in zip(found, starts, strict=True):
        assert one.shape == other.shape
        assert_allclose(one, other, rtol=1e-12)
    some = unpacked(packed[[4, 2]], width, numbers)
    assert_array_equal(some.factor, starts.factor[[4, 2]])


def test_one_start_for_all_rows():
    loc, scale = np.array([1.0, -2.0]), np.array([0.5, 3.0])
    starts = Starts.of_all(loc, scale)
    assert_array_equal(starts.factor, np.diag(scale))
    found = unpacked(0.5 * starts.packed(), 2, 0)
    for one, other in zip(found, starts, strict=True):
        assert_array_equal(one, other)


@pytest.mark.parametrize("many", [False, True])
def test_the_same_start_for_each_row(monkeypatch, many):
    """It has the sizes that searched starts have."""
    if many:
        monkeypatch.setattr(laplace, "SLOPES", 1)
    loc, scale = np.array([1.0, -2.0]), np.array([0.5, 3.0])
    starts = Starts.same(loc, scale, 6, 4)
    searched, found = Starts.searched(Normal(size=6, width=2), PRIOR, np.zeros(2), (6, 3), **ALL)
    for one, other in zip(starts, searched, strict=True):
        assert one.shape == other.shape
    assert found.shape == control(no_heights(6, 2, 4)).shape
    assert_array_equal(starts.loc, np.tile(loc, (6, 1)))
    assert_array_equal(starts.factor, np.tile(np.diag(scale), (6, 1, 1)))
    for part in starts[2:]:
        assert_array_equal(part, 0.0)


def test_a_pooled_start_is_as_wide_as_rows_lie_apart():
    rows = drawn()
    starts = Starts.pooled(rows)
    rng = np.random.default_rng(0)
    z = rows.loc + np.einsum("nij,mnj->mni", rows.factor, rng.normal(size=(20_000, 30, 2)))
    assert starts.loc.shape == (2,)
    assert_allclose(starts.loc, z.mean((0, 1)), atol=0.02)
    assert_allclose(starts.factor, np.diag(z.std((0, 1))), rtol=0.01)


@pytest.mark.parametrize("taken", [4, 6])
def test_a_search_returns_the_starts_and_the_control_of_all_rows(taken):
    """They are those of normal rows, whose distributions are known."""
    model = Normal(size=6, width=2)
    starts, found = Starts.searched(model, PRIOR, np.zeros(2), (6, taken), **ALL)
    means, covariance, heights = model.exact(PRIOR.loc)
    assert_allclose(starts.loc, means, atol=1e-4)
    factor = np.linalg.cholesky(covariance)
    assert_allclose(starts.factor, np.tile(factor, (6, 1, 1)), atol=1e-4)
    assert found.shape == (6, 6)
    assert_allclose(found[:, 0], heights - heights.mean(), atol=1e-4)
    for k, way in enumerate(PRIOR.factor.T):
        up, down = (model.exact(PRIOR.loc + sign * way)[2] for sign in (1, -1))
        slope = (up - down) / 2
        assert_allclose(found[:, 1 + k], slope - slope.mean(), atol=1e-4)


@pytest.mark.parametrize("follow", [False, True])
def test_a_pooled_search_sees_all_rows_that_it_can_choose(follow):
    """Otherwise it sees one block, and has no control."""
    model = Normal(size=6, width=2)
    z, sizes = np.zeros(2), (6, 4)
    starts, found = Starts.searched(model, PRIOR, z, sizes, pool=True, follow=follow)
    means, covariance, _ = model.exact(PRIOR.loc)
    means = means if follow else means[:4]
    assert_allclose(starts.loc, means.mean(0), atol=1e-4)
    scale = np.sqrt(means.var(0) + np.diag(covariance))
    assert_allclose(starts.factor, np.diag(scale), rtol=1e-4)
    expected = Starts.searched(model, PRIOR, z, sizes, **ALL)[1]
    assert_array_equal(found, expected if follow else control(no_heights(6, 2, 4)))


@pytest.mark.parametrize("value", [-np.inf, np.nan])
@pytest.mark.parametrize("pool", [False, True])
def test_a_row_without_a_density_has_no_control(pool, value):
    model, z = Broken(Normal(size=6, width=2), [3], value), np.zeros(2)
    starts, found = Starts.searched(model, PRIOR, z, (6, 4), pool=pool, follow=True)
    for part in (*starts, found):
        assert np.isfinite(part).all()
    assert_array_equal(found[3], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert_allclose(found[:, :-1].sum(0), 0.0, atol=1e-10)
