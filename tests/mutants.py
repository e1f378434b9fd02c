"""Mutants: faults put into the code one at a time, each of which the tests should notice.

    python tests/mutants.py --wing numpyro --sample 100

A fault is a change of one operator, number, condition or decorator. Cosmic Ray makes it in memory:
no file changes. Each mutant runs in a process of its own against the tests that concern its module;
a failing test, an error at import and a run without end kill it. Survivors that no test can notice
are lines of `survivors.txt`, each below a line with the reason.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import itertools
import os
import random
import re
import signal
import sys
import time
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path

from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parent.parent
PACKAGES = {"pyro": "pyroflows", "numpyro": "numpyro_flows"}
LISTED = ROOT / "tests" / "survivors.txt"
LIMIT = 900  # seconds
# Imported once, before the processes part; none of them may start a thread.
HEAVY = ("scipy.stats", "torch", "pyro", "jax", "equinox", "optax", "numpyro")

OPERATORS = """
BinaryOperator_Add_Sub BinaryOperator_Sub_Add BinaryOperator_Mul_Div BinaryOperator_Div_Mul
BinaryOperator_Pow_Mul BinaryOperator_FloorDiv_Mul BinaryOperator_Mod_Mul
ComparisonOperator_Eq_NotEq ComparisonOperator_NotEq_Eq ComparisonOperator_Lt_GtE
ComparisonOperator_Lt_LtE ComparisonOperator_LtE_Gt ComparisonOperator_LtE_Lt
ComparisonOperator_Gt_LtE ComparisonOperator_Gt_GtE ComparisonOperator_GtE_Lt
ComparisonOperator_GtE_Gt ComparisonOperator_Is_IsNot ComparisonOperator_IsNot_Is
UnaryOperator_USub_UAdd UnaryOperator_Delete_Not TrueWithFalse FalseWithTrue AndWithOr OrWithAnd
BreakWithContinue ContinueWithBreak
""".split()
OPERATORS = [f"core/Replace{name}" for name in OPERATORS]
OPERATORS += [f"core/{name}" for name in ("AddNot", "NumberReplacer", "RemoveDecorator")]
OPERATORS += ["core/ZeroIterationForLoop"]

# The tests that concern a module: files in `specs`, and a choice of the cases of the registry.
LAWS = "agreement reference bijection data_dependent evaluations density context freshness errors"
NEAR = {
    "layers/scales": (LAWS + " numerics", "AffineCoupling or realnvp-5 or penalty or starts"),
    "layers/coupling": (LAWS + " images", "Coupling or own or networks"),
    "layers/linear": (LAWS, "Invertible or Permutation or LowerTriangular or glow-5 or matrices"),
    "layers/elementwise": (
        LAWS + " training images",
        "Norm or Standard or Scaling or data_dependent or momentum",
    ),
    "layers/chain": (LAWS + " hosting training", "Chain or Stack or nice or standard or layers"),
    "layers/multiscale": (LAWS + " images", "Squeeze or Flatten or MultiScale or levels or images"),
    "layers/pixels": (LAWS + " pixels", "Logit or pixels"),
    "layers/tails": (LAWS + " numerics", "SinhArcsinh or LogTails or far_out"),
    "transform": (LAWS + " hosting agreement", "Chain or nice or context or host or errors"),
    "distribution": ("density hosting errors evaluations freshness reference", ""),
    "guides/path_gradient": ("guides evidence", ""),
    "archive": ("storage broken_files old_files errors", ""),
    "arviz": ("diagnostics importance", ""),
    "ascent": ("ascent evidence guide_starts guides", ""),
    "batches": ("sources training checkpoints failures", ""),
    "bits": ("pixels images", ""),
    "chains": ("bridge_sampling", ""),
    "checkpoint": ("checkpoints", ""),
    "checks": ("errors reference storage density training guides", ""),
    "draws": ("guides_of_draws priors", ""),
    "evidence": ("bridge_sampling log_evidence importance", ""),
    "guides": ("guides guide_starts evidence mixtures", ""),
    "history": ("training failures errors checkpoints", ""),
    "laplace": ("laplace groups", ""),
    "levels": ("images reference errors", "images or levels or scales or errors"),
    "local": ("local_layout groups", ""),
    "loop": ("training checkpoints failures", ""),
    "mixture": ("mixtures", ""),
    "partition": ("reference errors storage", "partition or Coupling or errors or storage"),
    "priors": ("priors", ""),
    "progress": ("progress ascent", ""),
    "recipe": ("storage errors old_files", ""),
    "rows": ("sources training failures checkpoints errors", ""),
    "schedule": ("ascent training evidence errors", ""),
    "search": ("guide_starts mixtures", ""),
    "sites": ("diagnostics importance guides", ""),
    "verdict": ("importance diagnostics", ""),
}
# The hosts' tests that concern a module.
HOSTS = {
    "transform": ("transforms", "functional", "memo"),
    "distribution": ("functional",),
    "guides/path_gradient": ("guides",),
    "layers/coupling": ("transforms",),
    "layers/linear": ("transforms",),
}


@dataclass(frozen=True)
class Mutant:
    """A module with one fault."""

    module: str  # path without suffix
    operator: str
    old: str
    new: str

    def near(self, wing):
        """Test files, and an expression that chooses among their tests."""
        name = self.module.split("/", 1)[1]
        files, cases = NEAR[name]
        specs = [f"tests/specs/test_{file}.py" for file in files.split()]
        hosts = [f"tests/hosts/{wing}/test_{file}.py" for file in HOSTS.get(name, ())]
        return [*specs, *filter(os.path.exists, hosts)], cases

    def diff(self):
        """The changed lines."""
        lines = difflib.unified_diff(self.old.splitlines(), self.new.splitlines(), n=0, lineterm="")
        return [line for line in list(lines)[2:] if line[0] in "+-"]

    def __str__(self):
        return " | ".join([self.module, *(" ".join(line.split()) for line in self.diff())])


OF_THE_FLOOR = {path.stem for path in (ROOT / "pyroflows_common").glob("*.py")}


def places(wing, only):
    """All places of faults: module, operator and its occurrence."""
    for package in (PACKAGES[wing], "pyroflows_common"):
        for name in NEAR:
            module = f"{package}/{name}"
            if (package == "pyroflows_common") == (name in OF_THE_FLOOR) and only in module:
                tree = get_ast(source(module))
                for operator in OPERATORS:
                    count = sum(
                        len(list(get_operator(operator)().mutation_positions(node)))
                        for node in nodes(tree)
                    )
                    yield from ((module, operator, k) for k in range(count))


def source(module):
    return (ROOT / f"{module}.py").read_text()


def nodes(node):
    yield node
    for child in getattr(node, "children", ()):
        yield from nodes(child)


def mutants(chosen):
    """The mutants of these places, without those that change nothing but annotations."""
    for module, operator, occurrence in chosen:
        old = source(module)
        new = mutate_code(old, get_operator(operator)(), occurrence)
        if meaning(new) not in (meaning(old), None):
            yield Mutant(module, operator, old, new)


class Bare(ast.NodeTransformer):
    """Drops annotations, and the decorators that change nothing in a complete class."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        idle = ("override", "abstractmethod")
        node.decorator_list = [d for d in node.decorator_list if ast.unparse(d) not in idle]
        return self.generic_visit(node)

    def visit_AnnAssign(self, node):
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def meaning(code):
    """What the code does, as text; None where it is no Python."""
    try:
        return ast.dump(Bare().visit(ast.parse(code)))
    except SyntaxError:  # an unpacking that was taken for a product
        return None


