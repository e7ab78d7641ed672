"""The last layer, of the tokens that are read alone.

``read_alone(subject, read)``   while training reads the final hidden state of some tokens only
``tokens_before(marked)``       those that are read where the loss is about marked tokens

Nothing comes after the last layer but the loss: what a token that is not read learns from the others there, and what the feed-forward makes of it,
is of no use, and no gradient comes back through it. Keys and values of all tokens are. A student of few layers whose prompts are long and answers short
spends a quarter of its operations there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from vlm_core.seam.masks import causal_mask
from vlm_core.seam.seam import attending, run_at
from vlm_core.subjects.subject import Subject

__all__ = ["read_alone", "tokens_before"]


def tokens_before(marked: torch.Tensor) -> torch.Tensor:
    """Tokens whose next one is marked, bool ``[row, token]``: what is said of a token is read from the one before."""
    return nn.functional.pad(marked[:, 1:].bool(), (0, 1))


@contextmanager
def read_alone(subject: Subject, read: torch.Tensor) -> Iterator[None]:
    """In this context the last layer gives nothing for tokens that are not read; loss and gradients of those that are stay the same, up to rounding.

    Products of queries with keys and of weights with values, the output projection and the feed-forward are of these tokens alone. Under a recipe,
    sequences are those that came in.

    A layer with a feed-forward in which tokens may meet (experts that are chosen for several together, norms over them) is computed whole, and so
    are passes over sequences of another length. Eager attention (which is asked for its maps), one that drops at random, and one of which half is
    read attends whole. Activations must not be computed again on the way back, which would be outside of this context.

    Parameters
    ----------
    read : bool Tensor ``[row, token]``
    """
    anatomy = subject.anatomy
    attention, feed_forward = anatomy.attentions[-1], anatomy.mlps[-1]
    if not _by_token(feed_forward):
        yield
        return
    tokens = _Read(read, attention)
    with ExitStack() as stack:
        for module in (feed_forward, anatomy.output_projection(anatomy.n_layers - 1)):
            if _by_token(module):
                _narrowed(module, tokens, stack)
        if subject.seam.original == "sdpa":
            stack.enter_context(attending(attention, tokens.attend))
        yield


class _Read:
    """The tokens that are read, where the last layer has them.

    Parameters
    ----------
    read : bool Tensor ``[row, token]``
        Of the sequences that came in.
    """

    def __init__(self, read: torch.Tensor, attention: nn.Module) -> None:
        self._read, self._attention = read, attention

    def among(self, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Those of ``shape`` ``[row, token]``; None for other sequences than these."""
        run, _ = run_at(self._attention)
        read = self._read
        if run is not None:
            tokens = run.tokens.on(read.device)
            if tokens.source is not None or read.shape != run.shape:
                return None
            if tokens.index is not None:
                read = read.gather(1, tokens.index) & tokens.valid
        return read if read.shape == shape else None

    def attend(self, original, module, query, key, value, mask, *args, **kwargs):
        """The attention of the queries of tokens that are read; zeros for others."""
        read = None if _needs_all(module, query, key, mask, kwargs) else self.among((query.shape[0], query.shape[2]))
        counts = None if read is None else read.sum(1)
        most = 0 if counts is None else int(counts.max())
        if not 0 < 2 * most < query.shape[2]:
            return original(module, query, key, value, mask, *args, **kwargs)
        if mask is None:
            mask = causal_mask(query.shape[2], key.shape[2], query.device)
        there = torch.arange(most, device=read.device) < counts[:, None]
        places = torch.zeros_like(there, dtype=torch.long)
        places[there] = read.nonzero()[:, 1]
        if mask.shape[2] > 1:
            rows = places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            mask = mask.expand(len(places), -1, -1, -1).gather(2, rows)
        asked = query.gather(2, places[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        found, maps = original(module, asked, key, value, mask, *args, **kwargs)
        return found.new_zeros(*read.shape, *found.shape[2:]).index_put((read,), found[there]), maps


def _needs_all(module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, kwargs: dict) -> bool:
    """Whether a query's attention depends on more than itself, the keys and its row of the mask."""
    biased = any(isinstance(one, torch.Tensor) and one.ndim == 4 for one in kwargs.values())
    causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True) and query.shape[2] == key.shape[2]
    return biased or bool(kwargs.get("dropout")) or (mask is None and not causal)


def _narrowed(module: nn.Module, tokens: _Read, stack: ExitStack) -> None:
    """Until the stack is closed, a module treats the tokens that are read alone, and gives zeros for others."""
    narrowed: list[torch.Tensor] = []
    read: list[torch.Tensor] = []

    def narrow(_, args: tuple, kwargs: dict):
        among = None if kwargs or len(args) != 1 else tokens.among(args[0].shape[:-1])
        if among is None:
            return None
        narrowed[:], read[:] = [args[0][among][None]], [among]
        return tuple(narrowed), kwargs

    def widen(_, args: tuple, found: torch.Tensor):
        if not narrowed or args[0] is not narrowed[0]:
            return None
        return found.new_zeros(*read[0].shape, found.shape[-1]).index_put((read[0],), found[0])

    stack.enter_context(module.register_forward_pre_hook(narrow, with_kwargs=True))
    stack.enter_context(module.register_forward_hook(widen, prepend=True))


def _by_token(module: nn.Module) -> bool:
    """Whether a module is made of linear maps alone, so that it treats each token by itself."""
    if any(isinstance(one, nn.ModuleList) for one in module.modules()):
        return False
    own = [one for one in module.modules() if next(one.parameters(recurse=False), None) is not None]
    return bool(own) and all(isinstance(one, nn.Linear) for one in own)
