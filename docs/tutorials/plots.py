"""The figures of the tutorials: NumPy arrays in, matplotlib figures out."""

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
    """Return the corners of a rectangle around the points."""
    low, high = points.min(0), points.max(0)
    return low - margin * (high - low), high + margin * (high - low)


def cloud(axes, points, colour, title=None):
    """Draw points."""
    axes.scatter(*points.T, s=3, alpha=0.5, linewidths=0, color=colour)
    if title:
        axes.set_title(title)


def shade(axes, low, high, log_density, title=None):
    """Shade the values of a density on the points of `plane`."""
    size = int(len(log_density) ** 0.5)
    image = np.exp(log_density).reshape(size, size)
    extent = (low[0], high[0], low[1], high[1])
    axes.imshow(image, extent=extent, origin="lower", cmap=DENSITY, aspect="auto")
    if title:
        axes.set_title(title)


def frame(axes, low, high):
    """Show one rectangle of the plane, without ticks."""
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#bdbdbd")


def gallery(rows):
    """Draw data, samples and density of several data sets, a column for each.

    `rows` maps a name to (data, samples, log_prob), where `log_prob` takes an array of points.
    """
    fig, axes = plt.subplots(3, len(rows), figsize=(2.2 * len(rows), 6.6), squeeze=False)
    for column, (name, (data, samples, log_prob)) in zip(axes.T, rows.items(), strict=True):
        low, high = around(data)
        cloud(column[0], data, DATA)
        column[0].set_title(name, fontsize=17)
        cloud(column[1], samples, SAMPLES)
        shade(column[2], low, high, log_prob(plane(low, high)[0]))
        for panel in column:
            frame(panel, low, high)
    for panel, label in zip(axes[:, 0], ("data", "samples", "density"), strict=True):
        panel.set_ylabel(label, fontsize=17)
    return fig


def clouds(panels, colours, window=None):
    """Draw several sets of points side by side; `panels` maps a title to points.

    `window` has the corners of what every panel shows; without it, each shows all of its points.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(2.9 * len(panels), 3.2), squeeze=False)
    for panel, colour, (title, points) in zip(axes[0], colours, panels.items(), strict=True):
        cloud(panel, points, colour, title)
        frame(panel, *(around(points) if window is None else window))
    return fig


def curves(result, label="validation"):
    """Draw the losses of a `FitResult` against the step."""
    fig, axes = plt.subplots(figsize=(7, 3.2))
    axes.plot(result.losses, color="#90a4ae", lw=0.8, label="training batch")
    axes.plot(result.validation_steps, result.validation_losses, color=SAMPLES, lw=2, label=label)
    axes.set(xlabel="step", ylabel="nats per point")
    axes.legend()
    return fig
