"""Checks that one wing works in an environment without the other: `bare.py present absent`."""

import importlib
import importlib.util
import pkgutil
import sys

HOSTS = {"pyroflows": ("torch", "pyro"), "numpyro_flows": ("jax", "numpyro")}
EXTRAS = {"pyroflows": "pyroflows[pyro]", "numpyro_flows": "pyroflows[numpyro]"}

present, absent = sys.argv[1:]

for host in HOSTS[absent]:
    if importlib.util.find_spec(host) is not None:
        sys.exit(f"{host} is installed here, so this environment proves nothing")

wing = importlib.import_module(present)
modules = [
    module.name
    for package in (wing, importlib.import_module("pyroflows_common"))
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
for module in modules:
    importlib.import_module(module)
for name in wing.__all__:
    getattr(wing, name)

if importlib.util.find_spec(absent) is None:
    sys.exit(f"{absent} is missing from the wheel")
try:
    importlib.import_module(absent)
except ImportError as error:
    message = str(error)
else:
    sys.exit(f"{absent} can be imported without {' and '.join(HOSTS[absent])}")
if EXTRAS[absent] not in message or "\n" in message:
    sys.exit(f"{absent} does not say in one sentence to install {EXTRAS[absent]}: {message!r}")

print(f"{present}: {len(modules)} modules and {len(wing.__all__)} names, alone")
print(f"{absent}: {message}")
