"""The two wings are mirrors: the same files, names, signatures and attributes."""

import ast
import inspect
from pathlib import Path

import pytest

from tests.wings import WINGS

PACKAGES = [wing.package for wing in WINGS]
NAMES = sorted(set.intersection(*(set(package.__all__) for package in PACKAGES)))
FOLDERS = [Path(package.__file__).parent for package in PACKAGES]
# Mechanics of one host: Pyro's parameter store, and JAX's trees of arrays.
MECHANICS = [{"guides/store.py"}, {"tree.py", "compiling.py"}]
# Names of one wing: PyTorch's modules know themselves which parameters are trained.
ONE_WING = {"trainable"}
IN_FOLDER = [{str(p.relative_to(folder)) for p in folder.rglob("*.py")} for folder in FOLDERS]
FILES = sorted(set.union(*IN_FOLDER) - set.union(*MECHANICS))

# What only one host or one framework asks for.
HOSTS = {
    # torch.nn.Module and Pyro's transforms
    "forward", "training", "bijective", "sign", "with_cache", "clear_cache",
    # Equinox modules and NumPyro's transforms
    "inv", "call_with_intermediates", "tree_flatten", "tree_unflatten", "buffers",
    "pytree_data_fields", "pytree_aux_fields", "inputs", "eq",
    # PyTorch's way to a sample with its density; NumPyro's is by intermediates
    "rsample_and_log_prob",
    # what torch.nn.Module has of its own
    "state_dict", "load_state_dict", "astype",
    # a property of NumPyro's Stack, whose blocks are one, and an attribute of Pyro's
    "layers",
}  # fmt: skip


def public(names):
    return {name for name in names if not name.startswith("_")} - HOSTS


# JAX's explicit randomness and parameters, and what they take the place of; torch.compile;
# NumPyro's own arguments.
ONE_SIDED = {"key", "params", "seed", "generator", "compile", "intermediates", "prefix", "name"}


# Methods of guides, whose arguments are those of the host's guides.
OF_GUIDES = {"get_posterior", "get_transform", "median", "quantiles"}
# A method that only one host's guides have.
OF_ONE_HOST = {"sample_posterior"}


def parameters(function):
    """Name, kind and default of each parameter that both wings have."""
    return [
        (p.name, p.kind, p.default)
        for p in inspect.signature(function).parameters.values()
        if p.name not in ONE_SIDED | {"self"}
    ]


def of_the_package(cls):
    """The classes of the same package that a class inherits from."""
    package = cls.__module__.split(".")[0]
    return [base for base in cls.__mro__ if base.__module__.split(".")[0] == package]


def test_the_same_public_names():
    assert len(PACKAGES) == 2
    for package in PACKAGES:
        assert sorted(package.__all__) == list(package.__all__)
        assert set(package.__all__) - ONE_WING == set(NAMES)
        for name in NAMES:
            assert getattr(package, name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_the_same_signatures(name):
    ours, theirs = (getattr(package, name) for package in PACKAGES)
    assert inspect.isclass(ours) == inspect.isclass(theirs)
    if name != "FlowDistribution":  # made by flow_distribution; its own signature is the host's
        assert parameters(ours) == parameters(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_methods(name):
    ours, theirs = (getattr(package, name) for package in PACKAGES)
    if not inspect.isclass(ours):
        return
    members = [
        {n: value for base in reversed(of_the_package(cls)) for n, value in vars(base).items()}
        for cls in (ours, theirs)
    ]
    kinds = [
        {
            n: "method" if inspect.isfunction(value) else "attribute"
            for n, value in found.items()
            if n in public(found) - OF_ONE_HOST and (callable(value) or isinstance(value, property))
        }
        for found in members
    ]
    assert kinds[0] == kinds[1]
    for method, kind in kinds[0].items():
        if kind == "method" and method not in OF_GUIDES:
            assert parameters(members[0][method]) == parameters(members[1][method]), method


INSTANCES = {
    "ActNorm": (3,),
    "AdditiveCoupling": (3,),
    "AffineCoupling": (3,),
    "BatchNorm": (3,),
    "BijectTo": (3, ((0.0, None),)),
    "Checkerboard": ((1, 2, 2),),
    "ConvNet": (2, 2),
    "DenseNet": (3, 2),
    "DiagonalScaling": (3,),
    "Flatten": ((1, 2, 2),),
    "InvertibleConv1x1": ((2, 2, 2),),
    "InvertibleLinear": (3,),
    "LogTails": (3,),
    "Logit": (3,),
    "LowerTriangular": (3,),
    "Partition": ([True, False],),
    "Permutation": ([1, 0],),
    "Preconditioner": (3,),
    "ResNet": (2, 2),
    "SinhArcsinh": (3,),
    "Squeeze": ((1, 2, 2),),
    "Standardization": (3,),
    "TransformModule": (3,),
}


def attributes(instance):
    found = set(vars(instance))
    for held in ("_parameters", "_buffers", "_modules"):
        found |= set(vars(instance).get(held, ()))
    return public(found)


@pytest.mark.parametrize("name", INSTANCES)
def test_the_same_attributes(name):
    ours, theirs = (attributes(wing.new(name, *INSTANCES[name])) for wing in WINGS)
    assert ours == theirs


@pytest.mark.parametrize("wing", range(2))
def test_files_of_one_wing_hold_nothing_public(wing):
    assert MECHANICS[wing] <= IN_FOLDER[wing]
    for file in MECHANICS[wing]:
        body = ast.parse((FOLDERS[wing] / file).read_text()).body
        defined = {getattr(node, "name", None) for node in body}
        assert not defined & set(NAMES)


@pytest.mark.parametrize("file", FILES)
def test_the_same_files_in_the_same_order(file):
    """Each public name of one file stands in the other's of the same name, in the same order."""
    orders = []
    for folder in FOLDERS:
        body = ast.parse((folder / file).read_text()).body
        definitions = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        orders.append([node.name for node in definitions if not node.name.startswith("_")])
    shared = [name for name in orders[0] if name in orders[1]]
    assert [name for name in orders[1] if name in shared] == shared
    everything = {name for package in PACKAGES for name in package.__all__}
    for own, other in (orders, orders[::-1]):
        assert not (set(own) - set(other)) & everything
