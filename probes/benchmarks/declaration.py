"""What a benchmark is, as a declaration: where it is, what a row of it says, how it is scored, who may use it.

``Benchmark``   the declaration
``Join``        pictures that lie in another part of the set than the questions
``WORD``, ``LETTER``   what prompts end in
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets

__all__ = ["LETTER", "WORD", "Benchmark", "Join", "TEXT", "TEXTS"]

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
TEXT = datasets.Value("string")
TEXTS = datasets.List(TEXT)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Join:
    """Pictures in another configuration of the set.

    Parameters
    ----------
    config : str
        Its name.
    on : str
        The column of a question that names its picture.
    key, image : str
        The columns of the pictures: their name, and the picture.
    """

    config: str
    on: str
    key: str = "id"
    image: str = "image"


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark.

    Parameters
    ----------
    name : str
        What ``load`` calls it.
    ids : tuple of str
        On the Hugging Face Hub: the present id, then older ones that are tried where there is no such set. Empty: it is not there.
    split : str
    item : callable
        ``item(row, id, seed) -> fields of an item`` but ``id``, ``scene_id``, ``image`` and ``scorer``. ``id`` and ``seed`` decide the
        order of options where the set has the right one first.
    id : callable
        ``id(row) -> str``. Two rows of one id are told apart by their order.
    scorer : str
        Its name in ``vlm_core.scoring.SCORERS``.
    licence, citation : str
    verified : str
        What of this declaration is known from where, and what is not.
    columns : mapping of name to feature
        The columns that are read, with their types in the set.
    config : str, optional
    scene : callable, optional
        ``scene(row) -> str``, the picture's own name; default: its pixels name it.
    image : str
        The column of the picture.
    key : tuple of str, optional
        The columns that ``id`` needs, where it does without the picture: a subset is then chosen without reading pictures.
    join : Join, optional
    extra : mapping of name to feature, optional
        Fields of its items beside the usual ones.
    candidates : bool
        Whether its items have them.
    get : str
        How the data is had where it is not on the Hub.
    rows : callable, optional
        ``rows(folder, split) -> rows``, of a set in files of its own kind; pictures are paths.
    n : int, optional
        How many items the published set has; they are chosen unless another number is asked for.
    """

    name: str
    ids: tuple[str, ...]
    split: str
    item: Callable[[Row, str, int], dict[str, Any]]
    id: Callable[[Row], str]
    scorer: str
    licence: str
    citation: str
    verified: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    config: str | None = None
    scene: Callable[[Row], str] | None = None
    image: str = "image"
    key: tuple[str, ...] = ()
    join: Join | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    candidates: bool = False
    get: str = ""
    rows: Callable[[Any, str], Iterable[Row]] | None = None
    n: int | None = None

    @property
    def features(self) -> datasets.Features:
        """The types of its items' fields."""
        usual = {"id": TEXT, "scene_id": TEXT, "task": TEXT, "image": datasets.Image(), "prompt": TEXT, "answer": TEXT, "references": TEXTS}
        choice = {"candidates": TEXTS} if self.candidates else {}
        return datasets.Features({**usual, **choice, "scorer": TEXT, **self.extra})
