"""Sources of sample claim tests with known outcomes, for pytester."""

from __future__ import annotations

HEADER = """
import numpy as np
import pytest
from vlm_core.stats import Claim, Control, Superiority

ASKED = dict(effect="accuracy lost per item", test=Superiority(0.1), source="a paper, 2025")
ONE = Claim(id="H1.one", sentence="It costs ten points.", **ASKED)
TWO = Claim(id="H1.two", sentence="It costs ten points again.", **ASKED)
THREE = Claim(id="H2.three", sentence="Another family.", **ASKED)
LOOK = Claim(id="H1.look", sentence="Only looked at.", tier="exploratory", **ASKED)

def effects(share, n=100):
    return (np.arange(n) < share * n).astype(float)

def clusters(n=100):
    return np.arange(n)
"""

SUPPORTED = """
@pytest.mark.claim(ONE)
def test_supported(evidence):
    evidence.decide(ONE, effects(0.5), clusters=clusters())
"""
REFUTED = """
@pytest.mark.claim(TWO)
def test_refuted(evidence):
    evidence.decide(TWO, effects(0.0), clusters=clusters())
"""
INCONCLUSIVE = """
@pytest.mark.claim(THREE)
def test_inconclusive(evidence):
    evidence.decide(THREE, effects(0.1), clusters=clusters())
"""
INVALID = """
@pytest.mark.claim(TWO, part="control")
def test_invalid(evidence):
    failed = Control("other scene", "negative", False, 0.4, "below 0.3")
    evidence.decide(TWO, effects(0.5), clusters=clusters(), controls=[failed])
"""
EXPLORATORY = """
@pytest.mark.claim(LOOK)
def test_look(evidence):
    evidence.decide(LOOK, effects(0.0), clusters=clusters())
"""
CRASHING = """
@pytest.mark.claim(ONE, part="crash")
def test_crashing(evidence):
    raise RuntimeError("no such layer")
"""
