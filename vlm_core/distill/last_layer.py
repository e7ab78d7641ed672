"""The last layer's feed-forward, of the tokens that are read alone.

``read_alone(subject, read)``   while supervised training reads the final hidden state of some tokens only

Nothing comes after the last layer's feed-forward but the loss: what it makes of a token that is not read is of no use, and no gradient comes back
through it. A student of few layers whose prompts are long and answers short spends a fifth of its operations there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vlm_core.subjects.subject import Subject

__all__ = ["read_alone"]


@contextmanager
def read_alone(subject: Subject, read: torch.Tensor) -> Iterator[None]:
    """In this context the last layer's feed-forward gives zeros for tokens that are not read; loss and gradients of those that are stay the same, up to rounding.

    A feed-forward in which tokens may meet (experts that are chosen for several together, norms over them), or a sequence of another length
    (a recipe lets go of tokens) is computed whole. Activations must not be computed again on the way back, which would be outside of this context.

    Parameters
    ----------
    read : bool Tensor ``[row, token]``
    """
    module = subject.anatomy.mlps[-1]
    if not _by_token(module):
        yield
        return
    narrowed: list[torch.Tensor] = []

    def narrow(_, args: tuple, kwargs: dict):
        if kwargs or len(args) != 1 or args[0].shape[:-1] != read.shape:
            return None
        narrowed[:] = [args[0][read][None]]
        return tuple(narrowed), kwargs

    def widen(_, args: tuple, found: torch.Tensor):
        if not narrowed or args[0] is not narrowed[0]:
            return None
        return found.new_zeros(*read.shape, found.shape[-1]).index_put((read,), found[0])

    with module.register_forward_pre_hook(narrow, with_kwargs=True), module.register_forward_hook(widen, prepend=True):
        yield


def _by_token(module: nn.Module) -> bool:
    """Whether a module is made of linear maps alone, so that it treats each token by itself."""
    if any(isinstance(one, nn.ModuleList) for one in module.modules()):
        return False
    own = [one for one in module.modules() if next(one.parameters(recurse=False), None) is not None]
    return bool(own) and all(isinstance(one, nn.Linear) for one in own)
