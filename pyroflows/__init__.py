"""Normalizing flows for Pyro: NICE, RealNVP and Glow as transforms with parameters."""

try:
    import jaxtyping as _jaxtyping  # noqa: F401
    import pyro as _pyro  # noqa: F401
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "pyroflows needs PyTorch, Pyro and jaxtyping, which the extra pyroflows[pyro] installs; "
        "for NumPyro, install pyroflows[numpyro] and import numpyro_flows"
    ) from error

from pyroflows.applications import (
    corrupt,
    inpaint,
    inpaint_draws,
    interpolate,
    outlier_scores,
    plot_density,
    resample,
)
from pyroflows.diagnostics import check_invertible
from pyroflows.distribution import FlowDistribution, flow_distribution
from pyroflows.flows import glow, nice, realnvp
from pyroflows.guides import (
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
from pyroflows.layers import (
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
from pyroflows.networks import ConvNet, DenseNet, ResNet
from pyroflows.prior import FlowPrior
from pyroflows.storage import load, save
from pyroflows.training import FitResult, fit
from pyroflows.transform import Conditioned, TransformModule
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
]
