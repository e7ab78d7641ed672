"""Training of a learned gate on the answers of the subject itself.

``train_gate(...)``   a gate for one subject, layer and fraction

The subject's weights stay as they are. In each step the image tokens of a few items are scored, Gumbel noise is added, and the best are
kept; what the model then says is compared with what it says of all tokens. Nothing is dropped while training: ``log`` of a token's gate
is added to the score that it gets in attention, in every layer from the drop on, which for gates of 0 and 1 is dropping. The choice of the
best has no slope; it gets that of a sigmoid about the threshold (straight-through). Training begins with half of the tokens, among which
what is asked about mostly is, and comes down to the number asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from vlm_core.interventions.numeric import integer, real
from vlm_core.interventions.policy import Choice, Seen
from vlm_core.interventions.sources import GateWeights
from vlm_core.interventions.tokens import DropTokens
from vlm_core.items import item_field, item_number, require_items, take
from vlm_core.observation.gradients import final_hidden, next_logits
from vlm_core.reduction.answering import Answered, answering
from vlm_core.reduction.gate import LearnedGate, gate_scores, marks
from vlm_core.seam.plan import require_possible
from vlm_core.subjects.embed import Encoded, encode_items
from vlm_core.subjects.rows import forward_rows, read_logits
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.budget import Budget
from vlm_core.sweeps.engine import choose_path
from vlm_core.sweeps.prefix import Sprout, grow_stems
from vlm_core.sweeps.resume import forward_resumed
from vlm_core.sweeps.trunk import Unshareable, record_trunks

__all__ = ["train_gate"]

_CLOSED = 1e-6
"""Gate of a token that is not kept: what it adds to attention is far below what is compared, and its slope is finite."""
_RATE = 3e-3


def train_gate(
    subject: Subject,
    items: Sequence,
    layer: int,
    keep: float,
    steps: int = 150,
    seed: int = 0,
    *,
    batch: int = 16,
    width: int = 32,
    temperature: float = 1.0,
) -> LearnedGate:
    """Train a gate to keep the tokens without which the model says something else.

    The loss is the Kullback-Leibler divergence of the next token's distribution after the prompt, the whole model's from the gated one's,
    averaged over the batch; Adam, learning rate 3e-3. Items need no answers. Equal seeds give equal weights on one machine.

    Parameters
    ----------
    items : sequence of items
        On which nothing is decided later.
    layer, keep
        As in ``DropTokens``, with 0 < keep < 1.
    steps, batch : int
        Steps of training, items of each.
    width : int
        Of the scorer's hidden layer.
    temperature : float
        Of the noise and of the sigmoid.

    Raises
    ------
    ValueError
        For a layer that there is not, a fraction that leaves nothing to choose, or items of fewer than two image tokens.
    """
    require_items(items)
    steps, seed, batch, width = (
        integer(value, name, least=least)
        for value, name, least in ((steps, "steps", 1), (seed, "seed", 0), (batch, "batch", 1), (width, "width", 1))
    )
    temperature = real(temperature, "temperature")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not len(items):
        raise ValueError("a gate is trained on items, got none")
    row = DropTokens(layer, keep, Answered())
    if not row.decides:
        raise ValueError(f"keep must be above 0 and below 1 for a gate to learn what to keep, got {row.keep}")
    require_possible(row, subject.anatomy)
    items = take(items, range(len(items)))
    encoded = encode_items(subject, items)
    for item, one in zip(items, encoded, strict=True):
        n = int(one.image.sum())
        if not 0 < row.count(n) < n:
            raise ValueError(f"item {item_field(item, 'id')!r} has {n} image tokens: at keep {row.keep} there is nothing to choose")
    numbers = list(map(item_number, items))
    with torch.inference_mode(False), torch.enable_grad():
        return _trained(subject, encoded, numbers, row, steps, seed, batch, width, temperature)


def _trained(
    subject: Subject,
    encoded: Sequence[Encoded],
    numbers: Sequence[int],
    row: DropTokens,
    steps: int,
    seed: int,
    batch: int,
    width: int,
    temperature: float,
) -> LearnedGate:
    targets = _said(subject, encoded, numbers, batch)
    generator = torch.Generator().manual_seed(seed)
    weights = [one.to(subject.device).requires_grad_() for one in _drawn(subject.anatomy.hidden_size, width, generator)]
    order = _order(len(encoded), steps * batch, seed)
    optimiser = torch.optim.Adam(weights, lr=_RATE)

    def gated(seen: Seen, count: int) -> Choice:
        with torch.enable_grad():
            scores = gate_scores([one.to(seen.stream.device) for one in weights], seen.hidden, seen.asked)
            count = _count(done / steps, len(seen), count)
            return Choice(torch.arange(len(seen), device=scores.device), sizes=_gates(scores, count, temperature, generator))

    last_hidden = _from_the_layer_on(subject, encoded, numbers, row) or _from_the_first_layer_on(subject, encoded, numbers, row)
    with answering(gated):
        for done in range(steps):
            chosen = order[done * batch : (done + 1) * batch]
            said = next_logits(subject.anatomy, last_hidden(chosen)).log_softmax(-1)
            expected = targets[torch.as_tensor(chosen, device=targets.device)].to(said.device)
            loss = torch.nn.functional.kl_div(said, expected, log_target=True, reduction="batchmean")
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = slope
            optimiser.step()
    found = [one.detach().cpu().clone() for one in weights]
    return LearnedGate(GateWeights(*found, marks(subject.anatomy)))


LastHidden = Callable[[Sequence[int]], torch.Tensor]
"""Final hidden states of some prompts' last tokens, ``[prompt, hidden]``, differentiable."""


