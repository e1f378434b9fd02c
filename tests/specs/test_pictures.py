"""Pictures of images, pairs and densities: what is drawn is what was given."""

import matplotlib.figure
import numpy as np
import pytest
from numpy.testing import assert_allclose

from pyroflows_common.pictures import plot_images, plot_pairs


def shown(figure):
    """The pictures on a figure, as arrays, row by row."""
    return [np.asarray(i.get_array()) for axes in figure.axes for i in axes.images]


def test_a_sheet_shows_each_image(wing):
    x = np.random.default_rng(0).random((5, 1, 4, 6)).astype(np.float32)
    figure = plot_images(wing.array(x))
    assert len(figure.axes) == 6  # two rows of three
    for image, drawn in zip(x, shown(figure), strict=True):
        assert_allclose(drawn[..., 0], 1 - image[0], atol=1e-6)  # ink on paper
    colour = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4)).astype(np.uint8)
    for image, drawn in zip(colour, shown(plot_images([colour])), strict=True):
        assert_allclose(255 * drawn, np.moveaxis(image, 0, -1), atol=1e-4)


def test_rows_of_a_sheet_have_labels_and_what_is_missing_a_colour():
    x = np.full((2, 1, 2, 2), 0.5)
    x[0, 0, 0, 0] = np.nan
    figure = plot_images([x, x[:1]], ["some", "few"], columns=3)
    assert [axes.get_ylabel() for axes in figure.axes][::3] == ["some", "few"]
    first, second, third = shown(figure)
    assert len(set(first[0, 0])) == 3
    assert len(set(first[1, 1])) == 1
    assert isinstance(figure, matplotlib.figure.Figure)


def test_pairs_show_each_cloud_in_each_panel(wing):
    rng = np.random.default_rng(0)
    draws, data = rng.standard_normal((40, 3)), rng.standard_normal((30, 3))
    figure = plot_pairs(wing.array(draws), wing.array(data), names=["a", "b", "c"])
    axes = np.array(figure.axes).reshape(3, 3)
    assert [panel.get_xlabel() for panel in axes[2]] == ["a", "b", "c"]
    of_data, of_draws = axes[2, 1].lines
    assert_allclose(of_draws.get_xydata(), draws[:, [1, 2]])
    assert_allclose(of_data.get_xydata(), data[:, [1, 2]])
    assert not axes[0, 2].get_visible()


def test_a_density_is_drawn_where_it_is(wing):
    density = wing.density(wing.new("Standardization", 2))
    rng = np.random.default_rng(0)
    data = rng.standard_normal((500, 2)).astype(np.float32)
    (axes,) = wing.package.plot_density(density, wing.array(data), size=41).axes
    image, (low, high) = np.asarray(axes.images[0].get_array()), axes.get_xlim()
    grid = np.linspace(low, high, 41)
    height = np.linspace(*axes.get_ylim(), 41)[20]
    expected = np.exp(-0.5 * (grid**2 + height**2)) / (2 * np.pi)
    assert_allclose(image[20], expected, atol=1e-4)
    assert wing.package.plot_density(density, size=5).axes[0].images


def test_a_density_with_bounds_is_zero_beyond_them(wing):
    density = wing.density(wing.new("Logit", 2, alpha=1e-6))
    data = np.random.default_rng(0).random((500, 2)).astype(np.float32)
    (axes,) = wing.package.plot_density(density, wing.array(data), size=41).axes
    image, (low, high) = np.asarray(axes.images[0].get_array()), axes.get_xlim()
    assert low < 0 < 1 < high
    grid = np.linspace(low, high, 41)
    inside = (grid > 0) & (grid < 1)
    assert (image[inside][:, inside] > 0).all()
    assert (image[~inside] == 0).all()
    assert (image[:, ~inside] == 0).all()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_images(np.ones((3, 4, 4))), r"`images` has shape \(3, 4, 4\)"),
        (lambda: plot_images(np.ones((3, 2, 4, 4))), "one channel or three"),
        (lambda: plot_images([np.ones((1, 1, 2, 2))], ["a", "b"]), "`labels` has 2 entries for 1"),
        (lambda: plot_images([np.ones((5, 1, 2, 2))], columns=2), "`columns` is 2, but a row has"),
        (lambda: plot_pairs(np.ones(3)), r"`draws` has shape \(3,\)"),
        (lambda: plot_pairs(np.ones((3, 2)), np.ones((3, 3))), r"different sizes: \[2, 3\]"),
        (lambda: plot_pairs(np.ones((3, 2)), names=["a"]), r"different sizes: \[1, 2\]"),
    ],
)  # fmt: skip
def test_errors(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_errors_of_densities(wing):
    density = wing.density(wing.new("Standardization", 3))
    with pytest.raises(ValueError, match=r"event shape \(3,\), expected \(\) and \(2,\)"):
        wing.package.plot_density(density)
    density = wing.density(wing.new("Standardization", 2))
    with pytest.raises(ValueError, match=r"`data` has shape \(9, 3\), expected \(n, 2\)"):
        wing.package.plot_density(density, np.ones((9, 3)))
