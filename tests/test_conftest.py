"""How the tests are divided over workers."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="not run by pytest-xdist")
def test_a_file_stays_on_one_worker(request):
    """pytest-xdist reads groups from the id of a test, which pytest 9.2 no longer lets it change."""
    assert request.node.nodeid.endswith("@test_conftest.py"), "xdist groups have no effect with this pytest"
