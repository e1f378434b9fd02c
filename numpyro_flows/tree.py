"""Modules as trees of named arrays: trainable ones, names and stacking."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

Module = TypeVar("Module", bound=eqx.Module)
Tree = TypeVar("Tree")


def replace(module: Module, **changes: object) -> Module:
    """Return a module with some of its fields replaced."""
    new = object.__new__(type(module))
    kept = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    new.__dict__.update(kept | changes)
    return new


def fields(module: eqx.Module, static: bool = False) -> dict[str, Any]:
    """Return the fields of a module by name, either those that hold arrays or the static ones."""
    chosen = (f for f in dataclasses.fields(module) if bool(f.metadata.get("static")) == static)
    return {field.name: getattr(module, field.name) for field in chosen}


def as_dtype(module: Module, dtype: DTypeLike) -> Module:
    """Return a module with its floating-point arrays in another dtype."""
    return jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, module)


def select(condition: Array, a: Tree, b: Tree) -> Tree:
    """Return the tree `a` if a condition holds, and `b` otherwise."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def rearranged(move: Callable[..., Any], *arrays: Array) -> Array:
    """Apply `move(numpy or jax.numpy, *arrays)`, which moves or makes elements, in NumPy on a CPU.

    Outside `jit`, JAX would compile a program for each shape.
    """
    if jax.default_backend() == "cpu" and all(map(_is_plain, arrays)):
        return jax.device_put(np.array(move(np, *map(np.asarray, arrays))))  # shares no memory
    return move(jnp, *arrays)


def _is_plain(array: Array) -> bool:
    """Whether an array is neither traced nor bound to a device, nor a random key."""
    traced = isinstance(array, jax.core.Tracer)
    return not (traced or array.committed or jnp.issubdtype(array.dtype, jax.dtypes.extended))


class Blocks(eqx.Module):
    """A sequence of modules of the same structure, whose arrays are stacked along a first axis."""

    stacked: Any
    depth: int = eqx.field(static=True)

    def __init__(self, modules: Iterable[eqx.Module]) -> None:
        modules = list(modules)
        arrays, static = zip(*(eqx.partition(one, eqx.is_array) for one in modules), strict=True)
        shapes = [jax.tree.map(jnp.shape, a) for a in arrays]
        if any(s != static[0] for s in static) or any(s != shapes[0] for s in shapes):
            raise ValueError("`layers` of a Stack must be built alike; use a Chain for others")
        stack = functools.partial(rearranged, lambda xp, *parts: xp.stack(parts))
        self.stacked = eqx.combine(jax.tree.map(stack, *arrays), static[0])
        self.depth = len(modules)

    def __len__(self) -> int:
        return self.depth

    def __getitem__(self, index: int) -> Any:
        if not -self.depth <= index < self.depth:
            raise IndexError(f"`index` is {index}, but the stack has {self.depth} blocks")
        arrays, static = eqx.partition(self.stacked, eqx.is_array)
        block = jax.tree.map(lambda array: rearranged(lambda _, a: a[index], array), arrays)
        return eqx.combine(block, static)


def trainable(flow: Module) -> Module:
    """Return the flow's pytree with True for parameters and False for state, for `eqx.partition`.

    Modules, including custom networks, list their state in the class variable `buffers`. The
    context of a conditioned flow is not trained either.

    Examples:
        >>> import equinox as eqx
        >>> from numpyro_flows import BatchNorm, trainable
        >>> flow = BatchNorm(2)
        >>> parameters, state = eqx.partition(flow, trainable(flow))
        >>> parameters.running_mean is None
        True
    """
    return _marked(flow, ("buffers", "conditions"))


def frozen(flow: Module) -> Module:
    """Return the flow with gradients stopped at its buffers but not at its context."""
    rest, buffers = eqx.partition(flow, _marked(flow, ("buffers",)))
    stopped = jax.tree.map(lambda a: lax.stop_gradient(a) if eqx.is_array(a) else a, buffers)
    return eqx.combine(rest, stopped)


def _marked(flow: Module, kinds: tuple[str, ...]) -> Module:
    """Return the flow's pytree with True for floating-point arrays that no class lists so."""

    def listed(node: object) -> tuple[str, ...]:
        named = (getattr(type(node), kind, None) for kind in kinds)
        return sum((names for names in named if isinstance(names, tuple)), ())

    def lists(node: object) -> bool:
        return isinstance(node, eqx.Module) and bool(listed(node))

    def mark(node: Any) -> Any:
        if not lists(node):
            return eqx.is_inexact_array(node)
        changes = {
            name: jax.tree.map(lambda _: False, value)
            if name in listed(node)
            else jax.tree.map(mark, value, is_leaf=lists)
            for name, value in fields(node).items()
        }
        return replace(node, **changes)

    return jax.tree.map(mark, flow, is_leaf=lists)


def dtype_of(module: Module) -> DTypeLike:
    """Return the dtype of a module's first floating-point array; the default dtype without one."""
    arrays = filter(eqx.is_inexact_array, jax.tree.leaves(module))
    return next((array.dtype for array in arrays), jnp.result_type(float))


def nodes(flow: Any, wanted: Callable[[object], bool]) -> list[Any]:
    """Return the outermost parts of a flow that satisfy a condition."""
    return [node for node in jax.tree.leaves(flow, is_leaf=wanted) if wanted(node)]


def named(node: Any, prefix: str) -> Iterable[tuple[str, Array]]:
    """Yield each array of a module with the name that PyTorch would give it."""
    if eqx.is_array(node):
        yield prefix.removesuffix("."), node
    else:
        for name, child in _children(node):
            yield from named(child, f"{prefix}{name}.")


def restored(node: Any, prefix: str, state: Mapping[str, ArrayLike]) -> Any:
    """Return the module with each array replaced by that of the same name in a state."""
    if eqx.is_array(node):
        value = state[prefix.removesuffix(".")]
        return value if isinstance(value, Array) else jax.device_put(np.array(value))
    children = {n: restored(child, f"{prefix}{n}.", state) for n, child in _children(node)}
    if isinstance(node, Blocks):
        return Blocks(children.values())
    if isinstance(node, eqx.Module):
        return replace(node, **children)
    if isinstance(node, tuple | list):
        return type(node)(children.values())
    return children if isinstance(node, dict) else node


def _children(node: object) -> list[tuple[str, Any]]:
    if isinstance(node, Blocks | tuple | list):
        return [(str(i), node[i]) for i in range(len(node))]
    if isinstance(node, eqx.Module):
        return list(fields(node).items())
    return list(node.items()) if isinstance(node, dict) else []
