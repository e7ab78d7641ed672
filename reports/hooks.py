"""Hooks of the claims plugin, for those who declare suites.

``pytest_claims_leaves_out(config, item)``   claims that a run does not ask
"""

from __future__ import annotations

import pytest


@pytest.hookspec(firstresult=True)
def pytest_claims_leaves_out(config, item):
    """Whether this run does not ask the claim that a collected test decides: True leaves it out.

    It stays declared: it counts in its family, whose error rate is shared as ever, and a run without it is complete.
    """
