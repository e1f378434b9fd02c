"""The examples in the docstrings run, and print what they show."""

import doctest
import importlib
import pkgutil

import jax
import pytest

import numpyro_flows
import pyroflows
import pyroflows_common

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

MODULES = [
    module.name
    for package in (pyroflows_common, pyroflows, numpyro_flows)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.ispkg
]


@pytest.fixture(autouse=True)
def single_precision():
    """A user's JAX computes in float32; the laws' does not."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_show(name):
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    report = []
    for example in doctest.DocTestFinder().find(importlib.import_module(name)):
        runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("package", [pyroflows, numpyro_flows], ids=lambda p: p.__name__)
def test_examples_are_found(package):
    finder = doctest.DocTestFinder()
    builders = importlib.import_module(f"{package.__name__}.flows.builders")
    found = {test.name.rpartition(".")[2] for test in finder.find(builders) if test.examples}
    assert {"nice", "realnvp", "glow"} <= found
