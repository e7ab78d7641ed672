"""The errors that a researcher sees when a model, or something of it, cannot be measured. Each carries a whole sentence.

``SubjectError``    nothing of the subject can be measured: what is wrong with which subject, what was expected, what to do
``NotMeasurable``   one quantity does not exist on this subject or these items, others do: a claim about it is invalid, not in error
"""

__all__ = ["NotMeasurable", "SubjectError"]


class SubjectError(Exception):
    """A subject (checkpoint, model or processor) that cannot be measured, in one clear sentence."""


class NotMeasurable(ValueError):
    """What was asked for does not exist on this subject or these items (image tokens without places, an object that no token shows)."""
