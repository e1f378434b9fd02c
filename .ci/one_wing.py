"""A pytest plugin for the laws of one wing, where the other's host is not installed.

    python -m pytest --noconftest -p one_wing tests/specs/test_density.py

It stands in for `tests/conftest.py`, which needs both hosts.
"""

import hypothesis
import pytest

from tests.wings import WINGS

hypothesis.settings.register_profile(
    "laws", deadline=None, max_examples=8, derandomize=True, database=None
)
hypothesis.settings.load_profile("laws")


@pytest.fixture(params=WINGS, ids=repr, scope="session")
def wing(request):
    """The adapter of each wing whose host is installed."""
    return request.param
