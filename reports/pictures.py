"""Pictures that travel inside a run's JSON and page.

``thumbnail``  a picture no larger than asked
``png``        a picture as base64 text
"""

from __future__ import annotations

import base64
import io


def thumbnail(image, side):
    """The picture in colour, its longer side at most ``side`` pixels; a smaller one keeps its size."""
    scale = min(1.0, side / max(image.size))
    return image.convert("RGB").resize(tuple(max(1, round(length * scale)) for length in image.size))


def png(image):
    """The picture as base64 text of a PNG."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()
