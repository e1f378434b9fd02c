"""Outputs of the pages' code, kept from one build to the next."""

import functools
import hashlib
import importlib.metadata
import sys
from collections import defaultdict
from pathlib import Path

from markdown_exec import base_format, formatters

# The function has no public name.
from markdown_exec._internal.formatters.python import _run_python

ROOT = Path(__file__).parents[1]
# Whatever the pages' code may import or read.
SOURCES = ("pyroflows*/**/*.py", "numpyro_flows/**/*.py", "docs/**/*.py", "docs/**/*.json")

MOST = 2000  # outputs on file


class Cache:
    """Runs blocks of code, unless the same have run in the same session before.

    An output is filed under all code of its session up to it, the sources of the project, and the
    versions of everything installed. A block that is not on file first runs those before it.
    """

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        start = hashlib.sha256(fingerprint()).hexdigest()
        self.chains = defaultdict(lambda: start)
        self.waiting = defaultdict(list)

    def run(self, code, returncode=None, session=None, id=None, **extra):
        """Return the output of a block, from file if it is there."""
        name = session or (id, code)
        self.chains[name] = hashlib.sha256((self.chains[name] + code).encode()).hexdigest()
        path = self.folder / self.chains[name]
        self.waiting[name].append(code)
        if path.exists():
            path.touch()
            return path.read_text()
        waiting, self.waiting[name] = self.waiting[name], []
        for block in waiting:
            output = _run_python(block, returncode, session, id, **extra)
        path.write_text(output)
        return output


def fingerprint():
    """Return what all outputs depend on."""
    parts = [
        sys.version,
        *sorted(f"{d.name}{d.version}" for d in importlib.metadata.distributions()),
    ]
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            parts += [str(path.relative_to(ROOT)), path.read_text()]
    return "\0".join(parts).encode()


def install(folder):
    """Let the pages' code run through a cache in a folder, of which old outputs are removed."""
    run = Cache(folder).run
    formatters["python"] = functools.partial(base_format, language="python", run=run)
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-MOST]:
        path.unlink()
