"""Activations of one prompt, captured to be put into another.

``capture_activations(...)``    at chosen sites and layers, for ``Patch`` and ``ResampleHeads``
``capture_embeddings(...)``     what enters the first layer, for ``ReplaceTokens``
``capture_image_kv(...)``       image keys and values, for ``ReplaceImageKV``
``mean_token(...)``             the mean visual token of a set, for ``ReplaceTokens``
``token_spread(...)``           how far visual tokens are spread, for the scale of ``GaussianNoise``
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm_core.errors import NotMeasurable
from vlm_core.interventions import Row, require_row
from vlm_core.interventions.sources import SITES, Activations, ImageKV, Vector
from vlm_core.items import item_number, require_item, require_items, take
from vlm_core.seam.views import AttentionView, Tokens
from vlm_core.subjects.embed import Encoded, encode_items
from vlm_core.subjects.groups import with_groups
from vlm_core.subjects.rows import forward_rows
from vlm_core.subjects.subject import Subject, require_subject

__all__ = ["capture_activations", "capture_embeddings", "capture_image_kv", "mean_token", "token_spread"]


@dataclass(frozen=True)
class AtSite:
    """Keeps what one prompt has at a site, ``[1, token, ...]`` per layer."""

    name: str
    layers: frozenset[int]

    def site(self, site: str, layer: int, output: torch.Tensor, tokens: Tokens) -> torch.Tensor | None:
        return output.clone() if site == self.name and layer in self.layers else None


@dataclass(frozen=True)
class _ImageKeyValues:
    """Keys and values of one prompt's image tokens for every query head, ``[1, head, image token, 2 * head_dim]`` per layer."""

    n_heads: int

    def attention(self, view: AttentionView) -> torch.Tensor:
        image = view.keys_of("image")[0]
        both = torch.cat([view.key[:, :, image], view.value[:, :, image]], dim=-1)
        return both.repeat_interleave(self.n_heads // both.shape[1], dim=1)


def capture_activations(
    subject: Subject,
    item: Any,
    sites: str | Iterable[str] = "residual",
    layers: int | Iterable[int] | None = None,
    *,
    intervention: Row = None,
    groups: Mapping[str, np.ndarray] | None = None,
) -> Activations:
    """What one prompt has at some sites and layers, padding left out.

    Parameters
    ----------
    item : item, or Encoded
    sites : one or more of {"residual", "attention", "mlp", "head"}
        See ``vlm_core.interventions.sources.SITES``.
    layers : int or iterable of int, optional
        Default: all. ``n_layers`` is what enters the final norm, at the site ``residual`` only.
    intervention : optional
        In force while capturing (a corrupted run, say). It may not shorten the sequence.
    groups : mapping of str to BoolTensor or bool array ``[token]``, optional
        Named token groups of this prompt, to be matched with those of another.

    Returns
    -------
    Activations
        On the CPU.

    Raises
    ------
    ValueError
        For an unknown site, a layer that the model does not have, or a sequence that was shortened.
    """
    require_subject(subject)
    require_row(intervention, "intervention")
    anatomy = subject.anatomy
    sites = (sites,) if isinstance(sites, str) else tuple(sites)
    wanted = frozenset(range(anatomy.n_layers) if layers is None else [layers] if isinstance(layers, int) else layers)
    for site in sites:
        if site not in SITES:
            raise ValueError(f"'{site}' is not a site: choose from {', '.join(SITES)}")
        most = anatomy.n_layers if site == "residual" else anatomy.n_layers - 1
        if any(not 0 <= layer <= most for layer in wanted):
            raise ValueError(f"site '{site}' has layers 0 to {most} in this model, asked for {sorted(wanted)}")
    encoded = _encoded(subject, item, groups)
    _, run = forward_rows(
        subject, [encoded], np.zeros(1, dtype=int), [intervention], [_number(item)], observers=[AtSite(site, wanted) for site in sites]
    )
    if run.tokens.index is not None:
        raise ValueError("activations are captured from whole sequences: leave DropTokens and MergeTokens out")
    values = {
        (site, layer): run.record(number, layer)[0].float().cpu()
        for number, site in enumerate(sites)
        for layer in sorted(run.records[number])
    }
    return Activations(values, encoded.image.cpu(), {name: members.cpu() for name, members in encoded.groups.items()})


def capture_embeddings(subject: Subject, item: Any, groups: Mapping[str, np.ndarray] | None = None) -> Activations:
    """What enters the first layer for one prompt: text embeddings and projected image features."""
    return capture_activations(subject, item, "residual", 0, groups=groups)


def capture_image_kv(subject: Subject, item: Any) -> ImageKV:
    """Keys and values of one prompt's image tokens, for every query head.

    Raises
    ------
    ValueError
        Where layers hold different numbers of image keys (an image outside the token sequence).
    """
    require_subject(subject)
    subject.anatomy.require("image_kv", range(subject.anatomy.n_layers))
    encoded = _encoded(subject, item, None)
    observer = _ImageKeyValues(subject.anatomy.n_heads)
    _, run = forward_rows(subject, [encoded], np.zeros(1, dtype=int), [None], [_number(item)], observers=[observer])
    stacked = torch.stack([run.record(0, layer)[0] for layer in range(subject.anatomy.n_layers)]).float().cpu()
    size = stacked.shape[-1] // 2
    return ImageKV(stacked[..., :size].contiguous(), stacked[..., size:].contiguous())


def mean_token(subject: Subject, items: Sequence, batch: int = 32) -> Vector:
    """The mean visual token: what enters the first layer at image tokens, averaged over tokens and items (Neo et al. 2025)."""
    return Vector(_image_moments(subject, items, batch)[0].float())


def token_spread(subject: Subject, items: Sequence, batch: int = 32) -> float:
    """Standard deviation of visual tokens' components around the mean token.

    Causal tracing (Meng et al. 2022) corrupts by noise of three times the spread: ``GaussianNoise(3 * token_spread(...))``.
    """
    return float(_image_moments(subject, items, batch)[1].mean().sqrt())


def _image_moments(subject: Subject, items: Sequence, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance ``[hidden]`` of visual tokens, parts joined as Chan, Golub and LeVeque (1983) do."""
    require_subject(subject)
    require_items(items)
    count, mean, squares = 0, 0.0, 0.0
    for start in range(0, len(items), batch):
        for encoded in encode_items(subject, take(items, range(start, min(start + batch, len(items)))), batch=batch):
            tokens = capture_embeddings(subject, encoded).at("residual", 0)[encoded.image.cpu()].double()
            n, own = len(tokens), tokens.mean(0)
            apart = own - mean
            squares = squares + (tokens - own).square().sum(0) + apart.square() * (count * n / (count + n))
            mean = mean + apart * (n / (count + n))
            count += n
    if not count:
        raise NotMeasurable("a mean token needs at least one item with image tokens in its sequence")
    return mean, squares / count


def _encoded(subject: Subject, item: Any, groups: Mapping[str, np.ndarray] | None) -> Encoded:
    if not isinstance(item, Encoded):
        require_item(item)
    encoded = item if isinstance(item, Encoded) else encode_items(subject, [item])[0]
    return with_groups(encoded, groups or {})


def _number(item: Any) -> int:
    return 0 if isinstance(item, Encoded) else item_number(item)