def _from_the_first_layer_on(subject: Subject, encoded: Sequence[Encoded], numbers: Sequence[int], row: DropTokens) -> LastHidden:
    def last_hidden(chosen: Sequence[int]) -> torch.Tensor:
        hidden, last = final_hidden(subject, [encoded[k] for k in chosen], [numbers[k] for k in chosen], row)
        return hidden[torch.arange(len(chosen), device=hidden.device), last]

    return last_hidden


def _from_the_layer_on(subject: Subject, encoded: Sequence[Encoded], numbers: Sequence[int], row: DropTokens) -> LastHidden | None:
    """The same from what enters the layer, which no gate changes, and in the last layer of the last token alone; None where that cannot be."""
    anatomy, budget = subject.anatomy, Budget.of(subject)
    tokens = sum(map(len, encoded))
    fits = tokens <= budget.most and tokens * anatomy.hidden_size * anatomy.embedding.weight.element_size() <= budget.stored
    if not fits or any(choose_path(anatomy, one, row)[0] != "resume" for one in encoded):
        return None
    try:
        recording = record_trunks(subject, encoded, hidden_at=[row.layer])
    except Unshareable:
        return None
    sprouts = [Sprout(k, (one,), number) for k, (one, number) in enumerate(zip(encoded, numbers, strict=True))]
    stems = grow_stems(subject, recording, sprouts, [row.layer])

    def last_hidden(chosen: Sequence[int]) -> torch.Tensor:
        rows = np.arange(len(chosen))
        last = np.array([len(encoded[k]) - 1 for k in chosen])
        return forward_resumed(subject, recording, [stems[k] for k in chosen], rows, [row] * len(chosen), row.layer, (rows, last), gradients=True)

    return last_hidden


def _count(done: float, n: int, count: int) -> int:
    """Gates that are open of ``n`` when ``done`` of the training is over: from half of them, geometrically, ``count`` after two thirds."""
    if count >= n / 2:
        return count
    return max(count, round(n / 2 * (2 * count / n) ** min(1.0, 1.5 * done)))


def _gates(scores: torch.Tensor, count: int, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """1 for the ``count`` best after Gumbel noise, else nearly 0, ``[token]``; with the slope of a sigmoid about the threshold."""
    uniform = torch.rand(len(scores), generator=generator).clamp(min=1e-9).to(scores.device)
    noisy = scores - temperature * (-uniform.log()).log()
    best = noisy.detach().sort(descending=True).values
    soft = ((noisy - best[count - 1 : count + 1].mean()) / temperature).sigmoid()
    hard = (noisy.detach() >= best[count - 1]).float().clamp(min=_CLOSED)
    return hard + soft - soft.detach()


def _drawn(hidden: int, width: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Weights to begin with: a scorer that says nearly nothing."""
    token, question = (torch.randn(width, hidden, generator=generator) * hidden**-0.5 for _ in range(2))
    out = torch.randn(width, generator=generator) * 0.1 * width**-0.5
    return [token, question, torch.zeros(width), out, torch.zeros(hidden)]


def _order(n: int, draws: int, seed: int) -> list[int]:
    """All items once before any comes again, in a new order each time."""
    draw = np.random.default_rng(seed)
    return [int(one) for _ in range(-(-draws // n)) for one in draw.permutation(n)][:draws]


def _said(subject: Subject, encoded: Sequence[Encoded], numbers: Sequence[int], batch: int) -> torch.Tensor:
    """Log-probabilities of the next token after each prompt, of the model as it is, ``[item, vocabulary]``."""
    found = []
    for start in range(0, len(encoded), batch):
        some = encoded[start : start + batch]
        rows = np.arange(len(some))
        last = np.array([len(one) - 1 for one in some])
        hidden, _ = forward_rows(subject, some, rows, [None] * len(some), numbers[start : start + batch], (rows, last))
        found.append(read_logits(subject, hidden).log_softmax(-1))
    return torch.cat(found).clone()
