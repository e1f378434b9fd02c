"""A picture of the packages, drawn from what their files import."""

import ast
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[1]
FLOOR = "pyroflows_common"


def modules(package):
    """The dotted names and paths of a package's modules, without the faces."""
    folder = ROOT / package
    for path in sorted(folder.rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(folder).with_suffix("").parts), path


def imported(path, package):
    """The modules of a package, or of the floor, that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for whole in (node.module, *(f"{node.module}.{a.name}" for a in node.names)):
                top, _, inner = whole.partition(".")
                if top in (package, FLOOR) and inner:
                    names.add((top, inner))
    return names


def rooms(package):
    """The rooms of a wing: folders with their modules, and single modules at the top."""
    found = {}
    for name, _ in modules(package):
        folder, _, inner = name.partition(".")
        found.setdefault(folder, []).append(inner)
    return {room: [inner for inner in inners if inner] for room, inners in found.items()}


def links(package):
    """Which room imports which, without what follows from other links."""
    known = rooms(package)
    direct = {room: set() for room in known}
    for name, path in modules(package):
        room = name.split(".")[0]
        for top, inner in imported(path, package):
            other = inner.split(".")[0]
            if top == package and other in known and other != room:
                direct[room].add(other)

    def reached(room):
        return set().union(*({other} | reached(other) for other in direct[room]))

    return {
        room: {o for o in others if not any(o in reached(p) for p in others - {o})}
        for room, others in direct.items()
    }


def heights(below):
    """How many rooms lie below each room, one on the other."""

    def height(room):
        return 1 + max(map(height, below[room]), default=-1)

    return {room: height(room) for room in below}


def draw(package):
    """Draw the rooms of a wing, each above what it imports, and the floor below them."""
    below, known = links(package), rooms(package)
    rows, high = {}, heights(below)
    for room, height in sorted(high.items()):
        rows.setdefault(height, []).append(room)
    fig, axes = plt.subplots(figsize=(7.6, 1.05 * (len(rows) + 1)), layout="constrained")
    places = {}
    for height, row in sorted(rows.items()):
        # Each room stands above the middle of what it imports.
        middle = {
            room: sum(places[other][0] for other in below[room]) / max(len(below[room]), 1)
            for room in row
        }
        used = {
            room: max([h for r, h in high.items() if room in below[r]], default=0) for room in row
        }
        for i, room in enumerate(sorted(row, key=lambda room: (middle[room], -used[room], room))):
            places[room] = (10 * (i + 0.5) / len(row), height + 1)
    # Arrows lie over the boxes that they pass, so that each can be followed.
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": "#78909c", "lw": 1.2, "zorder": 4}
    half = {room: size(room, wrapped("  ".join(known[room])))[1] / 2 for room in places}
    for room, others in below.items():
        for other in others:
            (x, y), (to_x, to_y) = places[room], places[other]
            bend = "arc3" if y - to_y == 1 else "arc3,rad=0.25"  # round the rooms between
            arrow = FancyArrowPatch(
                (x, y - half[room]), (to_x, to_y + half[other]), connectionstyle=bend, **style
            )
            axes.add_patch(arrow)
    for room, (x, y) in places.items():
        box(axes, x, y, room, wrapped("  ".join(known[room])))
    names = "  ".join(name for name, _ in modules(FLOOR))
    box(axes, 5, 0.0, FLOOR, wrapped(names, 112))
    axes.set(xlim=(-0.1, 10.1), ylim=(-0.6, len(rows) + 0.5))
    axes.axis("off")
    return fig


def wrapped(names, width=42):
    """Break a list of names into lines."""
    lines = [""]
    for name in names.split():
        if len(lines[-1]) + len(name) > width:
            lines.append("")
        lines[-1] += f"{name}   "
    return "\n".join(line.strip() for line in lines)


def size(title, inner):
    """Return how wide and high a box is."""
    lines = inner.split("\n") if inner else []
    longest = max(len(title) * 1.7, *map(len, lines), 0)
    return 0.072 * longest + 0.35, 0.36 + 0.13 * len(lines)


def box(axes, x, y, title, inner):
    """Draw a room with its name and what is in it."""
    (width, height), lines = size(title, inner), inner.split("\n") if inner else []
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.08", "fc": "#fff3ec", "ec": "#b3410e"}
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, **style, zorder=2))
    text = {"ha": "center", "va": "center", "zorder": 5}
    axes.text(x, y + 0.065 * len(lines), title, fontsize=10, weight="bold", **text)
    axes.text(x, y - 0.11, inner, fontsize=7, **text)
