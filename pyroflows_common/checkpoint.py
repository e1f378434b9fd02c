"""The file from which an interrupted `fit` resumes, and its comparison with the call."""

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, BinaryIO

from pyroflows_common.archive import replace_file


class Checkpoint(ABC):
    """A file that each write replaces as a whole; each wing has its own format.

    Args:
        path: path of the file, which need not exist.
        settings: settings that determine the numbers of the run. A file written with other
            settings is refused.

    Raises:
        ValueError: if the path is not that of a file in a directory.
    """

    format: str  # name of the format, which the file must hold

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.path = Path(path)
        if self.path.is_dir() or not self.path.absolute().parent.is_dir():
            raise ValueError(f"`checkpoint` is {str(path)!r}, expected a file in a directory")
        self.settings = json.loads(json.dumps(settings, default=describe))

    @abstractmethod
    def _write(self, state: dict[str, Any], file: BinaryIO) -> None:
        """Write a state to an open file."""

    @abstractmethod
    def _read(self) -> dict[str, Any]:
        """Return the content of the file; no code from it is run."""

    def save(self, state: dict[str, Any]) -> None:
        """Write a state made of arrays, numbers, strings, and dicts and lists of them."""
        state = {"format": self.format, "settings": self.settings, **state}
        replace_file(self.path, lambda file: self._write(state, file))

    def load(self) -> dict[str, Any] | None:
        """Return the state, or None if there is no file yet.

        Raises:
            ValueError: if the file is not a checkpoint, or is the checkpoint of another run.
        """
        if not self.path.exists():
            return None
        try:
            state = self._read()
            known = isinstance(state, dict) and state.get("format") == self.format
        except Exception as error:  # a broken file can raise anything
            raise ValueError(
                f"`checkpoint` {str(self.path)!r} cannot be read: it is damaged, or `fit` has not "
                "written it"
            ) from error
        if not known:
            raise ValueError(f"`checkpoint` {str(self.path)!r} is not a checkpoint of `fit`")
        differences = compare(state["settings"], self.settings)
        if differences:
            raise ValueError(
                f"`checkpoint` {str(self.path)!r} is of another run: {'; '.join(differences)}. "
                "Pass another path, or remove the file to start anew"
            )
        return state


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return a line for each setting in which a checkpoint differs from this call."""
    differences = []
    for name in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(name), ours.get(name)
        if there != here:
            short = max(len(repr(there)), len(repr(here))) < 60
            differences.append(
                f"`{name}` was {there!r} there and is {here!r} here"
                if short
                else f"`{name}` differs"
            )
    return differences


def describe(value: object) -> str:
    """Return a description of a value that is the same in every process."""
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    return repr(value)
