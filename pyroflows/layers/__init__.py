"""Layers: parametric bijections and their composition."""

from pyroflows.layers.chain import Chain, Stack
from pyroflows.layers.constrained import BijectTo
from pyroflows.layers.coupling import AdditiveCoupling, AffineCoupling
from pyroflows.layers.elementwise import ActNorm, BatchNorm, DiagonalScaling, Standardization
from pyroflows.layers.linear import (
    InvertibleConv1x1,
    InvertibleLinear,
    LowerTriangular,
    Permutation,
)
from pyroflows.layers.multiscale import Flatten, MultiScale, Squeeze
from pyroflows.layers.pixels import Logit, dequantize
from pyroflows.layers.preconditioner import Preconditioner
from pyroflows.layers.tails import LogTails, SinhArcsinh

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
