"""From the residual stream to words.

``LogitLens``       every layer's residual stream read by the model's own final norm and unembedding
``DirectLogits``    how much of a logit each head, each MLP and the embedding wrote
``FrozenNorm``      a norm as the linear map that it is once its scale is fixed
``target_tokens``   words, or the items' answers, as token ids

The final norm is applied exactly once: the residual stream is taken *before* it at every layer, the last included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from vlm_core.errors import SubjectError
from vlm_core.families.anatomy import Anatomy
from vlm_core.interventions.numeric import boolean, integer
from vlm_core.items import item_field
from vlm_core.observation.declaring import freeze, freeze_numbers, require_layers, require_positions
from vlm_core.observation.outputs import positions_of
from vlm_core.placement import home, present
from vlm_core.quantization import as_matrix
from vlm_core.seam.views import AttentionView, LayerView, Tokens
from vlm_core.subjects.embed import Encoded
from vlm_core.subjects.rows import forward_rows, read_logits
from vlm_core.subjects.subject import Subject

__all__ = ["DirectLogits", "FrozenNorm", "LogitLens", "target_tokens"]

# Logits held at once while a lens looks at many tokens.
_LOGITS_AT_ONCE = 2**24


def target_tokens(subject: Subject, items: Sequence, targets: str | Sequence[str]) -> torch.Tensor:
    """First token of each target as it follows the prompt, ``[item, target]``; -1 where an item has fewer.

    Parameters
    ----------
    targets : "answer", "candidates" or sequence of str
        The item's own answer, its candidates in order, or the same words for all items.
    """
    if targets == "answer":
        words = [[item_field(item, "answer")] for item in items]
    elif targets == "candidates":
        words = [list(item_field(item, "candidates")) for item in items]
    elif isinstance(targets, str):
        raise ValueError(f"targets are 'answer', 'candidates' or a sequence of words, got '{targets}'")
    elif not isinstance(targets, list | tuple) or not targets:
        raise ValueError(f"targets are 'answer', 'candidates' or a sequence of words, got {targets!r}")
    else:
        words = [list(targets)] * len(items)
    tokens = torch.full((len(items), max(map(len, words))), -1)
    for row, some in enumerate(words):
        for column, word in enumerate(some):
            tokens[row, column] = subject.continuation(word)[0]
    return tokens


@dataclass(frozen=True)
class LogitLens:
    """The residual stream that enters each layer, projected to the vocabulary.

    Observed as a dict of arrays ``[item, layer, ...]`` (``[item, layer, token, ...]`` where ``positions`` names several
    tokens), layer ``n_layers`` being the model's own output: ``index`` and ``logprob`` ``[..., top]`` of the likeliest
    tokens, ``rank`` (0 is the likeliest) and ``word logprob`` ``[..., word]`` of the words asked for, where asked for ``entropy`` ``[..., 1]``
    of the distribution over the vocabulary (in nats). The whole ``[token, vocabulary]`` table is kept only where ``full`` asks for it, as
    ``logits``.

    Parameters
    ----------
    layers : tuple of int, optional
        Default: every layer and what enters the final norm.
    positions : str or tuple of int
        As in ``HiddenStates``; a token group means each of its tokens.
    top : int
        How many tokens to keep; 0 for none.
    words : "answer", "candidates" or tuple of str
        See ``target_tokens``.
    full, entropy : bool
        Whether to keep the whole table, and the entropy.

    Notes
    -----
    nostalgebraist 2020. Log-probabilities are those of the model as it speaks, a cap on its logits included.
    """

    layers: tuple[int, ...] | None = None
    positions: str | tuple[int, ...] = "last"
    top: int = 5
    words: str | tuple[str, ...] = ()
    full: bool = False
    entropy: bool = False

    def __post_init__(self) -> None:
        freeze(self, "layers", "positions", "words")
        freeze_numbers(self, "layers", "positions")
        object.__setattr__(self, "top", integer(self.top, "top of LogitLens", least=0))
        for name in ("full", "entropy"):
            object.__setattr__(self, name, boolean(getattr(self, name), f"{name} of LogitLens"))
        if not isinstance(self.words, str | tuple):
            raise ValueError(f"words of LogitLens are 'answer', 'candidates' or several words, got {self.words!r}")

    @property
    def ragged(self) -> dict[int, str]:
        """The token axis, where a token group is asked for."""
        each = isinstance(self.positions, str) and self.positions != "last"
        return {-2: self.positions.removesuffix(" tokens")} if each else {}

    def require_there(self, anatomy: Anatomy, tokens: Tokens | None = None) -> None:
        """Refuse a layer or words that the model, or positions that the batch does not have."""
        require_layers(self, anatomy)
        if self.top > anatomy.vocab_size:
            raise ValueError(f"top {self.top} exceeds this model's vocabulary of {anatomy.vocab_size}")
        if tokens is not None:
            require_positions(self, tokens)

    def parts(self, subject: Subject, items: Sequence, encoded: Sequence[Encoded]) -> tuple:
        """The lens with the subject's unembedding and the items' words."""
        words = target_tokens(subject, items, self.words) if len(self.words) else None
        return (_Lens(self, subject, words),)


@dataclass(frozen=True, eq=False)
class _Lens:
    lens: LogitLens
    subject: Subject
    words: torch.Tensor | None

    def require_there(self, anatomy: Anatomy, tokens: Tokens | None = None) -> None:
        self.lens.require_there(anatomy, tokens)

    def layer(self, view: LayerView) -> dict[str, torch.Tensor] | None:
        lens = self.lens
        if lens.layers is not None and view.layer not in lens.layers:
            return None
        where, real = positions_of(view.tokens, lens.positions)
        hidden = torch.take_along_dim(view.hidden, where[:, :, None], dim=1)
        words = None
        if self.words is not None:
            words = self.words.to(hidden.device)[view.tokens.rows][:, None].expand(-1, hidden.shape[1], -1).flatten(0, 1)
        flat = hidden.flatten(0, 1)
        step = max(1, _LOGITS_AT_ONCE // self.subject.anatomy.vocab_size)
        pieces: dict[str, list[torch.Tensor]] = {}
        for start in range(0, flat.shape[0], step):
            chosen = None if words is None else words[start : start + step]
            for name, piece in self._read(flat[start : start + step], chosen).items():
                pieces.setdefault(name, []).append(piece)
        record = {}
        for name, some in pieces.items():
            whole = torch.cat(some).unflatten(0, hidden.shape[:2])
            fill = torch.nan if whole.is_floating_point() else -1
            whole = whole.masked_fill(~real[:, :, None].to(whole.device), fill)
            record[name] = whole[:, 0] if lens.positions == "last" else whole
        return record

    def _read(self, hidden: torch.Tensor, words: torch.Tensor | None) -> dict[str, torch.Tensor]:
        norm = self.subject.anatomy.norm
        # The norm's hooks are the seam: its bare forward is not another layer of the run.
        logits = read_logits(self.subject, norm.forward(hidden.to(home(norm))))
        normaliser = logits.logsumexp(1, keepdim=True)
        found = {}
        if self.lens.top:
            best = logits.topk(self.lens.top, dim=1)
            found |= {"index": best.indices.int(), "logprob": best.values - normaliser}
        if words is not None:
            words = words.to(logits.device)
            own = logits.gather(1, words.clamp(min=0))
            higher = torch.stack([(logits > one[:, None]).sum(1) for one in own.T], dim=1).int()
            found |= {
                "rank": higher.masked_fill(words < 0, -1),
                "word logprob": (own - normaliser).masked_fill(words < 0, torch.nan),
            }
        if self.lens.entropy:
            logprob = logits - normaliser
            # 0 * log 0 of a word that a family rules out is 0.
            found["entropy"] = -(logprob.exp() * logprob.clamp(min=torch.finfo(logprob.dtype).min)).sum(1, keepdim=True)
        return found | {"logits": logits} if self.lens.full else found


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """``norm(h) = scale(h) * gain * centre(h) + bias``: an RMSNorm, or (``centred``) a LayerNorm."""

    norm: nn.Module
    gain: torch.Tensor
    bias: torch.Tensor
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module, size: int) -> FrozenNorm:
        """Read gain and bias off a norm module by what it does to two probes, whatever its parameters are called."""
        parameter = next(norm.parameters())
        # Mean 0 and mean square far above any epsilon: both kinds of norm send it to plus or minus their gain.
        probe = torch.full((size,), 64.0, dtype=parameter.dtype, device=home(norm))
        probe[1::2] *= -1
        with torch.no_grad():
            up, down, flat = (norm.forward(row[None])[0].double() for row in (probe, -probe, probe.abs()))
        bias = (up + down) / 2
        gain = (up - down) / 2 * probe.double().sign()
        centred = bool((flat - bias).abs().max() < 1e-2 * gain.abs().max())
        return cls(norm, gain, bias, centred)

    def scale(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm's own scale at each of ``hidden`` ``[n, hidden]``: ``[n]``, float64.

        Raises
        ------
        SubjectError
            If the module is no RMSNorm and no LayerNorm.
        """
        own = self.norm.forward(hidden).double() - self.bias
        plain = self.gain * self._centre(hidden.double())
        scale = (own * plain).sum(1) / (plain * plain).sum(1).clamp(min=1e-300)
        missed = (own - scale[:, None] * plain).norm() / own.norm().clamp(min=1e-300)
        if missed > max(64 * torch.finfo(hidden.dtype).eps, 1e-5):
            raise SubjectError(
                f"direct logit attribution needs norms that are linear at a fixed scale (RMSNorm, LayerNorm): "
                f"{type(self.norm).__name__} is off by {missed.item():.1g} of its length; use ablations instead."
            )
        return scale

    def pull(self, directions: torch.Tensor) -> torch.Tensor:
        """Directions ``[..., hidden]`` after the norm as directions before it (to be multiplied by the scale)."""
        return self._centre(directions * self.gain)

    def _centre(self, values: torch.Tensor) -> torch.Tensor:
        return values - values.mean(-1, keepdim=True) if self.centred else values


