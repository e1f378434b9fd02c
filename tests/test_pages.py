"""The code that the site's pages show: it fits the column, and what it needs is said."""

import ast
import builtins
import re
import textwrap
from pathlib import Path

import pytest

PAGES = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r'^( *)```python exec="on" source="above"([^\n]*)\n(.*?)^\1```', re.S | re.M)
WIDEST = 84


def blocks(page):
    """The shown blocks of a page: their session, and their code without hidden lines."""
    for found in BLOCK.finditer(page.read_text("utf-8")):
        lines = textwrap.dedent(found[3]).splitlines()
        shown = [line for line in lines if "markdown-exec: hide" not in line]
        yield found[2], "\n".join(shown)


def names(code, context):
    """The names that code reads (`ast.Load`) or sets (`ast.Store`), also by import and `def`."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, context):
            found.add(node.id)
        elif context is ast.Store and isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif context is ast.Store and isinstance(node, ast.FunctionDef):
            found |= {node.name, *(a.arg for a in node.args.args)}
    return found


@pytest.mark.parametrize(
    "page", sorted(PAGES.rglob("*.md")), ids=lambda page: str(page.relative_to(PAGES))
)
def test_code_fits_the_column(page):
    lines = [line for _, code in blocks(page) for line in code.splitlines()]
    assert [line for line in lines if len(line) > WIDEST] == []


@pytest.mark.parametrize("host", ["pyro", "numpyro"])
def test_cards_need_no_more_than_the_gallery_says(host):
    """The imports, and for the cards with digits the first of those."""
    shown = [code for options, code in blocks(PAGES / "gallery.md") if f'-{host}"' in options]
    imports, *cards = shown
    images = next(card for card in cards if "load_digits()" in card)
    assert len(cards) == 9
    for card in cards:
        known = names(imports, ast.Store) | names(card, ast.Store) | set(dir(builtins))
        if "digits" in card:
            known |= names(images, ast.Store)
        assert names(card, ast.Load) <= known
