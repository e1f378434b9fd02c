"""Normalizing flows for NumPyro: NICE, RealNVP and Glow as transforms with parameters."""

try:
    import equinox as _equinox  # noqa: F401
    import jax as _jax  # noqa: F401
    import numpyro as _numpyro  # noqa: F401
    import optax as _optax  # noqa: F401
except ImportError as error:
    raise ImportError(
        "numpyro_flows needs JAX, NumPyro, Equinox and Optax: pip install 'pyroflows[numpyro]'"
    ) from error

from numpyro_flows.affine import LowerTriangular, Preconditioner
from numpyro_flows.autoflow import AutoFlow
from numpyro_flows.chain import Chain, Stack
from numpyro_flows.coupling import AdditiveCoupling, AffineCoupling
from numpyro_flows.diagnostics import check_invertible, to_arviz
from numpyro_flows.distribution import FlowDistribution, flow_distribution
from numpyro_flows.evidence import GuideFitResult, fit_guide
from numpyro_flows.flows import glow, nice, realnvp
from numpyro_flows.guides import AutoGlow, AutoNICE, AutoRealNVP
from numpyro_flows.image import Flatten, MultiScale, Squeeze
from numpyro_flows.linear import InvertibleConv1x1, InvertibleLinear, Permutation
from numpyro_flows.networks import ConvNet, DenseNet, ResNet
from numpyro_flows.normalization import ActNorm, BatchNorm, DiagonalScaling, Standardization
from numpyro_flows.partition import (
    Checkerboard,
    Partition,
    alternating,
    channels,
    checkerboard,
    halves,
)
from numpyro_flows.pixels import Logit, bits_per_dim, dequantize
from numpyro_flows.storage import load, save
from numpyro_flows.tails import LogTails, SinhArcsinh
from numpyro_flows.training import FitResult, fit
from numpyro_flows.transform import TransformModule

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "AutoFlow",
    "AutoGlow",
    "AutoNICE",
    "AutoRealNVP",
    "BatchNorm",
    "Chain",
    "Checkerboard",
    "ConvNet",
    "DenseNet",
    "DiagonalScaling",
    "FitResult",
    "Flatten",
    "FlowDistribution",
    "GuideFitResult",
    "InvertibleConv1x1",
    "InvertibleLinear",
    "LogTails",
    "Logit",
    "LowerTriangular",
    "MultiScale",
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
    "dequantize",
    "fit",
    "fit_guide",
    "flow_distribution",
    "glow",
    "halves",
    "load",
    "nice",
    "realnvp",
    "save",
    "to_arviz",
]
