"""The paper: a run's evidence as a PDF of a few pages; ``python -m reports paper RUN``.

``write(folder)`` writes ``folder/paper.pdf`` and returns its path. What it says is ``reports.paper.content``; what it looks like is
here. It needs reportlab and svglib, which the extra ``paper`` installs.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import math
import re
from pathlib import Path
from xml.sax.saxutils import escape

from reports import figures, heads, recipes, record, summary
from reports.paper import blocks, content, forest

TARGET = "paper.pdf"
COMPLETE_PAGES = (6, 8)  # of a complete run: every hypothesis, no evidence lost
_MARGIN, _TEXT, _GAP, _BODY = (
    54,
    487,
    12,
    9.0,
)  # points: the margin of an A4 page, the width of its text, what parts columns, the size of its letters
_BARE = [
    ("FONTNAME", (0, 0), (-1, -1), "Label"),
    ("FONTSIZE", (0, 0), (-1, -1), 1),
    ("LEADING", (0, 0), (-1, -1), 1),
]  # cells without text take no room
_LEAST = 165  # points of a page that a table in parts may begin in
_AGAIN = ", continued"
_ABREAST, _WHOLE = 8, 40  # rows of a table in parts, in each; rows of one that is not broken
_INK = "#1b1f24"
_FONTS = {
    "Text": "STIXGeneral",
    "Text-Bold": "STIXGeneralBol",
    "Text-Italic": "STIXGeneralItalic",
    "Label": "DejaVuSans",
    "Label-Bold": "DejaVuSans-Bold",
    "Figures": "DejaVuSans",
}


class NotInstalled(ImportError):
    """reportlab or svglib is not there."""


def write(folder, out=None):
    """Write the paper of a run.

    Parameters
    ----------
    folder : pathlib.Path
        A run directory, as for ``reports.page.render``.
    out : pathlib.Path, optional
        Where to; ``folder/paper.pdf`` otherwise.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    NotInstalled
        Where reportlab or svglib is not there: what to install.
    ValueError, KeyError, OSError
        Where the folder is not a run.
    """
    _require()
    identity, records = record.load_run(folder)
    made = pdf(identity, records, heads.load(folder), recipes.load(folder))
    target = Path(out) if out else folder / TARGET
    target.write_bytes(made)
    return target


def pdf(identity, records, described=None, recipe=None):
    """The paper as bytes; ``described``: the head report, ``recipe``: the token recipe, if there are any."""
    from reportlab.lib.pagesizes import A4
    from reportlab.platypus import BaseDocTemplate, CondPageBreak, Frame, PageTemplate

    _register()
    model = summary.page(identity, records)
    title = f"Research claims, tested on {model['title']}"
    out = io.BytesIO()
    document = BaseDocTemplate(
        out, pagesize=A4, leftMargin=_MARGIN, rightMargin=_MARGIN, topMargin=50, bottomMargin=46, title=title, author="vlm-claims",
        subject=model["subject_line"], invariant=1, lang="en",
    )  # fmt: skip
    frame = Frame(
        _MARGIN, document.bottomMargin, _TEXT, document.height, leftPadding=0, rightPadding=0, topPadding=0, bottomPadding=0, id="text"
    )
    document.addPageTemplates(PageTemplate(frames=[frame]))
    looks = _looks()
    story = [_paragraph(title, looks["title"]), _paragraph(model["subject_line"] or "family and size unknown", looks["subject"])]
    story.append(_paragraph(f"{identity['name']} · {str(identity['started'])[:10]}", looks["subject"]))
    said = content.content(identity, records, described, recipe)
    for block, following in itertools.pairwise([*said, None]):
        if isinstance(block, blocks.Heading) and isinstance(following, blocks.Rows) and following.abreast > 1:
            # A table that goes on over pages would take its heading to where it fits as a whole.
            story += [CondPageBreak(_LEAST), _paragraph(block.text, looks["h1"].clone("above-table", keepWithNext=0))]
        else:
            story += _LAID_OUT[type(block)](block, looks)
    document.build(story, canvasmaker=functools.partial(_pages(), running=title, foot=identity["name"]))
    return out.getvalue()


def _require():
    for name in ("reportlab", "svglib"):
        try:
            __import__(name)
        except ImportError as error:
            raise NotInstalled(f"a paper needs {name}, which is not installed: pip install -e '.[paper]'") from error


@functools.cache
def _register():
    """Fonts that ship with Matplotlib, embedded: letters of a book for sentences, and the figures' own for tables and figures."""
    import matplotlib
    from reportlab.lib.fonts import addMapping
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFont

    base = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for name, file in _FONTS.items():
        pdfmetrics.registerFont(TTFont(name, str(base / f"{file}.ttf")))
    for family, bold, italic in (("Text", "Text-Bold", "Text-Italic"), ("Label", "Label-Bold", "Label")):
        for is_bold, is_italic, name in ((0, 0, family), (1, 0, bold), (0, 1, italic), (1, 1, bold)):
            addMapping(family, is_bold, is_italic, name)


