"""What a trained flow is good for: inpainting, outliers, latents, and pictures."""

from numpyro_flows.applications.corruption import corrupt
from numpyro_flows.applications.inpainting import inpaint, inpaint_draws
from numpyro_flows.applications.latents import interpolate, resample
from numpyro_flows.applications.outliers import outlier_scores
from numpyro_flows.applications.pictures import plot_density

__all__ = [
    "corrupt",
    "inpaint",
    "inpaint_draws",
    "interpolate",
    "outlier_scores",
    "plot_density",
    "resample",
]
