"""What users install, on each Python, with the lowest and the newest versions: `make matrix`.

A corner whose interpreter is not installed is skipped. `TORCH=2.13.0 make matrix` takes this
PyTorch in every corner, where others have no build for the CPU.
"""

import os
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PACKAGES = {"pyro": "pyroflows", "numpyro": "numpyro_flows"}
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
LAWS = ["density", "old_files"]
TORCH = os.environ.get("TORCH")
# What type checkers of users see: a package without `py.typed` would be `Any` to them.
TYPED = """
from typing import Any, assert_type
from {package} import FitResult, fit, halves
from pyroflows_common.partition import Partition

def trained(flow: Any, data: Any) -> None:
    assert_type(fit(flow, data, steps=1), FitResult)
    assert_type(halves(2), Partition)
"""

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False


def built(pattern):
    """The one file of this form that `make package` has built."""
    (path,) = (ROOT / "dist").glob(pattern)
    return str(path)


def pinned(session, wing, versions):
    """Write down what pip must install: the lowest versions, and the chosen PyTorch."""
    folder = Path(session.create_tmp())
    pins, torch = folder / "pins.txt", folder / "torch.txt"
    torch.write_text(f"torch=={TORCH}\n" if TORCH else "")
    if versions == "newest":
        return f"--constraint={torch}"
    extras = [f"--extra={extra}" for extra in (wing, "arviz", "plot", "applications")]
    session.run(
        *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header"),
        *("--resolution=lowest-direct", "--only-binary=:all:", f"--python={session.python}"),
        *("--no-annotate", f"--constraint={torch}", f"--output-file={pins}"),
        *(*extras, str(ROOT / "pyproject.toml")),
        external=True,
    )
    return f"--constraint={pins}"


@nox.session(python=PYTHONS)
@nox.parametrize("versions", ["lowest", "newest"])
@nox.parametrize("wing", list(PACKAGES))
def wing(session, wing, versions):
    """Install the wheel for one host: imports, a fit, a guide, types, and laws."""
    pins = pinned(session, wing, versions)
    extras = f"[{wing},arviz,plot,applications]"
    session.install("--only-binary=:all:", pins, built("*.whl") + extras)
    package, other = PACKAGES[wing], *set(PACKAGES.values()) - {PACKAGES[wing]}
    session.run("python", "-I", ROOT / ".ci" / "bare.py", package, other)
    session.run("python", "-I", ROOT / ".ci" / "smoke.py", package)
    session.install(pins, "pytest", "hypothesis", "scipy")
    laws(session)
    if versions == "newest":
        session.install("mypy")
        with session.chdir(session.create_tmp()):
            Path("typed.py").write_text(TYPED.format(package=package))
            session.run("mypy", "--config-file=", "--strict", "typed.py")


def laws(session):
    """Run some laws from the sdist on the installed wheel."""
    folder = Path(session.create_tmp()) / "sdist"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.unpack_archive(built("*.tar.gz"), folder)
    (source,) = folder.iterdir()
    for package in (*PACKAGES.values(), "pyroflows_common"):
        shutil.rmtree(source / package)
    with session.chdir(source):
        session.run(
            *("python", "-m", "pytest", "--quiet", "--noconftest", "-p", "one_wing"),
            *(f"tests/specs/test_{law}.py" for law in LAWS),
            env={
                "PYTHONPATH": ".ci",
                "OMP_NUM_THREADS": "1",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            },
        )


@nox.session(python=PYTHONS)
@nox.parametrize("file", ["*.whl", "*.tar.gz"], ids=["wheel", "sdist"])
def plain(session, file):
    """Install without an extra: each wing names the one it needs."""
    session.install(built(file))
    session.run("python", "-I", ROOT / ".ci" / "bare.py", "none", *PACKAGES.values())
