"""Without the packages of its extra, a wing says in one sentence which extra brings them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {
    "pyroflows": ("torch", "pyro", "jaxtyping"),
    "numpyro_flows": ("jax", "numpyro", "equinox", "optax", "jaxtyping"),
}
EXTRAS = ("pyroflows[pyro]", "pyroflows[numpyro]")

# Imports a wing in an environment without some modules, where others look as if they were there.
WITHOUT = """
import importlib, sys, types
wing, present, absent = (argument.split() for argument in sys.argv[1:])
sys.modules |= {name: types.ModuleType(name) for name in present}
sys.modules |= dict.fromkeys(absent)
try:
    importlib.import_module(*wing)
except ImportError as error:
    print(error)
"""

ALONE = [(wing, name) for wing, names in NEEDED.items() for name in names]


def message(wing, absent):
    present = [name for name in NEEDED[wing] if name not in absent]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, wing, " ".join(present), " ".join(absent)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.removesuffix("\n")


@pytest.mark.parametrize("wing", NEEDED)
def test_without_any_of_them(wing):
    said = message(wing, NEEDED[wing])
    assert said.startswith(f"{wing} needs ")
    assert "\n" not in said
    assert all(extra in said for extra in EXTRAS)


@pytest.mark.parametrize(("wing", "name"), ALONE, ids=lambda part: part)
def test_without_one_of_them(wing, name):
    assert message(wing, [name]) == message(wing, NEEDED[wing])
