"""What a prompt and its answer are written like for one subject.

``Wording``                chat template, what lies between prompt and answer, answers as tokens
``require_texts(...)``     refuse what is no list of texts
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from vlm_core.errors import SubjectError
from vlm_core.families.family import Family
from vlm_core.secrets import hidden

__all__ = ["Wording", "require_texts"]


class Wording:
    """The texts of one processor.

    Parameters
    ----------
    processor : its processor
    family : Family
    name : str
        The subject's, for errors.

    Attributes
    ----------
    known : dict of str to tuple of int
        Token ids of the answers asked for.
    """

    def __init__(self, processor: Any, family: Family, name: str) -> None:
        self.processor = processor
        self.family = family
        self.name = name
        self.known: dict[str, tuple[int, ...]] = {}
        self._kept_lead: str | None = None

    def render(self, prompt: str, answer: str | None = None) -> str:
        """The text given to the processor: chat template where there is one, up to where the answer starts.

        ``prompt`` is the user's text without image token. With ``answer`` the text goes on to the end of the answer.
        """
        require_texts([prompt, *([] if answer is None else [answer])], "prompt and answer")
        text = self.turns(prompt)
        if answer is None:
            return text
        return text + ("\n" if self.family.answer_apart else self.lead()) + answer

    def turns(self, prompt: str, answer: str | None = None, n_images: int = 1) -> str:
        """The whole text of a prompt with its images, and with its answer."""
        if getattr(self.processor, "chat_template", None):
            content = [*({"type": "image"} for _ in range(n_images)), {"type": "text", "text": prompt}]
            turns = [{"role": "user", "content": content}]
            if answer is not None:
                turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            try:
                return self.processor.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=False)
            except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
                raise SubjectError(
                    f"subject '{self.name}' has a chat template that cannot be rendered ({hidden(str(error))}): it gets one user turn of "
                    f"images and text, and an answer; templates run in transformers' sandbox."
                ) from error
        placeholder = self.family.placeholder
        shown = placeholder.format(self.processor.image_token) * n_images if placeholder else ""
        return shown + prompt + ("" if answer is None else f" {answer}")

    def lead(self) -> str:
        """The white space between the prompt and the answer, as the subject's own template writes it."""
        if self._kept_lead is None and self.family.answer_apart:
            self._kept_lead = ""
        elif self._kept_lead is None:
            start, whole = self.turns("question"), self.turns("question", "reply")
            rest = whole[len(start) :] if whole.startswith(start) else None
            if rest is not None and rest.lstrip().startswith("reply"):
                self._kept_lead = rest[: len(rest) - len(rest.lstrip())]
            else:
                self._kept_lead = "" if start[-1:].isspace() else " "
        return self._kept_lead

    def continuation(self, answer: str) -> tuple[int, ...]:
        """Token ids of ``answer`` as it follows a prompt.

        Raises
        ------
        SubjectError
            If the tokenizer gives it no token, or only unknown ones.
        """
        if not isinstance(answer, str):
            raise ValueError(f"an answer must be a str, got {answer!r} ({type(answer).__name__}): write it as the model would")
        if answer not in self.known:
            tokenizer = self.processor.tokenizer
            anchor = self.turns("question")[-1:] if self.lead() else ""
            anchor = anchor if anchor.strip() else ""
            before = tokenizer(anchor, add_special_tokens=False)["input_ids"] if anchor else []
            ids = tokenizer(anchor + self.lead() + answer, add_special_tokens=False)["input_ids"]
            if ids[: len(before)] == before and len(ids) > len(before):
                ids = ids[len(before) :]
            else:
                ids = tokenizer(self.lead() + answer, add_special_tokens=False)["input_ids"]
            unknown = tokenizer.unk_token_id
            if not ids or (unknown is not None and unknown in ids):
                raise SubjectError(
                    f"subject '{self.name}' cannot write the answer '{answer}': its tokenizer does not know all of it; "
                    f"use candidates from its vocabulary."
                )
            self.known[answer] = tuple(ids)
        return self.known[answer]


def require_texts(texts: Any, name: str) -> None:
    """Refuse what is no list of texts.

    Raises
    ------
    ValueError
    """
    if isinstance(texts, str) or not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
        raise ValueError(f"{name} must be a list of str, got {texts!r:.60} ({type(texts).__name__}): write [text], also of one")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a list of str, got {text!r:.60} ({type(text).__name__}) among them")
