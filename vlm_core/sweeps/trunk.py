"""What a prompt leaves behind when it runs once: the state that its rows start from.

``record_trunks(...)``   run prompts through the language model once and keep what their rows will need
``same_prefixes(...)``   which prompts begin alike, up to their last image token
``enter_first_layer(...)``   what prompts are before the first layer
``Trunk``                one prompt: prefix keys and values, the residual stream at chosen layers
``Stem``                 a prompt with one answer prefix, on a trunk that begins as it does: what a row is (before any intervention)
``Recording``            the trunks of one recorded batch, and the inputs of every layer for them

The *prefix* is everything up to and including the last image token, the *suffix* what follows. Under a causal mask no suffix can change
the prefix, so one prefix serves all questions about its image, all their answers and all interventions that touch later tokens only. Every layer is recorded with
the arguments that the model called it with, so that it can be called again by itself: the model's code stays what it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch

from vlm_core.interventions.declaration import Positions
from vlm_core.seam.plan import Program
from vlm_core.seam.positions import Positioned
from vlm_core.seam.run import Run
from vlm_core.seam.seam import active
from vlm_core.seam.views import Tokens
from vlm_core.subjects.embed import Encoded, batch_sequences
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.branches import Branches

__all__ = ["Recording", "Stem", "Trunk", "Unshareable", "enter_first_layer", "record_trunks", "same_prefixes"]

_PER_TOKEN = ("position_embeddings", "position_ids", "attention_mask")
_ATTENTION_OPTIONS = frozenset(
    ("scaling", "softcap", "dropout", "sliding_window", "is_causal", "use_cache", "position_ids", "cache_position")
)


class Unshareable(Exception):
    """Rows cannot start from recorded state; the message says why."""


class _Stopped(Exception):
    """Raised where a recording has all it needs."""


@dataclass(eq=False)
class Trunk:
    """One prefix, run once, with the longest sequence that begins with it.

    Parameters
    ----------
    sequence : Encoded
        The longest prompt with its answer prefix.
    number : int
        Its place in the recorded batch.
    n_prefix : int
        Tokens up to and including the last image token.
    order : LongTensor ``[prefix token]``
        Prefix tokens in the order of ``keys``: the others first, then the image tokens.
    n_image : int
    keys, values : dict of layer to Tensor ``[kv head, prefix token, head_dim]``
    hidden : dict of layer to Tensor ``[token, hidden]``
        The residual stream that enters a layer: of the whole sequence, or of the suffix alone, as was asked for.
    """

    sequence: Encoded
    number: int
    n_prefix: int
    order: torch.Tensor
    n_image: int
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def n_other(self) -> int:
        """Prefix tokens that are not image tokens."""
        return self.n_prefix - self.n_image


@dataclass(eq=False)
class Stem:
    """A prompt with one answer prefix, on the trunk that holds its prefix.

    Parameters
    ----------
    trunk : Trunk
    sequence : Encoded
    suffix : dict of layer to Tensor ``[suffix token, hidden]``
        The residual stream that enters a layer, after the last image token.
    item : int
        Seed of random token choices.
    branches : Branches or None
        The answer prefixes, where the sequence is a prompt with several of them.
    seen : dict
        What policies see of it, once for all batches of rows that start at one layer.
    """

    trunk: Trunk
    sequence: Encoded
    suffix: dict[int, torch.Tensor] = field(default_factory=dict)
    item: int = 0
    branches: Branches | None = None
    seen: dict = field(default_factory=dict)
    _members: dict[Positions, torch.Tensor] = field(default_factory=dict)

    @property
    def n_suffix(self) -> int:
        """Tokens after the last image token."""
        return len(self.sequence) - self.trunk.n_prefix

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.sequence) - (0 if self.branches is None else len(self.branches.tokens))

    def positions(self, device: torch.device) -> torch.Tensor:
        """Where each suffix token stands in its own sequence, ``[suffix token]``."""
        start = self.trunk.n_prefix
        if self.branches is None:
            return torch.arange(start, len(self.sequence), device=device)
        return self.branches.positions(self.n_prompt, start, device)

    def members(self, group: Positions) -> torch.Tensor:
        """Which of the sequence's tokens belong to a token group (or are at positions), ``[token]``."""
        if group not in self._members:
            image = self.sequence.image[None]
            named = {name: members[None] for name, members in self.sequence.groups.items()}
            tokens = Tokens(image, torch.ones_like(image), torch.zeros(1, dtype=torch.long, device=image.device), named=named)
            where = Positioned(tokens)
            where.check([frozenset((group,))], [0])
            self._members[group] = where.members(tokens, group)[0]
        return self._members[group]

    def hidden(self, layer: int) -> torch.Tensor:
        """The residual stream of the whole sequence that enters ``layer``, ``[token, hidden]``."""
        whole = self.trunk.hidden[layer]
        return torch.cat([whole[: self.trunk.n_prefix], self.suffix[layer]])


