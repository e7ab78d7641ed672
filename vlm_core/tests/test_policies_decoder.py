"""Policies that read the language model: each against its definition in plain loops, by hand, and on permuted tokens."""

from __future__ import annotations

import math

import pytest
import torch

from vlm_core import DropTokens, HeadId, MergeTokens
from vlm_core.errors import NotMeasurable
from vlm_core.interventions.policy import Seen
from vlm_core.interventions.stored import load_interventions, save_interventions
from vlm_core.reduction import DART, DivPrune, FastV, HeadGuided, SparseVLM, ToMe, pyramid, pyramid_of
from vlm_core.reduction.sparsevlm import peaks
from vlm_core.tests.policy_states import N_PREAMBLE, attention_of, permuted, same_tokens, seen_of
from vlm_core.tests.test_drop import N_IMAGE
from vlm_core.tests.test_policies import kept
from vlm_core.tests.test_seam import logits
from vlm_core.tests.tiny import make_items

SIZES = [(5, 2), (12, 5), (12, 11), (33, 8), (64, 16)]
"""Candidates, and how many stay."""


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def cosine(one: list[float], other: list[float]) -> float:
    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


def with_hidden(rows: list[list[float]], question: list[list[float]] = ()) -> Seen:
    """Candidates and a question with given streams."""
    stream = torch.tensor([*rows, *question], dtype=torch.float32)
    numbers = torch.arange(len(rows))
    return Seen(1, stream, numbers, torch.arange(len(rows), len(stream)), numbers, len(rows))


# -- DivPrune ---------------------------------------------------------------------------------------------------------


def slow_divprune(hidden: list[list[float]], keep: int) -> list[int]:
    n = len(hidden)
    apart = [[1 - cosine(a, b) for b in hidden] for a in hidden]
    chosen: list[int] = []
    while len(chosen) < keep:
        best, farthest = -1, -math.inf
        for one in range(n):
            if one in chosen:
                continue
            others = chosen or [other for other in range(n) if other != one]
            nearest = min(apart[one][other] for other in others)
            if nearest > farthest:
                best, farthest = one, nearest
        chosen.append(best)
    return sorted(chosen)


@pytest.mark.parametrize(("n", "keep"), SIZES)
def test_divprune_is_greedy(n, keep):
    for seed in range(3):
        seen = seen_of(n, seed=seed)
        assert DivPrune().choose(seen, keep).kept.tolist() == slow_divprune(seen.hidden.double().tolist(), keep)