@dataclass(frozen=True)
class DirectLogits:
    """What each part of the model wrote, at the last token, along the directions of target tokens.

    The final norm is frozen at the run's own scale, which makes it linear; a norm between the attention and the residual
    stream (Gemma 2 and 3, GLM-4V) likewise. Observed as a dict: ``heads`` ``[item, layer, head, target]``, ``mlp``
    ``[item, layer, target]`` (all else that the layer adds), ``embedding`` and ``bias`` ``[item, target]``. Their sum is
    the target's logit, before a cap on the logits where the model has one.

    Parameters
    ----------
    targets : "answer", "candidates" or tuple of str
        See ``target_tokens``: the first token of each counts.

    Notes
    -----
    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". A direct effect only: what later layers make
    of a head's output is not in it.
    """

    targets: str | tuple[str, ...] = "answer"

    def __post_init__(self) -> None:
        freeze(self, "targets")

    def parts(self, subject: Subject, items: Sequence, encoded: Sequence[Encoded]) -> tuple:
        """One observer of heads, one of the residual stream."""
        tokens = target_tokens(subject, items, self.targets)
        anatomy, head = subject.anatomy, subject.anatomy.head
        final = FrozenNorm.of(anatomy.norm, anatomy.hidden_size)
        with present(head):
            rows = tokens.clamp(min=0).to(head.weight.device)
            unembedding = head.weight.detach()[rows].double().to(final.gain.device)
            bias = None if getattr(head, "bias", None) is None else head.bias.detach()[rows].double().to(final.gain.device)
        missing = (tokens < 0).to(final.gain.device)
        unembedding = unembedding.masked_fill(missing[:, :, None], torch.nan)
        offset = (unembedding * final.bias).sum(2)
        if bias is not None:
            offset = offset + bias
        directions = final.pull(unembedding)
        return (
            _HeadLogits(subject, directions, _attention_norms(subject, encoded[0])),
            _ResidualLogits(anatomy.n_layers, directions, final, offset),
        )

    def combine(self, heads: dict, residual: dict) -> dict[str, torch.Tensor]:
        """Scale everything by the final norm, and leave to each MLP what its layer added beyond its heads."""
        n_layers = max(residual)
        end = residual[n_layers]
        scale = end["scale"][:, None].cpu()
        stream = torch.stack([residual[layer]["stream"].cpu() for layer in range(n_layers + 1)], dim=1)
        stream = stream * scale[:, None]
        shape = next(iter(heads.values()))["heads"].shape[1:]
        written = torch.zeros((len(scale), n_layers, *shape), dtype=torch.float64)
        bias = torch.zeros((len(scale), n_layers, shape[-1]), dtype=torch.float64)
        for layer, record in heads.items():
            written[:, layer] = record["heads"].cpu() * scale[:, None]
            bias[:, layer] = record["bias"].cpu() * scale
        return {
            "heads": written.float(),
            "mlp": (stream[:, 1:] - stream[:, :-1] - written.sum(2) - bias).float(),
            "embedding": stream[:, 0].float(),
            "bias": (end["offset"].cpu() + bias.sum(1)).float(),
        }


