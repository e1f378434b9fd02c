"""The version is the same wherever it is written."""

import re
import tomllib
from pathlib import Path

import numpyro_flows
import pyroflows

ROOT = Path(__file__).resolve().parent.parent


def found(pattern, file):
    """The first match of a pattern in a file."""
    return re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)[1]


def test_one_version():
    assert pyroflows.__version__ == numpyro_flows.__version__
    assert found(r"^version: (.*)$", "CITATION.cff") == pyroflows.__version__
    assert found(r"^## \[(\d.*)\]", "CHANGELOG.md") == pyroflows.__version__


def test_the_licence_is_the_same_in_the_citation():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert found(r"^license: (.*)$", "CITATION.cff") == project["license"]
    assert project["name"] in found(r"^title: (.*)$", "CITATION.cff")


def test_type_checkers_may_look_into_each_package():
    for package in ("pyroflows", "numpyro_flows", "pyroflows_common"):
        assert (ROOT / package / "py.typed").is_file()
