"""Which of an item's candidates a sentence names: "The circle is red." says red.

``SPOKEN``                    the scorer of free answers to questions with candidates
``named(output, candidates)``  the candidate, or None where the text names none, or several that contradict each other

Text and candidates are read alike: small letters, no punctuation, no articles, contractions written out ("isn't", "is not"), number words as
digits ("two", "2"), "upper" and "lower" as "top" and "bottom". Then, in this order:

1. the whole text is a candidate;
2. where the candidates are yes and no: the first word (after "the answer is") decides, unless the other one follows as a word of its own ("Yes and no"). Without such a
   word a statement is a yes and a negated one ("There is no red circle", "The two are not alike") a no; a text that says it does not know is
   neither;
3. else every candidate in the text is a mention, also in the plural; the longest one counts where they lie in each other ("dark red" is not "red").
   A mention is denied by a negation before it in its clause ("not red", "neither red nor blue", "rather than red"), or right behind it ("red is
   not"). A clause ends at punctuation and at "but", "instead" and "it is". What is left must be one candidate, or several of which one holds all
   others.

A denied mention names nothing, even where only two candidates are left. "One" after an adjective or "the" ("the red one") is no number, and
"no circles" is zero where zero is a candidate.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from vlm_core.items import item_field
from vlm_core.scoring.scorer import Scorer

__all__ = ["SPOKEN", "named"]

_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
).split()
_SAME = {**{word: str(number) for number, word in enumerate(_NUMBERS)}, "upper": "top", "lower": "bottom", "grey": "gray"}
_ARTICLES = {"a", "an", "the"}
_NEGATIONS = {"not", "no", "never", "without", "neither", "nor", "except"}
_PHRASES = {"rather than": "without", "instead of": "without", "other than": "without", "anything but": "without"}
_UNKNOWING = re.compile(
    r"\b(?:not (?:sure|certain|clear|possible|able|enough)|(?:do|can|could) not (?:know|tell|see|say|determine|answer)|"
    r"unclear|unsure|unable|unknown)\b"
)
_END = "|"  # of a clause


def named(output: str, candidates: Sequence[str]) -> str | None:
    """The candidate that a text names; None where it names none, or several.

    Parameters
    ----------
    output : str
        As the subject wrote it.
    candidates : sequence of str
    """
    read = {candidate: tuple(one for one in _words(candidate) if one != _END) for candidate in candidates}
    said = _words(output)
    plain = tuple(one for one in said if one != _END)
    whole = [candidate for candidate, words in read.items() if words and words == plain]
    if whole:
        return whole[0]
    if set(read.values()) == {("yes",), ("no",)}:
        answer = _yes_or_no(said)
        return next((candidate for candidate, words in read.items() if words == (answer,)), None)
    affirmed = {candidate for candidate, place in _mentions(said, read) if not _denied(said, place, len(read[candidate]))}
    if len(affirmed) > 1:  # "One" beside another number is a pronoun
        affirmed -= {candidate for candidate in affirmed if read[candidate] == ("1",) and "1" not in output}
    if not affirmed:
        none = [candidate for candidate, words in read.items() if words == ("0",)]
        return none[0] if none and {"no", "none"} & set(plain) and not any(word.isdigit() for word in plain) else None
    longest = [one for one in affirmed if all(_holds(read[one], read[other]) for other in affirmed)]
    return longest[0] if longest else None


def _words(text: str) -> list[str]:
    """Words as they are compared, with the ends of clauses between them."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    text = re.sub(r"\bcan(?:not|'t)\b", "can not", text)
    text = re.sub(r"\bwon't\b", "will not", text)
    text = re.sub(r"n't\b", " not", text)
    text = re.sub(r"'(?:s|re|m)\b", " is", text)
    for phrase, word in _PHRASES.items():
        text = text.replace(phrase, word)
    text = re.sub(r"\b(?:but|instead|however|it is|they are)\b", f" {_END} ", text)
    found = re.findall(r"\w+|[.,;:!?\n|]", text.replace("_", " "))
    return [_END if not word[0].isalnum() else _SAME.get(word, word) for word in found if word not in _ARTICLES]


def _yes_or_no(said: list[str]) -> str | None:
    place = said.index("answer") + 1 if "answer" in said[:2] else 0
    if place and said[place : place + 1] in (["is"], [_END]):
        said = said[place + 1 :]
    words = [word for word in said if word != _END]
    if not words or _UNKNOWING.search(" ".join(words)):
        return None
    first = words[0]
    if first in ("yes", "no"):
        other = "no" if first == "yes" else "yes"
        # "No" within a sentence belongs to what is not there: "Yes, there is a circle and no square".
        alone = [place for place, word in enumerate(said) if word == other and said[place + 1 : place + 2] in ([], [_END])]
        return None if alone or words[1:3] in (["and", other], ["or", other]) else first
    return ("no" if _NEGATIONS & set(words) else "yes") if {"is", "are", "does", "do", "has", "have", "there"} & set(words) else None


def _mentions(said: list[str], read: dict[str, tuple[str, ...]]) -> list[tuple[str, int]]:
    """Candidates with where they stand, without those that lie in a longer one."""
    found = [
        (candidate, place)
        for candidate, words in read.items()
        for place in range(len(said) - len(words) + 1)
        if words and all(_same(one, other) for one, other in zip(said[place : place + len(words)], words, strict=True))
    ]

    def within(one: tuple[str, int], other: tuple[str, int]) -> bool:
        length, longer = len(read[one[0]]), len(read[other[0]])
        return longer > length and other[1] <= one[1] and one[1] + length <= other[1] + longer

    return [one for one in found if not any(within(one, other) for other in found)]


def _same(word: str, candidate: str) -> bool:
    return word == candidate or (not candidate.isdigit() and word in (f"{candidate}s", f"{candidate}es"))


def _denied(said: list[str], place: int, length: int) -> bool:
    """Whether a negation lies before a mention in its clause, or right behind it."""
    if said[place + length : place + length + 2] in (["is", "not"], ["are", "not"], ["was", "not"], ["is", "wrong"]):
        return True
    for word in reversed(said[:place]):
        if word == _END:
            return False
        if word in _NEGATIONS:
            return True
    return False


def _holds(longer: tuple[str, ...], part: tuple[str, ...]) -> bool:
    return any(longer[place : place + len(part)] == part for place in range(len(longer) - len(part) + 1))


def _spoken(output: str, item: Any) -> float:
    return float(named(output, [str(one) for one in item_field(item, "candidates")]) == str(item_field(item, "answer")))


SPOKEN = Scorer("spoken", "which candidate a sentence names, by the rules in vlm_core.scoring.spoken", _spoken, needs=("candidates",))
