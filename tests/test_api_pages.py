"""The pages show every public name, once, and name nothing that is gone."""

import re
from collections import Counter
from pathlib import Path

import pytest

import numpyro_flows
import pyroflows

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (pyroflows, numpyro_flows)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_each_public_name_has_its_place(package):
    text = (ROOT / "docs" / "api" / f"{package.__name__}.md").read_text(encoding="utf-8")
    shown = Counter(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE))
    assert shown == Counter(f"{package.__name__}.{name}" for name in package.__all__)


def test_both_pages_have_one_order():
    pages = [
        re.findall(rf"^(?:::: {package.__name__}\.|## )(\S+)$", text, flags=re.MULTILINE)
        for package in PACKAGES
        for text in [(ROOT / "docs" / "api" / f"{package.__name__}.md").read_text("utf-8")]
    ]
    assert pages[0] == [name for name in pages[1] if name != "trainable"]


def test_the_tests_that_a_page_names_are_there():
    text = (ROOT / "docs" / "trouble.md").read_text("utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) == text.count("::")
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / "specs" / file).read_text("utf-8"), name