@functools.cache
def _looks():
    from reportlab.lib.enums import TA_CENTER, TA_JUSTIFY, TA_RIGHT
    from reportlab.lib.styles import ParagraphStyle

    def look(name, size, space=3.0, leading=1.2, **more):
        return ParagraphStyle(name, fontSize=size, leading=leading * size, spaceAfter=space, **({"fontName": "Text"} | more))

    body = {"alignment": TA_JUSTIFY, "allowWidows": 0, "allowOrphans": 0}
    return {
        "title": look("title", 19, 4, fontName="Text-Bold", alignment=TA_CENTER),
        "subject": look("subject", 10, 2, alignment=TA_CENTER, textColor="#4a525c"),
        "h1": look("h1", 13, 4, fontName="Text-Bold", spaceBefore=9, keepWithNext=1),
        "h2": look("h2", 11, 3, fontName="Text-Bold", spaceBefore=7, keepWithNext=1),
        "body": look("body", _BODY, 2.5, **body),
        "lead": look("lead", _BODY, fontName="Text-Italic", **body),
        "abstract": look("abstract", _BODY, 8, leftIndent=26, rightIndent=26, spaceBefore=8, **body),
        "alert": look("alert", _BODY, 4, leftIndent=26, rightIndent=26, textColor="#a33d00", **body),
        "code": look("code", 7, 4, fontName="Label", leftIndent=10, backColor="#f4f5f7", borderPadding=2, splitLongWords=1),
        "item": look("item", _BODY, 2, leftIndent=12, bulletIndent=2, **body),
        "caption": look("caption", 8.4, 3, leading=1.22),
        "subtitle": look("subtitle", 7.2, 1, fontName="Label", textColor="#4a525c"),
        "cell": look("cell", 6.6, 0, leading=1.2, fontName="Label", splitLongWords=1),
        "number": look("number", 6.6, 0, leading=1.2, fontName="Label", alignment=TA_RIGHT, splitLongWords=1),
    }


# Text


def _markup(text, font="Text"):
    """Text as reportlab's markup: escaped, minus signs before numbers, letters that the font lacks from the figures' font."""
    from reportlab.pdfbase import pdfmetrics

    known = pdfmetrics.getFont(font).face.charToGlyph
    text = re.sub(r"(?<![\w./-])-(?=\d)", "−", "".join(letter if letter.isprintable() else " " for letter in str(text)))
    return "".join(
        run if own else f'<font name="Label">{run}</font>'
        for own, letters in itertools.groupby(text, lambda letter: ord(letter) in known)
        for run in [escape("".join(letters))]
    )


def _paragraph(text, look, lead=""):
    from reportlab.platypus import Paragraph

    opening = f"<b>{_markup(lead, f'{look.fontName}-Bold')}</b>" if lead else ""
    return Paragraph(opening + _markup(text, look.fontName), look)


def _heading(block, looks):
    return [_paragraph(block.text, looks[f"h{block.level}"])]


def _words(block, looks):
    return [_paragraph(block.text, looks[block.style], block.lead)]


def _items(block, looks):
    from reportlab.platypus import Paragraph

    return [Paragraph(_markup(text), looks["item"], bulletText="•") for text in block.texts]


def _missing(block, looks):
    return [_paragraph(f"This run does not have {block.what}.", looks["caption"], f"{block.label}. ")]


def _caption(block, looks):
    from reportlab.platypus import Paragraph

    return Paragraph(f"<b>{_markup(f'{block.label}. {block.title}', 'Text-Bold')}</b> {_markup(block.caption)}", looks["caption"])