class _Recorder(Run):
    """A run that changes nothing and keeps what passes."""

    alert = True

    def __init__(self, anatomy, recording: Recording, image, valid, keys_at: range, hidden_at: Collection, suffix_at: Collection):
        program = Program.compile([None] * image.shape[0], anatomy.n_layers, anatomy.n_heads)
        super().__init__(anatomy, program, image, valid, left=False)
        self._recording = recording
        self._keys_at, self._hidden_at, self._suffix_at = keys_at, hidden_at, suffix_at
        self._alike = recording.alike()
        # The first layer of which only the arguments are needed.
        self._stop = max((*(layer + 1 for layer in keys_at[-1:]), *hidden_at, *suffix_at))

    def enter_layer(self, layer: int, args: tuple, kwargs: dict):
        recording = self._recording
        hidden = args[0] if args else kwargs["hidden_states"]
        for trunk in recording.trunks:
            length = len(trunk.sequence)
            if layer in self._hidden_at:
                trunk.hidden[layer] = hidden[trunk.number, :length]
            elif layer in self._suffix_at:
                trunk.hidden[layer] = hidden[trunk.number, trunk.n_prefix : length].clone()
        if layer < self.anatomy.n_layers:
            recording.keep(layer, args, kwargs)
        if self._stop <= layer < self.anatomy.n_layers:
            # Nothing more to compute: one token goes on, to learn what the remaining layers are called with.
            first = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
            kwargs = recording.layer_kwargs(layer, np.arange(hidden.shape[0]), first, {}, mask=True)
            return ((hidden[:, :1],), kwargs) if args else ((), {**kwargs, "hidden_states": hidden[:, :1]})
        return None

    def attend(self, layer, original, module, query, key, value, mask, *args, **kwargs):
        if layer in self._keys_at:
            self._recording.check_attention(layer, module, mask, args, kwargs)
            for trunks in self._alike:
                numbers = torch.tensor([trunk.number for trunk in trunks], device=key.device)
                order = trunks[0].order.to(key.device)
                for kept, states in (("keys", key), ("values", value)):
                    own = states if len(trunks) == len(states) else states.index_select(0, numbers)
                    for trunk, one in zip(trunks, own.index_select(2, order).unbind(), strict=True):
                        getattr(trunk, kept)[layer] = one
            if layer == self.anatomy.n_layers - 1:
                raise _Stopped
        return original(module, query, key, value, mask, *args, **kwargs)


class _Entrance(Run):
    """A run that ends before the first layer."""

    alert = True

    def enter_layer(self, layer: int, args: tuple, kwargs: dict):
        self.hidden = args[0] if args else kwargs["hidden_states"]
        raise _Stopped


