"""Normalizing flows for NumPyro: NICE, RealNVP and Glow as transforms with parameters."""

try:
    import equinox as _equinox  # noqa: F401
    import jax as _jax  # noqa: F401
    import jaxtyping as _jaxtyping  # noqa: F401
    import numpyro as _numpyro  # noqa: F401
    import optax as _optax  # noqa: F401
except ImportError as error:
    raise ImportError(
        "numpyro_flows needs JAX, NumPyro, Equinox, Optax and jaxtyping, which the extra "
        "pyroflows[numpyro] installs; for Pyro, install pyroflows[pyro] and import pyroflows"
    ) from error

from numpyro_flows.applications import (
    corrupt,
    inpaint,
    inpaint_draws,
    interpolate,
    outlier_scores,
    plot_density,
    resample,
)
from numpyro_flows.diagnostics import check_invertible
from numpyro_flows.distribution import FlowDistribution, flow_distribution
from numpyro_flows.flows import glow, nice, realnvp
from numpyro_flows.guides import (
    AutoFlow,
    AutoGlow,
    AutoNICE,
    AutoRealNVP,
    GuideFitResult,
    MixtureFitResult,
    NeuTraResult,
    fit_guide,
    fit_mixture,
    fit_prior,
    log_evidence,
    sample_neutra,
    to_arviz,
)
from numpyro_flows.layers import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    BatchNorm,
    BijectTo,
    Chain,
    DiagonalScaling,
    Flatten,
    InvertibleConv1x1,
    InvertibleLinear,
    Logit,
    LogTails,
    LowerTriangular,
    MultiScale,
    Permutation,
    Preconditioner,
    SinhArcsinh,
    Squeeze,
    Stack,
    Standardization,
    dequantize,
)
from numpyro_flows.networks import ConvNet, DenseNet, ResNet
from numpyro_flows.prior import FlowPrior
from numpyro_flows.storage import load, save
from numpyro_flows.training import FitResult, fit
from numpyro_flows.transform import Conditioned, TransformModule
from numpyro_flows.tree import trainable
from pyroflows_common.bits import bits_per_dim
from pyroflows_common.evidence import Evidence
from pyroflows_common.outliers import threshold
from pyroflows_common.partition import (
    Checkerboard,
    Partition,
    alternating,
    channels,
    checkerboard,
    halves,
)
from pyroflows_common.pictures import plot_images, plot_pairs
from pyroflows_common.version import __version__ as __version__

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "AutoFlow",
    "AutoGlow",
    "AutoNICE",
    "AutoRealNVP",
    "BatchNorm",
    "BijectTo",
    "Chain",
    "Checkerboard",
    "Conditioned",
    "ConvNet",
    "DenseNet",
    "DiagonalScaling",
    "Evidence",
    "FitResult",
    "Flatten",
    "FlowDistribution",
    "FlowPrior",
    "GuideFitResult",
    "InvertibleConv1x1",
    "InvertibleLinear",
    "LogTails",
    "Logit",
    "LowerTriangular",
    "MixtureFitResult",
    "MultiScale",
    "NeuTraResult",
    "Partition",
    "Permutation",
    "Preconditioner",
    "ResNet",
    "SinhArcsinh",
    "Squeeze",
    "Stack",
    "Standardization",
    "TransformModule",
    "alternating",
    "bits_per_dim",
    "channels",
    "check_invertible",
    "checkerboard",
    "corrupt",
    "dequantize",
    "fit",
    "fit_guide",
    "fit_mixture",
    "fit_prior",
    "flow_distribution",
    "glow",
    "halves",
    "inpaint",
    "inpaint_draws",
    "interpolate",
    "load",
    "log_evidence",
    "nice",
    "outlier_scores",
    "plot_density",
    "plot_images",
    "plot_pairs",
    "realnvp",
    "resample",
    "sample_neutra",
    "save",
    "threshold",
    "to_arviz",
    "trainable",
]