def test_divprune_by_hand():
    """At 0, 10, 90 and 180 degrees: 180 has the farthest nearest neighbour, then its opposite, then 90."""
    seen = with_hidden([[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in (0, 10, 90, 180)])
    assert [DivPrune().choose(seen, keep).kept.tolist() for keep in (1, 2, 3)] == [[3], [0, 3], [0, 2, 3]]


def test_divprune_is_asked_in_any_order():
    """What one fraction worked out serves the others."""
    seen = seen_of(20)
    alone = {keep: DivPrune().choose(seen_of(20), keep).kept.tolist() for keep in (3, 9, 15)}
    assert {keep: DivPrune().choose(seen, keep).kept.tolist() for keep in (9, 3, 15)} == alone


def test_divprune_keeps_tokens_once_that_are_all_alike():
    assert DivPrune().choose(with_hidden([[1.0, 2.0]] * 6), 4).kept.tolist() == [0, 1, 2, 3]


def test_divprune_follows_tokens_to_other_places():
    assert all(same_tokens(DivPrune(), 24, 7, seed) for seed in range(5))
    # Two that are each other's nearest are alike as first ones: there the place decides.
    pair = [[1.0, 0.0], [-1.0, 0.1]]
    assert DivPrune().choose(with_hidden(pair), 1).kept.tolist() == DivPrune().choose(with_hidden(pair[::-1]), 1).kept.tolist() == [0]


# -- DART -------------------------------------------------------------------------------------------------------------


def slow_dart(seen: Seen, keep: int, n_image: int, n_text: int) -> list[int]:
    def longest(tokens: list[int], count: int) -> list[int]:
        norms = {}
        for token in tokens:
            keys = [number for head in range(seen.before.key.shape[1]) for number in seen.before.key[0, head, token].tolist()]
            norms[token] = math.sqrt(dot(keys, keys))
        return sorted(tokens, key=lambda token: -norms[token])[:count]

    stream = seen.stream.double().tolist()
    candidates = seen.candidates.tolist()
    image = longest(candidates, min(n_image, keep))
    pivots = image + longest(seen.question.tolist(), n_text)
    taken = list(image)
    for number, pivot in enumerate(pivots):
        share = (keep - len(image)) // len(pivots) + (number < (keep - len(image)) % len(pivots))
        left = [token for token in candidates if token not in taken]
        taken += sorted(left, key=lambda token: cosine(stream[pivot], stream[token]))[:share]
    return sorted(candidates.index(token) for token in taken)


@pytest.mark.parametrize("pivots", [(4, 4), (1, 0), (3, 20), (9, 2)])
@pytest.mark.parametrize(("n", "keep"), SIZES)
def test_dart_is_its_definition(n, keep, pivots):
    for seed in range(3):
        seen = seen_of(n, seed=seed)
        assert DART(*pivots).choose(seen, keep).kept.tolist() == slow_dart(seen, keep, *pivots)


def test_dart_by_hand():
    """One pivot of the image and one of the text: the opposite of each, then no third."""
    angles = (0, 90, 170, 200, 45)
    seen = with_hidden([[math.cos(math.radians(one)), math.sin(math.radians(one))] for one in angles], [[1.0, 0.0], [0.0, -1.0]])
    seen.once(("keys",), lambda: torch.tensor([[1.0], [5.0], [2.0], [2.0], [1.0]]))  # the second candidate is the pivot: at 90 degrees
    seen.once(("asked keys",), lambda: torch.tensor([[1.0], [3.0]]))  # the second token of the question: at -90
    # At 90: the least like it is 200. At -90: the least like it that is left is 45 (135 degrees away), not 170 (100 degrees).
    assert DART(1, 1).choose(seen, 3).kept.tolist() == [1, 3, 4]
    # One more for the first pivot: after 200 degrees, which is 110 away, comes 0, which is 90 away.
    assert DART(1, 1).choose(seen, 4).kept.tolist() == [0, 1, 3, 4]


def test_dart_follows_tokens_to_other_places():
    assert all(same_tokens(DART(), 24, 11, seed) for seed in range(5))


def test_dart_needs_a_pivot():
    with pytest.raises(ValueError, match="image_pivots"):
        DART(0)
    with pytest.raises(ValueError, match="text_pivots"):
        DART(1, -1)
    with pytest.raises(ValueError, match="use layer >= 1"):
        DropTokens(0, 0.5, DART())


# -- SparseVLM --------------------------------------------------------------------------------------------------------


def slow_peaks(points: list[list[float]], count: int) -> tuple[list[int], list[int]]:
    n = len(points)
    apart = [[math.dist(a, b) / math.sqrt(len(a)) for b in points] for a in points]
    density = []
    for one in range(n):
        nearest = sorted(apart[one][other] for other in range(n) if other != one)[:5]
        density.append(math.exp(-sum(distance**2 for distance in nearest) / len(nearest)) if nearest else 1.0)
    score = []
    for one in range(n):
        denser = [other for other in range(n) if (density[other], -other) > (density[one], -one)]
        distance = min(apart[one][other] for other in denser) if denser else max(map(max, apart))
        score.append(density[one] * distance)
    centres = sorted(sorted(range(n), key=lambda one: -score[one])[:count])
    cluster = [centres.index(one) if one in centres else min(range(count), key=lambda c: apart[one][centres[c]]) for one in range(n)]
    return centres, cluster


def slow_sparsevlm(seen: Seen, keep: int, recycled: float, merged: float) -> dict[int, dict[int, float]]:
    """Candidates that stay, and the weights of what each carries."""
    image, question = seen.hidden.double().tolist(), seen.asked.double().tolist()
    n = len(image)
    share = [0.0] * len(question)
    for token in image:
        products = [dot(token, word) for word in question]
        weights = [math.exp(product - max(products)) for product in products]
        for word, weight in enumerate(weights):
            share[word] += weight / sum(weights) / n
    raters = [word for word in range(len(question)) if share[word] >= 1 / len(question)]
    scores = [0.0] * n
    for word in raters:
        for head in range(seen.before.query.shape[1]):
            attention = attention_of(seen.before, head, N_PREAMBLE + n + word)
            for one in range(n):
                scores[one] += attention[N_PREAMBLE + one]
    order = sorted(range(n), key=lambda one: -scores[one])
    clusters = 0
    while clusters < merged * recycled * (n - keep) - 1e-9 and clusters < keep - 1:
        clusters += 1
    found = {one: {one: 1.0} for one in order[: keep - clusters]}
    if clusters:
        dropped = order[keep - clusters :]
        pool = sorted(dropped[: min(len(dropped), max(clusters, round(recycled * len(dropped))))])
        centres, cluster = slow_peaks([image[one] for one in pool], clusters)
        for number, centre in enumerate(centres):
            own = [one for one, belongs in zip(pool, cluster, strict=True) if belongs == number]
            found[pool[centre]] = {one: 1 / len(own) for one in own}
    return found


@pytest.mark.parametrize("shares", [(0.3, 0.1), (0.0, 0.1), (1.0, 0.5), (0.6, 1.0)])
@pytest.mark.parametrize(("n", "keep"), SIZES)
def test_sparsevlm_is_its_definition(n, keep, shares):
    for seed in range(3):
        seen = seen_of(n, seed=seed)
        choice = SparseVLM(*shares).choose(seen, keep)
        expected = slow_sparsevlm(seen, keep, *shares)
        assert len(choice.kept) == keep and choice.kept.tolist() == sorted(expected)
        mix = torch.eye(n)[choice.kept] if choice.mix is None else choice.mix
        for row, one in zip(mix, choice.kept.tolist(), strict=True):
            assert row.nonzero()[:, 0].tolist() == sorted(expected[one])
            assert row[row > 0].tolist() == pytest.approx([expected[one][other] for other in sorted(expected[one])])


@pytest.mark.parametrize(("n", "count"), [(1, 1), (2, 1), (2, 2), (7, 3), (30, 6), (30, 30)])
def test_density_peaks_in_plain_loops(n, count):
    for seed in range(3):
        points = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
        centres, cluster = peaks(points, count)
        assert (centres.tolist(), cluster.tolist()) == slow_peaks(points.double().tolist(), count)


def test_density_peaks_by_hand():
    """Two heaps on a line; the middle of each is its centre, however far apart everything is."""
    for scale in (1.0, 1000.0):
        centres, cluster = peaks(torch.tensor([[0.0], [1.0], [2.0], [50.0], [51.0], [52.0]]) * scale, 2)
        assert cluster.tolist() == [0, 0, 0, 1, 1, 1]
        assert centres[0] in (0, 1, 2) and centres[1] in (3, 4, 5)
    # Mean squares of the distances to the three others: 36.7, 28.7, 20.7 and 76.7.
    assert peaks(torch.tensor([[0.0], [1.0], [3.0], [10.0]]), 1)[0].tolist() == [2]


def test_every_centre_has_itself_where_all_are_alike():
    centres, cluster = peaks(torch.ones(5, 3), 3)
    assert centres.tolist() == [0, 1, 2] and cluster.tolist() == [0, 1, 2, 0, 0]
    seen = seen_of(30)
    seen.stream[:] = 1.0
    choice = SparseVLM(1.0, 0.3).choose(seen, 12)
    torch.testing.assert_close(choice.mix.sum(1), torch.ones(12))


def test_sparsevlm_by_hand():
    """Ten tokens on a line, rated in order: two stay, the best four of the rest become one at 3, which is in the thick of them."""
    line = [100.0, 90.0, 0.0, 1.0, 3.0, 10.0, 200.0, 300.0, 400.0, 500.0]
    seen = with_hidden([[one] for one in line], [[1.0], [2.0], [-1.0]])
    # Both are nearest to the second token of the question, or (at 0) to none: it alone is above the average.
    rated = torch.stack([torch.arange(10.0), torch.arange(10.0).flip(0), torch.arange(10.0)])
    seen.once(("attention", "question", None, True), lambda: rated)
    choice = SparseVLM(0.5, 0.25).choose(seen, 3)  # 0.5 * 0.25 * 7 tokens, rounded up: one cluster of round(0.5 * 8) tokens
    assert choice.kept.tolist() == [0, 1, 4]
    assert (choice.mix @ seen.hidden)[:, 0].tolist() == [100.0, 90.0, 3.5]
    assert SparseVLM(0.0).choose(seen, 3).kept.tolist() == [0, 1, 2] and SparseVLM(0.0).choose(seen, 3).mix is None


def test_sparsevlm_follows_tokens_to_other_places():
    assert all(same_tokens(SparseVLM(0.6, 0.3), 40, 12, seed) for seed in range(5))


def test_sparsevlm_needs_a_question():
    with pytest.raises(NotMeasurable, match="ask after the image"):
        SparseVLM().choose(with_hidden([[1.0], [2.0], [3.0]]), 2)
    for shares, sentence in (((1.5,), "recycled"), ((-0.1,), "recycled"), ((0.3, 0.0), "merged"), ((0.3, 1.1), "merged")):
        with pytest.raises(ValueError, match=sentence):
            SparseVLM(*shares)


# -- FastV from some heads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", ["last", "all"])
@pytest.mark.parametrize(("n", "keep"), SIZES)
def test_given_heads_alone_choose(n, keep, queries):
    seen = seen_of(n)
    heads = [HeadId(1, 0), HeadId(1, 3), HeadId(0, 1), HeadId(7, 2)]
    received = [0.0] * n
    last = seen.stream.shape[0] - 1
    for head in (0, 3):
        for query in [last] if queries == "last" else range(last + 1):
            attention = attention_of(seen.before, head, query)
            for one in range(n):
                received[one] += attention[N_PREAMBLE + one]
    expected = sorted(sorted(range(n), key=lambda one: -received[one])[:keep])
    assert HeadGuided(heads, queries).choose(seen, keep).kept.tolist() == expected


def test_given_heads_by_hand():
    """The head that looks at the last token keeps it, the one that looks at the first keeps that."""
    seen = seen_of(3, heads=2, kv_heads=2, head_dim=1)
    seen.before.query[:] = 1.0
    seen.before.key[0, 0, N_PREAMBLE : N_PREAMBLE + 3, 0] = torch.tensor([1.0, 2.0, 3.0])
    seen.before.key[0, 1, N_PREAMBLE : N_PREAMBLE + 3, 0] = torch.tensor([3.0, 2.0, 1.0])
    assert [HeadGuided([(1, head)]).choose(seen, 1).kept.tolist() for head in (0, 1)] == [[2], [0]]


def test_all_heads_of_a_layer_are_fastv(gqa_subject):
    batch = gqa_subject.encode_items(make_items(3))
    chosen = []
    for policy in (FastV(), HeadGuided([(layer, head) for layer in range(3) for head in range(4)])):
        with gqa_subject.intervene(DropTokens(2, 0.3, policy), batch) as run:
            logits(gqa_subject, batch)
            chosen.append([kept(run, batch, row) for row in range(3)])
    assert chosen[0] == chosen[1]


def test_given_heads_follow_tokens_to_other_places():
    assert all(same_tokens(HeadGuided([(1, 2)]), 24, 7, seed) for seed in range(5))


def test_heads_that_are_not_there_are_refused(subject):
    with pytest.raises(ValueError, match=r"none of L0.H1 L2.H3 is in layer 1, the one before the drop: drop at one of 1, 3"):
        DropTokens(2, 0.5, HeadGuided([(2, 3), (0, 1)]))
    with pytest.raises(ValueError, match="use layer >= 1"):
        DropTokens(0, 0.5, HeadGuided([(0, 1)]))
    with pytest.raises(ValueError, match="at least one head"):
        HeadGuided([])
    with pytest.raises(ValueError, match="queries of HeadGuided"):
        HeadGuided([(0, 1)], "some")
    batch = subject.encode_items(make_items(1))
    with pytest.raises(ValueError, match=r"names head L1.H9, which lies outside this model's 3 layers x 4 heads"):
        with subject.intervene(DropTokens(2, 0.5, HeadGuided([(1, 9)])), batch):
            pass
    # Nothing is chosen, so nothing is missing.
    assert DropTokens(2, 1.0, HeadGuided([(0, 1)])).count(17) == 17


def test_given_heads_go_to_a_file_and_back(tmp_path):
    row = DropTokens(1, 0.25, HeadGuided([(0, 3), (0, 1)], "all"))
    save_interventions(tmp_path / "row.json", row)
    again = load_interventions(tmp_path / "row.json")
    assert again == row and again.policy.heads == (HeadId(0, 1), HeadId(0, 3))
    assert again.describe() == "drop(layer 1, keep 0.25, heads(L0.H1 L0.H3, queries all))"


# -- ToMe -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["hidden", "keys"])
@pytest.mark.parametrize("proportional", [True, False])
def test_tome_is_what_merging_gives(gqa_subject, similarity, proportional):
    """Once, and in two layers, where the second must know how many tokens each stands for."""
    subject = gqa_subject
    batch = subject.encode_items(make_items(4))
    for places in (((1, 0.4),), ((1, 0.6), (2, 0.2))):
        merges = tuple(MergeTokens(layer, keep, similarity, proportional) for layer, keep in places)
        policies = tuple(DropTokens(layer, keep, ToMe(similarity, proportional)) for layer, keep in places)
        with subject.intervene(merges, batch) as run:
            expected = logits(subject, batch)
            left, there = [kept(run, batch, row) for row in range(4)], run.tokens.valid
        with subject.intervene(policies, batch) as run:
            found = logits(subject, batch)
            assert [kept(run, batch, row) for row in range(4)] == left
            torch.testing.assert_close(found[there], expected[there], rtol=1e-4, atol=1e-4)


def slow_tome(rows: list[list[float]], keep: int) -> dict[int, dict[int, float]]:
    """Tokens that are left, with the weights of their members, in plain loops."""
    members = {one: [one] for one in range(len(rows))}

    def mean(one: int) -> list[float]:
        return [sum(rows[other][axis] for other in members[one]) / len(members[one]) for axis in range(len(rows[0]))]

    while len(members) > keep:
        left = sorted(members)
        even, odd = left[0::2], left[1::2]
        edges = []
        for one in even:
            likeness = [cosine(mean(one), mean(other)) for other in odd]
            best = max(range(len(odd)), key=lambda number: likeness[number])
            edges.append((likeness[best], one, odd[best]))
        gone = sorted(edges, key=lambda edge: -edge[0])[: len(left) - keep]
        for _, one, other in gone:
            members[other] = members[other] + members[one]
            del members[one]
    return {one: {other: 1 / len(own) for other in own} for one, own in members.items()}


@pytest.mark.parametrize(("n", "keep"), SIZES)
def test_tome_is_its_definition(n, keep):
    for seed in range(3):
        seen = seen_of(n, seed=seed)
        choice, expected = ToMe().choose(seen, keep), slow_tome(seen.hidden.double().tolist(), keep)
        assert choice.kept.tolist() == sorted(expected)
        assert choice.sizes.tolist() == [len(expected[one]) for one in choice.kept.tolist()]
        for row, one in zip(choice.mix, choice.kept.tolist(), strict=True):
            assert {at: round(float(row[at]), 5) for at in row.nonzero()[:, 0].tolist()} == {
                at: round(weight, 5) for at, weight in expected[one].items()
            }


def test_tome_by_hand():
    """Tokens 0 and 3 are alike, 2 and 1 less so: one leaves, 0 into 3."""
    seen = with_hidden([[1.0, 0.0], [0.0, 1.0], [0.3, 1.0], [1.0, 0.1]])
    choice = ToMe().choose(seen, 3)
    assert choice.kept.tolist() == [1, 2, 3] and choice.sizes.tolist() == [1, 1, 2]
    assert (choice.mix @ seen.hidden)[2].tolist() == pytest.approx([1.0, 0.05])


def test_tome_depends_on_the_order():
    """Not equivariant: even and odd places are the two sides of the matching."""
    assert not all(same_tokens(ToMe(), 12, 8, seed) for seed in range(5))


def test_tome_takes_what_merging_takes():
    for wrong, sentence in ((("values",), "similarity"), (("hidden", 1), "proportional")):
        with pytest.raises(ValueError, match=sentence):
            ToMe(*wrong)
    with pytest.raises(ValueError, match="use layer >= 1"):
        DropTokens(0, 0.5, ToMe("keys"))
    assert DropTokens(0, 0.5, ToMe()).reads == frozenset()


# -- PyramidDrop ------------------------------------------------------------------------------------------------------


def test_the_published_pyramid():
    drops = pyramid(32)
    assert [(drop.layer, drop.keep, drop.policy) for drop in drops] == [(8, 0.5, FastV()), (16, 0.25, FastV()), (24, 0.125, FastV())]


@pytest.mark.parametrize("n_layers", [4, 6, 18, 28, 32, 40])
@pytest.mark.parametrize("keep", [0.05, 0.25, 0.5, 0.9, 1.0])
def test_a_pyramid_at_equal_tokens(n_layers, keep):
    for layer in (None, 0, 1):
        drops = pyramid_of(keep, n_layers, layer, "random")
        start = drops[0].layer
        held = 0.0
        for place in range(start, n_layers):
            held += [drop.keep for drop in drops if drop.layer <= place][-1]
        assert held / (n_layers - start) == pytest.approx(keep, abs=1e-9)
        assert layer in (None, start) and drops[1].keep == pytest.approx(drops[0].keep ** 2)
        assert 1 >= drops[0].keep >= drops[1].keep >= drops[2].keep > 0


def test_a_pyramid_by_hand():
    """Seven layers from the first on: stages of 2, 2 and 2; r + r² + r³ = 3 * 7 / 24 has the root one half."""
    drops = pyramid_of(7 / 24, 7, layer=1)
    assert [drop.layer for drop in drops] == [1, 3, 5]
    assert [drop.keep for drop in drops] == pytest.approx([0.5, 0.25, 0.125])


def test_a_pyramid_runs(subject):
    batch = subject.encode_items(make_items(2))
    with subject.intervene(pyramid(3, layer=0, policy="stride"), batch), torch.inference_mode():
        cache = subject.model(**batch.inputs, use_cache=True).past_key_values
    n_text = batch.valid.shape[1] - N_IMAGE
    assert [cache.get_seq_length(layer) - n_text for layer in range(3)] == [round(N_IMAGE * keep) for keep in (0.5, 0.25, 0.125)]


def test_stages_that_do_not_fit_are_refused():
    for arguments in ((3,), (4, 2), (32, 30), (32, 32), (32, 40)):
        with pytest.raises(ValueError, match="stages do not fit"):
            pyramid(*arguments)
    with pytest.raises(ValueError, match="ratio must be above 0"):
        pyramid(32, ratio=0.0)
    for keep in (0.0, 1.5):
        with pytest.raises(ValueError, match="keep must be a fraction"):
            pyramid_of(keep, 32)


def test_permuting_leaves_a_state_what_it_was():
    """Of the helper that the tests above trust: permuting there and back is nothing."""
    seen, order = seen_of(9), torch.randperm(9, generator=torch.Generator().manual_seed(3))
    back = permuted(permuted(seen, order), order.argsort())
    for name in ("hidden", "keys"):
        assert torch.equal(getattr(back, name), getattr(seen, name))
    assert not torch.equal(permuted(seen, order).hidden, seen.hidden)
