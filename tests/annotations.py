"""Check the jaxtyping annotations of both wings while the tests run.

An import hook decorates the functions of both packages. A call is checked after it has returned,
so that bad input meets the package's own error messages first. Only annotations with a jaxtyping
type are checked; mypy checks the others.
"""

import ast
import collections
import functools
import inspect
import sys
from importlib.machinery import PathFinder, SourceFileLoader

import torch
from beartype.door import die_if_unbearable
from jaxtyping import jaxtyped

PACKAGES = ("pyroflows", "numpyro_flows")
OFTEN = 100  # calls of one function, after which one in so many is checked
CALLS = collections.Counter()


@functools.cache
def annotated(function):
    """Return the signature of a function and its annotations with arrays."""
    hints = {n: hint for n, hint in function.__annotations__.items() if "jaxtyping" in repr(hint)}
    return inspect.signature(function), hints


def compare(function, args, kwargs, result):
    """Compare the arrays of a call with the function's annotations."""
    CALLS[function] += 1  # what every step of a run calls need not be compared in each
    if CALLS[function] > OFTEN and CALLS[function] % OFTEN:
        return
    signature, hints = annotated(function)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    values = bound.arguments | {"return": result}
    where = f"{function.__module__}.{function.__qualname__}: "
    with jaxtyped("context"):
        for name, hint in hints.items():
            die_if_unbearable(values[name], hint, exception_prefix=f"{where}`{name}` ")


def checked(function):
    """Decorate a function so that each call is compared with its annotations."""
    if not annotated(function)[1]:
        return function

    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        if not torch.compiler.is_compiling():
            compare(function, args, kwargs, result)
        return result

    return call


class Decorator(ast.NodeTransformer):
    """Puts `checked` under the other decorators of each function that is not a local one."""

    def visit_FunctionDef(self, node):
        mark = ast.parse("__import__('tests.annotations', fromlist=['checked']).checked")
        node.decorator_list.append(ast.copy_location(mark.body[0].value, node))
        return node


class Loader(SourceFileLoader):
    def source_to_code(self, data, path, *, _optimize=-1):
        tree = ast.fix_missing_locations(Decorator().visit(ast.parse(data, path)))
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_code(self, fullname):  # neither reads nor writes the bytecode of the plain source
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install():
    """Check what is imported from now on."""
    sys.meta_path.insert(0, Finder)
