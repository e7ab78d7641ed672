"""Relevance budgets: how many image tokens each region of an image gets depends on the image and on what is asked.

``RelevanceBudget``   three scores per token, three tensions between them, a floor and a ceiling per region
``Relevance``         the scores of one prompt, and what follows from them
``SCORES``            their names
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vlm_core.interventions.numeric import integer, real
from vlm_core.interventions.policy import Choice, Policy, Seen
from vlm_core.interventions.sources import Couplings

__all__ = ["COUPLINGS", "SCORES", "Relevance", "RelevanceBudget"]

COUPLINGS = ("attention", "similarity", "none")
SCORES = ("propositional", "perspectival", "participatory")
"""What a patch says that others do not, how it stands out from its surround, how the question couples to it."""

_TEMPERATURE = 0.1
"""Of cosines between the question's tokens and an image token."""
_SLACK = 1e-9
"""Products that are whole numbers but for rounding count as whole."""


@dataclass(frozen=True, eq=False)
class Relevance:
    """The scores of one prompt's image tokens.

    Parameters
    ----------
    scores : Tensor ``[score, candidate]``
        Of ``SCORES``, each with mean 1.
    region : LongTensor ``[candidate]``
        Regions are numbered from 0, as they lie in the image; tokens without a place are one region, the last.
    sizes : LongTensor ``[region]``
        Candidates of each.
    shares : Tensor ``[score, region]``
        How the image's relevance falls to regions by each score alone; sums to 1 over regions.
    weights : Tensor ``[region]``
        What budgets are in proportion to; sums to 1.
    tokens : Tensor ``[candidate]``
        By what tokens of one region are ranked.
    demand : float
        Share of the image's tokens that the question couples to: the perplexity of the coupling by the number of candidates, in (0, 1].
    """

    scores: torch.Tensor
    region: torch.Tensor
    sizes: torch.Tensor
    shares: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor
    demand: float

    @property
    def dominant(self) -> torch.Tensor:
        """Score by which each region has the largest share of the image, ``[region]``; the first of ``SCORES`` of those alike."""
        # Shares that differ by rounding alone are alike.
        return self.shares.mul(1e5).round().argmax(0)


