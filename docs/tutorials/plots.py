"""The figures of the tutorials: arrays or tensors in, matplotlib figures out."""

import matplotlib.pyplot as plt
import numpy as np

DATA, SAMPLES, BASE, DENSITY = "#1f5a94", "#d84315", "#616161", "Oranges"

plt.rcParams.update(
    {
        "figure.facecolor": "white",
        "figure.constrained_layout.use": True,
        "font.size": 12,
        "axes.titlesize": 13,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)


def plane(low, high, size=120):
    """Return the points of a grid in the plane as `(size², 2)`, and the area of a cell."""
    sides = [np.linspace(a, b, size) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2)
    return points.astype(np.float32), float(np.prod([s[1] - s[0] for s in sides]))


def around(points, margin=0.15):
    """Return the corners of a square around the points, but for the outermost ones."""
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    half = (0.5 + margin) * (high - low).max()
    return (low + high) / 2 - half, (low + high) / 2 + half


def cloud(axes, points, colour):
    """Draw points."""
    axes.scatter(*points.T, s=3, alpha=0.5, linewidths=0, color=colour)


def shade(axes, low, high, log_density):
    """Shade the values of a density on the points of `plane`."""
    size = int(len(log_density) ** 0.5)
    image = np.exp(log_density).reshape(size, size)
    extent = (low[0], high[0], low[1], high[1])
    axes.imshow(image, extent=extent, origin="lower", cmap=DENSITY)


def frame(axes, low, high):
    """Show one part of the plane, with equal axes and no ticks."""
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#bdbdbd")


def gallery(columns):
    """Draw data, samples and density of several flows, a column for each.

    `columns` maps a name to (data, samples, log_prob); log_prob takes an array of points.
    """
    count = len(columns)
    side, size = (2.2, 17) if count > 3 else (1.8, 10)  # a page shows wide figures smaller
    fig, axes = plt.subplots(3, count, figsize=(side * count, 3.1 * side), squeeze=False)
    for column, (name, (data, samples, log_prob)) in zip(axes.T, columns.items(), strict=True):
        data, samples = np.asarray(data), np.asarray(samples)
        low, high = around(data)
        cloud(column[0], data, DATA)
        column[0].set_title(name, fontsize=size)
        cloud(column[1], samples, SAMPLES)
        shade(column[2], low, high, np.asarray(log_prob(plane(low, high)[0])))
        for panel in column:
            frame(panel, low, high)
    for panel, label in zip(axes[:, 0], ("data", "samples", "density"), strict=True):
        panel.set_ylabel(label, fontsize=size)
    return fig


def clouds(panels):
    """Draw several sets of points side by side; `panels` maps a title to (points, colour).

    Points in the colour of the base are shown from −4 to 4, all others where the first set lies.
    """
    count = len(panels)
    fig, axes = plt.subplots(1, count, figsize=(2.3 * count, 2.6), squeeze=False)
    data = around(np.asarray(next(iter(panels.values()))[0]))
    base = np.array([-4.0, -4.0]), np.array([4.0, 4.0])
    for panel, (title, (points, colour)) in zip(axes[0], panels.items(), strict=True):
        cloud(panel, np.asarray(points), colour)
        panel.set_title(title)
        frame(panel, *(base if colour == BASE else data))
    return fig


def curves(result):
    """Draw the losses of a `FitResult` against the step."""
    fig, axes = plt.subplots(figsize=(7, 3.2))
    steps, losses = result.validation_steps, result.validation_losses
    axes.plot(result.losses, color="#90a4ae", lw=0.8, label="training batch")
    axes.plot(steps, losses, color=SAMPLES, lw=2, label="validation")
    axes.set(xlabel="step", ylabel="nats per point")
    axes.legend()
    return fig


def modes(grid, log_density, found):
    """Draw the density of a frequency on a grid, and draws of several guides, a panel for each.

    `found` maps names to the data of ArviZ.
    """
    grid, log_density = np.asarray(grid), np.asarray(log_density)
    density = np.exp(log_density - log_density.max())
    density /= density.sum() * (grid[1] - grid[0])
    fig, axes = plt.subplots(len(found), 1, figsize=(8, 4.2), sharex=True, sharey=True)
    for panel, (name, data) in zip(axes, found.items(), strict=True):
        draws = np.asarray(data["posterior"]["frequency"]).ravel()
        panel.hist(draws, bins=np.linspace(0.05, 2.0, 196), density=True, color=SAMPLES, alpha=0.6)
        panel.plot(grid, density, lw=1, color=DATA)
        panel.set(title=name, yticks=[], xlim=(0.05, 2.0))
    axes[-1].set(xlabel="frequency")
    return fig


def groups(means, counts, intervals, data, exact):
    """Draw medians of groups against the means of their data, and the global sites.

    `intervals` has the lower ends, medians and upper ends; `data` is that of ArviZ; `exact` has
    the sides of a grid of the global sites, and the probability of each of its cells.
    """
    low, middle, high = intervals
    panels = [["groups", name] for name in ("mu", "tau", "sigma")]
    fig, axes = plt.subplot_mosaic(panels, figsize=(9, 4.8), width_ratios=[2, 1])
    panel = axes["groups"]
    panel.axline((1, 1), slope=1, lw=1, color=BASE)
    shades = {"c": counts, "cmap": "viridis_r", "vmin": -1}  # no yellow: it is too light
    points = panel.scatter(means, middle, s=14, linewidths=0, zorder=2, **shades)
    some = np.argsort(means)[10::20]
    ends = middle[some] - low[some], high[some] - middle[some]
    panel.errorbar(means[some], middle[some], ends, fmt="none", lw=0.8, color=BASE, zorder=1)
    panel.set(xlabel="mean of the houses", ylabel="theta")
    fig.colorbar(points, ax=panel, label="houses").ax.set_ylim(1, counts.max())
    sides, weight = exact
    weight = weight.reshape([len(side) for side in sides])
    for i, (name, side) in enumerate(zip(("mu", "tau", "sigma"), sides, strict=True)):
        share = weight.sum(tuple(j for j in range(3) if j != i)) / (side[1] - side[0])
        draws = np.ravel(data["posterior"][name])
        axes[name].hist(draws, bins=30, density=True, color=SAMPLES, alpha=0.6)
        axes[name].plot(side, share, lw=1, color=DATA)
        axes[name].set(xlabel=name, yticks=[], xlim=(draws.min(), draws.max()))
    return fig
