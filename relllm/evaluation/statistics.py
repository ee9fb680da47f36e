"""Whether two systems differ, and by how much: a paired test, Holm's correction, the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES_AT_ONCE = 100  # of 30,000 clips: 24 MB


@dataclass(frozen=True)
class PairedTest:
    """A two-sided test of paired values."""

    p_value: float  # 1 where no pair differs
    num_different: int  # the pairs that differ, which are the ones ranked


def wilcoxon_test(differences: Sequence[float] | np.ndarray) -> PairedTest:
    """Test the paired differences, at least one and all finite, by Wilcoxon's signed ranks, two-sided.

    Pairs that do not differ are left out, as Wilcoxon did, and not ranked (Pratt): levels tie in most pairs. Where all
    steps have one size (right or wrong: +1, -1) it is the sign test, McNemar's, whose p-value is the exact binomial
    one; otherwise exact up to 50 differing pairs (13 if sizes tie), and beyond the normal approximation.
    """
    from scipy.stats import binomtest, wilcoxon

    values = np.asarray(differences, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"Expected at least one pair, and finite differences; got {values}.")
    different = values[values != 0]
    if not len(different):
        return PairedTest(1.0, 0)
    has_one_size = len(np.unique(np.abs(different))) == 1
    test = binomtest(int(np.sum(different > 0)), len(different)) if has_one_size else wilcoxon(different)
    return PairedTest(float(test.pvalue), len(different))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's step-down correction, in the same order; compare them with the level itself."""
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(values), 0, -1)
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1)
    return adjusted.tolist()


class Resampler:
    """Bootstrap resamples of a data set's clips, drawn once, so that all systems and metrics share them.

    Every metric here is a function of sums over clips. `units`, two at least, says for each clip what is drawn with
    replacement: its own id, or its speaker, whose clips then come and go together.
    """

    def __init__(self, units: Sequence[str], *, num_resamples: int, seed: int) -> None:
        names, self._unit_of = np.unique(np.asarray(units, dtype=str), return_inverse=True)
        self.num_units = len(names)
        rng = np.random.default_rng(seed)
        self._counts = np.empty((num_resamples, self.num_units), dtype=np.uint16)
        for row in self._counts:
            row[:] = np.bincount(rng.integers(self.num_units, size=self.num_units), minlength=self.num_units)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum `values` (clips, values) over the clips of each resample: (num_resamples, values)."""
        of_unit = np.zeros((self.num_units, values.shape[1]))
        np.add.at(of_unit, self._unit_of, values)
        starts = range(0, len(self._counts), _RESAMPLES_AT_ONCE)
        return np.concatenate([self._counts[at : at + _RESAMPLES_AT_ONCE].astype(float) @ of_unit for at in starts])


def percentile_interval(values: np.ndarray, num_units: int) -> tuple[float, float] | None:
    """Return the middle 95 % of a statistic's bootstrap values, widened for few units: expanded percentiles.

    The plain one is too narrow by about sqrt(n / (n - 1)) and by the normal quantile in place of Student's; moving the
    two quantiles makes up for both (`ExpandProbs` of R's `resample`, after Hesterberg, arXiv 1411.5279). It is `None`
    if any resample does not define the statistic (a value that is not finite): its end could be anything.
    """
    from scipy.stats import norm, t

    if not np.isfinite(values).all():
        return None
    expanded = np.sqrt(num_units / (num_units - 1)) * t.ppf(0.975, num_units - 1)
    low, high = np.quantile(values, [norm.cdf(-expanded), norm.cdf(expanded)])
    return float(low), float(high)
