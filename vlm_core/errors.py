"""The one error that a researcher sees when a model cannot be measured.

``SubjectError`` carries a whole sentence: what is wrong with which subject, what was expected, what to do.
"""

__all__ = ["SubjectError"]


class SubjectError(Exception):
    """A subject (checkpoint, model or processor) that cannot be measured, in one clear sentence."""