# Tables and figures


def _rows(block, looks):
    """A table under its caption; one that is longer than a page goes on under its head."""
    from reportlab.platypus import Table

    def cell(value, place, head=False):
        if isinstance(value, dict):
            return _picture(value["image"], 22)
        look = looks["cell" if place in block.left else "number"]
        return _paragraph("", look, value) if head else _paragraph(value, look)

    width = (_TEXT - _GAP * (block.abreast - 1)) / block.abreast
    widths = [share * width / sum(block.widths) for share in block.widths]
    columns, last = len(widths) + 1, len(widths) - 1  # of one part of the table, and of the gap after it
    head = [cell(value, place, head=True) for place, value in enumerate(block.columns)] + [""]
    body = [[_caption(block, looks)], head * block.abreast]
    starts = []  # lines that a page may begin with
    rules = [
        *_BARE, ("SPAN", (0, 0), (-1, 0)), ("VALIGN", (0, 0), (-1, -1), "TOP"),
        ("TOPPADDING", (0, 0), (-1, -1), 0.7), ("BOTTOMPADDING", (0, 0), (-1, -1), 1.3),
        ("LEFTPADDING", (0, 0), (-1, -1), 2.5), ("RIGHTPADDING", (0, 0), (-1, -1), 2.5), ("LEFTPADDING", (0, 0), (-1, 0), 0),
    ]  # fmt: skip
    for line, opens in _abreast(block):
        if opens and block.abreast > 1:
            starts.append(len(body))
        body.append([])
        for part, row in enumerate(line):
            start, end = (part * columns, len(body) - 1), (part * columns + last, len(body) - 1)
            if row and len(row) == 1:
                rules += [("SPAN", start, end), ("TOPPADDING", start, end, 2.5)]
            if row:
                rules.append(("LINEBELOW", start, end, 0.25, "#e3e6ea"))
            row = row or ("",)
            cells = [cell(value, place, head=len(row) == 1) for place, value in enumerate(row)]
            body[-1] += cells + [""] * (columns - len(cells))
    body = [(line + [""] * columns * block.abreast)[: columns * block.abreast - 1] for line in body]
    for part in range(block.abreast):
        left, right = part * columns, part * columns + last
        rules += [
            ("LINEABOVE", (left, 1), (right, 1), 0.9, _INK),
            ("LINEBELOW", (left, 1), (right, 1), 0.5, _INK),
            ("LINEBELOW", (left, -1), (right, -1), 0.9, _INK),
        ]
    rules += [("NOSPLIT", (0, start), (-1, end - 1)) for start, end in itertools.pairwise([*starts, len(body)])]
    if block.whole and len(body) <= _WHOLE and not starts:
        rules.append(("NOSPLIT", (0, 0), (-1, -1)))
    return [Table(body, colWidths=((widths + [_GAP]) * block.abreast)[:-1], repeatRows=2, style=rules, spaceBefore=5, spaceAfter=7)]


def _abreast(block):
    """A table's lines, each of the rows that stand beside each other, and whether reading, part by part, starts anew there."""
    if block.abreast == 1:
        yield from (((row,), False) for row in block.rows)
        return
    for rows in _chunks(block.rows, _ABREAST * block.abreast):
        fewest = math.ceil(len(rows) / block.abreast)
        parts = next(parts for most in itertools.count(fewest) if len(parts := _chunks(rows, most)) <= block.abreast)
        lines = itertools.zip_longest(*parts)
        yield from ((line, place == 0) for place, line in enumerate(lines))


def _chunks(rows, most):
    """Rows in parts of at most so many; none ends with a heading, and one that begins below a heading repeats it."""
    found, heading = [[]], None
    for place, row in enumerate(rows):
        needs = 2 if len(row) == 1 and place + 1 < len(rows) else 1
        if found[-1] and len(found[-1]) + needs > most:
            found.append([] if len(row) == 1 or heading is None else [heading])
        heading = (
            (row[0].partition(":")[0] + _AGAIN,) if len(row) == 1 and not row[0].endswith(_AGAIN) else row if len(row) == 1 else heading
        )
        found[-1].append(row)
    return found


