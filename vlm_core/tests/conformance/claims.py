"""``conforms(title)``: a check of one claim of the support matrix, run on every tiny model; its verdict is held against ``SUPPORT.md``.

A check that returns nothing says "yes". What holds in part only returns its verdict, "eager only: <reason>".
"""

from __future__ import annotations

import pytest

from vlm_core.support import CLAIMS
from vlm_core.tests.conformance.models import batch_of, subject_of
from vlm_core.tests.family_models import TINY

CHECKED: list[str] = []
"""Claims of the matrix that a check stands for."""


def conforms(title: str, needs: str | None = None, refused_by=None, unavailable=None):
    """Run a check on every model and say how it came out.

    ``needs``: a capability without which ``refused_by(subject, batch)`` must be refused with the family's reason.
    ``unavailable(name)``: why the question does not arise on a model (having checked that who asks is told), or None.
    """
    assert title in CLAIMS
    CHECKED.append(title)

    def wrap(check):
        @pytest.mark.parametrize("name", TINY)
        def test(name, support):
            reason = unavailable(name) if unavailable else None
            if reason is not None:
                support(name, title, f"not applicable: {reason}")
                return
            if needs is not None and needs not in subject_of(name).capabilities:
                subject = subject_of(name)
                with pytest.raises(ValueError, match=f"lacks '{needs}'") as refused:
                    refused_by(subject, batch_of(name))
                stated = subject.anatomy.family.refusals[needs]
                assert stated in str(refused.value)
                support(name, title, f"no: {stated}")
                return
            support(name, title, check(name) or "yes")

        test.__doc__ = check.__doc__
        return test

    return wrap
