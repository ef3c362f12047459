# ruff: noqa: N803, N806 - the letters after an array's name are its shape
"""The one release of how a model does on rows that were held out: a noisy histogram, and all that follows from it.

Each row is in one cell: its label, whether the model is right, and how confident it is. A unit has up to
`rows_per_unit` rows, so two-sided geometric noise of that sensitivity on each cell (`geometric`) makes the histogram
epsilon-DP for it. No unit that is trained on is held out: training and evaluation compose in parallel, and a run costs
the larger of both.

Guarantees: `figures` reads the noisy counts and what is public, so accuracy, by label too, balanced accuracy, AUROC and
calibration cost nothing more. Each has an interval of 95 %, for the noise and for which rows happened to be held out:
of shares that of Wilson's score (JASA 22, 1927) with the variance of the noise in it, solved as Fieller's theorem
is; of means of shares by recovery of variances (Zou and Donner, Statistics in Medicine 27, 2008); of AUROC Wilson's
with the bound A(1 - A)/rows of the rarer label on its variance (Birnbaum and Klose, Annals of Mathematical Statistics
28, 1957), which does not vanish where the rows happen to be told apart. Where the noise hides how many rows there are,
a value is None.

Not promised: intervals for rows that depend on each other, such as several of one person; they are too narrow then. Nor
AUROC of more than two labels. Of scores in one cell half count as in order, and its interval is as much wider as they
could matter.

Shapes: N rows, K labels, B bins of confidence, S = 2·B scores. A histogram is [K, 2, B]: right, then wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cloister.privacy import geometric

DEFAULT_EPSILON = 0.2
MOST_BINS = 10
MOST_CELLS = 10_000
MOST_LABELS = MOST_CELLS // 2
# Bins are as many as keep the noise of the accuracy below this, in standard deviations.
_NOISE_OF_ACCURACY = 0.0075
# The doubt, 1 - confidence, falls from each bin to the next by the same factor, and by this much over all: small
# networks are sure of much.
_DOUBT = 256.0
# 95 % of a Laplace distribution; of sums of several draws, which are nearer to a Gaussian, somewhat more.
_Z = math.log(20) / math.sqrt(2)
_VAGUE = 0.5  # intervals, and bins, of this width and more say nothing about calibration

Counts = npt.NDArray[np.int64]


class Share(NamedTuple):
    """An estimate and the ends of its interval; the value is None where nothing is known.

    Noise takes them below 0 and above 1. What is shown is not; but a mean of what was cut off there would be too low.
    """

    value: float | None
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Between 0 and 1."""
        return {
            name: None if each is None else round(min(1.0, max(0.0, each)), 4) for name, each in self._asdict().items()
        }


