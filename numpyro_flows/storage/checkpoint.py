"""Checkpoints of `fit` as NumPy files."""

import hashlib
import json
from typing import Any, BinaryIO

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from numpyro_flows.transform import TransformModule
from pyroflows_common import checkpoint
from pyroflows_common.checkpoint import describe


class Checkpoint(checkpoint.Checkpoint):
    """One file of `numpy.savez`, replaced as a whole whenever it is written.

    The arrays of a state are those of its entry `"arrays"`, a dict.
    """

    format = "numpyro_flows fit 1"

    def _write(self, state: dict[str, Any], file: BinaryIO) -> None:
        about = json.dumps({name: value for name, value in state.items() if name != "arrays"})
        np.savez(file, about=np.frombuffer(about.encode(), np.uint8), **state["arrays"])

    def _read(self) -> dict[str, Any]:
        with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = dict(content)
        return {**json.loads(arrays.pop("about").tobytes()), "arrays": arrays}


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
