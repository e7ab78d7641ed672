"""What can be seen of a batch at some layer.

``Tokens``           which token is what, and where it comes from
``AttentionView``    one attention, for observers; its probabilities come in blocks of queries, never as a whole map
``AttentionBlock``   one such block
``LayerView``        the residual stream that enters a layer, for observers
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace

import torch
from torch import nn

__all__ = ["GROUPS", "MASK_KEPT", "AttentionBlock", "AttentionView", "LayerView", "Tokens"]

GROUPS = ("image", "text", "question", "preamble", "last", "bos", "answer", "all")
"""Token groups that every sequence has; a batch may bring named ones of its own (``Tokens.named``)."""

# Scores of one block: about what a core's second-level cache holds, but enough queries for a matrix product to pay.
_BLOCK_SCORES = 2**18
_BLOCK_QUERIES = 16
MASK_KEPT = 2**15
"""A mask of at most so many numbers is kept for other layers: of a larger one, the product costs far more than making it again."""
_PLAIN = nullcontext()
_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, eq=False)
class Tokens:
    """Which tokens a batch holds at some layer.

    Parameters
    ----------
    image, valid : BoolTensor ``[element, token]``
        Image tokens; tokens that are neither padding nor dropped.
    rows : LongTensor ``[element]``
        A row that each element stands for.
    source : LongTensor ``[element]`` or None
        Sequence of the incoming batch that each element comes from; None where it is the same.
    index : LongTensor ``[element, token]`` or None
        Original position of each token; None where nothing was dropped.
    left : bool
        Whether rows are filled up on the left.
    begun : LongTensor ``[element]`` or None
        Original position of each prompt's first token, whether it is still there or not; None where nothing was dropped.
    named : dict of str to BoolTensor ``[element, token]``
        Further groups ("object", "background"), see ``group``.
    """

    image: torch.Tensor
    valid: torch.Tensor
    rows: torch.Tensor
    source: torch.Tensor | None = None
    index: torch.Tensor | None = None
    left: bool = False
    begun: torch.Tensor | None = None
    named: dict[str, torch.Tensor] = field(default_factory=dict)
    _kept: dict = field(init=False, repr=False, default_factory=dict)

    def kept(self, key: tuple, compute: Callable, *args):
        """``compute(*args)`` on the first call with ``key``, the same afterwards: layers share their tokens, so most is asked often."""
        found = self._kept.get(key)
        if found is None:
            # Not as inference tensors: a run with gradients may ask next.
            with torch.inference_mode(False):
                found = self._kept[key] = compute(*args)
        return found

    def on(self, device: torch.device) -> Tokens:
        """The same tokens on a layer's own device (``device_map="auto"`` spreads layers over several)."""
        return self if self.valid.device == device else self.kept(("on", device), lambda: self._moved(device))

    def _moved(self, device: torch.device) -> Tokens:
        def move(value):
            if isinstance(value, torch.Tensor):
                return value.to(device)
            return {name: move(one) for name, one in value.items()} if isinstance(value, dict) else value

        return Tokens(**{one.name: move(getattr(self, one.name)) for one in fields(self) if one.init})

    @property
    def known(self) -> tuple[str, ...]:
        """Names of its token groups."""
        return tuple(dict.fromkeys((*GROUPS, *self.named)))

    @property
    def prompt(self) -> torch.Tensor:
        """Tokens of the prompt: valid, and not of an answer; ``[element, token]``."""
        return self.valid & ~self.named["answer"] if "answer" in self.named else self.valid

    @property
    def start(self) -> torch.Tensor:
        """Column of the incoming batch where each prompt begins: what padding lies left of it, ``[element]``."""
        return self.kept(("start",), lambda: self.valid.int().argmax(1)) if self.begun is None else self.begun

    @property
    def last(self) -> torch.Tensor:
        """Index of the prompt's last token, ``[element]``."""
        n = self.valid.shape[1]
        return self.kept(("last",), lambda: n - 1 - self.prompt.flip(1).int().argmax(1))

    def group(self, name: str) -> torch.Tensor:
        """Members of a token group, ``[element, token]``.

        ``image`` and ``text`` partition the valid tokens. ``preamble`` is the text before the first image token, and
        ``question`` the text after the last one (all text where there is no image); text between two images is in
        neither. Batches laid out alike share them: they are for reading. ``bos`` is the first valid token. ``answer`` are tokens that follow the prompt, appended or generated; they are text, and
        of the question's side. ``last`` are the tokens that an answer's tokens are read from: the last one of the prompt and every one of
        the answer. Other names are looked up in ``named``.

        Raises
        ------
        ValueError
            For an unknown group, with the known ones.
        """
        return self.kept(("group", name), lambda: self._group(name))

    def _group(self, name: str) -> torch.Tensor:
        if name == "image":
            return self.image & self.valid
        if name == "text":
            return self.valid ^ self.group("image")
        if name == "all":
            return self.valid
        if name in ("last", "bos"):
            where = self.last if name == "last" else self.valid.int().argmax(1)
            found = torch.arange(self.valid.shape[1], device=where.device) == where[:, None]
            return found | self.group("answer") if name == "last" and "answer" in self.named else found
        if name in self.named:
            return self.named[name] & self.valid
        if name == "answer":
            return torch.zeros_like(self.valid)
        if name in ("question", "preamble"):
            image = (self.image & self.valid).int()
            if name == "question":
                return self.valid & (image.flip(1).cumsum(1).flip(1) == 0)
            return self.valid & (image.cumsum(1) == 0) & (image.sum(1, keepdim=True) > 0)
        raise ValueError(f"there is no token group '{name}': this batch knows {', '.join(self.known)}")

    def members(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions ``[element, n]`` of a group's members in order, and which of them are real.

        Sequences with fewer members than the widest are filled up with positions of others.
        """
        return self.kept(("members", name), lambda: self._members(name))

    def _members(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if name == "last":
            return self.last[:, None], torch.ones_like(self.last[:, None], dtype=torch.bool)
        members = self.group(name)
        if members.shape[0] == 1:
            order = members[0].nonzero().T
            return order, torch.ones_like(order, dtype=torch.bool)
        n = int(members.sum(1).max())
        order = (~members).int().argsort(dim=1, stable=True)[:, :n]
        return order, members.gather(1, order)

    def pinned(self) -> Tokens:
        """The same with ``question`` and ``preamble`` named, so that they stay what they are when image tokens go."""
        pinned = {name: self.group(name) for name in ("question", "preamble") if name not in self.named}
        return replace(self, named={**self.named, **pinned})

    def extended(self, length: int) -> Tokens:
        """The same with generated text tokens appended up to ``length``: they belong to the question's side."""
        extra = length - self.valid.shape[1]
        if extra == 0:
            return self
        pad = nn.functional.pad
        known = {"answer": self.group("answer"), **self.named}
        return replace(
            self,
            image=pad(self.image, (0, extra)),
            valid=pad(self.valid, (0, extra), value=True),
            index=None,
            named={name: pad(members, (0, extra), value=name in ("question", "answer")) for name, members in known.items()},
        )


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """Attention of some queries of a group.

    ``positions``, ``real`` ``[element, n]``: where the queries are, and which of them are members at all (the others
    are filling, their numbers mean nothing). ``probabilities`` ``[element, head, n, key]``: keys that none of the
    queries can see may be cut off at the end.
    """

    positions: torch.Tensor
    real: torch.Tensor
    probabilities: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Asked:
    """Queries of a block: ``all_see`` leading keys need no causal mask, keys from ``some_see`` on are left out.

    ``whole``: all of them are members; ``first`` is the position of the first. ``bias`` ``[1, queries that share keys, some_see]``: added to the scores of a small block of one
    sequence, as `_later` has it; None for others.
    """

    positions: torch.Tensor
    real: torch.Tensor
    whole: bool
    all_see: int
    some_see: int
    first: int = 0
    bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Shared:
    """How ``AttentionView.shares`` goes about one sequence that attends causally; with nothing in it, by the mean map.

    For all queries, attention whose values say which group a key belongs to: ``values`` ``[1, kv head, key, head_dim]``. For some, one
    product of their attention with ``weights`` ``[query and key, group]``: ``where`` those are that see any of the groups (positions ``[query]``, or
    a slice), ``later`` ``[1, head that shares keys and query, key]`` what a causal order adds to their scores.
    """

    values: torch.Tensor | None = None
    where: torch.Tensor | slice | None = None
    later: torch.Tensor | None = None
    weights: torch.Tensor | None = None


_BY_MEAN = _Shared()


@dataclass(eq=False, slots=True)
class AttentionView:
    """What an observer sees inside one attention: tensors after interventions.

    ``query`` ``[element, head, query, head_dim]``; ``key``, ``value`` ``[element, kv head, key, head_dim]``;
    ``output`` ``[element, query, head, head_dim]`` before the output projection; ``mask`` the model's own, boolean or
    additive, None where it is causal; ``entered`` is read as ``hidden``, ``flat`` as ``unrotated``; ``crossed`` whether the keys are the
    image's, outside the sequence.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None
    tokens: Tokens
    entered: torch.Tensor | None = None
    crossed: bool = False
    flat: tuple[torch.Tensor, torch.Tensor] | None = None
    _kept: dict = field(default_factory=dict, repr=False)

    @property
    def unrotated(self) -> AttentionView | None:
        """The same attention if all tokens stood at one position; None where nothing is rotated, or no one reads it.

        Everything else stays: the layer's own input, its causal order, windows and caps. An observer that reads it says
        ``reads_unrotated = True``.
        """
        if self.flat is None:
            return None
        query, key = self.flat
        return replace(self, query=query, key=key, flat=None, _kept={})

    @property
    def hidden(self) -> torch.Tensor:
        """The residual stream that entered the layer, ``[element, token, hidden]``.

        Raises
        ------
        ValueError
            Where it was not kept: all observers of the run say ``reads_hidden = False``, or a policy reads the view.
        """
        if self.entered is None:
            raise ValueError(
                "view.hidden was not kept: an observer that reads it must not say reads_hidden = False, a policy reads the stream that "
                "enters its own layer"
            )
        return self.entered

    def keys_of(self, group: str) -> torch.Tensor:
        """Which keys belong to a token group, ``[element, key]``. Keys outside the sequence are the image's."""
        if not self.crossed:
            return self.tokens.group(group)
        belongs = group in ("image", "all")
        return torch.full((self.key.shape[0], self.key.shape[2]), belongs, dtype=torch.bool, device=self.key.device)

    def probabilities(self, queries: torch.Tensor) -> torch.Tensor:
        """Attention of the queries at ``[element, n]``: ``[element, head, n, key]``. The whole map is never built."""
        (asked,) = self._asked(queries, torch.ones_like(queries, dtype=torch.bool), max(1, queries.shape[1]))
        found = self._probabilities(asked)
        return nn.functional.pad(found, (0, self.key.shape[2] - found.shape[3]))

    def blocks(self, queries: str) -> Iterator[AttentionBlock]:
        """Attention of a token group's members, a block of queries at a time. One block serves all who ask for it."""
        asked = self._asked_of(queries)
        for one in asked:
            yield AttentionBlock(one.positions, one.real, self._of_block(queries, one, len(asked) == 1))

    def _of_block(self, queries: str, asked: _Asked, only: bool) -> torch.Tensor:
        found = self._kept.get(("block", queries)) if only else None
        if found is None:
            found = self._probabilities(asked)
            if only:
                self._kept["block", queries] = found
        return found

    def mean(self, queries: str) -> torch.Tensor:
        """Attention averaged over a token group's queries, ``[element, head, key]``; NaN where it has no member."""
        found = self._kept.get(("mean", queries))
        if found is None:
            with _as_it_is(self.query):
                found = self._kept["mean", queries] = self._mean(queries)
        return found

    def _mean(self, queries: str) -> torch.Tensor:
        n_keys, total, count, blocks = self.key.shape[2], None, 0, self._asked_of(queries)
        if len(blocks) == 1 and blocks[0].whole and blocks[0].some_see == n_keys:
            return self._of_block(queries, blocks[0], True).mean(2)
        for asked in blocks:
            block = self._of_block(queries, asked, len(blocks) == 1)
            if asked.whole:
                summed, members = block.sum(2), asked.real.shape[1]
            else:
                weight = asked.real[:, None, None].float()
                summed, members = (weight @ block)[:, :, 0], weight.sum(3)
            count = count + members
            if total is None:
                total = summed if asked.some_see == n_keys else nn.functional.pad(summed, (0, n_keys - asked.some_see))
            else:
                total[:, :, : asked.some_see] += summed
        return total.div_(count)

    def shares(self, queries: str, groups: tuple[str, ...]) -> torch.Tensor:
        """Attention on groups of keys, averaged over a group of queries, ``[element, head, group]``; NaN where that has no member.

        Under autocast too its products have the type of their factors: rounded shares would not sum to 1.
        """
        query, key = self.query, self.key
        kind = "cpu" if query.is_cpu else query.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.shares(queries, groups)
        asked = self.tokens.kept((queries, groups, query.shape, key.shape, self.crossed, self._causal), self._shared, queries, groups)
        if asked is _BY_MEAN or self.softcap is not None or ("mean", queries) in self._kept:
            members = self.tokens.kept(("groups", groups, key.shape, self.crossed), self._members, groups)
            return self.mean(queries) @ members
        if query.dtype != torch.float32 or query.requires_grad or key.requires_grad:
            query, key = query.detach().float(), key.detach().float()
        if asked.values is not None:
            attention = nn.functional.scaled_dot_product_attention
            return attention(query, key, asked.values, is_causal=True, scale=self.scaling).mean(2)[..., : len(groups)]
        where = asked.where
        few = query[0, :, where] if isinstance(where, slice) else query[0].index_select(1, where)
        if few.shape[0] > key.shape[1]:
            # Heads that share keys are neighbours: their queries stand under one another.
            few = few.reshape(key.shape[1], -1, key.shape[3])
        found = torch.baddbmm(asked.later, few, key[0].mT, alpha=self.scaling).softmax(-1)
        return torch.mm(found.view(query.shape[1], -1), asked.weights)[None]

    def _members(self, groups: tuple[str, ...]) -> torch.Tensor:
        """Which keys belong to which group, ``[element, key, group]``."""
        return torch.stack([self.keys_of(group) for group in groups], dim=2).float()

    def _shared(self, queries: str, groups: tuple[str, ...]) -> _Shared:
        (n_elements, n_heads, n_queries, size), n_keys = self.query.shape, self.key.shape[2]
        if n_elements > 1 or not self._causal or n_queries < n_keys or len(groups) > size:
            return _BY_MEAN
        sharing = n_heads // self.key.shape[1]
        at = self.tokens.members(queries)[0][0]
        if len(at) == n_queries and sharing == 1:
            members = self._members(groups)
            values = members.new_zeros(1, 1, n_keys, size)
            values[0, 0, :, : len(groups)] = members[0]
            return _Shared(values=values.expand(self.key.shape))
        if sharing * len(at) * n_keys > MASK_KEPT:
            return _BY_MEAN
        return _few(at, [self.tokens.members(group)[0][0] for group in groups], n_keys, sharing)

    def narrowed(self, heads: Sequence[int]) -> AttentionView:
        """The same attention with some of its heads only."""
        index = torch.as_tensor(heads, device=self.query.device)
        mask = self.mask

        def shared(keys: torch.Tensor) -> torch.Tensor:
            return keys[:, index // (self.query.shape[1] // keys.shape[1])]

        return replace(
            self,
            query=self.query[:, index],
            key=shared(self.key),
            value=shared(self.value),
            flat=None if self.flat is None else (self.flat[0][:, index], shared(self.flat[1])),
            output=self.output[:, :, index],
            mask=mask if mask is None or mask.shape[1] == 1 else mask[:, index],
            _kept={},
        )

    @property
    def _causal(self) -> bool:
        return self.mask is None and not self.crossed

    def _asked_of(self, queries: str) -> list[_Asked]:
        # Layers with the same tokens ask the same.
        key = ("asked", queries, self.query.shape, self.key.shape, self._causal, self.softcap is None)
        return self.tokens.kept(key, self._in_blocks, queries)

    def _in_blocks(self, queries: str) -> list[_Asked]:
        positions, real = self.tokens.members(queries)
        n_elements, n_heads = self.query.shape[:2]
        # At most a quarter of many queries: a small model's whole map would fit a block.
        quarter = -(-positions.shape[1] // 4)
        step = max(_BLOCK_QUERIES, min(quarter, _BLOCK_SCORES // (n_elements * n_heads * self.key.shape[2])))
        return self._asked(positions, real, step)

    def _asked(self, positions: torch.Tensor, real: torch.Tensor, step: int) -> list[_Asked]:
        n_keys = self.key.shape[2]
        # How many keys a query at 0 sees.
        seen = n_keys - self.query.shape[2] + 1
        asked = []
        for at, members in zip(positions.split(step, dim=1), real.split(step, dim=1), strict=True):
            # One sequence has no filling.
            whole = at.shape[0] == 1 or bool(members.all())
            if not self._causal or not at.shape[1]:
                asked.append(_Asked(at, members, whole, 0, n_keys))
                continue
            if at.shape[0] == 1:
                numbers = at[0].tolist()
                first, last = min(numbers), max(numbers)
            else:
                first = int((at if whole else at.masked_fill(~members, n_keys - seen)).min())
                last = int((at if whole else at.masked_fill(~members, 0)).max())
            one = _Asked(at, members, whole, first + seen, last + seen, first)
            sharing = self.query.shape[1] // self.key.shape[1]
            if at.shape[0] == 1 and self.softcap is None and sharing * at.shape[1] * one.some_see <= MASK_KEPT:
                one = replace(one, bias=self._bias(one))
            asked.append(one)
        return asked

    def _bias(self, asked: _Asked) -> torch.Tensor:
        """What a causal order adds to all scores of a block of one sequence, ``[1, queries that share keys, some_see]``."""
        later = nn.functional.pad(_later(asked), (asked.all_see, 0))[:, 0]
        return later.repeat(1, self.query.shape[1] // self.key.shape[1], 1)

    def _query(self, asked: _Asked) -> torch.Tensor:
        """A block's queries in float32, ``[element, head, n, head_dim]``."""
        query, where = _constant(self.query), asked.positions
        if len(where) == 1:
            return query.index_select(2, where[0]).float()
        return torch.take_along_dim(query, where[:, None, :, None], dim=2).float()

    def _probabilities(self, asked: _Asked) -> torch.Tensor:
        n_elements, n_heads, n_queries, size = self.query.shape
        n_keys, queries = self.key.shape[2], asked.positions
        key = self._kept.get("key")
        if key is None:
            # [element and kv head, head_dim, key]: one product for all of them.
            key = self._kept["key"] = _constant(self.key).float().flatten(0, 1).transpose(1, 2)
        if asked.some_see < n_keys:
            key = key[..., : asked.some_see]
        # Heads that share keys are neighbours: their queries stand under one another in one product.
        query = self._query(asked).view(key.shape[0], -1, size)
        if asked.bias is not None:
            with _as_it_is(query):
                scores = torch.baddbmm(asked.bias, query, key, alpha=self.scaling)
            return scores.softmax(-1).view(n_elements, n_heads, -1, asked.some_see)
        with _as_it_is(query):
            scores = torch.bmm(query.mul_(self.scaling), key).view(n_elements, n_heads, -1, asked.some_see)
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self._causal:
            if asked.all_see < asked.some_see:
                scores[..., asked.all_see :].add_(_later(asked))
        elif self.mask is not None:
            mask = self.mask[..., :n_keys]
            mask = mask.expand(n_elements, -1, n_queries, n_keys)
            mask = torch.take_along_dim(mask, queries[:, None, :, None], dim=2)
            scores = scores.masked_fill_(~mask, _LOWEST) if mask.dtype == torch.bool else scores.add_(mask)
        return scores.softmax(-1)


def _few(queries: torch.Tensor, groups: Sequence[torch.Tensor], n_keys: int, sharing: int) -> _Shared:
    """Attention of queries at some positions on groups of keys, of one sequence in causal order."""
    device, numbers, members = queries.device, queries.tolist(), [group.tolist() for group in groups]
    # A query before all members of the groups gives them nothing.
    first = min((group[0] for group in members if group), default=n_keys)
    seeing = numbers[bisect_left(numbers, first) :]
    if not seeing:
        return _BY_MEAN
    start, stop = seeing[0], seeing[-1] + 1
    at = torch.tensor(seeing, device=device)
    weights = torch.zeros(len(seeing), n_keys, len(groups), device=device)
    for number, group in enumerate(members):
        weights[:, group, number] = 1 / len(numbers)
    later = (torch.arange(n_keys, device=device) > at[:, None]) * _LOWEST
    where = slice(start, stop) if stop - start == len(seeing) else at
    return _Shared(where=where, later=later.repeat(sharing, 1)[None], weights=weights.flatten(0, 1))


def _later(asked: _Asked) -> torch.Tensor:
    """Added to the scores of keys that not every query sees, ``[element, 1, n, all_see to some_see]``.

    0, or the lowest number there is where the key lies after the query.
    """
    at = asked.positions
    keys = torch.arange(asked.first + 1, asked.first + 1 + asked.some_see - asked.all_see, device=at.device)
    return (keys > at.unsqueeze(1).unsqueeze(3)) * _LOWEST


def _as_it_is(tensor: torch.Tensor) -> AbstractContextManager:
    """In this context products have the type of their factors: under autocast they would be rounded."""
    kind = "cpu" if tensor.is_cpu else tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _PLAIN


def _constant(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


@dataclass(frozen=True, eq=False)
class LayerView:
    """The residual stream ``hidden`` ``[element, token, hidden]`` that enters ``layer`` (or the final norm)."""

    layer: int
    hidden: torch.Tensor
    tokens: Tokens
