"""Checks that one wing works in an environment without the other: `bare.py present absent`.

Where both are absent, `present` is `none`: `bare.py none pyroflows numpyro_flows`.
"""

import importlib
import importlib.util
import pkgutil
import sys

HOSTS = {"pyroflows": ("torch", "pyro"), "numpyro_flows": ("jax", "numpyro")}
EXTRAS = {"pyroflows": "pyroflows[pyro]", "numpyro_flows": "pyroflows[numpyro]"}


def works(wing):
    """Import every module and every name of a wing and of the common floor."""
    package = importlib.import_module(wing)
    modules = [
        module.name
        for part in (package, importlib.import_module("pyroflows_common"))
        for module in pkgutil.walk_packages(part.__path__, f"{part.__name__}.")
    ]
    for module in modules:
        importlib.import_module(module)
    for name in package.__all__:
        getattr(package, name)
    print(f"{wing} {package.__version__}: {len(modules)} modules, {len(package.__all__)} names")


def refuses(wing):
    """Check that a wing without its host says in one sentence which extra it needs."""
    for host in HOSTS[wing]:
        if importlib.util.find_spec(host) is not None:
            sys.exit(f"{host} is installed here, so this environment proves nothing")
    if importlib.util.find_spec(wing) is None:
        sys.exit(f"{wing} is missing from the wheel")
    try:
        importlib.import_module(wing)
    except ImportError as error:
        message = str(error)
    else:
        sys.exit(f"{wing} can be imported without {' and '.join(HOSTS[wing])}")
    if EXTRAS[wing] not in message or "\n" in message:
        sys.exit(f"{wing} does not say in one sentence to install {EXTRAS[wing]}: {message!r}")
    print(f"{wing}: {message}")


present, *absent = sys.argv[1:]
if present != "none":
    works(present)
for wing in absent:
    refuses(wing)
