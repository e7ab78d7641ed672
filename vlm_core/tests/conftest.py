"""Tiny subjects and items shared by the tests of this package."""

from __future__ import annotations

import pytest
import torch

from vlm_core import image_kv_means
from vlm_core.tests.tiny import make_items, tiny_subject


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors are faster on one thread, and results do not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def subject():
    """A multi-head LLaVA on sdpa."""
    return tiny_subject()


@pytest.fixture(scope="session")
def gqa_subject():
    """Two query heads per key/value head."""
    return tiny_subject(kv_heads=2, seed=1)


@pytest.fixture(scope="session")
def eager_subject():
    """The weights of ``subject`` on eager attention."""
    return tiny_subject(attention="eager")


@pytest.fixture(scope="session")
def items():
    """Twelve items, candidates of one token."""
    return make_items(12)


@pytest.fixture(scope="session")
def means(subject, items):
    """Image key/value means of ``subject``."""
    return image_kv_means(subject, items)
