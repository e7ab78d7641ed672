"""How alike vectors are: by NumPy and plain loops, on sets whose answer is known, and in the layers of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_core import TokenLikeness, capture_embeddings, observe
from vlm_core.observation.likeness import MEASURES, likeness
from vlm_core.tests.tiny import normal

SIZES = [(2, 5), (3, 3), (9, 4), (17, 32), (40, 8)]


def slowly(rows: np.ndarray) -> dict[str, float]:
    """Every measure by its definition: singular values of the matrix, cosines in loops."""
    rows, found = rows.astype(float), {}
    for suffix, some in (("", rows), (", centred", rows - rows.mean(0))):
        singular = np.linalg.svd(some, compute_uv=False)
        singular = singular[singular > 1e-7 * np.linalg.norm(rows, 2)]
        share = singular / singular.sum()
        found[f"effective rank{suffix}"] = float(np.exp(-sum(one * np.log(one) for one in share)))
        found[f"participation ratio{suffix}"] = float(sum(singular**2) ** 2 / sum(singular**4))
        pairs, nearest = [], []
        for i, one in enumerate(some):
            own = [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for j, other in enumerate(some) if i != j]
            pairs += own
            nearest.append(max(own))
        found[f"cosine{suffix}"], found[f"nearest{suffix}"] = float(np.mean(pairs)), float(np.mean(nearest))
    return found


def named(rows: torch.Tensor) -> dict[str, float]:
    return dict(zip(MEASURES, likeness(rows).tolist(), strict=True))


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_every_measure_is_what_its_definition_gives(shape, shift):
    rows = normal(*shape, seed=sum(shape)) + shift
    expected = slowly(rows.numpy())
    assert named(rows) == pytest.approx({name: expected[name] for name in MEASURES}, rel=1e-6)


@pytest.mark.parametrize("n", [2, 7, 49])
def test_the_same_token_many_times_has_rank_one_and_no_spread(n):
    """Means and Gram matrices that round: thirds in float64."""
    found = named((normal(1, 16).double() / 3).repeat(n, 1))
    assert [found[name] for name in ("cosine", "nearest", "effective rank", "participation ratio")] == pytest.approx([1.0] * 4)
    assert all(np.isnan(found[name]) for name in MEASURES if name.endswith("centred"))


@pytest.mark.parametrize("n", [2, 5, 8])
def test_orthonormal_tokens_have_as_many_dimensions(n):
    rows = torch.linalg.qr(normal(8, 8)).Q[:n]
    found = named(rows)
    assert [found["effective rank"], found["participation ratio"]] == pytest.approx([n, n])
    assert [found["cosine"], found["nearest"]] == pytest.approx([0.0, 0.0], abs=1e-6)
    # a simplex around its mean: one dimension less
    assert [found["effective rank, centred"], found["participation ratio, centred"]] == pytest.approx([n - 1, n - 1])


def test_a_set_twice_keeps_its_rank_and_has_perfect_neighbours():
    rows = normal(7, 12)
    once, twice = named(rows), named(torch.cat([rows, rows]))
    for name in MEASURES:
        if "nearest" in name:
            assert twice[name] == pytest.approx(1.0) and once[name] < 0.99
        elif name != "cosine":
            assert twice[name] == pytest.approx(once[name])
    assert twice["cosine"] > once["cosine"]


def test_by_hand():
    """Singular values 3 and 1: shares 3/4 and 1/4."""
    found = named(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    assert found["effective rank"] == pytest.approx(4 / 3**0.75) and found["participation ratio"] == pytest.approx(100 / 82)
    assert found["cosine"] == found["nearest"] == 0.0
    # two tokens lie on either side of their mean
    assert found["nearest, centred"] == pytest.approx(-1.0) and found["effective rank, centred"] == pytest.approx(1.0)


def test_scale_and_rotation_change_nothing():
    rows, turn = normal(6, 10), torch.linalg.qr(normal(10, 10, seed=1)).Q
    assert named(1e-3 * rows @ turn) == pytest.approx(named(rows), rel=1e-5)


def test_a_token_without_direction_is_in_no_cosine():
    rows = torch.cat([normal(4, 6), torch.zeros(1, 6)])
    with_it, without = named(rows), named(rows[:4])
    for name in ("cosine", "nearest", "effective rank", "participation ratio"):
        assert with_it[name] == pytest.approx(without[name])
    assert np.isnan(named(torch.cat([normal(1, 6), torch.zeros(1, 6)]))["cosine"])


@pytest.mark.parametrize("rows", [normal(1, 4), normal(0, 4), torch.full((3, 4), torch.nan), torch.tensor([[1.0, 2.0], [torch.inf, 0.0]])])
def test_too_few_tokens_and_overflow_have_no_measures(rows):
    assert likeness(rows).isnan().all()


def test_zeros_have_no_measures():
    assert likeness(torch.zeros(3, 4)).isnan().all()


def test_every_layer_of_a_model_by_its_states(subject, items):
    """Layer by layer against states that are captured one prompt at a time: batches pad, groups are ragged."""

    def groups(item, prompt):
        odd = np.arange(len(prompt)) % 2 == 1
        one = np.zeros(len(prompt), dtype=bool)
        one[0] = True
        return {"odd": odd if item["id"] != "item-0" else one}

    found = observe(subject, items[:3], TokenLikeness(("image", "odd")), groups=groups)
    assert found.shape == (3, subject.anatomy.n_layers + 1, 2, len(MEASURES))
    for number, item in enumerate(items[:3]):
        captured = capture_embeddings(subject, item)
        first = captured.at("residual", 0)
        np.testing.assert_allclose(found[number, 0, 0], likeness(first[captured.image]).numpy(), rtol=1e-5)
        odd = torch.arange(len(first)) % 2 == 1
        expected = likeness(first[odd]).numpy() if number else np.full(len(MEASURES), np.nan)
        np.testing.assert_allclose(found[number, 0, 1], expected, rtol=1e-5)


def test_later_layers_by_what_the_model_itself_prints(subject, items):
    batch = subject.encode_items(items[:1])
    with torch.inference_mode():
        states = subject.model(**batch.inputs, output_hidden_states=True).hidden_states
    found = observe(subject, items[:1], TokenLikeness())[0, :, 0]
    for layer in range(subject.anatomy.n_layers):
        np.testing.assert_allclose(found[layer], likeness(states[layer][0][batch.image[0]]).numpy(), rtol=1e-4)


def test_unknown_groups_are_refused(subject, items):
    with pytest.raises(ValueError, match="no token group 'object'"):
        observe(subject, items[:1], TokenLikeness(("object",)))
    with pytest.raises(ValueError, match="at least one"):
        TokenLikeness(())
