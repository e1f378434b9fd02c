"""Normalizing flows for Pyro: NICE, RealNVP and Glow as transforms with parameters."""

try:
    import pyro as _pyro  # noqa: F401
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("pyroflows needs PyTorch and Pyro: pip install 'pyroflows[pyro]'") from error

from pyroflows.affine import LowerTriangular, Preconditioner
from pyroflows.autoflow import AutoFlow
from pyroflows.chain import Chain, Stack
from pyroflows.coupling import AdditiveCoupling, AffineCoupling
from pyroflows.diagnostics import check_invertible, to_arviz
from pyroflows.distribution import FlowDistribution, flow_distribution
from pyroflows.evidence import GuideFitResult, fit_guide
from pyroflows.flows import glow, nice, realnvp
from pyroflows.guides import AutoGlow, AutoNICE, AutoRealNVP
from pyroflows.image import Flatten, MultiScale, Squeeze
from pyroflows.linear import InvertibleConv1x1, InvertibleLinear, Permutation
from pyroflows.networks import ConvNet, DenseNet, ResNet
from pyroflows.normalization import ActNorm, BatchNorm, DiagonalScaling, Standardization
from pyroflows.partition import Checkerboard, Partition, alternating, channels, checkerboard, halves
from pyroflows.pixels import Logit, bits_per_dim, dequantize
from pyroflows.storage import load, save
from pyroflows.tails import LogTails, SinhArcsinh
from pyroflows.training import FitResult, fit
from pyroflows.transform import TransformModule

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