def _drawn(block, looks):
    """Figures side by side over their caption, on one page."""
    from reportlab.platypus import Table

    width = (_TEXT - _GAP * (block.across - 1)) / block.across
    cells = [_panel(title, figure, width, block.height, looks) for title, figure in block.figures]
    lines = [cells[start : start + block.across] for start in range(0, len(cells), block.across)]
    lines[-1] += [""] * (block.across - len(lines[-1]))
    lines.append([_caption(block, looks)] + [""] * (block.across - 1))
    style = [
        *_BARE, ("VALIGN", (0, 0), (-1, -1), "TOP"), ("TOPPADDING", (0, 0), (-1, -1), 2),
        ("SPAN", (0, -1), (-1, -1)), ("NOSPLIT", (0, 0), (-1, -1)),
        ("LEFTPADDING", (0, 0), (-1, -1), 0), ("RIGHTPADDING", (0, 0), (-1, -1), 0), ("RIGHTPADDING", (0, 0), (-2, -2), _GAP),
    ]  # fmt: skip
    return [Table(lines, colWidths=[width + _GAP] * (block.across - 1) + [width], style=style, spaceBefore=3, spaceAfter=5)]


def _panel(title, figure, width, height, looks):
    drawing = _vector(figure)
    factor = min(width / drawing.width, height / drawing.height)
    drawing.scale(factor, factor)
    drawing.width, drawing.height = drawing.width * factor, drawing.height * factor
    return [_paragraph(title, looks["subtitle"]), drawing] if title else [drawing]


def _vector(figure):
    """A record's figure, drawn by the page's own drawing code, as reportlab's vector drawing."""
    from svglib.svglib import svg2rlg

    if figure["kind"] == blocks.FOREST:
        svg = figures.drawn(forest.claims, figure["data"])["svg"]
    else:
        svg = figures.draw(figure["kind"], figure["data"])["svg"]
    # svglib knows opacities of fills and lines, not of shapes, and one family of a list of fonts.
    svg = re.sub(r"(?<![-\w])opacity: ([\d.]+)", r"fill-opacity: \1; stroke-opacity: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: Figures", svg)
    return svg2rlg(io.BytesIO(svg.encode("utf-8")))


def _picture(image, side):
    from reportlab.platypus import Image

    picture = Image(io.BytesIO(base64.b64decode(image)))
    factor = side / max(picture.imageWidth, picture.imageHeight)
    picture.drawWidth, picture.drawHeight = factor * picture.imageWidth, factor * picture.imageHeight
    return picture


_LAID_OUT = {
    blocks.Heading: _heading,
    blocks.Words: _words,
    blocks.Items: _items,
    blocks.Rows: _rows,
    blocks.Drawn: _drawn,
    blocks.Missing: _missing,
}


@functools.cache
def _pages():
    """A canvas that writes head and foot when it knows how many pages there are."""
    from reportlab.pdfgen.canvas import Canvas

    class Pages(Canvas):
        def __init__(self, *args, running, foot, **kwargs):
            super().__init__(*args, **(kwargs | {"initialFontName": "Label"}))
            self._running, self._foot, self._kept = running, foot, []

        def showPage(self):
            self._kept.append(dict(self.__dict__))
            self._startPage()

        def save(self):
            for page in self._kept:
                self.__dict__.update(page)
                self._margins(len(self._kept))
                super().showPage()
            super().save()

        def _margins(self, count):
            width, height = self._pagesize
            self.setFillColor("#4a525c")
            self.setFont("Label", 7)
            if self._pageNumber > 1:
                self.drawString(_MARGIN, height - 36, _fitted(self._running, _TEXT))
            self.drawString(_MARGIN, 30, _fitted(self._foot, 0.8 * _TEXT))
            self.drawRightString(width - _MARGIN, 30, f"page {self._pageNumber} of {count}")

    return Pages


def _fitted(text, width, size=7):
    """Text of one line, cut where it would not fit."""
    from reportlab.pdfbase.pdfmetrics import stringWidth

    text = "".join(letter if letter.isprintable() else " " for letter in str(text))
    if stringWidth(text, "Label", size) <= width:
        return text
    while text and stringWidth(text + "…", "Label", size) > width:
        text = text[:-1]
    return text + "…"
