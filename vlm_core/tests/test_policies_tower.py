"""Policies that read the vision tower: each against its definition in plain loops, by hand, and on permuted tokens."""

from __future__ import annotations

import math

import pytest
import torch

from vlm_core import DropTokens, NotMeasurable, Subject
from vlm_core.interventions.policy import TowerLayer, Visual
from vlm_core.reduction import HiPrune, PruMerge, VisionZip
from vlm_core.reduction.keeping import keep_tokens
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.policy_states import same_tokens, seen_of
from vlm_core.tests.test_drop import N_IMAGE
from vlm_core.tests.test_policies import kept
from vlm_core.tests.test_seam import logits
from vlm_core.tests.tiny import make_items, tiny_subject

SIZES = [(2, 3, 2), (2, 3, 6), (2, 3, 8), (3, 4, 5), (3, 4, 13), (5, 7, 8), (8, 8, 16), (8, 8, 60)]
"""Rows and columns of a grid, and how many of the tokens stay."""
N_OUTSIDE = 3
"""Tokens without a place beside the grid: one before it and two after it."""


def visual_of(rows: int, columns: int, seed: int = 0, layers: int = 4, size: int = 6, outliers: int = 0) -> Visual:
    """A class token, a grid, two tokens without a place. Two patches of the grid receive nothing, ``outliers`` ten times as much."""
    generator = torch.Generator().manual_seed(100 + seed)
    n = rows * columns
    place = torch.arange(n)
    ends = torch.tensor([-1]), torch.tensor([-1, -1])
    grid, row, column = (torch.cat([ends[0], one, ends[1]]) for one in (torch.zeros_like(place), place // columns, place % columns))
    tower = []
    for layer in range(layers):
        received = torch.randn(n, generator=generator).exp()
        order = torch.randperm(n, generator=generator)
        received[order[:outliers]] *= 10
        received[order[-2:]] = 0
        received = torch.cat([torch.zeros(1), received, torch.zeros(2)])
        keys = torch.cat([torch.zeros(1, size), torch.randn(n, size, generator=generator), torch.zeros(2, size)])
        keys = keys if layer >= layers - 2 else None
        tower.append(TowerLayer(received / received.sum(), keys))
    return Visual(grid, row, column, tuple(tower))


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def placed(visual: Visual) -> list[int]:
    return [token for token, grid in enumerate(visual.grid.tolist()) if grid >= 0]


def ranked(visual: Visual, layer: int, among: list[int]) -> list[int]:
    """Tokens without a place come last."""
    received, inside = visual.tower[layer].received.tolist(), placed(visual)
    return sorted(among, key=lambda token: (token not in inside, -received[token], token))


def mixed(weights: dict[int, dict[int, float]], n: int) -> torch.Tensor:
    rows = torch.zeros(len(weights), n)
    for number, token in enumerate(sorted(weights)):
        for other, weight in weights[token].items():
            rows[number, other] += weight
    return rows


def agrees(policy, seen, keep: int, weights: dict[int, dict[int, float]]) -> None:
    choice = policy.choose(seen, keep)
    choice.require_fit(policy, len(seen), keep)
    assert choice.kept.tolist() == sorted(weights)
    found = torch.eye(len(seen))[choice.kept] if choice.mix is None else choice.mix
    torch.testing.assert_close(found, mixed(weights, len(seen)), rtol=1e-5, atol=1e-6)


# -- VisionZip --------------------------------------------------------------------------------------------------------


def slow_visionzip(visual: Visual, keep: int, share: float, layer: int) -> dict[int, dict[int, float]]:
    keys, inside = visual.tower[layer].keys.tolist(), placed(visual)
    n_dominant = max(1, math.floor(keep * share + 0.5)) if keep < len(inside) else keep
    dominant = ranked(visual, layer, list(range(len(keys))))[:n_dominant]
    rest = [token for token in inside if token not in dominant]
    targets = [rest[number * (len(rest) // (keep - n_dominant))] for number in range(keep - n_dominant)]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest if targets else ():
        if token not in targets:
            likeness = [cosine(keys[token], keys[target]) for target in targets]
            joined[targets[likeness.index(max(likeness))]].append(token)
    weights = {token: {token: 1.0} for token in dominant}
    for target, some in joined.items():
        weights[target] = {target: 0.5, **{token: 0.5 / len(some) for token in some}} if some else {target: 1.0}
    return weights


@pytest.mark.parametrize(("rows", "columns", "keep"), SIZES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", [{}, {"dominant": 0.5}, {"dominant": 0.2, "layer": -1}, {"dominant": 1}], ids=str)
def test_visionzip_is_its_definition(rows, columns, keep, seed, settings):
    visual = visual_of(rows, columns, seed)
    policy = VisionZip(**settings)
    expected = slow_visionzip(visual, keep, policy.dominant, policy.layer)
    agrees(policy, seen_of(rows * columns + N_OUTSIDE, seed=seed, visual=visual), keep, expected)


def test_visionzip_by_hand():
    # Of six tokens the third receives most. Of the five others, numbers 0 and 2 are targets (every second): tokens 0 and 3.
    keys = torch.tensor([[1.0, 0], [1, 0.1], [5, 5], [0, 1], [0.2, 1], [0.1, 1]])
    received = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.1])
    tower = (TowerLayer(received, keys), TowerLayer(received.flip(0), keys))
    zeros = torch.zeros(6, dtype=torch.long)
    seen = seen_of(6, visual=Visual(zeros, zeros, torch.arange(6), tower))
    choice = VisionZip(dominant=1 / 3).choose(seen, 3)
    assert choice.kept.tolist() == [0, 2, 3]
    assert choice.mix.tolist() == [[0.5, 0.5, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0.5, 0.25, 0.25]]


def test_visionzip_keeps_54_dominant_tokens_of_64_as_published():
    for keep, dominant in ((64, 54), (128, 108), (192, 162)):
        visual = visual_of(24, 24)
        mix = VisionZip().choose(seen_of(576 + N_OUTSIDE, visual=visual), keep).mix
        assert int(((mix == 1).sum(1) == 1).sum()) == dominant and len(mix) == keep


def test_which_tokens_visionzip_merges_into_depends_on_their_order():
    visual = visual_of(4, 5)
    assert not same_tokens(VisionZip(0.5), 20 + N_OUTSIDE, 8, 0, visual)
    assert same_tokens(VisionZip(1.0), 20 + N_OUTSIDE, 8, 0, visual)


# -- PruMerge ---------------------------------------------------------------------------------------------------------


def slow_prumerge(visual: Visual, keep: int, share: float, layer: int, adaptive: bool) -> dict[int, dict[int, float]]:
    received, keys, inside = visual.tower[layer].received.tolist(), visual.tower[layer].keys.tolist(), placed(visual)
    n = len(received)
    ordered = sorted(received[token] for token in inside)

    def quartile(part: float) -> float:
        place = part * (len(ordered) - 1)
        low = math.floor(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    bound = quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25))
    order = ranked(visual, layer, list(range(n)))
    outliers = [token for token in order if token in inside and received[token] > bound]
    if adaptive:
        stay = outliers or order[:1]
    else:
        stay = outliers[:keep]
        others = [token for token in range(n) if token not in outliers]
        more = keep - len(stay)
        stay = stay + [others[(2 * number + 1) * len(others) // (2 * more)] for number in range(more)]
    k = min(max(1, math.floor(n * share + 0.5)), n - 1)
    weights = {token: {token: 1.0} for token in stay}
    for token in stay:
        if token in inside:
            likeness = {other: cosine(keys[token], keys[other]) if other in inside else 0.0 for other in range(n) if other != token}
            for other in sorted(likeness, key=lambda one: -likeness[one])[:k]:
                weights[token][other] = received[other]
    return weights


@pytest.mark.parametrize(("rows", "columns", "keep"), SIZES)
@pytest.mark.parametrize("outliers", [0, 1, 6])
@pytest.mark.parametrize("settings", [{}, {"adaptive": True}, {"neighbours": 0.4, "layer": -2}], ids=str)
def test_prumerge_is_its_definition(rows, columns, keep, outliers, settings):
    visual = visual_of(rows, columns, seed=outliers, outliers=outliers)
    policy = PruMerge(**settings)
    expected = slow_prumerge(visual, keep, policy.neighbours, policy.layer, policy.adaptive)
    agrees(policy, seen_of(rows * columns + N_OUTSIDE, visual=visual), keep, expected)


def test_tokens_of_no_grid_are_spread_evenly():
    """After a policy that left none with a place: nothing stands out, nothing is added."""
    outside = torch.full((9,), -1)
    nothing = TowerLayer(torch.zeros(9), torch.zeros(9, 4))
    seen = seen_of(9, visual=Visual(outside, outside, outside, (nothing, nothing)))
    for policy, expected in ((PruMerge(), [1, 4, 7]), (VisionZip(), [0, 1, 2]), (HiPrune(), [0, 1, 2])):
        choice = policy.choose(seen, 3)
        assert choice.kept.tolist() == expected
        assert choice.mix is None or torch.equal(choice.mix, torch.eye(9)[expected])


def test_prumerge_by_hand():
    # Quartiles of 1, 1, 1, 1, 2, 10 are 1 and 1.75: above 2.875 there is one outlier, the last token. Of the five others the third is the
    # middle. One neighbour each: the last one's is the first, the third one's is the second.
    received = torch.tensor([1.0, 2, 1, 1, 1, 10])
    keys = torch.tensor([[1.0, 0], [0, 2], [0.1, 1], [-1, 1], [-1, 0], [1, 0.01]])
    zeros = torch.zeros(6, dtype=torch.long)
    seen = seen_of(6, visual=Visual(zeros, zeros, torch.arange(6), (TowerLayer(received, keys),)))
    policy = PruMerge(neighbours=1 / 6)
    choice = policy.choose(seen, 2)
    assert choice.kept.tolist() == [2, 5]
    assert choice.mix.tolist() == [[0, 2, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1]]
    alone = PruMerge(adaptive=True, neighbours=1 / 6).choose(seen, 4)
    assert alone.kept.tolist() == [5] and alone.mix.tolist() == [[1, 0, 0, 0, 0, 1]]
    assert policy.exact and not PruMerge(adaptive=True).exact


def test_outliers_move_with_the_tokens_and_evenly_spaced_ones_do_not():
    visual = visual_of(5, 5, outliers=4)
    assert same_tokens(PruMerge(adaptive=True), 25 + N_OUTSIDE, 4, 0, visual)
    assert same_tokens(PruMerge(), 25 + N_OUTSIDE, 3, 0, visual)
    assert not same_tokens(PruMerge(), 25 + N_OUTSIDE, 10, 0, visual)


# -- HiPrune ----------------------------------------------------------------------------------------------------------


def slow_hiprune(visual: Visual, keep: int, share: float, layer: int) -> list[int]:
    tokens = list(range(len(visual.grid)))
    stay = ranked(visual, layer, tokens)[: max(1, math.floor(share * keep / 5 + 0.5))]
    places = list(zip(visual.grid.tolist(), visual.row.tolist(), visual.column.tolist(), strict=True))
    beside = set()
    for anchor in stay:
        for token in tokens:
            (grid, row, column), (other, y, x) = places[anchor], places[token]
            if grid == other >= 0 and abs(row - y) + abs(column - x) == 1 and token not in stay:
                beside.add(token)
    stay = stay + ranked(visual, layer, sorted(beside))[: keep - len(stay)]
    return sorted(stay + ranked(visual, -1, [token for token in tokens if token not in stay])[: keep - len(stay)])


@pytest.mark.parametrize(("rows", "columns", "keep"), SIZES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", [{}, {"objects": 0.6}, {"objects": 1.0, "object_layer": 0}], ids=str)
def test_hiprune_is_its_definition(rows, columns, keep, seed, settings):
    visual = visual_of(rows, columns, seed)
    policy = HiPrune(**settings)
    layer = 1 if policy.object_layer is None else policy.object_layer  # the middle of four
    expected = slow_hiprune(visual, keep, policy.objects, layer)
    agrees(policy, seen_of(rows * columns + N_OUTSIDE, seed=seed, visual=visual), keep, {token: {token: 1.0} for token in expected})


def test_hiprune_by_hand():
    # On three rows of three, the middle token is the anchor: four beside it, then the one corner that receives most in the last layer.
    place = torch.arange(9)
    middle, last = torch.zeros(9), torch.zeros(9)
    middle[4], last[8], last[6] = 1.0, 1.0, 0.5
    visual = Visual(torch.zeros_like(place), place // 3, place % 3, tuple(TowerLayer(one) for one in (last, middle, last)))
    assert HiPrune().choose(seen_of(9, visual=visual), 6).kept.tolist() == [1, 3, 4, 5, 7, 8]
    assert HiPrune().choose(seen_of(9, visual=visual), 7).kept.tolist() == [1, 3, 4, 5, 6, 7, 8]
    # No room for all that lies beside it: the earlier of those alike.
    assert HiPrune().choose(seen_of(9, visual=visual), 3).kept.tolist() == [1, 3, 4]
    # The right end of a row does not touch the left end of the next.
    assert HiPrune(object_layer=0).choose(seen_of(9, visual=visual), 3).kept.tolist() == [5, 7, 8]


def test_hiprune_keeps_what_lies_beside_an_anchor_on_its_own_grid():
    # Two rows of three, each a grid of its own. Beside the middle of the first are its ends, not the ends of the second.
    place = torch.arange(6)
    middle, last = torch.zeros(6), torch.zeros(6)
    middle[1], last[4] = 1.0, 1.0
    visual = Visual(place // 3, torch.zeros_like(place), place % 3, tuple(TowerLayer(one) for one in (last, middle, last)))
    assert HiPrune().choose(seen_of(6, visual=visual), 4).kept.tolist() == [0, 1, 2, 4]


def test_hiprune_moves_with_the_tokens():
    for seed in range(5):
        assert same_tokens(HiPrune(0.5), 25 + N_OUTSIDE, 9, seed, visual_of(5, 5, seed))


# -- in a model -------------------------------------------------------------------------------------------------------


def test_they_rank_by_the_tower_of_the_prompt_s_own_image():
    """The dominant tokens are those with the highest attention of the class token in the maps that the tower itself returns."""
    subject = tiny_subject(vision_layers=4)
    batch = subject.encode_items(make_items(4))
    subject.model.set_attn_implementation({"vision_config": "eager"})
    with torch.inference_mode():
        maps = subject.model.model.vision_tower(batch.inputs["pixel_values"], output_attentions=True).attentions
    for layer in (0, 2):
        with subject.intervene(DropTokens(layer, 5 / N_IMAGE, VisionZip(1.0)), batch) as run:
            logits(subject, batch)
        for row in range(4):
            received = maps[-2][row, :, 0, 1:].mean(0)
            assert kept(run, batch, row) == (1 + received.topk(5).indices).sort().values.tolist()


def test_a_model_that_keeps_fewer_tokens_looks_at_its_tower_in_every_call():
    """Called with labels, a cache and the like, as a trainer does; features made elsewhere have no images to look at, which is said."""
    subject = tiny_subject()
    batch, row = subject.encode_items(make_items(3)), DropTokens(1, 0.3, VisionZip())
    with subject.intervene(row, batch), torch.inference_mode():
        last = subject.model(**batch.inputs).logits[:, -1]
    with keep_tokens(subject, row), torch.inference_mode():
        found = subject.model(**batch.inputs, labels=batch.inputs["input_ids"], use_cache=True)
        torch.testing.assert_close(found.logits[:, -1], last)
    ready = {"image": subject.model.model.get_image_features(batch.inputs["pixel_values"], return_dict=True)}
    inputs = {name: one for name, one in batch.inputs.items() if name != "pixel_values"}
    with keep_tokens(subject, row), torch.inference_mode():
        subject.model.model.get_image_features(batch.inputs["pixel_values"].flip(0), return_dict=True)  # of other images
        with pytest.raises(NotMeasurable, match="not known without the images: call the model, or generate, with pixel_values"):
            subject.model(**inputs, mm_encoder_outputs=ready)


@pytest.mark.parametrize("policy", [VisionZip(), PruMerge(), HiPrune()], ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "paligemma"])
def test_generate_makes_features_first_and_still_keeps_what_the_tower_saw(family, policy):
    """``generate`` calls the model without the images; beams repeat every prompt."""
    processor, model = PROCESSORS[family]()
    subject = Subject(model, processor, name=family)
    batch = subject.encode_items(make_items(2, size=48))
    layer = max(1, subject.anatomy.n_deepstack)
    row, options = DropTokens(layer, 0.3, policy), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with subject.intervene(row, batch) as run, torch.inference_mode():
        expected = subject.model.generate(**batch.inputs, **options)
        left = tuple((run.tokens.image & run.tokens.valid).sum(1).tolist())
    features = subject.anatomy.base.get_image_features
    with keep_tokens(subject, row) as found, torch.inference_mode():
        assert torch.equal(subject.model.generate(**batch.inputs, **options), expected)
        assert found.image_tokens == left
        assert len(subject.model.generate(**batch.inputs, **options, num_beams=2)) == 2
        assert found.image_tokens == tuple(n for n in left for _ in range(2))
    assert subject.anatomy.base.get_image_features == features, "nothing is left behind"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: VisionZip(0), "dominant must be a share above 0 and at most 1, got 0"),
        (lambda: VisionZip(1.2), "dominant must be a share above 0"),
        (lambda: VisionZip(layer=-3), "layer must be one of -1, -2, counted from the tower's end, got -3"),
        (lambda: PruMerge(layer=0), "layer must be one of -1, -2"),
        (lambda: PruMerge(adaptive=1), "adaptive must be True or False"),
        (lambda: PruMerge(neighbours=math.nan), "neighbours must be finite"),
        (lambda: HiPrune(objects=-1), "objects must be a share above 0"),
        (lambda: HiPrune(object_layer=-1), "object_layer must be 0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_layer_that_the_tower_lacks_is_refused(subject):
    batch = subject.encode_items(make_items(1))
    with pytest.raises(NotMeasurable, match="the vision tower has 2 layers, of which none is 7: choose one from 0 to 1"):
        with subject.intervene(DropTokens(0, 0.5, HiPrune(object_layer=7)), batch):
            logits(subject, batch)
    seen = seen_of(5, visual=Visual(*(torch.zeros(5, dtype=torch.long),) * 3))
    with pytest.raises(ValueError, match="nothing to read attention and keys of the vision tower from"):
        HiPrune().choose(seen, 2)
