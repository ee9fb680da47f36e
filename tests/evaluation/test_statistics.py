"""The paired test, Holm's correction and the bootstrap: against scipy and hand computation, and on simulated data."""

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, wilcoxon

from relllm.evaluation.statistics import Resampler, holm, percentile_interval, wilcoxon_test


def test_the_signed_rank_test_agrees_with_scipy_on_levels_and_on_continuous_values() -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(-2, 3, 200)
    assert wilcoxon_test(levels).p_value == pytest.approx(wilcoxon(levels, zero_method="wilcox").pvalue, abs=1e-12)
    continuous = rng.normal(0.3, 1, 30)
    assert wilcoxon_test(continuous).p_value == pytest.approx(wilcoxon(continuous, method="exact").pvalue, abs=1e-12)


def test_few_tied_differences_are_counted_out_over_all_signs() -> None:
    differences = np.array([1, 1, -1, 2, 2, 1, 2, 0, 0], dtype=float)
    ranks = np.array([2.5, 2.5, 2.5, 6, 6, 2.5, 6])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 7)).reshape(7, -1)
    sums, observed = ranks @ signs, ranks @ np.sign(differences[differences != 0])
    expected = 2 * min(np.mean(sums >= observed), np.mean(sums <= observed))
    test = wilcoxon_test(differences)
    assert (test.p_value, test.num_different) == (pytest.approx(expected), 7)


def test_right_and_wrong_answers_give_the_exact_sign_test() -> None:
    differences = [1.0] * 9 + [-1.0] * 2 + [0.0] * 30
    assert wilcoxon_test(differences).p_value == pytest.approx(binomtest(9, 11).pvalue, abs=1e-12)


def test_systems_that_never_differ_have_a_p_value_of_one() -> None:
    test = wilcoxon_test([0.0] * 5)
    assert (test.p_value, test.num_different) == (1.0, 0)


@pytest.mark.parametrize("differences", [[], [1.0, float("nan")], [float("inf")]])
def test_differences_that_are_no_numbers_are_refused(differences: list[float]) -> None:
    with pytest.raises(ValueError, match="finite differences"):
        wilcoxon_test(differences)


def test_holm_agrees_with_the_steps_by_hand() -> None:
    # Sorted: .005 x 4 = .02, .01 x 3 = .03, .03 x 2 = .06, then .04 x 1 = .04, which may not be below .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_sums_of_resamples_are_those_of_drawing_whole_units() -> None:
    units = ["a", "b", "a", "c"]
    values = np.array([[1.0, 1], [10, 1], [2, 1], [100, 1]])
    sums = Resampler(units, num_resamples=500, seed=0).sums(values)
    by_unit = {(3.0, 2.0), (10.0, 1.0), (100.0, 1.0)}
    possible = {(a[0] + b[0] + c[0], a[1] + b[1] + c[1]) for a in by_unit for b in by_unit for c in by_unit}
    assert {
        tuple(row) for row in sums.tolist()
    } == possible  # all ten of them, and no clip without its speaker's others
    again = Resampler(units, num_resamples=500, seed=0).sums(values)
    assert np.array_equal(sums, again)


def test_with_many_clips_the_interval_is_that_of_scipy() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.binomial(2, 0.6, 2000).astype(float), rng.binomial(2, 0.5, 2000).astype(float)
    resampler = Resampler([str(number) for number in range(2000)], num_resamples=4000, seed=1)
    sums = resampler.sums(np.stack([ours, theirs], axis=1))
    interval = percentile_interval(sums[:, 0] / sums[:, 1] - 1, resampler.num_units)
    reference = bootstrap(
        (ours, theirs),
        lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis) - 1,
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(2),
        batch=200,
    ).confidence_interval
    assert interval == pytest.approx((reference.low, reference.high), abs=0.004)


def test_a_resample_without_the_statistic_leaves_the_interval_undefined() -> None:
    assert percentile_interval(np.array([1.0, np.nan, 2.0]), 3) is None
    assert percentile_interval(np.array([1.0, np.inf, 2.0]), 3) is None


def test_without_an_effect_a_family_has_a_false_finding_in_one_run_of_twenty() -> None:
    rng = np.random.default_rng(4)
    runs, family = 1000, 3
    levels = rng.binomial(2, 0.5, size=(2, runs, family, 120))
    differences = (levels[0] - levels[1]).astype(float)
    found = [min(holm([wilcoxon_test(one).p_value for one in run])) < 0.05 for run in differences]
    error = 3 * np.sqrt(0.05 * 0.95 / runs)
    assert abs(np.mean(found) - 0.05) < error


@pytest.mark.slow
@pytest.mark.parametrize(("num_speakers", "clips_each", "spread"), [(150, 1, 0.0), (12, 20, 0.15)])
def test_the_interval_covers_a_known_gain_as_often_as_it_says(
    num_speakers: int, clips_each: int, spread: float
) -> None:
    """Levels of two systems; in the second case speakers differ in the gain, and are what is resampled."""
    rng = np.random.default_rng(5)
    runs = 500
    units = [str(number // clips_each) for number in range(num_speakers * clips_each)]
    covered = 0
    for run in range(runs):
        of_speaker = rng.uniform(-spread, spread, num_speakers).repeat(clips_each)
        ours, theirs = rng.binomial(2, 0.6 + of_speaker), rng.binomial(2, 0.4, len(units))
        sums = Resampler(units, num_resamples=400, seed=run).sums(np.stack([ours, theirs], axis=1).astype(float))
        interval = percentile_interval(sums[:, 0] / sums[:, 1] - 1, num_speakers)
        assert interval is not None
        covered += interval[0] <= 0.5 <= interval[1]
    assert abs(covered / runs - 0.95) < 3 * np.sqrt(0.05 * 0.95 / runs)
