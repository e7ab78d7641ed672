"""Whether what is taught is also what is tested, by the content of pictures.

``leaks(items, evaluated)``              a table of shared pictures and questions
``require_disjoint(items, evaluated)``   refuse them

A picture is known by its pixels (``vlm_core.identity.picture_digest``): one that was saved again without loss, under another name or in
another colour mode, is found; one that was resized, cropped or compressed with loss is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from vlm_core.identity import picture_digest
from vlm_core.items import item_field, plain, require_items, take

__all__ = ["COLUMNS", "leaks", "require_disjoint"]

COLUMNS = ("item", "evaluated", "evaluated_item", "what")


def leaks(items: Sequence, evaluated: Mapping[str, Sequence], fields: Sequence[str] = ("image",)) -> pd.DataFrame:
    """Pictures, and questions about them, that are both in ``items`` and in a set that is evaluated on.

    Parameters
    ----------
    items : sequence of items
    evaluated : mapping of name to sequence of items
    fields : sequence of str
        Where evaluated items have pictures: beside ``image`` perhaps that of a counterfactual partner. Of items that are taught it is
        ``image``.

    Returns
    -------
    DataFrame
        ``item``, ``evaluated`` (the set's name), ``evaluated_item``, ``what`` (``"picture"``, or ``"picture and prompt"`` where the same is
        asked, ignoring case and punctuation): one row for each item and set, about the first evaluated item that shares the most.
    """
    if not isinstance(evaluated, Mapping):
        raise ValueError(f"evaluated must be a mapping of names to items, got a {type(evaluated).__name__}: write {{'test': items}}")
    require_items(items, ("id", "image", "prompt"))
    taught = [
        (str(item_field(item, "id")), _pictures(item_field(item, "image")), plain(item_field(item, "prompt")))
        for item in take(items, range(len(items)))
    ]
    rows = []
    for name, others in evaluated.items():
        require_items(others, ("id", "prompt", *fields))
        pictures: dict[str, str] = {}
        asked: dict[tuple[str, str], str] = {}
        for other in take(others, range(len(others))):
            for field in fields:
                shown = item_field(other, field)
                for picture in () if shown is None else _pictures(shown):
                    pictures.setdefault(picture, str(item_field(other, "id")))
                    asked.setdefault((picture, plain(item_field(other, "prompt"))), str(item_field(other, "id")))
        for item, shown, prompt in taught:
            both = next((asked[one, prompt] for one in shown if (one, prompt) in asked), None)
            either = next((pictures[one] for one in shown if one in pictures), None)
            if both is not None:
                rows.append((item, str(name), both, "picture and prompt"))
            elif either is not None:
                rows.append((item, str(name), either, "picture"))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def require_disjoint(items: Sequence, evaluated: Mapping[str, Sequence], fields: Sequence[str] = ("image",)) -> None:
    """Refuse items that show a picture of a set that is evaluated on; see `leaks`.

    Raises
    ------
    ValueError
        One sentence with their number and the first of them.
    """
    found = leaks(items, evaluated, fields)
    if len(found):
        first = found.iloc[0]
        raise ValueError(
            f"{found['item'].nunique()} of {len(items)} items that are taught show a picture that is evaluated on ({first['what']} of item "
            f"{first['item']!r} is that of {first['evaluated_item']!r} in '{first['evaluated']}'): leave them out of one of the two"
        )


def _pictures(image) -> list[str]:
    return [picture_digest(one) for one in (image if isinstance(image, list | tuple) else [image])]