_UNKNOWN = Share(None, 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is public about an evaluation before it takes place."""

    labels: int
    rows: int
    """As published (`cloister.rounding`): it chooses the bins. What is counted are the rows that there are."""
    epsilon: float
    rows_per_unit: int = 1

    def __post_init__(self) -> None:
        if (
            not 1 <= self.labels <= MOST_LABELS
            or self.rows < 0
            or self.rows_per_unit < 1
            or not 0.0 < self.epsilon < math.inf
        ):
            raise ValueError("the labels, rows, epsilon or rows of a unit are out of range")

    @property
    def bins(self) -> int:
        affordable = (_NOISE_OF_ACCURACY * self.rows / self._std) ** 2 / (2 * self.labels)
        return max(1, min(MOST_BINS, MOST_CELLS // (2 * self.labels), int(affordable)))

    @property
    def edges(self) -> list[float]:
        """[B + 1]: where bins of confidence begin and end; in the last, 1 is included."""
        doubt, bins = 1 - 1 / self.labels, self.bins
        return [round(1 - doubt * _DOUBT ** (-each / bins), 4) for each in range(bins)] + [1.0]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.labels, 2, self.bins

    @property
    def noise_of_accuracy(self) -> float:
        """About how far noise alone moves the accuracy, as one half of an interval; 1 where it hides all."""
        cells = self.labels * self.bins
        return min(1.0, _Z * self._std * math.sqrt(cells) / self.rows) if self.rows else 1.0

    @property
    def _std(self) -> float:
        return geometric.standard_deviation(self.epsilon, self.rows_per_unit)

    def counted(self, label_N: npt.NDArray[Any], right_N: npt.NDArray[Any], confidence_N: npt.NDArray[Any]) -> Counts:
        """The exact histogram: private, see `released`. What is no number counts as least confident."""
        bin_N = np.searchsorted(np.array(self.edges[1:-1]), np.nan_to_num(confidence_N, nan=0.0), side="right")
        counts = np.zeros(self.shape, dtype=np.int64)
        np.add.at(counts, (label_N, np.where(right_N, 0, 1), bin_N), 1)
        return counts

    def released(self, counts: Counts, source: geometric.RandomNumbers | None = None) -> Counts:
        """With noise on each cell."""
        noise = [geometric.noise(self.epsilon, self.rows_per_unit, source) for _ in range(counts.size)]
        return counts + np.array(noise, dtype=np.int64).reshape(counts.shape)

    def figures(self, histogram: Counts, names: Sequence[str]) -> dict[str, Any]:
        """All that follows from a noisy histogram, as JSON; `names` are the labels'.

        Raises:
            ValueError: the histogram has another shape than this evaluation's.
        """
        if histogram.shape != self.shape or len(names) != self.labels:
            raise ValueError("this is no histogram of this evaluation")
        right_KB, wrong_KB = histogram[:, 0], histogram[:, 1]
        whole = self._share(right_KB, wrong_KB)
        by_label = [self._share(right_B, wrong_B) for right_B, wrong_B in zip(right_KB, wrong_KB, strict=True)]
        calibration = []
        for place, (start, stop) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
            share = self._share(right_KB[:, place], wrong_KB[:, place])
            rows = max(0, int(histogram[:, :, place].sum()))
            calibration.append({"from": start, "to": stop, "rows": rows, **share.to_dict(),
                                "verdict": _verdict(share, start, stop)})  # fmt: skip
        return {
            "accuracy": whole.to_dict(),
            "balanced_accuracy": _mean(by_label).to_dict(),
            "auroc": self._auroc(right_KB, wrong_KB).to_dict() if self.labels == 2 else None,
            "by_label": [{"label": name, **share.to_dict()} for name, share in zip(names, by_label, strict=True)],
            "calibration": calibration,
        }

    def _share(self, right: Counts, wrong: Counts) -> Share:
        """Of the rows in these cells, how many are right: all p with (R - pT)² <= z²·Var[R - pT], a quadratic in p."""
        r, t = float(right.sum()), float(right.sum() + wrong.sum())
        noise = self._std**2
        square = t * t + _Z**2 * (t - noise * (right.size + wrong.size))
        if t <= 0.0 or square <= 0.0:
            return _UNKNOWN
        half = r * t + _Z**2 * (t / 2 - noise * right.size)
        inside = half * half - square * (r * r - _Z**2 * noise * right.size)
        value = r / t
        if inside < 0.0:
            return Share(value, min(0.0, value), max(1.0, value))
        reach = math.sqrt(inside) / square
        return Share(value, min(half / square - reach, value), max(half / square + reach, value))

    def _auroc(self, right_KB: Counts, wrong_KB: Counts) -> Share:
        """How often a row of the second label scores higher than one of the first, both drawn at random."""
        # From surely the first label to surely the second.
        first_S, second_S = (
            np.concatenate(each).astype(np.float64)
            for each in ((right_KB[0][::-1], wrong_KB[0]), (wrong_KB[1][::-1], right_KB[1]))
        )
        first, second = first_S.sum(), second_S.sum()
        if min(first, second) <= 2 * _Z * self._std * math.sqrt(first_S.size):
            return _UNKNOWN
        below_S, above_S = (np.cumsum(each_S) - each_S / 2 for each_S in (first_S / first, second_S / second))
        value = float(below_S @ second_S / second)
        noise = self._std**2 * sum(
            float((effect_S**2).sum()) / total**2
            for effect_S, total in ((below_S - value, second), (1 - above_S - value, first))
        )
        ties = abs(float(first_S @ second_S)) / (2 * first * second)
        # All p with (value - p)² <= z²·(p(1 - p)/rows + noise).
        wilson = _Z**2 / min(first, second)
        half = value + wilson / 2
        inside = half * half - (1 + wilson) * (value * value - _Z**2 * noise)
        reach = math.sqrt(max(0.0, inside)) / (1 + wilson)
        centre = half / (1 + wilson)
        return Share(value, min(centre - reach, value) - ties, max(centre + reach, value) + ties)


def _mean(shares: Sequence[Share]) -> Share:
    known = [(share.value, share.low, share.high) for share in shares if share.value is not None]
    if len(known) < len(shares):
        return _UNKNOWN
    value = sum(each for each, _, _ in known) / len(known)
    below = math.sqrt(sum((each - low) ** 2 for each, low, _ in known)) / len(known)
    above = math.sqrt(sum((high - each) ** 2 for each, _, high in known)) / len(known)
    return Share(value, value - below, value + above)


def _verdict(share: Share, start: float, stop: float) -> str:
    if share.value is None or max(share.high - share.low, stop - start) >= _VAGUE:
        return "too few rows to tell"
    if share.high < start:
        return "too sure of itself"
    return "not sure enough" if share.low > stop else "as sure as it may be"
