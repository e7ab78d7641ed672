"""The verdict of every check is held against ``SUPPORT.md``."""

from __future__ import annotations

import pytest

from vlm_core.support import contradiction, outcome_property


@pytest.fixture
def support(request, record_property):
    """Say what came out for a model and a capability: it must be what ``SUPPORT.md`` says."""

    def say(name: str, capability: str, verdict: str) -> None:
        record_property(*outcome_property(name, capability, verdict))
        wrong = contradiction(name, capability, verdict)
        assert wrong is None, wrong

    return say