@dataclass(frozen=True, eq=False)
class _HeadLogits:
    """``heads`` ``[element, head, target]`` and the projection's ``bias`` ``[element, target]``, before the final scale."""

    subject: Subject
    directions: torch.Tensor
    norms: tuple[FrozenNorm | None, ...]

    def attention(self, view: AttentionView) -> dict[str, torch.Tensor]:
        projection = self.subject.anatomy.output_projection(view.layer)
        last = view.tokens.last[:, None, None, None]
        outputs = torch.take_along_dim(view.output.detach(), last, dim=1)[:, 0]
        n_heads, size = outputs.shape[1:]
        directions = self.directions.to(outputs.device)[view.tokens.rows] * _share(self.subject.anatomy.layers[view.layer])
        constant = torch.zeros((), device=outputs.device)
        norm = self.norms[view.layer]
        if norm is not None:
            scale = norm.scale(projection.forward(outputs.flatten(1)))
            constant = (directions * norm.bias).sum(2)
            directions = norm.pull(directions) * scale[:, None, None]
        with present(projection):
            if getattr(projection, "bias", None) is not None:
                constant = constant + directions @ projection.bias.detach().double()
            back = directions @ _matrix(projection, n_heads * size, outputs)
        heads = torch.einsum("ethd,ehd->eht", back.unflatten(2, (n_heads, size)), outputs.double())
        return {"heads": heads, "bias": constant.expand_as(directions[:, :, 0])}


