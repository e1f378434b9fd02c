"""The file that lets `fit` go on after it was cut off."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from numpyro_flows.transform import TransformModule

FORMAT = "numpyro_flows fit 1"


class Checkpoint:
    """One file, replaced as a whole whenever it is written.

    Args:
        path: where it is or will be.
        settings: all that the run's numbers depend on. A file written under others is refused.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.path = Path(path)
        if self.path.is_dir() or not self.path.absolute().parent.is_dir():
            raise ValueError(f"`checkpoint` is {str(path)!r}, expected a file in a directory")
        self.settings = json.loads(json.dumps(settings, default=describe))

    def save(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Write the state: numbers, strings, and dicts and lists of them; and arrays by name."""
        about = json.dumps({"format": FORMAT, "settings": self.settings, **state})
        # A rename is atomic: whoever is killed here leaves the old file or the new one.
        unfinished = self.path.with_name(self.path.name + ".tmp")
        with open(unfinished, "wb") as file:
            np.savez(file, about=np.frombuffer(about.encode(), np.uint8), **arrays)
        os.replace(unfinished, self.path)

    def load(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return state and arrays, or None where there is no file yet. No code from it is run.

        Raises:
            ValueError: where the file is not a checkpoint, or is one of another run.
        """
        if not self.path.exists():
            return None
        try:
            with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as content:
                arrays = dict(content)
            state = json.loads(arrays.pop("about").tobytes())
            known = isinstance(state, dict) and state.get("format") == FORMAT
        except Exception as error:  # broken files fail in as many ways as there are
            raise ValueError(f"`checkpoint` {str(self.path)!r} cannot be read: {error}") from error
        if not known:
            raise ValueError(f"`checkpoint` {str(self.path)!r} is not a checkpoint of `fit`")
        differences = compare(state["settings"], self.settings)
        if differences:
            raise ValueError(
                f"`checkpoint` {str(self.path)!r} is of another run: {'; '.join(differences)}. "
                "Pass another path, or remove the file to start anew"
            )
        return state, arrays


# A checkpoint holds the arrays of a tree by their numbers; random keys as the words they are.


def numbered(name: str, tree: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a tree by names for the file."""
    return {
        f"{name}/{number}": np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for number, leaf in enumerate(jax.tree.leaves(tree))
    }


def collected(name: str, arrays: dict[str, Any], like: Any) -> Any:
    """Return the tree whose arrays have these names; `like` is one that is built alike."""
    leaves: list[Any] = jax.tree.leaves(like)
    found = [arrays[f"{name}/{number}"] for number in range(len(leaves))]
    restored = [
        # NumPy's files know no bfloat16: it comes back as bytes.
        jax.random.wrap_key_data(a) if _is_key(leaf) else jnp.asarray(a.view(leaf.dtype))
        for a, leaf in zip(found, leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Say where the settings in a checkpoint and those of this call differ."""
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


def describe(value: Any) -> Any:
    """Describe a value in a way that is the same in another process."""
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    return repr(value)


def describe_flow(flow: TransformModule) -> str:
    """Return a digest of how a flow is built, whatever its parameters are."""
    parts = [
        None if flow.recipe is None else list(flow.recipe),
        _types(flow),
        [(name, list(array.shape), str(array.dtype)) for name, array in flow.state_dict().items()],
    ]
    return hashlib.sha256(json.dumps(parts, default=describe).encode()).hexdigest()


def _types(node: Any) -> list[Any]:
    """Return the types of all modules, from the outside in."""
    if isinstance(node, eqx.Module):
        return [type(node).__qualname__, *(_types(child) for child in vars(node).values())]
    if isinstance(node, tuple | list):
        return [_types(child) for child in node]
    return []
