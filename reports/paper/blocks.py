"""What a paper is made of: blocks, in reading order, that say nothing of how they look."""

from __future__ import annotations

from typing import NamedTuple

from reports import summary

SYMBOLS = {"supported": "●", "refuted": "✕", "inconclusive": "◐", "invalid": "–"}
HYPOTHESES = tuple(summary.HYPOTHESES)
FOREST = "forest of claims"  # drawn by reports.paper.forest; no test leaves one


class Heading(NamedTuple):
    """A heading; ``level`` 1 is a section."""

    text: str
    level: int = 1


class Words(NamedTuple):
    """A paragraph; ``lead`` opens it in bold, ``style`` is ``body``, ``abstract``, ``note``, ``alert`` or ``code``."""

    text: str
    lead: str = ""
    style: str = "body"


class Items(NamedTuple):
    """A list."""

    texts: tuple


class Rows(NamedTuple):
    """A table: ``label`` as it is cited, cells as text, ``widths`` as shares, ``left`` columns of words, ``abreast`` parts of it beside
    each other, ``whole`` where it is not to be broken over pages.

    A cell that is a dict is a picture; a row of one cell is a heading within the table.
    """

    label: str
    title: str
    caption: str
    columns: tuple
    rows: tuple
    widths: tuple
    left: tuple = (0,)
    abreast: int = 1
    whole: bool = True


class Drawn(NamedTuple):
    """Figures of a record side by side, ``across`` of them in a row; ``height`` is the most that one may take, in points."""

    label: str
    title: str
    caption: str
    figures: tuple
    across: int = 2
    height: float = 125


class Missing(NamedTuple):
    """An exhibit that this run does not have."""

    label: str
    what: str