class Recording:
    """The trunks of one batch, and what every layer was called with."""

    def __init__(self, anatomy, trunks: Sequence[Trunk]) -> None:
        self.anatomy = anatomy
        self.trunks = list(trunks)
        self.stems: list[Stem] = []
        self._kwargs: dict[int, dict] = {}
        self._masks: dict[tuple, torch.Tensor | None] = {}
        self._seen: dict[int, torch.Tensor | None] = {}
        self._checked: dict[int, torch.Tensor] = {}

    def alike(self) -> list[list[Trunk]]:
        """Its trunks, those together whose prefix tokens are in the same order."""
        found: dict[tuple[int, ...], list[Trunk]] = {}
        for trunk in self.trunks:
            found.setdefault(tuple(trunk.order.tolist()), []).append(trunk)
        return list(found.values())

    def keep(self, layer: int, args: tuple, kwargs: dict) -> None:
        """Keep the arguments of ``layer``; refuse those that cannot be cut into rows and tokens."""
        if len(args) > 1:
            raise Unshareable("its layers take positional arguments that cannot be told apart")
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if kwargs.get("past_key_values") is not None:
            raise Unshareable("its layers insist on a cache")
        for name, value in kwargs.items():
            found = value if isinstance(value, tuple | list) else (value,)
            if name not in _PER_TOKEN and any(isinstance(one, torch.Tensor) and one.numel() > 1 for one in found):
                if name == "cache_position":
                    continue
                raise Unshareable(f"its layers take the tensor '{name}', which is not known to be cut into rows and tokens")
        self._kwargs[layer] = kwargs

    def layer_kwargs(self, layer: int, numbers: np.ndarray, positions: torch.Tensor, chosen: dict, mask: bool) -> dict:
        """The arguments of ``layer`` for some trunks' tokens.

        Parameters
        ----------
        numbers : int array ``[row or 1]``
            Place of each row's trunk in the batch.
        positions : LongTensor ``[row or 1, token]``
        chosen : dict
            Filled with what was cut, for layers that share it.
        mask : bool
            Whether the model's own mask goes along (``positions`` must then start at 0 and be consecutive).
        """
        kwargs = dict(self._kwargs[layer])

        def cut(tensor: torch.Tensor, token_dim: int) -> torch.Tensor:
            if id(tensor) not in chosen:
                chosen[id(tensor)] = _cut(tensor, token_dim, numbers, positions)
            return chosen[id(tensor)]

        if isinstance(kwargs.get("position_embeddings"), tuple):
            kwargs["position_embeddings"] = tuple(cut(tensor, -2) for tensor in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = cut(kwargs["position_ids"], -1)
        own = kwargs.get("attention_mask")
        if not mask:
            kwargs["attention_mask"] = None
        elif own is not None and id(own) not in chosen:
            n = positions.shape[1]
            rows = own if own.shape[0] == 1 else own[torch.as_tensor(numbers, device=own.device)]
            chosen[id(own)] = rows[:, :, :n, :n]
        if mask and own is not None:
            kwargs["attention_mask"] = chosen[id(own)]
        kwargs.pop("cache_position", None)
        return kwargs

    # -- the model's own masks --------------------------------------------------------------------------------------

    def check_attention(self, layer: int, module, mask, args: tuple, options: dict) -> None:
        """Refuse attention that is more than a masked softmax of scaled (and capped) products."""
        self._seen[layer] = mask
        given = {name for name, value in options.items() if value is not None and value is not False}
        strange = sorted(given - _ATTENTION_OPTIONS)
        if args or strange:
            raise Unshareable(f"its attention takes more than queries, keys and values ({', '.join(strange) or 'positional arguments'})")
        if mask is None:
            causal = options.get("is_causal")
            if not (getattr(module, "is_causal", True) if causal is None else causal):
                raise Unshareable("its attention is not causal")
            return
        if id(mask) in self._checked:
            return
        self._checked[id(mask)] = mask
        if mask.shape[1] != 1:
            raise Unshareable("its attention masks differ from head to head")
        if mask.dtype != torch.bool:
            blocked = mask <= torch.finfo(mask.dtype).min / 2
            if bool((~blocked & (mask != 0)).any()):
                raise Unshareable("its attention masks carry biases")
        for trunk in self.trunks:
            own = _allowed(mask, trunk.number)
            if bool(own[: trunk.n_prefix, trunk.n_prefix : len(trunk.sequence)].any()):
                raise Unshareable("its image tokens see the question, so there is no prefix that a question leaves untouched")

    def prefix_mask(self, layer: int, trunk: Trunk) -> torch.Tensor | None:
        """Prefix tokens (in the order of ``keys``) that each suffix token may see, ``[suffix token, prefix token]``; None for all."""
        mask = self._seen[layer]
        if mask is None:
            return None
        key = (id(mask), trunk.number, "prefix")
        if key not in self._masks:
            order = trunk.order.to(mask.device)
            seen = _allowed(mask, trunk.number)[trunk.n_prefix : len(trunk.sequence), : trunk.n_prefix][:, order]
            self._masks[key] = None if bool(seen.all()) else seen
        return self._masks[key]

    def suffix_mask(self, layer: int, trunk: Trunk) -> torch.Tensor | None:
        """Suffix tokens that each suffix token may see, ``[suffix token, suffix token]``; None for all earlier ones."""
        mask = self._seen[layer]
        if mask is None:
            return None
        key = (id(mask), trunk.number, "suffix")
        if key not in self._masks:
            where = slice(trunk.n_prefix, len(trunk.sequence))
            seen = _allowed(mask, trunk.number)[where, where]
            self._masks[key] = None if torch.equal(seen, torch.ones_like(seen).tril()) else seen
        return self._masks[key]

    def __iter__(self) -> Iterator[Stem]:
        return iter(self.stems)


def _allowed(mask: torch.Tensor, number: int) -> torch.Tensor:
    own = mask[number if mask.shape[0] > 1 else 0, 0]
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2


def _cut(tensor: torch.Tensor, token_dim: int, numbers: np.ndarray, positions: torch.Tensor) -> torch.Tensor:
    row_dim, token_dim = tensor.ndim + token_dim - 1, tensor.ndim + token_dim
    positions = positions.to(tensor.device)
    if tensor.shape[row_dim] > 1:
        rows = torch.as_tensor(numbers, device=tensor.device)
        tensor = tensor.index_select(row_dim, rows)
    n = max(tensor.shape[row_dim], positions.shape[0])
    shape = [1] * tensor.ndim
    shape[row_dim], shape[token_dim] = positions.shape
    tensor = tensor.expand(*tensor.shape[:row_dim], n, *tensor.shape[row_dim + 1 :])
    return torch.take_along_dim(tensor, positions.view(shape).clamp(max=tensor.shape[token_dim] - 1), dim=token_dim)


def _trunk(sequence: Encoded, number: int) -> Trunk:
    image = sequence.image
    n_prefix = int(image.nonzero()[-1]) + 1
    prefix = image[:n_prefix]
    order = torch.cat([(~prefix).nonzero()[:, 0], prefix.nonzero()[:, 0]])
    return Trunk(sequence, number, n_prefix, order, int(prefix.sum()))


def enter_first_layer(subject: Subject, sequences: Sequence[Encoded]) -> torch.Tensor:
    """What enters the first layer, ``[sequence, token, hidden]``, right-padded: embeddings, and what the model does to them before."""
    anatomy = subject.anatomy
    inputs, image, valid = batch_sequences(subject, sequences)
    run = _Entrance(anatomy, Program.compile([None] * len(sequences), anatomy.n_layers, anatomy.n_heads), image, valid, left=False)
    with torch.inference_mode(), active(run), suppress(_Stopped):
        _model(anatomy)(**inputs)
    return run.hidden


def _model(anatomy):
    return anatomy.language_model if anatomy.family.enter == "language_model" else anatomy.base


def same_prefixes(sequences: Sequence[Encoded]) -> dict[int, int]:
    """For every sequence the first whose prefix it shares, bit for bit: tokens, embeddings and all that goes with them, positions to the end.

    Sequences without image tokens, or whose image is not in the sequence, are left out.
    """
    known: dict[tuple, list[int]] = {}
    found: dict[int, int] = {}
    for number, sequence in enumerate(sequences):
        if sequence.cross is not None or not bool(sequence.image.any()):
            continue
        n = int(sequence.image.nonzero()[-1]) + 1
        # A sum tells most images apart; it is compared nowhere but with its like.
        alike = known.setdefault((n, float(sequence.embeds[:n].detach().sum(dtype=torch.float64))), [])
        first = next((other for other in alike if _same_prefix(sequence, sequences[other], n)), number)
        if first == number:
            alike.append(number)
        found[number] = first
    return found


def _same_prefix(one: Encoded, other: Encoded, n: int) -> bool:
    if (one.positions is None) != (other.positions is None) or one.types.keys() != other.types.keys():
        return False
    pairs = [(one.ids[:n], other.ids[:n]), (one.embeds[:n], other.embeds[:n]), (one.image[:n], other.image[:n])]
    if one.positions is not None:
        both = min(len(one), len(other))
        pairs.append((one.positions[:, :both], other.positions[:, :both]))
    pairs += [(one.types[name][:n], other.types[name][:n]) for name in one.types]
    pairs += list(zip(one.deepstack, other.deepstack, strict=True))
    return all(torch.equal(*pair) for pair in pairs)


def record_trunks(
    subject: Subject,
    sequences: Sequence[Encoded],
    *,
    keys_from: int | None = None,
    keys_to: int | None = None,
    hidden_at: Sequence[int] = (),
    suffix_at: Sequence[int] = (),
) -> Recording:
    """Run prompts once, as far as needed.

    Parameters
    ----------
    sequences : sequence of Encoded
        Of each prefix the longest, with its answer prefix, so that the layers' inputs cover every suffix.
    keys_from, keys_to : int, optional
        Keep prefix keys and values from the first of these layers up to the other, without it; default: to the end, and none.
    hidden_at, suffix_at : sequence of int
        Layers at which the whole residual stream is kept, or only that of the suffix.

    Returns
    -------
    Recording
        Without stems: ``vlm_core.sweeps.prefix.grow_stems`` adds them.

    Raises
    ------
    Unshareable
        Where the model does something that the recorded state cannot stand for, with the reason.
    """
    anatomy = subject.anatomy
    recording = Recording(anatomy, [_trunk(sequence, number) for number, sequence in enumerate(sequences)])
    inputs, image, valid = batch_sequences(subject, sequences)
    n_layers = anatomy.n_layers
    keys_at = range(n_layers if keys_from is None else keys_from, n_layers if keys_to is None else keys_to)
    recorder = _Recorder(anatomy, recording, image, valid, keys_at, frozenset(hidden_at), frozenset(suffix_at))
    with torch.inference_mode(), active(recorder), suppress(_Stopped):
        _model(anatomy)(**inputs)
    return recording
