"""Set-up that every test shares: threads, precision, markers."""

import gc
import os
import shutil
import tempfile

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
# Tests run each program once or twice: compile it quickly. XLA's new emitters of fused loops take
# two thirds of the time that it spends on a small program, its split for several threads a third
# of the rest. `XLA_FLAGS=` in the environment gives the programs that users get.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_multi_thread_eigen=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests import annotations  # noqa: E402

annotations.install()

from tests.grouping import group_of, is_of_a_case  # noqa: E402
from tests.memory import Keeper  # noqa: E402
from tests.wings import WINGS  # noqa: E402
from tests.wings.hosts import HOSTS  # noqa: E402

torch.set_num_threads(1)
jax.config.update("jax_disable_most_optimizations", True)
# Each program is compiled once for all processes of a run.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["FLOWS_PROGRAMS"] = tempfile.mkdtemp(prefix="flows-programs-")
jax.config.update("jax_compilation_cache_dir", os.environ["FLOWS_PROGRAMS"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hypothesis.settings.register_profile(
    "laws", deadline=None, max_examples=8, derandomize=True, database=None
)
hypothesis.settings.load_profile("laws")
keeper = Keeper()
# What has been imported stays: the collector need not look through it again and again.
gc.collect()
gc.freeze()


def pytest_collection_modifyitems(config, items):
    """Leave out what needs a GPU where there is none; put together what shares programs."""
    if not torch.cuda.is_available():
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    # Files first: the longest groups are among them, and short ones at the end fill the gaps.
    items.sort(key=lambda item: (is_of_a_case(item), group_of(item)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))


def pytest_unconfigure():
    """Remove the compiled programs at the end of a run."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["FLOWS_PROGRAMS"], ignore_errors=True)


def pytest_runtest_teardown(item, nextitem):
    """Keep each process small."""
    keeper.check()


@pytest.fixture(params=WINGS, ids=repr, scope="session")
def wing(request):
    """The adapter of a wing: each law runs on both."""
    return request.param


@pytest.fixture
def host(wing):
    """The host of a wing, with an empty parameter store."""
    HOSTS[wing.name].clear()
    return HOSTS[wing.name]
