"""The map of the code: which module may import which, and what a package's face may do."""

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOSTS = {"torch", "pyro", "jax", "numpyro", "equinox", "optax"}
# A module imports only those before it; a package, as it runs all its modules, only where it ends.
COMMON = [
    "checks", "support", "budgets", "blocks", "invertibility", "partition", "bits", "levels",
    "recipe", "archive", "checkpoint", "rows", "batches", "schedule", "history", "progress", "loop",
    "sites", "draws", "guides", "search", "laplace", "local", "ascent", "mixture", "verdict",
    "evidence", "chains",
    "arviz", "neutra", "priors", "version",
    "inpainting", "outliers", "corruption", "latents", "pictures",
]  # fmt: skip
WING = [
    "compiling", "tree", "rng", "inputs", "support", "convolutions", "networks", "transform",
    "layers.scales", "layers.coupling", "layers.linear", "layers.elementwise", "layers.chain",
    "layers.multiscale", "layers.pixels", "layers.tails", "layers.preconditioner",
    "layers.constrained",
    "flows.images", "flows.builders", "flows.monotone",
    "distribution", "prior", "diagnostics",
    "storage.checkpoint", "storage.flow",
    "training.sources", "training.preparation", "training.step", "training.run", "training.fit",
    "guides.model", "guides.reference", "guides.path_gradient",
    "guides.search", "guides.starts", "guides.rows", "guides.local", "guides.groups",
    "guides.importance", "guides.store", "guides.autoflow", "guides.couplings", "guides.mixture",
    "guides.draws", "guides.fit", "guides.modes", "guides.row_weights", "guides.arviz",
    "guides.density", "guides.evidence", "guides.neutra", "guides.prior",
    "applications.inputs", "applications.inpainting", "applications.outliers",
    "applications.corruption", "applications.latents", "applications.pictures",
]  # fmt: skip
PACKAGES = {"pyroflows_common": COMMON, "pyroflows": WING, "numpyro_flows": WING}


def modules(package):
    """Each module of a package by its dotted name, without the faces."""
    folder = ROOT / package
    for path in sorted(folder.rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(folder).with_suffix("").parts), path


def imported(path):
    """All modules that a file imports anywhere, by their full names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if source_of(inner) is not None else node.module


def source_of(name):
    """The file of a module, None where there is none in this project."""
    parts = name.split(".")
    for path in (ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py")):
        if parts[0] in PACKAGES and path.exists():
            return path
    return None


CASES = [(package, *module) for package in PACKAGES for module in modules(package)]


@pytest.mark.parametrize(("package", "name", "path"), CASES, ids=lambda c: str(c)[-40:])
def test_imports_run_one_way(package, name, path):
    order = PACKAGES[package]
    assert name in order, f"{package}.{name} has no place in the order of imports"
    own = order.index(name)
    for target in imported(path):
        top, _, inner = target.partition(".")
        if top in HOSTS:
            assert package != "pyroflows_common", f"the common floor imports {target}"
        if top not in PACKAGES:
            continue
        assert top in (package, "pyroflows_common"), f"{package}.{name} imports {target}"
        if top != package or inner == "":
            assert top != package, f"{package}.{name} imports its own face"
            continue
        assert inner in order, f"{package}.{name} imports the face of {target}"
        assert order.index(inner) < own, f"{package}.{name} imports {target}, which comes later"
        if "." in inner and inner.split(".")[0] != name.split(".")[0]:  # runs the whole package
            rest = [m for m in order if m.split(".")[0] == inner.split(".")[0]]
            assert max(map(order.index, rest)) < own, f"{package}.{name} closes a circle: {target}"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_order_names_no_module_that_is_gone(package):
    jax_only = {"tree", "compiling"}
    one_sided = {"pyroflows": jax_only, "numpyro_flows": {"guides.store"}}.get(package, set())
    assert set(PACKAGES[package]) - {name for name, _ in modules(package)} == one_sided


FACES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("__init__.py"))]


@pytest.mark.parametrize("path", FACES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_face_hands_names_on_and_defines_nothing(path):
    body = ast.parse(path.read_text()).body
    statements = [n for n in body if not isinstance(n, ast.Import | ast.ImportFrom | ast.Expr)]
    plain = [n for n in statements if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"]
    missing_host = [n for n in statements if isinstance(n, ast.Try)]
    assert len(plain) + len(missing_host) == len(statements)
    assert not missing_host or path.parent.parent == ROOT


def test_the_order_has_packages_in_one_piece():
    for order in PACKAGES.values():
        folders = [name.split(".")[0] for name in order]
        assert len(list(itertools.groupby(folders))) == len(set(folders))
