"""Modules as trees of named arrays: which are trained, what they are called, new ones in place."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

Module = TypeVar("Module", bound=eqx.Module)


def replace(module: Module, **changes: Any) -> Module:
    """Return a module with some of its fields replaced."""
    new = object.__new__(type(module))
    for field in dataclasses.fields(module):
        value = changes[field.name] if field.name in changes else getattr(module, field.name)
        object.__setattr__(new, field.name, value)
    return new


def trainable(flow: Module) -> Module:
    """Return the flow's pytree with true at parameters and false at state, for `eqx.partition`.

    State is what a module, a network of one's own too, names in its class variable `buffers`.
    """

    def has_state(node: Any) -> bool:
        return isinstance(node, eqx.Module) and isinstance(getattr(node, "buffers", None), tuple)

    def mark(node: Any) -> Any:
        if not has_state(node):
            return eqx.is_inexact_array(node)
        changes = {}
        for field in dataclasses.fields(node):
            if not field.metadata.get("static"):
                value = getattr(node, field.name)
                changes[field.name] = (
                    jax.tree.map(lambda _: False, value)
                    if field.name in node.buffers
                    else jax.tree.map(mark, value, is_leaf=has_state)
                )
        return replace(node, **changes)

    return mark(flow)


def named(node: Any, prefix: str) -> Iterable[tuple[str, Array]]:
    """Yield each array of a module with its name, as PyTorch would name it."""
    if eqx.is_array(node):
        yield prefix.removesuffix("."), node
    else:
        for name, child in _children(node):
            yield from named(child, f"{prefix}{name}.")


def restored(node: Any, prefix: str, state: Mapping[str, Any]) -> Any:
    """Return the module with the arrays of a state, by their names, in place of its own."""
    if eqx.is_array(node):
        return jnp.asarray(state[prefix.removesuffix(".")])
    children = {n: restored(child, f"{prefix}{n}.", state) for n, child in _children(node)}
    if hasattr(node, "_unpacked"):
        return node._packed(replace(node._unpacked(), **children))
    if isinstance(node, eqx.Module):
        return replace(node, **children)
    if isinstance(node, tuple | list):
        return type(node)(children.values())
    return children if isinstance(node, dict) else node


def _children(node: Any) -> list[tuple[str, Any]]:
    node = node._unpacked() if hasattr(node, "_unpacked") else node
    if isinstance(node, eqx.Module):
        fields = [f.name for f in dataclasses.fields(node) if not f.metadata.get("static")]
        return [(name, getattr(node, name)) for name in fields]
    if isinstance(node, tuple | list):
        return [(str(i), child) for i, child in enumerate(node)]
    return list(node.items()) if isinstance(node, dict) else []
