"""A guide in Pyro's parameter store: the names of its parameters and of the rest of its state."""

import contextlib
import itertools
import weakref
from collections.abc import Iterator

import pyro
from torch import Tensor
from torch.nn import Module, Parameter

from pyroflows.transform import TransformModule

# The first parameter of each guide that this process has put into the store, by the guide's name:
# what else the store holds has been loaded.
_made: weakref.WeakValueDictionary[str, Parameter] = weakref.WeakValueDictionary()
_settled = False


def tensors(name: str, transform: TransformModule) -> dict[str, Tensor]:
    """Return the parameters by Pyro's names, and the rest of the state by names of ours."""
    trained = {key for key, p in transform.named_parameters() if p.requires_grad}
    state = transform.state_dict().items()
    return {f"{name}.{'transform$$$' if k in trained else 'state.'}{k}": v for k, v in state}


def has_made(name: str, transform: Module) -> bool:
    """Return whether the store holds another guide of this name that was made in this process."""
    store, made = pyro.get_param_store(), _made.get(name)
    key = (made is not None and store.param_name(made)) or ""
    held = key.startswith(f"{name}.transform$$$") and key in store
    if not held or store[key] is not made:  # cleared, or loaded since
        return False
    return all(parameter is not made for parameter in transform.parameters())


def forget(name: str) -> None:
    """Take the guide of this name out of the store, if it holds one."""
    store = pyro.get_param_store()
    for key in [key for key in store if key.startswith(_prefixes(name))]:
        del store[key]


def has_loaded(name: str, transform: TransformModule) -> bool:
    """Return whether the store holds a guide of this name that was not made in this process.

    Raises:
        ValueError: if that guide has other shapes or another precision.
    """
    if has_made(name, transform):
        return False
    store = pyro.get_param_store()
    held = {key: store[key] for key in store if key.startswith(_prefixes(name))}
    own = {key: _real(value) for key, value in tensors(name, transform).items()}
    kinds, expected = ({k: (v.shape, v.dtype) for k, v in d.items()} for d in (held, own))
    if held and kinds != expected:
        raise ValueError(
            f"Pyro's parameter store holds another guide by the name of {name!r}: give this one a "
            "`name`, or call pyro.clear_param_store()"
        )
    return bool(held)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Register one parameter of each guide only, while an optimiser that has all moves them."""
    global _settled
    before, _settled = _settled, True
    try:
        yield
    finally:
        _settled = before


def register(name: str, transform: TransformModule) -> None:
    """Register a flow's parameters and state, or replace them by those that the store holds."""
    trained = ((key, p) for key, p in transform.named_parameters() if p.requires_grad)
    first, parameter = next(trained, ("", None))
    if parameter is None:  # frozen
        return
    store, full = pyro.get_param_store(), f"{name}.transform"
    first = f"{full}$$${first}"
    if _settled:
        pyro.param(first, parameter)  # a bound without a parameter has no gradient
        return
    known = first in store
    if not known or store[first] is not parameter:
        if not known:
            _made[name] = parameter
        # The store takes also the state that no optimiser sees.
        for key, value in tensors(name, transform).items():
            if key.startswith(f"{name}.state."):
                if not known:
                    store[key] = _real(value)
                elif key in store:
                    value.copy_(store[key].detach())
    # Pyro by itself would register the parameters, but not take those of the store.
    pyro.module(full, transform, update_module_params=True)


def free_name(name: str) -> str:
    """Return a name that no guide in the store has: this one, or this one with a number."""
    store = pyro.get_param_store()
    names = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(1)))
    return next(n for n in names if not any(key.startswith(f"{n}.transform$$$") for key in store))


def _prefixes(name: str) -> tuple[str, str]:
    return f"{name}.transform$$$", f"{name}.state."


def _real(value: Tensor) -> Tensor:
    """Return a tensor of real numbers, as the store demands."""
    return value if value.is_floating_point() else value.double()
