"""The paper: a run's evidence as a PDF of a few pages; ``python -m reports paper RUN``.

``write``         ``RUN/paper.pdf``; ``pdf`` its bytes
``NotInstalled``  what it is made with is not there

``content`` has what it says, as ``blocks``; ``exhibits`` its tables and figures; ``layout`` what it looks like; ``forest`` its forest plot.
"""

from reports.paper.layout import COMPLETE_PAGES, NotInstalled, pdf, write

__all__ = ["COMPLETE_PAGES", "NotInstalled", "pdf", "write"]
