"""Pieces of the packages' sources as Markdown, taken by name, with a tab for each host."""

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
WINGS = {"Pyro": "pyroflows", "NumPyro": "numpyro_flows"}


def show(file, *names, **alone):
    """Return functions, methods or classes of a file of both wings: `Class.method`, `function`.

    `pyroflows` and `numpyro_flows` name further ones, which one wing has alone.
    """
    tabs = []
    for host, package in WINGS.items():
        path = ROOT / package / file
        pieces = "\n\n".join(piece(path, name) for name in (*names, *alone.get(package, ())))
        block = f'```python title="{package}/{file}"\n{pieces}\n```'
        tabs.append(f'=== "{host}"\n\n{textwrap.indent(block, "    ")}\n')
    return "\n".join(tabs)


def piece(path, name):
    """Return the source of one definition, without its docstring."""
    text = path.read_text()
    node = ast.parse(text)
    for part in name.split("."):
        found = [inner for inner in node.body if getattr(inner, "name", None) == part]
        if not found:
            raise ValueError(f"{path} defines no {name}")
        node = found[-1]
    lines = text.splitlines()
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    chosen = range(first, node.end_lineno)
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        without = range(docstring.lineno - 1, docstring.end_lineno)
        chosen = [i for i in chosen if i not in without]
    return textwrap.dedent("\n".join(lines[i] for i in chosen))