def _share(block: nn.Module) -> float:
    """How much of its attention's output a layer adds: all, or what a gate (Mllama) or a multiplier (Granite) lets through."""
    gate = getattr(block, "cross_attn_attn_gate", None)
    return float(getattr(block, "residual_multiplier", 1.0)) * (1.0 if gate is None else float(gate.detach().tanh()))


def _matrix(projection: nn.Module, size: int, like: torch.Tensor) -> torch.Tensor:
    """The linear map of an output projection, ``[hidden, head * head_dim]``, adapters on it included."""
    if type(projection) is nn.Linear:
        return projection.weight.detach().double()
    unit = torch.eye(size, dtype=like.dtype, device=like.device)
    return as_matrix(projection, unit).double().T


@dataclass(frozen=True, eq=False)
class _ResidualLogits:
    """The residual stream along the targets, ``[element, target]``, and at its end the final norm's scale."""

    n_layers: int
    directions: torch.Tensor
    final: FrozenNorm
    offset: torch.Tensor

    def layer(self, view: LayerView) -> dict[str, torch.Tensor]:
        hidden = torch.take_along_dim(view.hidden.detach(), view.tokens.last[:, None, None], dim=1)[:, 0]
        rows = view.tokens.rows
        directions = self.directions.to(hidden.device)[rows]
        record = {"stream": torch.einsum("eth,eh->et", directions, hidden.double())}
        if view.layer == self.n_layers:
            record |= {"scale": self.final.scale(hidden), "offset": self.offset.to(hidden.device)[rows]}
        return record


_ATTENTION_NORMS: WeakKeyDictionary[nn.Module, tuple[FrozenNorm | None, ...]] = WeakKeyDictionary()


def _attention_norms(subject: Subject, encoded: Encoded) -> tuple[FrozenNorm | None, ...]:
    """The norm that each layer puts on its attention's output before adding it; None where there is none.

    Which child of a decoder layer that is has no common name (``post_attention_layernorm`` comes after the addition in most
    families). So one prompt is run once and the child that is handed the attention's very output is taken.
    """
    model = subject.model
    if model not in _ATTENTION_NORMS:
        anatomy = subject.anatomy
        outputs: dict[int, torch.Tensor] = {}
        found: list[nn.Module | None] = [None] * anatomy.n_layers
        handles = []

        def keep(layer: int):
            def hook(module, args, output):
                outputs[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        def compare(layer: int):
            def hook(module, args):
                if args and args[0] is outputs.get(layer):
                    found[layer] = module

            return hook

        try:
            for layer, (block, attention) in enumerate(zip(anatomy.layers, anatomy.attentions, strict=True)):
                handles.append(attention.register_forward_hook(keep(layer)))
                handles += [
                    child.register_forward_pre_hook(compare(layer)) for child in block.children() if child is not attention
                ]
            forward_rows(subject, [encoded], np.array([0]), [None], [0])
        finally:
            for handle in handles:
                handle.remove()
        _ATTENTION_NORMS[model] = tuple(
            None if norm is None else FrozenNorm.of(norm, anatomy.hidden_size) for norm in found
        )
    return _ATTENTION_NORMS[model]
