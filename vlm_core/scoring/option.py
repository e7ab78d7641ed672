"""The letter of an option in what a model wrote.

``OPTION``                           the scorer of multiple choice
``letter_in(output, letters, texts)``  the letter, or None

The first rule that finds a letter decides; where it finds two different ones nothing does, and the answer is wrong:

1. the whole text is a letter: ``B``, ``(b)``, ``B.``, ``**B**``;
2. it begins with two letters that it does not choose between, ``A or B``, ``(A) and (B)``, ``A/B``: none, whatever follows; else it
   begins with a marked capital letter: ``B. cat``, ``(B) cat``, ``B: cat``, ``B) cat``, ``B, cat``, or the letter and a line break;
3. it says that a letter is the answer: ``the answer is B``, ``Answer: (b)``, ``option B``, ``I choose B``; of an answer that is withdrawn
   ("B? No, the answer is C") each such saying counts; a small "a" before another word is none ("the answer is a cat");
4. it holds a letter in brackets, ``(B)``, or in stars, ``**B**``;
5. it holds a capital letter as a word of its own; "A" and "I" count here only where they end the text or a mark follows, since they are
   words as well;
6. it is the text of an option, or holds that of one option and of no other (an option within a longer one that is held does not count).

An answer that mentions every option while it reasons is found by rule 3 if it ends in one, by none otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_core.items import plain
from vlm_core.scoring.scorer import Scorer, accepted

__all__ = ["OPTION", "letter_in"]


def letter_in(output: str, letters: Sequence[str], texts: Sequence[str] = ()) -> str | None:
    """Which option a text names; None where it names none, or several.

    Parameters
    ----------
    letters : sequence of str
        Of the options, capitals.
    texts : sequence of str, optional
        What the options say, in the order of the letters.
    """
    said = output.strip()
    either = "|".join(map(re.escape, letters))
    small = f"{either}|{either.lower()}"
    whole = re.fullmatch(rf"[\s(\[*\"'`]*({small})[\s)\]*\"'`.:,;!]*", said)
    if whole:
        return whole[1].upper()
    if re.match(rf"[\[(*]*(?:{either})[)\]*]*\s*(?:\bor\b|\band\b|[/&,])\s*[\[(*]*(?:{either})\b", said):
        return None
    begins = re.match(rf"[\[(*]*({either})(?:[.):\]*,]|\s*\n)", said)
    if begins:
        return begins[1]
    named = r"\b(?i:answer|choice|option|choose|select|pick)\b(?i:\s+(?:is|was|would\s+be|must\s+be))?\s*:?\s*(?i:option\s+)?"
    for pattern in (
        rf"{named}[(\[*\"'`]*({either}|{_small(letters)})\b(?!'\w)",
        rf"\(({either})\)|\[({either})\]|\*\*({either})\*\*",
        _alone(letters),
    ):
        found = {next(part for part in one.groups() if part).upper() for one in re.finditer(pattern, said)}
        if found:
            return found.pop() if len(found) == 1 else None
    return _by_text(said, letters, texts)


def _small(letters: Sequence[str]) -> str:
    """Small letters; "a" and "i" are words as well, unless a mark, the end of the line or nothing follows."""
    return "|".join(rf"{one}(?=[^\w\s]|[^\S\n]*(?:\n|$))" if one in ("a", "i") else re.escape(one) for one in map(str.lower, letters))


def _alone(letters: Sequence[str]) -> str:
    words = [letter for letter in letters if letter in ("A", "I")]
    others = [letter for letter in letters if letter not in words]
    parts = [rf"\b({'|'.join(others)})\b(?!'\w)"] if others else []
    parts += [rf"\b({'|'.join(words)})(?=[.,:;)!]|\s*$)"] if words else []
    return "|".join(parts)


def _by_text(said: str, letters: Sequence[str], texts: Sequence[str]) -> str | None:
    said = f" {plain(said)} "
    held = {letter: plain(text) for letter, text in zip(letters, texts, strict=False) if plain(text) and f" {plain(text)} " in said}
    # "red" within "dark red": the longer one is what was said.
    longest = [
        letter for letter, text in held.items() if not any(f" {text} " in f" {other} " and text != other for other in held.values())
    ]
    return longest[0] if len(longest) == 1 else None


def _option(output: str, item: Any) -> float:
    def field(name: str) -> Sequence[str]:
        return (item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)) or ()

    answer = accepted(item)[0]
    letters = list(field("candidates"))
    if answer not in letters:
        raise ValueError(f"an item's candidates are the letters of its options, got {letters} with the answer {answer!r}")
    return float(letter_in(output, letters, list(field("options"))) == answer)


OPTION = Scorer(
    "option",
    "the letter of the right option, MMStar (Chen et al. 2024) and ScienceQA (Lu et al. 2022); how it is found: vlm_core.scoring.option",
    _option,
    needs=("candidates",),
)
