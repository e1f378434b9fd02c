"""What a trained flow is good for: inpainting, outliers, latents, and pictures."""

from pyroflows.applications.corruption import corrupt
from pyroflows.applications.inpainting import inpaint, inpaint_draws
from pyroflows.applications.latents import interpolate, resample
from pyroflows.applications.outliers import outlier_scores
from pyroflows.applications.pictures import plot_density

__all__ = [
    "corrupt",
    "inpaint",
    "inpaint_draws",
    "interpolate",
    "outlier_scores",
    "plot_density",
    "resample",
]
