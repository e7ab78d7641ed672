"""Which image tokens go on: what a policy sees of a prompt, and what it answers.

``Policy``        base of the declarations of policies: frozen, compares and hashes by content
``Ranked``        base of those that score tokens and keep the best
``Seen``          the candidates of one prompt before a layer, with what may be asked about them
``Choice``        the tokens that stay, and what they carry
``Visual``        what lies outside the decoder: places of image tokens on the image, what the vision tower attended to
``TowerLayer``    one layer of the vision tower

A policy is a definition and nothing else: it gets tensors and gives indices. The seam asks it before a layer and does what it says
(``vlm_core.seam.shortening``), so one definition serves plain forward passes, ``generate`` and sweeps. The definitions live in
``vlm_core.reduction``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

import torch

from vlm_core.errors import NotMeasurable
from vlm_core.interventions.declaration import Declared
from vlm_core.interventions.numeric import shown

if TYPE_CHECKING:
    from vlm_core.families.anatomy import Anatomy
    from vlm_core.seam.views import AttentionView

__all__ = ["KEYED", "READS", "Choice", "Policy", "Ranked", "Seen", "TowerLayer", "Visual", "policy_kinds"]

READS = {
    "attention": "queries and keys of the layer before",
    "unrotated": "the same without rotary positions",
    "grid": "places of image tokens in rows and columns",
    "tower": "attention and keys of the vision tower",
}
"""What a policy may read beside the residual stream (``Policy.reads``)."""

KEYED = 2
"""Of how many layers of the vision tower, the last ones, keys are kept: those of a whole tower take more room than the prompt."""

_KINDS: dict[str, type[Policy]] = {}
_QUERIES = 64
"""Queries whose attention is looked at together: the whole map is never built."""


@dataclass(frozen=True, eq=False)
class TowerLayer:
    """One layer of the vision tower, per image token.

    Where a token stands for several patches of the tower, ``received`` is their sum and ``keys`` their mean.

    Parameters
    ----------
    received : Tensor ``[image token]``
        Attention that the token's patches receive, averaged over heads: from the tower's class token where it has one, else averaged
        over all patches of the view.
    keys : Tensor ``[image token, size]``, optional
        Keys of all heads side by side, of the last ``KEYED`` layers; None in earlier ones.
    """

    received: torch.Tensor
    keys: torch.Tensor | None = None

    def at(self, tokens: torch.Tensor) -> TowerLayer:
        """Of some of the tokens."""
        return TowerLayer(self.received[tokens], None if self.keys is None else self.keys[tokens])


@dataclass(frozen=True, eq=False)
class Visual:
    """What is known of a prompt's image tokens outside the decoder.

    Parameters
    ----------
    grid, row, column : LongTensor ``[image token]``
        As in ``vlm_core.families.layout.Layout``: -1 for tokens of no grid.
    tower : tuple of TowerLayer
        Of every layer of the vision tower, first to last; empty where it was not asked for.
    """

    grid: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    tower: tuple[TowerLayer, ...] = ()

    def neighbours(self, of: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Which tokens touch which in their grid, up, down, left or right: BoolTensor ``[image token, image token]``.

        Parameters
        ----------
        of : LongTensor ``[n]``, optional
            The tokens of the first axis. Default: all.
        """
        grid, row, column = (one[of, None] for one in (self.grid, self.row, self.column))
        # Tokens without a place all have the same one, outside every grid: none lies beside another.
        return (grid == self.grid) & ((row - self.row).abs() + (column - self.column).abs() == 1)


@dataclass(frozen=True, eq=False)
class Choice:
    """What a policy answers.

    Parameters
    ----------
    kept : LongTensor ``[kept]``
        Candidates that stay, ascending.
    mix : Tensor ``[kept, candidate]``, optional
        What each of them carries from here on: weights over the residual streams of all candidates. Default: its own.
    sizes : Tensor ``[kept]``, optional
        How many tokens each stands for from here on. Default: as many as before.
    proportional : bool
        Whether ``sizes`` count in the attention of later layers: ``log(size)`` is added to the score of each token.
    """

    kept: torch.Tensor
    mix: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    proportional: bool = True

    def require_fit(self, policy: Policy, n: int, asked: int) -> None:
        """Refuse indices that are none of ``n`` candidates, another number than ``asked`` of an exact policy, and weights of another shape.

        Raises
        ------
        ValueError
        """
        kept = self.kept.tolist()
        if kept != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < n):
            raise ValueError(f"policy {policy.describe()} must keep some of {n} candidates in ascending order, each once, got {kept[:8]}")
        if policy.exact and len(kept) != asked:
            raise ValueError(f"policy {policy.describe()} was asked for {asked} of {n} tokens and kept {len(kept)}: one that may says exact = False")
        for name, shape in (("mix", (len(kept), n)), ("sizes", (len(kept),))):
            found = getattr(self, name)
            if found is not None and tuple(found.shape) != shape:
                raise ValueError(f"policy {policy.describe()} gave {name} of shape {tuple(found.shape)} for {shape}")


