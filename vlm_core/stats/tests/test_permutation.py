"""p-values against textbook numbers, and multiplicity."""

import numpy as np
import pytest
from scipy import stats

from vlm_core.stats import holm, linear_contrast, monte_carlo_p, page_p, sign_flip_p

# Darwin's cross- and self-fertilised maize, 15 paired differences in eighths of an inch
# (Fisher 1935, "The Design of Experiments", section 17).
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]

# Tutorial, lecture and seminar rated by ten students (the example of SciPy's page_trend_test,
# p as printed there).
RATINGS = np.array(
    [[3, 4, 3], [2, 2, 4], [3, 3, 5], [1, 3, 2], [2, 3, 2], [2, 4, 5], [1, 2, 4], [3, 4, 4], [2, 4, 5], [1, 3, 4]]
)


def test_monte_carlo_p_counts_the_observed_arrangement():
    assert monte_carlo_p(3.0, [1.0, 2.0, 3.0, 4.0]) == pytest.approx(3 / 5)
    assert monte_carlo_p(9.0, np.zeros(200)) == pytest.approx(1 / 201)
    assert monte_carlo_p(9.0, []) == 1.0


@pytest.mark.parametrize(("observed", "draws"), [(np.nan, [1.0]), (1.0, [np.nan, 0.0])])
def test_monte_carlo_p_refuses_nan(observed, draws):
    with pytest.raises(ValueError, match="NaN"):
        monte_carlo_p(observed, draws)


def test_monte_carlo_p_is_valid_under_the_null():
    draws = np.random.default_rng(0).normal(size=(5000, 40))
    p = np.array([monte_carlo_p(row[0], row[1:]) for row in draws])
    for level in (0.025, 0.05, 0.1, 0.5):
        assert stats.binomtest(int(np.sum(p <= level)), p.size, level).pvalue > 1e-3


def test_sign_flips_reproduce_fishers_count():
    # Fisher 1935, section 21: 863 of the 32,768 sign arrangements reach the observed total.
    assert sign_flip_p(DARWIN, n_resamples=2**15) == pytest.approx(863 / 2**15)


def test_sign_flips_move_whole_clusters():
    doubled, clusters = np.repeat(DARWIN, 2), np.repeat(np.arange(15), 2)
    assert sign_flip_p(doubled, clusters, n_resamples=2**15) == pytest.approx(863 / 2**15)
    assert sign_flip_p(doubled, n_resamples=9999) < 0.01


def test_sign_flip_p_is_never_zero():
    assert sign_flip_p(np.ones(200), n_resamples=999) == pytest.approx(1 / 1000)


@pytest.mark.parametrize("effect", [[], [np.nan, 1.0], [[1.0], [2.0]]])
def test_sign_flip_p_refuses_what_it_cannot_read(effect):
    with pytest.raises(ValueError, match="finite numbers"):
        sign_flip_p(effect)


def test_holm_matches_r():
    # R 4.3: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") gives 0.03 0.06 0.06 0.02
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_stays_below_one_and_in_order():
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]).size == 0


@pytest.mark.parametrize("p", [[0.1, np.nan], [-0.1], [1.1], [[0.1]]])
def test_holm_refuses_what_is_no_p_value(p):
    with pytest.raises(ValueError, match="holm needs"):
        holm(p)


def test_holm_holds_the_family_wise_error_rate():
    p = np.random.default_rng(1).uniform(size=(4000, 6))
    false = sum(holm(row).min() < 0.05 for row in p)
    assert stats.binomtest(int(false), len(p), 0.05, alternative="greater").pvalue > 1e-3


def test_page_matches_the_published_example():
    assert page_p(RATINGS, np.arange(10)) == pytest.approx(0.0018191161948127822)
    assert page_p(RATINGS[:, ::-1], np.arange(10), falling=True) == pytest.approx(0.0018191161948127822)


def test_a_trend_too_clear_for_floats_has_a_bound_and_no_zero():
    climbing = np.tile(np.arange(12.0), (400, 1))
    assert stats.page_trend_test(climbing).pvalue == 0.0
    assert 0 < page_p(climbing, range(400)) == pytest.approx(2.220446049250313e-16)


def test_page_takes_clusters_not_items_as_rows():
    repeated, clusters = np.repeat(RATINGS, 5, axis=0), np.repeat(np.arange(10), 5)
    assert page_p(repeated, clusters) == pytest.approx(0.0018191161948127822)


def test_page_keeps_conditions_tied_that_differ_by_rounding_only():
    # 0.1 + 0.2 is not 0.3 in floating point; as ranks the two must be.
    values = np.array([[0.1, 0.3, 0.5], [0.2, 0.0, 0.5]])
    tied = np.array([[0.3, 0.3, 1.0]])
    assert page_p(np.tile(values, (6, 1)), np.arange(12) // 2) == page_p(np.tile(tied, (6, 1)), range(6))


def test_contrast_is_the_slope_in_the_predicted_direction():
    values = [[0.0, 0.5, 1.0], [1.0, 1.0, 1.0], [0.9, 0.6, 0.3]]
    assert linear_contrast(values) == pytest.approx([0.5, 0.0, -0.3])
    assert linear_contrast(values, falling=True) == pytest.approx([-0.5, 0.0, 0.3])


def test_trends_refuse_tables_without_order_or_with_gaps():
    with pytest.raises(ValueError, match="3 conditions or more"):
        linear_contrast([[1.0, 2.0]])
    with pytest.raises(ValueError, match="not measured"):
        page_p([[1.0, np.nan, 2.0]] * 3, range(3))
