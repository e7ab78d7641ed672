"""Text that rates the image, and what it drops made into a few tokens (SparseVLM, Zhang et al. 2024, arXiv:2410.04417).

``SparseVLM``    attention of text raters, with recycling
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch

from vlm_core.errors import NotMeasurable
from vlm_core.interventions.numeric import real
from vlm_core.interventions.policy import Choice, Policy, Seen

__all__ = ["SparseVLM", "peaks"]

NEIGHBOURS = 5
"""Nearest other tokens that a token's density is read from."""


@dataclass(frozen=True, eq=False)
class SparseVLM(Policy):
    """Keep the image tokens with the highest attention from text raters; the best of the others are clustered and stay as their means.

    *Raters* are the tokens of the question that the image is nearest to: products of the residual streams of image and question are made
    into shares of the question's tokens for each image token (softmax) and averaged over image tokens; those with at least an average share
    rate. The *score* of an image token is its attention in the layer before, averaged over heads and raters. *Recycling*: of the tokens that are not
    kept, the share ``recycled`` with the highest scores is clustered (density peaks, see ``peaks``) into ``merged`` times as many
    clusters. Each becomes one token: it stands where the cluster's centre stood and carries the mean of its members.

    Parameters
    ----------
    recycled : float
        Share of the dropped tokens that is recycled, in [0, 1]; 0 recycles nothing.
    merged : float
        Clusters per recycled token, in (0, 1].

    Notes
    -----
    Definition and shares (0.3 and 0.1) as in the public code, in four points our reading. As many tokens stay as are asked for, the clusters
    among them: ``ceil(merged * recycled * (candidates - keep))`` of them, but never all. Raters are found before the layer where tokens go,
    not once before the first. A density is read from five neighbours, where the code takes as many as there are clusters, the
    token itself among them. Clusters stand where their centres stood, where the code puts them after all others. The
    stages of the paper are several ``DropTokens`` in one row. Permuting the tokens permutes the choice where no two are alike.
    """

    recycled: float = 0.3
    merged: float = 0.1
    name: ClassVar[str] = "sparsevlm"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __post_init__(self) -> None:
        recycled, merged = real(self.recycled, "recycled"), real(self.merged, "merged")
        if not 0.0 <= recycled <= 1.0:
            raise ValueError(f"recycled must be a share between 0 and 1, got {recycled}")
        if not 0.0 < merged <= 1.0:
            raise ValueError(f"merged must be clusters per token, above 0 and up to 1, got {merged}")
        self._seal(recycled=recycled, merged=merged)

    def choose(self, seen: Seen, keep: int) -> Choice:
        """The tokens rated best, and the centres of clusters of the next best."""
        order = seen.once(("sparsevlm",), lambda: self._scores(seen).argsort(descending=True, stable=True))
        n_clusters = min(keep - 1, ceil(self.merged * self.recycled * (len(seen) - keep) - 1e-9))
        if not n_clusters:
            return Choice(order[:keep].sort().values)
        n_whole = keep - n_clusters
        n_recycled = min(len(seen) - n_whole, max(n_clusters, round(self.recycled * (len(seen) - n_whole))))
        whole, pool = order[:n_whole], order[n_whole : n_whole + n_recycled].sort().values
        centres, cluster = peaks(seen.hidden[pool], n_clusters)
        kept, place = torch.cat([whole, pool[centres]]).sort()
        mix = torch.zeros(keep, len(seen), device=seen.stream.device)
        mix[range(n_whole), whole] = 1.0
        mix[n_whole + cluster, pool] = 1.0
        return Choice(kept, (mix / mix.sum(1, keepdim=True))[place])

    @staticmethod
    def _scores(seen: Seen) -> torch.Tensor:
        if not len(seen.question):
            raise NotMeasurable("SparseVLM has image tokens rated by the text after the image, and this prompt has none: ask after the image")
        share = (seen.hidden @ seen.asked.T).softmax(1).mean(0)
        raters = (share >= share.mean()) | (share == share.max())
        return seen.attention("question")[raters].mean(0)


def peaks(hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters around density peaks (Rodriguez and Laio 2014; Du et al. 2016 with nearest neighbours).

    Distances are Euclidean, divided by the square root of the size. A token's density is ``exp`` of minus the mean square of its distances
    to its five nearest others (fewer where there are fewer). Centres are the tokens with the largest density times distance to the nearest
    denser token (for the densest: the largest distance of all). Of two equally dense the earlier counts as denser. The other tokens
    belong to the nearest centre.

    Parameters
    ----------
    hidden : Tensor ``[token, hidden]``
    count : int
        Clusters, at most as many as tokens.

    Returns
    -------
    centres : LongTensor ``[count]``
        Ascending.
    cluster : LongTensor ``[token]``
        Number of each token's centre.
    """
    n = len(hidden)
    # By products, far faster for wide streams; in double precision, as they cancel between neighbours.
    wide = hidden.double()
    distances = (torch.cdist(wide, wide, compute_mode="use_mm_for_euclid_dist") / hidden.shape[1] ** 0.5).fill_diagonal_(0.0)
    nearest = distances.topk(min(n, NEIGHBOURS + 1), dim=1, largest=False).values[:, 1:]
    density = -nearest.square().mean(1) if n > 1 else torch.zeros(n, device=hidden.device)
    # A number per token that grows with its density.
    rank = density.argsort(descending=True, stable=True).argsort()
    parent = distances.masked_fill(rank >= rank[:, None], torch.inf).min(1).values
    apart = torch.where(rank == 0, distances.max(), parent)
    # The logarithm of density times distance: densities of long residual streams are too small for numbers.
    centres = (apart.log() + density).argsort(descending=True, stable=True)[:count].sort().values
    cluster = distances[:, centres].argmin(1)
    cluster[centres] = torch.arange(count, device=hidden.device)
    return centres, cluster