@dataclass(eq=False)
class Seen:
    """The candidates of one prompt before a layer.

    Parameters
    ----------
    layer : int
        The layer that they are about to enter.
    stream : Tensor ``[token, hidden]``
        The residual stream of all tokens that are left; before layer 0, embeddings and projected features.
    candidates : LongTensor ``[candidate]``
        Which of them may be dropped, ascending.
    question : LongTensor ``[token of the question]``
        Which of them are text after the image.
    ordinals : LongTensor ``[candidate]``
        Which of the prompt's image tokens each candidate is.
    n_started : int
        Candidates that the prompt started with, before any layer.
    item : int
        Number of the item, for what is drawn at random.
    sizes : Tensor ``[candidate]``, optional
        How many tokens each candidate stands for, where some were merged before. Default: one.
    before, unrotated : AttentionView, optional
        The attention of the layer before, of this prompt alone; and without rotary positions.
    visual : Visual, optional
        What is known outside the decoder, of all of the prompt's image tokens.
    """

    layer: int
    stream: torch.Tensor
    candidates: torch.Tensor
    question: torch.Tensor
    ordinals: torch.Tensor
    n_started: int
    item: int = 0
    sizes: torch.Tensor | None = None
    before: AttentionView | None = None
    unrotated: AttentionView | None = None
    visual: Visual | None = None
    _kept: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.sizes is None:
            self.sizes = torch.ones(len(self.candidates), device=self.stream.device)

    def __len__(self) -> int:
        return len(self.candidates)

    def once(self, key: tuple, compute: Callable):
        """``compute()`` on the first call with ``key``, the same afterwards: several fractions ask the same."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    @property
    def hidden(self) -> torch.Tensor:
        """The candidates' residual stream in float32, ``[candidate, hidden]``."""
        return self.once(("hidden",), lambda: self.stream[self.candidates].float())

    @property
    def asked(self) -> torch.Tensor:
        """The question's residual stream in float32, ``[token of the question, hidden]``."""
        return self.once(("asked",), lambda: self.stream[self.question].float())

    @property
    def keys(self) -> torch.Tensor:
        """The candidates' keys in the layer before, all key heads side by side, ``[candidate, size]``."""
        return self.once(("keys",), lambda: self._keys_of(self.candidates).flatten(1))

    @property
    def mean_keys(self) -> torch.Tensor:
        """The candidates' keys in the layer before, averaged over key heads, ``[candidate, head_dim]``."""
        return self.once(("mean keys",), lambda: self._keys_of(self.candidates).mean(1))

    @property
    def asked_keys(self) -> torch.Tensor:
        """The question's keys in the layer before, all key heads side by side, ``[token of the question, size]``."""
        return self.once(("asked keys",), lambda: self._keys_of(self.question).flatten(1))

    def _keys_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[token, key head, head_dim]`` in float32."""
        keys = self._view(True).key[0].float()
        return keys[:, tokens.to(keys.device)].transpose(0, 1).to(self.stream.device)

    def attention(self, queries: str = "last", heads: Sequence[int] | None = None, rotary: bool = True) -> torch.Tensor:
        """Attention of some queries on the candidates in the layer before, averaged over heads, ``[query, candidate]``.

        Parameters
        ----------
        queries : str
            A token group.
        heads : sequence of int, optional
            Default: all of the layer.
        rotary : bool
            Without, every token stands at one position.
        """

        def compute() -> torch.Tensor:
            view = self._view(rotary)
            view = view if heads is None else view.narrowed(list(heads))
            # An answer that is scored is no part of what is asked.
            members = (view.tokens.group(queries) & view.tokens.prompt)[0]
            columns = self.candidates.to(view.query.device)
            blocks = members.nonzero().T.split(_QUERIES, dim=1)
            found = [view.probabilities(block)[0][:, :, columns].mean(0) for block in blocks]
            return torch.cat(found).to(self.stream.device)

        return self.once(("attention", queries, None if heads is None else tuple(heads), rotary), compute)

    def _view(self, rotary: bool) -> AttentionView:
        view = self.before if rotary else self.unrotated
        if view is None:
            what = READS["attention" if rotary else "unrotated"]
            raise ValueError(f"there is nothing to read {what} from before layer {self.layer}: a policy says in 'reads' what it asks for")
        return view

    def outside(self) -> Visual:
        """What is known of the candidates outside the decoder.

        Raises
        ------
        NotMeasurable
            Where that is not known of this prompt.
        """
        if self.visual is None:
            raise NotMeasurable("nothing is known of the places of this prompt's image tokens, or of what the vision tower saw")

        def compute() -> Visual:
            visual, at = self.visual, self.ordinals.to(self.visual.grid.device)
            return Visual(visual.grid[at], visual.row[at], visual.column[at], tuple(layer.at(at) for layer in visual.tower))

        return self.once(("outside",), compute)

    def tower(self, layer: int) -> TowerLayer:
        """What a layer of the vision tower attends to among the candidates; from 0, or from -1 backwards.

        Raises
        ------
        NotMeasurable
            Where the tower has no such layer.
        ValueError
            Where the policy does not say in ``reads`` that it asks for the tower.
        """
        layers = self.outside().tower
        if not layers:
            raise ValueError(f"there is nothing to read {READS['tower']} from: a policy says in 'reads' what it asks for")
        if not -len(layers) <= layer < len(layers):
            raise NotMeasurable(
                f"the vision tower has {len(layers)} layers, of which none is {layer}: choose one from 0 to {len(layers) - 1}"
            )
        return layers[layer]


class Policy(Declared):
    """Which image tokens stay. Subclasses are frozen dataclasses whose fields are the policy's settings.

    Attributes
    ----------
    name : str
        In tables and labels.
    reads : frozenset of str
        Of ``READS``: what must be there beside the residual stream.
    exact : bool
        Whether as many tokens stay as are asked for, in every prompt.
    """

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _KINDS[cls.__name__] = cls

    def __post_init__(self) -> None:
        self._seal()

    @property
    def looks_back(self) -> bool:
        """Whether the layer before is read, so that there must be one."""
        return bool(self.reads & {"attention", "unrotated"})

    def require_layer(self, layer: int) -> None:
        """Refuse a layer that this policy cannot come before, with a ``ValueError`` of one sentence; by default those without one before."""
        if self.looks_back and layer == 0:
            raise ValueError(f"policy '{self.name}' needs a layer before the drop to read attention from: use layer >= 1")

    def require_possible(self, anatomy: Anatomy) -> None:
        """Refuse a model that the policy is not for, before anything runs.

        Raises
        ------
        ValueError
        """

    @abstractmethod
    def choose(self, seen: Seen, keep: int) -> Choice:
        """Which of ``len(seen)`` candidates stay, ``0 < keep < len(seen)`` of them."""

    def describe(self) -> str:
        """A short unique label: the name, and settings that are not the usual ones."""
        settings = []
        for one in fields(self):  # type: ignore[arg-type]
            value = getattr(self, one.name)
            if value != one.default:
                settings.append(f"{one.name} {shown(value) if isinstance(value, float) else _short(value)}")
        return f"{self.name}({', '.join(settings)})" if settings else self.name


class Ranked(Policy):
    """A policy that scores tokens, and keeps those with the highest scores (the earlier of two alike)."""

    @abstractmethod
    def scores(self, seen: Seen) -> torch.Tensor:
        """One number per candidate, ``[candidate]``."""

    def choose(self, seen: Seen, keep: int) -> Choice:
        """The ``keep`` candidates with the highest scores."""
        order = seen.once(("order", self.digest), lambda: self.scores(seen).argsort(descending=True, stable=True))
        return Choice(order[:keep].sort().values)


def policy_kinds() -> Mapping[str, type[Policy]]:
    """Every kind of policy that has been declared, by the name of its class."""
    import vlm_core.reduction  # noqa: F401 (declares those that come with the library)

    return _KINDS


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
