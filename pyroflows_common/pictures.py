"""Pictures of samples and densities, on Matplotlib."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyroflows_common.checks import as_count, as_numpy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA, DRAWS, DENSITY = "#1f5a94", "#d84315", "Oranges"
POINTS = 5000  # of a cloud, beyond which more only cost time


def plot_images(
    images: Any, labels: Sequence[str] | None = None, *, columns: int | None = None
) -> "Figure":
    """Draw a sheet of images.

    Args:
        images: images `(n, C, H, W)`, of one channel or three, on the unit interval or of whole
            numbers up to 255; or a sequence of such arrays, one for each row of the sheet. Numbers
            beyond the unit interval are cut off, and NaN are drawn in colour.
        labels: labels of the rows.
        columns: number of columns. Default: a square sheet, or the longest row.

    Returns:
        A Matplotlib figure.

    Raises:
        ValueError: if an array has no shape of images, or if there are not as many labels as rows.
        ImportError: if Matplotlib is not installed.

    Examples:
        >>> import numpy as np
        >>> from pyroflows_common.pictures import plot_images
        >>> figure = plot_images(np.zeros((6, 1, 8, 8)), columns=3)
        >>> len(figure.axes)
        6
    """
    rows = [_images(row) for row in images] if isinstance(images, list | tuple) else None
    if rows is None:
        whole = _images(images)
        width = as_count(columns or int(np.ceil(len(whole) ** 0.5)), "columns")
        rows = [whole[start : start + width] for start in range(0, len(whole), width)]
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"`labels` has {len(labels)} entries for {len(rows)} rows of images")
    width = columns or max(map(len, rows))
    if width < max(map(len, rows)):
        raise ValueError(f"`columns` is {columns}, but a row has {max(map(len, rows))} images")
    height, breadth = rows[0].shape[1:3]
    size = (0.8 * width + (1.6 if labels else 0.0), 0.8 * len(rows) * height / breadth)
    figure, axes = _subplots(len(rows), width, size)
    for line, row, label in zip(axes, rows, labels or [""] * len(rows), strict=True):
        for panel in line:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        for panel, image in zip(line, row, strict=False):
            panel.imshow(image, vmin=0, vmax=1)
        if label:
            line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11)
    return figure


def plot_pairs(draws: Any, data: Any = None, *, names: Sequence[str] | None = None) -> "Figure":
    """Draw every pair of coordinates of draws, beside data where there are some.

    The diagonal shows the distribution of each coordinate, the panels below it the pairs.

    Args:
        draws: draws `(n, D)`, in orange.
        data: data `(m, D)`, in blue.
        names: names of the coordinates.

    Returns:
        A Matplotlib figure.

    Raises:
        ValueError: if the shapes do not fit.
        ImportError: if Matplotlib is not installed.

    Examples:
        >>> import numpy as np
        >>> from pyroflows_common.pictures import plot_pairs
        >>> figure = plot_pairs(np.eye(3), names=["a", "b", "c"])
        >>> len(figure.axes)
        9
    """
    clouds = {DRAWS: _cloud(draws, "draws")}
    if data is not None:
        clouds = {DATA: _cloud(data, "data"), **clouds}
    sizes = {cloud.shape[1] for cloud in clouds.values()}
    names = [f"x{i}" for i in range(max(sizes))] if names is None else list(names)
    if len(sizes | {len(names)}) > 1:
        raise ValueError(
            f"`draws`, `data` and `names` are of different sizes: {sorted(sizes | {len(names)})}"
        )
    size = len(names)
    figure, axes = _subplots(size, size, (1.5 * size + 0.6, 1.5 * size + 0.3))
    together = np.concatenate(list(clouds.values()))
    low, high = np.quantile(together, [0.002, 0.998], axis=0)
    low, high = low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9
    for i, line in enumerate(axes):
        for j, panel in enumerate(line):
            panel.set_visible(j <= i)
            panel.set(xlim=(low[j], high[j]))
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8, labelbottom=i == size - 1, labelleft=j == 0 < i)
            for colour, cloud in clouds.items():
                if i == j:
                    bins = np.linspace(low[j], high[j], 31)
                    style = {"histtype": "step", "density": True, "color": colour}
                    panel.hist(cloud[:, j], bins, **style)
                elif j < i:
                    panel.plot(cloud[:, j], cloud[:, i], ".", ms=2, alpha=0.3, color=colour)
            if i == j:
                panel.set(yticks=[])
            else:
                panel.set(ylim=(low[i], high[i]))
            if i == size - 1:
                panel.set_xlabel(names[j])
            if j == 0 < i:
                panel.set_ylabel(names[i])
    return figure


def draw_density(
    log_prob: Callable[[np.ndarray], np.ndarray], about: np.ndarray, data: Any, size: int
) -> "Figure":
    """Shade a density in the plane where the points `about` lie, and draw data on it."""
    cloud = None if data is None else _cloud(data, "data")
    if cloud is not None and cloud.shape[1] != 2:
        raise ValueError(f"`data` has shape {as_numpy(data).shape}, expected (n, 2)")
    about = about if cloud is None else cloud
    low, high = np.quantile(about, [0.005, 0.995], axis=0)
    half = 0.65 * (high - low).max()
    low, high = (low + high) / 2 - half, (low + high) / 2 + half
    sides = [np.linspace(a, b, size) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2)
    image = np.exp(log_prob(points)).reshape(size, size)
    figure, axes = _subplots(1, 1, (4.0, 4.0))
    panel = axes[0, 0]
    panel.imshow(image, extent=(low[0], high[0], low[1], high[1]), origin="lower", cmap=DENSITY)
    if cloud is not None:
        panel.plot(*cloud.T, ".", ms=2, alpha=0.4, color=DATA)
    panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    return figure


def _images(images: Any) -> np.ndarray:
    """Return images as `(n, H, W, 3)` on the unit interval, ink on paper where they are grey."""
    x = as_numpy(images)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not x.size:
        raise ValueError(
            f"`images` has shape {x.shape}, expected (n, C, H, W) with one channel or three"
        )
    x = np.moveaxis(x / 255 if x.dtype.kind in "iu" else x, 1, -1)
    missing = np.isnan(x).any(-1, keepdims=True)
    x = np.nan_to_num(x).clip(0, 1)
    x = np.repeat(1 - x, 3, -1) if x.shape[-1] == 1 else x
    return np.where(missing, np.array([0.78, 0.85, 0.93]), x)


def _cloud(points: Any, name: str) -> np.ndarray:
    """Return points `(n, D)`, of many only some."""
    x = as_numpy(points)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"`{name}` has shape {x.shape}, expected (n, D)")
    return x[:: max(len(x) // POINTS, 1)]


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure with a grid of axes that no global state knows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need Matplotlib, which the extra pyroflows[plot] installs"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