def put_in(mutant):
    """Let this process import the changed source, and neither read nor write its bytecode."""
    path = str(ROOT / f"{mutant.module}.py")
    read, stats = SourceFileLoader.get_data, SourceFileLoader.path_stats

    def get_data(self, name):
        return mutant.new.encode() if os.path.abspath(name) == path else read(self, name)

    def path_stats(self, name):
        if os.path.abspath(name) == path:
            raise OSError("a mutant has no bytecode")
        return stats(self, name)

    SourceFileLoader.get_data, SourceFileLoader.path_stats = get_data, path_stats


def run(mutant, wing):
    """Run the tests that concern a mutant, in this process; return pytest's exit code."""
    import pytest

    put_in(mutant)
    files, cases = mutant.near(wing)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-n", "0", "--assert=plain"]
    return pytest.main([*options, *(["-k", cases] if cases else []), *files], [OfOneWing(wing)])


class OfOneWing:
    """A plugin that leaves out the tests of the other wing."""

    def __init__(self, wing):
        self.other = re.compile("numpyro" if wing == "pyro" else "(?<!num)pyro(?!flows)")

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if not self.other.search(item.nodeid)]


def started(mutant, wing):
    """Start a mutant in a process of its own; return the process's number."""
    number = os.fork()
    if number:
        return number
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    signal.alarm(LIMIT)
    code = 1
    with contextlib.suppress(BaseException):
        code = int(run(mutant, wing))
    os._exit(code)


def tried(chosen, wing, jobs):
    """Run the mutants, a few at a time; yield each with whether it survived."""
    running = {}
    for mutant in chosen:
        running[started(mutant, wing)] = mutant
        if len(running) == jobs:
            number, status = os.wait()
            yield running.pop(number), status == 0
    while running:
        number, status = os.wait()
        yield running.pop(number), status == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wing", choices=PACKAGES, required=True)
    parser.add_argument("--sample", type=int, help="number of mutants; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", help="a part of the modules' paths")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    begin = time.time()
    found = list(places(options.wing, options.only))
    random.Random(options.seed).shuffle(found)
    print(f"{len(found)} places of faults", flush=True)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    for name in HEAVY:
        importlib.import_module(name)
    chosen = list(itertools.islice(mutants(found), options.sample))
    sound = [Mutant(name, "", source(name), source(name)) for name in {m.module for m in chosen}]
    failing = [m for m, survived in tried(sound, options.wing, options.jobs) if not survived]
    if failing:
        sys.exit(f"tests fail without a fault: {[m.module for m in failing]}")
    print(f"the tests of {len(sound)} modules pass; now with faults", flush=True)
    listed = LISTED.read_text().splitlines() if LISTED.exists() else []
    left = 0
    for mutant, survived in tried(chosen, options.wing, options.jobs):
        if survived and str(mutant) not in listed:
            left += 1
            print(mutant, flush=True)
    total = len(chosen)
    print(f"{total - left} of {total} killed or listed, in {time.time() - begin:.0f} s")
    sys.exit(total - left < 0.95 * total)


if __name__ == "__main__":
    main()