@dataclass(frozen=True, eq=False)
class RelevanceBudget(Policy):
    """Each region of the image gets a budget between a floor and a ceiling; a region's most relevant tokens fill it.

    A reconstruction: relevance realization with dynamic token budgets ("ARR-COC", after Vervaeke's ways of knowing and opponent
    processing) is described in words only, and its public code divides budgets evenly. The formulas below are ours.

    Scores of a token, in the residual stream before the layer, each divided by its mean over the image:

    * propositional (information): 1 - mean cosine with the image's other tokens, scaled from 0 to 1 within the image;
    * perspectival (salience): 1 - mean cosine with its up to eight neighbours in the grid, scaled alike (a token without neighbours is
      compared with all others);
    * participatory (coupling): as ``coupling`` says.

    Tensions, each from 0 to 1, act in turn. *Exploit - explore* weighs the participatory score by ``1 - explore``, and the mean of the two
    others by ``explore``. *Focus - diversify*: a region counts by ``1 - diversify`` of its highest score and ``diversify`` of its mean,
    times its tokens; these divide the image among regions for each score. *Compress - particularise*: budgets are in proportion to
    ``1 - particularise`` of a region's tokens and ``particularise`` of that division. Whole tokens go one at a time to the region with the
    largest weight over tokens it has + 1/2 (Sainte-Laguë), between floor and ceiling.

    The total is ``keep * (1 + s z)`` tokens, where ``z`` is the demand (``Relevance.demand``) less its centre over its scale, at most 1
    and at least -1, and ``s`` is ``elasticity``, or less where there are not so many tokens. Calibrated (``calibrated`` in
    ``vlm_core.reduction.relevance_maps``) on some items, the mean total over them is what is asked for, but for rounding. At one total, a
    region to which the question couples more never gets fewer tokens.

    Parameters
    ----------
    coupling : {"attention", "similarity", "none"} or Couplings
        ``attention``: what the question's tokens attend to in the layer before, averaged over them and over heads. ``similarity``: the
        mean over the question's tokens of exp(cosine / 0.1). ``none``: the question is not looked at. Couplings: scores that were taken
        elsewhere, such as those of another item's question. A prompt without a question couples to all tokens alike.
    particularise, explore, diversify : float
    regions : int
        Rows and columns of regions in each grid.
    floor, ceiling : float
        Tokens of a region, as multiples of its even share. 0.4 and 2.5 are 64 and 400 where the even share is 160 of a grid of 32 x 32.
    elasticity : float
        How far the total may go from what is asked for; at most ``1 - floor`` and ``ceiling - 1``.
    demand : (centre, scale), optional
        Without it the total is what is asked for, in every prompt.
    """

    coupling: str | Couplings = "attention"
    particularise: float = 0.5
    explore: float = 0.5
    diversify: float = 0.5
    regions: int = 4
    floor: float = 0.4
    ceiling: float = 2.5
    elasticity: float = 0.5
    demand: tuple[float, float] | None = None
    name: ClassVar[str] = "relevance"

    def __post_init__(self) -> None:
        if not isinstance(self.coupling, Couplings) and self.coupling not in COUPLINGS:
            raise ValueError(f"coupling must be one of {', '.join(COUPLINGS)}, or Couplings, got {self.coupling!r:.60}")
        tensions = ("particularise", "explore", "diversify")
        numbers = {name: real(getattr(self, name), name) for name in (*tensions, "floor", "ceiling", "elasticity")}
        for name in tensions:
            if not 0.0 <= numbers[name] <= 1.0:
                raise ValueError(f"{name} is a place between two ends: it must be between 0 and 1, got {numbers[name]}")
        floor, ceiling, elasticity = (numbers[name] for name in ("floor", "ceiling", "elasticity"))
        if not 0.0 <= floor <= 1.0 <= ceiling:
            raise ValueError(f"floor and ceiling are multiples of an even share, 0 <= floor <= 1 <= ceiling, got {floor} and {ceiling}")
        if not 0.0 <= elasticity <= min(1.0 - floor, ceiling - 1.0) + _SLACK:
            raise ValueError(
                f"elasticity must be between 0 and {min(1.0 - floor, ceiling - 1.0):g}, as a total has to lie between the sums of floors "
                f"and ceilings, got {elasticity}"
            )
        self._seal(**numbers, regions=integer(self.regions, "regions", least=1), demand=self._demand())

    def _demand(self) -> tuple[float, float] | None:
        if self.demand is None:
            return None
        if self.coupling == "none":
            raise ValueError("without coupling every question demands the same: demand must be None")
        if not isinstance(self.demand, list | tuple) or len(self.demand) != 2:
            raise ValueError(f"demand must be a pair (centre, scale), got {self.demand!r:.60}: calibrated(...) finds it")
        centre, scale = real(self.demand[0], "the demand's centre"), real(self.demand[1], "the demand's scale")
        if scale <= 0:
            raise ValueError(f"the demand's scale must be above 0, got {scale}: leave demand None where all questions demand the same")
        return centre, scale

    @property
    def reads(self) -> frozenset[str]:
        """Places in the grid; attention where that is the coupling."""
        return frozenset({"grid", "attention"} if self.coupling == "attention" else {"grid"})

    @property
    def exact(self) -> bool:
        """Whether the total is what is asked for in every prompt."""
        return self.demand is None

    def uniform(self) -> RelevanceBudget:
        """The control: the same scores rank tokens, but every region of every prompt gets its even share."""
        return replace(self, particularise=0.0, demand=None)

    def choose(self, seen: Seen, keep: int) -> Choice:
        """Every region's most relevant tokens, as many as its budget (the earlier of two alike)."""
        relevance = self.relevance(seen)
        budget = self.budget(relevance, keep)
        order = seen.once(("order", self.digest), lambda: _ranked(relevance))
        starts = relevance.sizes.cumsum(0) - relevance.sizes
        region = relevance.region[order]
        place = torch.arange(len(order), device=order.device) - starts[region]
        return Choice(order[place < budget[region]].sort().values)

    def relevance(self, seen: Seen) -> Relevance:
        """The scores of the candidates of one prompt."""
        return seen.once(("relevance", self.digest), lambda: self._relevance(seen))

    def _relevance(self, seen: Seen) -> Relevance:
        coupling = self.couplings(seen)
        region = seen.once(("regions", self.regions), lambda: self._regions(seen))
        scores = torch.stack([*seen.once(("image scores",), lambda: _image_scores(seen, _unit(seen))), coupling])
        scores = scores / scores.mean(1, keepdim=True)
        sizes = region.bincount()
        mean = torch.zeros(3, len(sizes), device=scores.device).index_add_(1, region, scores) / sizes
        most = torch.zeros_like(mean).scatter_reduce_(1, region.expand(3, -1), scores, "amax", include_self=False)
        shares = sizes * ((1.0 - self.diversify) * most + self.diversify * mean)
        shares = shares / shares.sum(1, keepdim=True)
        mixture = scores.new_tensor([self.explore / 2, self.explore / 2, 1.0 - self.explore])
        weights = (1.0 - self.particularise) * sizes / sizes.sum() + self.particularise * (mixture @ shares)
        chance = coupling / coupling.sum()
        demand = math.exp(-float(torch.xlogy(chance, chance).sum())) / len(seen)
        return Relevance(scores, region, sizes, shares, weights, mixture @ scores, demand)

    def couplings(self, seen: Seen) -> torch.Tensor:
        """How much the question couples to each candidate, in the unit of ``coupling``, ``[candidate]``."""
        if isinstance(self.coupling, Couplings):
            held = self.coupling.of(seen.item).to(seen.stream.device, torch.float32)
            if int(seen.ordinals.max()) >= len(held):
                raise ValueError(f"couplings to {len(held)} image tokens are held of item number {seen.item}, which has more of them")
            found = held[seen.ordinals]
        elif self.coupling == "none" or not len(seen.question):
            found = torch.ones(len(seen), device=seen.stream.device)
        elif self.coupling == "attention":
            found = seen.attention("question").mean(0)
        else:
            cosines = _unit(seen) @ torch.nn.functional.normalize(seen.asked, dim=1).T
            found = (cosines / _TEMPERATURE).exp().mean(1)
        return found if bool((found > 0).any()) else torch.ones_like(found)

    def total(self, demand: float, keep: int, n: int) -> int:
        """Tokens of ``n`` that stay of a prompt with this demand, where ``keep`` are asked for."""
        if self.demand is None:
            return keep
        centre, scale = self.demand
        far = min(1.0, max(-1.0, (demand - centre) / scale))
        return max(1, math.floor(keep * (1.0 + min(self.elasticity, n / keep - 1.0) * far) + 0.5))

    def budget(self, relevance: Relevance, keep: int) -> torch.Tensor:
        """Tokens of each region, ``[region]``, where ``keep`` are asked for."""
        n = len(relevance.region)
        even = relevance.sizes.double() * (keep / n)
        floor = (self.floor * even + _SLACK).floor().long()
        ceiling = torch.minimum((self.ceiling * even - _SLACK).ceil().long(), relevance.sizes)
        left = self.total(relevance.demand, keep, n) - int(floor.sum())
        # Quotients fall with every token that a region has: the largest of them all are those that would be taken one by one.
        nth = torch.arange(int(ceiling.max()), device=floor.device)
        quotients = relevance.weights.double()[:, None] / (nth + 0.5)
        quotients = quotients.masked_fill((nth < floor[:, None]) | (nth >= ceiling[:, None]), -1.0)
        taken = quotients.flatten().argsort(descending=True, stable=True)[:left] // max(1, len(nth))
        return floor + taken.bincount(minlength=len(floor))

    def _regions(self, seen: Seen) -> torch.Tensor:
        whole, here = seen.visual, seen.outside()
        block = torch.full_like(here.grid, -1)
        for grid in whole.grid[whole.grid >= 0].unique().tolist():
            members, inside = here.grid == grid, whole.grid == grid
            row = here.row * self.regions // (int(whole.row[inside].max()) + 1)
            column = here.column * self.regions // (int(whole.column[inside].max()) + 1)
            block = torch.where(members, (grid * self.regions + row) * self.regions + column, block)
        block = torch.where(block < 0, block.max() + 1, block)
        return block.unique(return_inverse=True)[1].to(seen.stream.device)


