"""Policies that look at nothing but places: random, evenly spaced, pooled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_core import DropTokens
from vlm_core.interventions.policy import Visual
from vlm_core.reduction import Pooling, Random, Stride
from vlm_core.reduction.pooling import blocks
from vlm_core.tests.policy_states import same_tokens, seen_of
from vlm_core.tests.test_drop import N_IMAGE
from vlm_core.tests.test_policies import kept
from vlm_core.tests.test_seam import logits
from vlm_core.tests.tiny import make_items

# -- random and evenly spaced -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "built_in"),
    [(Random(), {"policy": "random"}), (Random(7), {"policy": "random", "seed": 7}), (Stride(), {"policy": "stride"})],
    ids=["random", "random of another seed", "stride"],
)
def test_they_are_what_the_built_in_policies_keep(subject, policy, built_in):
    batch = subject.encode_items(make_items(4))
    for layer, keep in ((0, 0.5), (1, 0.2), (2, 0.9)):
        with subject.intervene(DropTokens(layer, keep, **built_in), batch) as run:
            expected = logits(subject, batch)
            chosen = [kept(run, batch, row) for row in range(4)]
        with subject.intervene(DropTokens(layer, keep, policy), batch) as run:
            torch.testing.assert_close(logits(subject, batch), expected, rtol=0, atol=0)
            assert [kept(run, batch, row) for row in range(4)] == chosen


def test_random_subsets_of_an_item_are_nested_and_other_items_others():
    small, large = (set(Random(3).choose(seen_of(40, item=5), keep).kept.tolist()) for keep in (9, 20))
    assert len(small) == 9 and small < large
    assert set(Random(3).choose(seen_of(40, item=6), 9).kept.tolist()) != small
    assert set(Random(4).choose(seen_of(40, item=5), 9).kept.tolist()) != small


def test_random_takes_each_token_alike():
    counts = torch.zeros(10)
    for item in range(2000):
        counts[Random().choose(seen_of(10, item=item, n_question=1), 3).kept] += 1
    # 600 expected each; one standard deviation of a count is below 21.
    assert counts.sum() == 6000 and ((counts - 600).abs() < 5 * 21).all()


@pytest.mark.parametrize("policy", [Random(), Stride()], ids=["random", "stride"])
def test_they_keep_places_whatever_stands_there(policy):
    """Not equivariant: tokens in another order, and the same places stay."""
    assert not same_tokens(policy, 20, 7, seed=0)
    assert policy.choose(seen_of(20, seed=1), 7).kept.tolist() == policy.choose(seen_of(20, seed=2), 7).kept.tolist()


def test_a_seed_that_is_none_is_refused():
    with pytest.raises(ValueError, match="seed"):
        Random(-1)
    with pytest.raises(ValueError, match="seed"):
        Random(0.5)


# -- pooling ----------------------------------------------------------------------------------------------------------


def grid_of(*sides: tuple[int, int], before: int = 0, line_ends: bool = False) -> tuple[tuple[int, ...], ...]:
    """Places of tokens of several grids in raster order; ``before``: class tokens in front; with or without tokens that end lines."""
    places = [(-1, -1, -1)] * before
    for number, (rows, columns) in enumerate(sides):
        for row in range(rows):
            places += [(number, row, column) for column in range(columns)] + [(-1, -1, -1)] * line_ends
    return tuple(zip(*places, strict=True))


@given(st.integers(1, 9), st.integers(1, 9), st.data())
@settings(max_examples=200, deadline=None)
def test_blocks_of_a_grid_are_connected_and_share_all_of_it(rows, columns, data):
    keep = data.draw(st.integers(1, rows * columns))
    found = blocks(*grid_of((rows, columns)), keep)
    assert len(found) == keep
    assert sorted(one for block in found for one in block) == list(range(rows * columns))
    assert [block[0] for block in found] == sorted(block[0] for block in found)
    for block in found:
        reached, edge = set(), {block[0]}
        while edge:
            reached |= edge
            edge = {
                other
                for one in edge
                for other in block
                if other not in reached and abs(one // columns - other // columns) + abs(one % columns - other % columns) == 1
            }
        assert reached == set(block)
    if rows % keep == 0 and columns == 1 or columns % keep == 0 and rows == 1:
        assert len({len(block) for block in found}) == 1


@given(st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=36, deadline=None)
def test_a_quarter_of_an_even_grid_is_two_by_two(half_rows, half_columns):
    columns = 2 * half_columns
    found = blocks(*grid_of((2 * half_rows, columns)), half_rows * half_columns)
    expected = []
    for row in range(half_rows):
        for column in range(half_columns):
            first = 2 * row * columns + 2 * column
            expected.append((first, first + 1, first + columns, first + columns + 1))
    assert found == tuple(expected)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3), st.integers(0, 2), st.booleans(), st.data())
@settings(max_examples=150, deadline=None)
def test_blocks_of_any_tokens(sides, before, line_ends, data):
    """Several grids, tokens without a place, tokens that left earlier: as many blocks as asked for, none of two grids."""
    grid, row, column = grid_of(*sides, before=before, line_ends=line_ends)
    stays = data.draw(st.lists(st.booleans(), min_size=len(grid), max_size=len(grid)).filter(any))
    grid, row, column = (tuple(one for one, there in zip(axis, stays, strict=True) if there) for axis in (grid, row, column))
    keep = data.draw(st.integers(1, len(grid)))
    found = blocks(grid, row, column, keep)
    members = [one for block in found for one in block]
    assert len(found) == keep and all(found) and len(set(members)) == len(members)
    assert all(len({grid[one] for one in block}) == 1 for block in found)
    # A grid is there with all of its tokens, or with none where its share is below one block.
    for number in set(grid):
        own = {one for one, place in enumerate(grid) if place == number}
        there = own & set(members)
        assert there == own or (not there and keep * len(own) < len(grid))
    if keep == len(grid):
        assert found == tuple((one,) for one in range(keep))


def test_blocks_by_hand():
    # One band of three rows: down, up and down again, cut after four tokens.
    assert blocks(*grid_of((3, 3)), 2) == ((0, 3, 6, 7), (1, 2, 4, 5, 8))
    # Two bands, of one row and of two; the larger one gets two of the three blocks.
    assert blocks(*grid_of((3, 3)), 3) == ((0, 1, 2), (3, 6, 7), (4, 5, 8))
    # 4 of 17: the grid's share of 3.76 is nearest to four, the class token goes.
    assert blocks(*grid_of((4, 4), before=1), 4) == ((1, 2, 5, 6), (3, 4, 7, 8), (9, 10, 13, 14), (11, 12, 15, 16))
    # 9 of 17: shares 8.47 and 0.53.
    assert (0,) in blocks(*grid_of((4, 4), before=1), 9)
    # 4 tokens and 2 ends of lines, half of them.
    assert blocks(*grid_of((2, 2), line_ends=True), 3) == ((0, 3), (1, 4), (2, 5))


def test_the_first_of_a_block_carries_its_mean():
    grid, row, column = (torch.tensor(axis) for axis in grid_of((4, 6)))
    seen = seen_of(24, visual=Visual(grid, row, column))
    choice = Pooling().choose(seen, 6)
    assert choice.kept.tolist() == [0, 2, 4, 12, 14, 16] and choice.sizes is None
    for number, first in enumerate(choice.kept.tolist()):
        own = [first, first + 1, first + 6, first + 7]
        for size in range(8):
            mean = sum(float(seen.hidden[one, size]) for one in own) / 4
            assert float(choice.mix[number] @ seen.hidden[:, size]) == pytest.approx(mean, abs=1e-6)


def test_pooling_is_average_pooling_of_the_features(subject):
    batch = subject.encode_items(make_items(2))
    entered = []
    handle = subject.anatomy.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    for row in (None, DropTokens(0, 4 / N_IMAGE, Pooling())):
        with subject.intervene(row, batch) as run:
            logits(subject, batch)
    handle.remove()
    plain, pooled = entered
    for number in range(2):
        patches = plain[number][batch.image[number]][1:].T.unflatten(1, (4, 4))  # a class token, then the patches
        expected = torch.nn.functional.avg_pool2d(patches[None], 2)[0].flatten(1).T
        torch.testing.assert_close(pooled[number][run.tokens.image[number] & run.tokens.valid[number]], expected)
        assert kept(run, batch, number) == [1, 3, 9, 11]
