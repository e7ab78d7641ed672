"""What of taught answers is kept, and how much was dropped for which reason.

``Kept``                  positions that are kept, and counts of what was dropped
``deduplicated``          one item of those that ask the same about the same picture
``within_length``         answers that are neither empty nor long
``writable``              answers that a student's tokenizer has tokens for
``self_consistent``       samples → the answer most of them give, with their agreement
``agreeing``              items whose samples agree often enough
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm_core.identity import picture_digest
from vlm_core.interventions.numeric import integer, real
from vlm_core.items import item_field, plain, require_items, take

__all__ = ["Kept", "agreeing", "deduplicated", "self_consistent", "within_length", "writable"]


@dataclass(frozen=True)
class Kept:
    """What a filter left.

    Parameters
    ----------
    name : str
        Of the filter.
    kept : tuple of int
        Positions, in order.
    dropped : mapping of str to int
        How many were dropped, by reason.
    """

    name: str
    kept: tuple[int, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)

    def of(self, values: Sequence) -> list:
        """Those of ``values`` (items, answers, samples) that are kept."""
        if len(values) != len(self.kept) + sum(self.dropped.values()):
            raise ValueError(f"'{self.name}' looked at {len(self.kept) + sum(self.dropped.values())} values, not at these {len(values)}")
        return take(values, self.kept)


def deduplicated(items: Sequence, answers: Sequence[str] | None = None) -> Kept:
    """The first of the items that ask the same (ignoring case and punctuation) about the same picture (by its pixels).

    Parameters
    ----------
    answers : sequence of str, optional
        One an item. Where the duplicates' answers contradict each other, all of them are dropped.
    """
    require_items(items, ("image", "prompt"))
    if answers is not None and len(answers) != len(items):
        raise ValueError(f"{len(items)} items but {len(answers)} answers: give one answer an item")
    groups: dict[tuple[str, str], list[int]] = {}
    for number, item in enumerate(take(items, range(len(items)))):
        groups.setdefault((picture_digest(item_field(item, "image")), plain(item_field(item, "prompt"))), []).append(number)
    kept, dropped = [], Counter()
    for members in groups.values():
        if answers is not None and len({plain(answers[number]) for number in members}) > 1:
            dropped["contradicting duplicates"] += len(members)
            continue
        kept.append(members[0])
        dropped["duplicate"] += len(members) - 1
    return Kept("deduplicated", tuple(sorted(kept)), dict(+dropped))


def within_length(answers: Sequence[str], at_most: int, at_least: int = 1, length: Callable[[str], int] | None = None) -> Kept:
    """Answers of ``at_least`` to ``at_most`` words.

    Parameters
    ----------
    length : callable, optional
        What to count instead, such as ``lambda text: len(tokenizer(text).input_ids)``.
    """
    integer(at_least, "at_least", least=0)
    integer(at_most, "at_most", least=at_least)
    count = (lambda text: len(text.split())) if length is None else length
    kept, dropped = [], Counter()
    for number, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise ValueError(f"answer {number} is {answer!r:.60} ({type(answer).__name__}): a text is needed")
        n = count(answer)
        if n < at_least:
            dropped[f"shorter than {at_least}"] += 1
        elif n > at_most:
            dropped[f"longer than {at_most}"] += 1
        else:
            kept.append(number)
    return Kept("within_length", tuple(kept), dict(dropped))


def writable(answers: Sequence[str], tokenizer) -> Kept:
    """Answers that a student can write: its tokenizer has tokens for all of them, and knows every one.

    Another answer would teach the unknown token. A tokenizer without one (bytes, characters) writes everything.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The student's.
    """
    unknown = tokenizer.unk_token_id
    kept, dropped = [], Counter()
    for number, answer in enumerate(answers):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not ids:
            dropped["no token for it"] += 1
        elif unknown is not None and unknown in ids:
            dropped["words that the student does not know"] += 1
        else:
            kept.append(number)
    return Kept("writable", tuple(kept), dict(dropped))


def self_consistent(samples: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """The answer that most samples of an item give (Wang et al. 2023, arXiv:2203.11171), and how many do.

    Samples that differ in case, punctuation or spacing alone count as one answer, written as its first; of answers that tie, the first.

    Returns
    -------
    answers : list of str
    agreement : float array ``[item]``
        Share of the item's samples that give it, in (0, 1].

    Raises
    ------
    ValueError
        For an item without samples.
    """
    answers, agreement = [], []
    for number, said in enumerate(samples):
        if isinstance(said, str) or not len(said) or not all(isinstance(one, str) for one in said):
            raise ValueError(f"the samples of item {number} are {said!r:.60}: at least one text in a list is needed")
        counts = Counter(map(plain, said))
        most, n = counts.most_common(1)[0]
        answers.append(next(one for one in said if plain(one) == most))
        agreement.append(n / len(said))
    return answers, np.array(agreement, dtype=float)


def agreeing(samples: Sequence[Sequence[str]], at_least: float) -> Kept:
    """Items of whose samples at least a share of ``at_least`` (0 to 1) give one answer."""
    if not 0 <= real(at_least, "at_least") <= 1:
        raise ValueError(f"at_least is a share of samples, 0 to 1, got {at_least}")
    _, agreement = self_consistent(samples)
    # A share such as 0.7 is not exact in binary.
    kept = tuple(np.flatnonzero(agreement >= at_least - 1e-9).tolist())
    n = len(agreement) - len(kept)
    return Kept("agreeing", kept, {f"agreement below {at_least:g}": n} if n else {})


