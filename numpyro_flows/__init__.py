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

from numpyro_flows.chain import Chain, Stack
from numpyro_flows.coupling import AdditiveCoupling, AffineCoupling
from numpyro_flows.distribution import FlowDistribution, flow_distribution
from numpyro_flows.flows import glow, nice, realnvp
from numpyro_flows.linear import InvertibleLinear, Permutation
from numpyro_flows.networks import DenseNet
from numpyro_flows.normalization import ActNorm, BatchNorm, DiagonalScaling, Standardization
from numpyro_flows.partition import Partition, alternating, halves
from numpyro_flows.storage import load, save
from numpyro_flows.training import FitResult, fit
from numpyro_flows.transform import TransformModule

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
