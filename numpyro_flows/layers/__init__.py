"""Layers: parametric bijections and their composition."""

from numpyro_flows.layers.chain import Chain, Stack
from numpyro_flows.layers.constrained import BijectTo
from numpyro_flows.layers.coupling import AdditiveCoupling, AffineCoupling
from numpyro_flows.layers.elementwise import ActNorm, BatchNorm, DiagonalScaling, Standardization
from numpyro_flows.layers.linear import (
    InvertibleConv1x1,
    InvertibleLinear,
    LowerTriangular,
    Permutation,
)
from numpyro_flows.layers.multiscale import Flatten, MultiScale, Squeeze
from numpyro_flows.layers.pixels import Logit, dequantize
from numpyro_flows.layers.preconditioner import Preconditioner
from numpyro_flows.layers.tails import LogTails, SinhArcsinh

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "BatchNorm",
    "BijectTo",
    "Chain",
    "DiagonalScaling",
    "Flatten",
    "InvertibleConv1x1",
    "InvertibleLinear",
    "LogTails",
    "Logit",
    "LowerTriangular",
    "MultiScale",
    "Permutation",
    "Preconditioner",
    "SinhArcsinh",
    "Squeeze",
    "Stack",
    "Standardization",
    "dequantize",
]