def _unit(seen: Seen) -> torch.Tensor:
    return seen.once(("unit",), lambda: torch.nn.functional.normalize(seen.hidden, dim=1))


def _image_scores(seen: Seen, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Propositional and perspectival scores, from 0 to 1 within the image."""
    n = len(seen)
    novelty = 1.0 - (unit @ unit.sum(0) - 1.0) / (n - 1)
    places, around, count = seen.outside(), torch.zeros_like(unit), torch.zeros(n, device=unit.device)
    grids, rows, columns = (one.to(unit.device) for one in (places.grid, places.row, places.column))
    for grid in grids[grids >= 0].unique().tolist():
        at = (grids == grid).nonzero()[:, 0]
        cells = unit.new_zeros(int(rows[at].max()) + 3, int(columns[at].max()) + 3, unit.shape[1] + 1)
        cells[rows[at] + 1, columns[at] + 1] = torch.nn.functional.pad(unit[at], (0, 1), value=1.0)
        lines = cells[:-2] + cells[1:-1] + cells[2:]
        sums = (lines[:, :-2] + lines[:, 1:-1] + lines[:, 2:])[rows[at], columns[at]]
        around[at], count[at] = sums[:, :-1] - unit[at], sums[:, -1] - 1.0
    contrast = 1.0 - (unit * around).sum(1) / count.clamp(min=1.0)
    return _stretched(novelty), _stretched(torch.where(count > 0, contrast, novelty))


def _stretched(values: torch.Tensor) -> torch.Tensor:
    low, high = values.min(), values.max()
    # What differs by rounding alone is alike.
    return (values - low) / (high - low) if bool(high - low > 1e-5) else torch.ones_like(values)


def _ranked(relevance: Relevance) -> torch.Tensor:
    """Candidates region by region, the most relevant first, ``[candidate]``."""
    order = relevance.tokens.argsort(descending=True, stable=True)
    return order[relevance.region[order].argsort(stable=True)]
