"""Normalizing flows for Pyro: NICE, RealNVP and Glow as transforms with parameters."""

try:
    import pyro as _pyro  # noqa: F401
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("pyroflows needs PyTorch and Pyro: pip install 'pyroflows[pyro]'") from error

from pyroflows.chain import Chain, Stack
from pyroflows.coupling import AdditiveCoupling, AffineCoupling
from pyroflows.distribution import FlowDistribution, flow_distribution
from pyroflows.flows import glow, nice, realnvp
from pyroflows.linear import InvertibleLinear, Permutation
from pyroflows.networks import DenseNet
from pyroflows.normalization import ActNorm, BatchNorm, DiagonalScaling, Standardization
from pyroflows.partition import Partition, alternating, halves
from pyroflows.storage import load, save
from pyroflows.training import FitResult, fit
from pyroflows.transform import TransformModule

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "BatchNorm",
    "Chain",
    "DenseNet",
    "DiagonalScaling",
    "FitResult",
    "FlowDistribution",
    "InvertibleLinear",
    "Partition",
    "Permutation",
    "Stack",
    "Standardization",
    "TransformModule",
    "alternating",
    "fit",
    "flow_distribution",
    "glow",
    "halves",
    "load",
    "nice",
    "realnvp",
    "save",
]
