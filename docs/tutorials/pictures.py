"""The figures of the tutorial on images: NumPy arrays in, matplotlib figures out."""

import matplotlib.pyplot as plt
import numpy as np


def numbered(grids, titles):
    """Draw small images with their pixels' numbers in them."""
    fig, axes = plt.subplots(1, len(grids), figsize=(1.7 * len(grids), 2.1), layout="constrained")
    for panel, grid, title in zip(np.atleast_1d(axes), grids, titles, strict=True):
        height, width = grid.shape
        panel.imshow(np.isnan(grid), cmap="Greys", vmin=0, vmax=4)
        for h in range(height):
            for w in range(width):
                if np.isfinite(grid[h, w]):
                    panel.text(w, h, f"{grid[h, w]:.0f}", ha="center", va="center", fontsize=13)
        panel.set(xticks=np.arange(width + 1) - 0.5, yticks=np.arange(height + 1) - 0.5)
        panel.tick_params(labelbottom=False, labelleft=False, length=0)
        panel.grid(color="#bdbdbd")
        panel.spines[:].set_visible(True)
        panel.set_title(title, fontsize=13)
    return fig


def sheet(rows, labels):
    """Draw rows of grey images (n, 1, H, W), each with a label."""
    columns = max(len(images) for images in rows)
    size = (0.85 * columns + 1.8, 0.85 * len(rows))
    fig, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for line, images, label in zip(axes, rows, labels, strict=True):
        for panel in line:
            panel.axis("off")
        for panel, image in zip(line, np.asarray(images)[:, 0], strict=False):
            panel.imshow(np.clip(image, 0, 1), cmap="gray_r", vmin=0, vmax=1)
        line[0].axis("on")
        line[0].set(xticks=[], yticks=[])
        line[0].spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=12)
    return fig


def spread(groups, label):
    """Draw the numbers of each group as points on a line of their own, and their mean as a bar."""
    fig, axes = plt.subplots(figsize=(8, 0.42 * len(groups) + 0.8), layout="constrained")
    for row, numbers in enumerate(groups.values()):
        axes.plot(numbers, [row] * len(numbers), "o", ms=6, alpha=0.6, color="#d84315")
        axes.plot([np.mean(numbers)] * 2, [row - 0.28, row + 0.28], lw=2.5, color="#1f5a94")
    axes.set_yticks(range(len(groups)), list(groups), fontsize=12)
    axes.invert_yaxis()
    axes.set_xlabel(label, fontsize=12)
    axes.grid(axis="x", color="#e0e0e0")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return fig
