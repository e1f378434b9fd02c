"""Checkpoints of `fit` in NumPy files."""

import hashlib
import json
from typing import Any, BinaryIO, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_flows.transform import TransformModule
from pyroflows_common import checkpoint
from pyroflows_common.checkpoint import describe

Tree = TypeVar("Tree")


class Checkpoint(checkpoint.Checkpoint):
    """A file of `numpy.savez`, which each write replaces as a whole.

    The entry `"arrays"` of a state is a dict of all its arrays.
    """

    format = "numpyro_flows fit 1"

    def _write(self, state: dict[str, Any], file: BinaryIO) -> None:
        about = json.dumps({name: value for name, value in state.items() if name != "arrays"})
        np.savez(file, about=np.frombuffer(about.encode(), np.uint8), **state["arrays"])

    def _read(self) -> dict[str, Any]:
        with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = dict(content)
        return {**json.loads(arrays.pop("about").tobytes()), "arrays": arrays}


# A checkpoint numbers the arrays of a tree, and holds a random key as its data.


def numbered(name: str, tree: object) -> dict[str, np.ndarray]:
    """Return the arrays of a tree under numbered names."""
    return {
        f"{name}/{number}": np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for number, leaf in enumerate(jax.tree.leaves(tree))
    }


def collected(name: str, arrays: dict[str, np.ndarray], like: Tree) -> Tree:
    """Return a tree of the same structure as `like`, from its arrays under numbered names."""

    def restored(number: int, leaf: Array) -> Array:
        array = arrays[f"{name}/{number}"]
        if _is_key(leaf):
            return jax.random.wrap_key_data(jnp.asarray(array))
        return jnp.asarray(array.view(leaf.dtype))  # NumPy's files hold bfloat16 as bytes

    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, map(restored, range(len(leaves)), leaves))


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe_flow(flow: TransformModule) -> str:
    """Return a digest of the structure of a flow, independent of its parameters."""
    parts = [
        None if flow.recipe is None else list(flow.recipe),
        _types(flow),
        [(name, list(array.shape), str(array.dtype)) for name, array in flow.state_dict().items()],
    ]
    return hashlib.sha256(json.dumps(parts, default=describe).encode()).hexdigest()


def _types(node: object) -> list[Any]:
    """Return the types of all modules of a tree, outermost first."""
    if isinstance(node, eqx.Module):
        return [type(node).__qualname__, *(_types(child) for child in vars(node).values())]
    if isinstance(node, tuple | list):
        return [_types(child) for child in node]
    return []
