# ruff: noqa: N803, N806, N815 - the letters after a tensor's name are its shape
"""Audits: attacks on our own steps and our own model, turned into lower bounds on epsilon.

Guarantees: of a mechanism that is as private as stated, a lower bound exceeds the stated epsilon with a probability of
at most 1 - confidence. An audit falsifies or it does not; it never proves. Both cost no privacy: they look at
synthetic rows and at what is released anyway.

`mechanism_audit` attacks steps from inside, where a canary's clipped gradient is known (Nasr et al., "Tight Auditing of
Differentially Private Machine Learning", arXiv 2302.07956). A claim about the whole plan is a claim about each step:
sensitivity over noise is at most 1/σ, rows are sampled at q, noise is fresh. Each part gets a confidence bound of its
own (Clopper and Pearson's, which is exact), and the accountant is asked what the plan costs at these:

    σ    how often a threshold takes absent canaries for present ones and conversely; Φ⁻¹(1-FPR) - Φ⁻¹(FNR) <= 1/σ for
         whatever is as private as Gaussian noise (Dong, Roth and Su, arXiv 1905.02383)
    ρ    the largest correlation of the noise of two steps or of two parameters. It leaves noise of σ·√(1-ρ²) at most:
         the likelihood ratio of correlated steps dominates, for all convex functions, that of independent ones with so
         much noise (Kahane's inequality, Comptes Rendus 1986)
    q    how often rows are in a batch: all of them, and each group of rows by itself

and the sizes of batches vary as Poisson sampling makes them vary. That what holds in the audited steps holds in the
others too is assumed.

`guess` and `one_run_audit` attack the trained model (Steinke, Nasr and Jagielski, "Privacy Auditing with One (1)
Training Run", arXiv 2305.08846): canaries were in the training set or not by independent fair coins; whoever guesses
too many coins refutes the epsilon. With m canaries no bound is larger than what m perfect guesses give:
`epsilon_detectable`.

Bounds are told at 95 %. To call a run falsified takes `CERTAINTY`, as it ends the run.

Shapes: S steps, M canaries or groups of rows, F directions without signal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, chdtr, chdtrc, ndtri, stdtrit
from scipy.stats import binom

Floats = npt.NDArray[np.float64]

MEANING = (
    "An audit can only falsify a claim; it does not prove one. The lower bounds hold with the stated confidence,"
    " against the attacks that were tried."
)
CONFIDENCE = 0.95
CERTAINTY = 0.999
"""The confidence at which the claim of a run counts as falsified."""
# Tests that only ask whether a thing is as it should be, without a number, must not cry wolf.
_FALSE_ALARM = 1e-9
# How far from the plan the accountant is asked: beyond, epsilon is at least what it is here. Very little noise takes
# minutes and gigabytes to account for.
_FARTHEST = 4 / 3
_MOST_MULTIPLIER = 1e9
# A canary's contribution is C when it is there and 0 when not: the threshold is half way, in units of C.
_THRESHOLD = 0.5
# Of the canaries with the highest and the lowest scores, so many are guessed; the others are not. Fixed beforehand, as
# choosing the best afterwards would be another attack.
_GUESSED_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class StepObservations:
    """What an attacker sees of many steps, in units of the clipping norm."""

    absent: Floats
    """Projections of released sums on the gradients of rows that are not in the data set."""
    present: Floats
    """The same of rows that are in every batch."""
    noise_SF: Floats
    """Released sums of S steps, in directions in which no row has a gradient."""
    sampled_SM: npt.NDArray[np.int64]
    """How many rows of each group were in the batch of each step, under the plan's sample rate."""
    rows_M: npt.NDArray[np.int64]
    """How many rows each group has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MechanismAudit:
    """A lower bound on the epsilon of a plan, by what its steps do."""

    epsilon_theory: float
    epsilon_lower_bound: float
    noise_multiplier_at_most: float
    sample_rate_at_least: float
    poisson: bool
    observations: int
    confidence: float

    @property
    def ratio(self) -> float:
        """How much of the theory the attack reached."""
        return self.epsilon_lower_bound / self.epsilon_theory

    @property
    def falsified(self) -> bool:
        return self.epsilon_lower_bound > self.epsilon_theory or not self.poisson

    def to_dict(self) -> dict[str, Any]:
        """What was seen, without what was stated. A noise multiplier without a bound is None: JSON has no infinity."""
        seen = {name: value for name, value in asdict(self).items() if name != "epsilon_theory"}
        bounded = self.noise_multiplier_at_most <= _MOST_MULTIPLIER
        return seen | {"noise_multiplier_at_most": self.noise_multiplier_at_most if bounded else None}


@dataclass(frozen=True, slots=True, kw_only=True)
class OneRunAudit:
    """A lower bound on the epsilon of one training run, by what its model tells of canaries."""

    epsilon_lower_bound: float
    epsilon_detectable: float
    p_value: float
    """The probability of so many correct guesses or more, were the stated epsilon true."""
    canaries: int
    guesses: int
    correct: int
    confidence: float

    @property
    def falsified(self) -> bool:
        return self.p_value < 1 - CERTAINTY


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """Both audits of one run, beside what was stated."""

    epsilon: float
    mechanism: MechanismAudit
    one_run: OneRunAudit

    @property
    def falsified(self) -> bool:
        return self.mechanism.falsified or self.one_run.falsified

    @property
    def verdict(self) -> str:
        return "falsified" if self.falsified else "not falsified"

    def to_dict(self) -> dict[str, Any]:
        """For the certificate."""
        return {
            "verdict": self.verdict,
            "meaning": MEANING,
            "epsilon": self.epsilon,
            "mechanism": self.mechanism.to_dict() | {"ratio": self.mechanism.ratio},
            "one_run": asdict(self.one_run),
        }


def mechanism_audit(
    seen: StepObservations,
    *,
    noise_multiplier: float,
    sample_rate: float,
    epsilon_theory: float,
    epsilon_of: Callable[[float, float], float],
    confidence: float = CONFIDENCE,
) -> MechanismAudit:
    """The lower bound that `seen` gives for a plan of this noise multiplier and sample rate.

    `epsilon_of(noise_multiplier, sample_rate)` is the accountant's answer for the plan's steps, delta and unit.
    """
    share = (1 - confidence) / 4
    wrongly_present = _at_most(int((seen.absent > _THRESHOLD).sum()), seen.absent.size, share)
    wrongly_absent = _at_most(int((seen.present <= _THRESHOLD).sum()), seen.present.size, share)
    mu = -float(ndtri(wrongly_present) + ndtri(wrongly_absent))
    rho = max(_correlation(seen.noise_SF, share / 2), _correlation(seen.noise_SF.T, share / 2))
    sigma = math.sqrt(1 - rho**2) / mu if mu > 0.0 else math.inf
    rate = _sample_rate(seen, share)
    bound = 0.0
    if sigma <= 10 * noise_multiplier and rate > 0.0:  # beyond, the bound is next to nothing and nothing is the bound
        at_sigma = max(sigma, noise_multiplier / _FARTHEST)
        at_rate = min(rate, _FARTHEST * sample_rate, (1 + sample_rate) / 2)
        bound = epsilon_of(at_sigma, at_rate)
    return MechanismAudit(
        epsilon_theory=epsilon_theory,
        epsilon_lower_bound=bound,
        noise_multiplier_at_most=sigma,
        sample_rate_at_least=rate,
        poisson=_sizes_are_binomial(seen),
        observations=seen.absent.size + seen.present.size,
        confidence=confidence,
    )


class Guesses(NamedTuple):
    """Of so many canaries, of how many it was guessed whether they were trained on, and how often rightly."""

    canaries: int
    guesses: int
    correct: int


def guess(scores_M: Floats, included_M: npt.NDArray[np.bool_]) -> Guesses:
    """Guess that high scores were trained on and low ones were not.

    Each canary was included by an independent fair coin, which the scores know only through the trained model.

    Raises:
        ValueError: a score is not finite, or there are too few.
    """
    m, k = len(scores_M), int(len(scores_M) * _GUESSED_SHARE / 2)
    if k < 1 or len(included_M) != m or not np.isfinite(scores_M).all():
        raise ValueError("a one-run audit takes a finite score and a coin for each of at least four canaries")
    order = np.argsort(scores_M, kind="stable")
    return Guesses(m, 2 * k, int(included_M[order[-k:]].sum() + (~included_M[order[:k]]).sum()))


def one_run_audit(made: Guesses, *, epsilon: float, delta: float, confidence: float = CONFIDENCE) -> OneRunAudit:
    """What these guesses say of the claim that the run is (epsilon, delta)-DP, and the lower bound on its epsilon."""
    m, guesses, correct = made
    return OneRunAudit(
        epsilon_lower_bound=_epsilon_refuted(m, guesses, correct, delta, 1 - confidence),
        epsilon_detectable=_epsilon_refuted(m, guesses, guesses, delta, 1 - confidence),
        p_value=guessing_p_value(m, guesses, correct, epsilon, delta),
        canaries=m,
        guesses=guesses,
        correct=correct,
        confidence=confidence,
    )


def guessing_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The probability of so many correct guesses under (epsilon, delta)-DP, or more: arXiv 2305.08846, Theorem 5.2."""
    rightly = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, rightly))
    if correct == 0:
        return 1.0
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, rightly))  # P[correct - i <= B < correct]
    alpha = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, beta + 2 * canaries * delta * alpha)


def _epsilon_refuted(canaries: int, guesses: int, correct: int, delta: float, p_value: float) -> float:
    """The largest epsilon whose p-value is below `p_value`, rounded down; the p-value ascends in epsilon."""
    low, high = 0.0, 64.0
    if guessing_p_value(canaries, guesses, correct, low, delta) >= p_value:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        refuted = guessing_p_value(canaries, guesses, correct, middle, delta) < p_value
        low, high = (middle, high) if refuted else (low, middle)
    return low


def _at_most(successes: int, trials: int, p_value: float) -> float:
    """Clopper and Pearson's upper bound on a probability."""
    return 1.0 if successes >= trials else float(betaincinv(successes + 1, trials - successes, 1 - p_value))


def _at_least(successes: npt.NDArray[np.int64], trials: npt.NDArray[np.int64], p_value: float) -> Floats:
    """Clopper and Pearson's lower bounds on probabilities."""
    some = np.maximum(successes, 1)
    return np.where(successes > 0, betaincinv(some, trials - some + 1, p_value), 0.0)


def _sample_rate(seen: StepObservations, p_value: float) -> float:
    """The rate of all rows together, or of the group that is sampled most."""
    steps, groups = seen.sampled_SM.shape
    sampled_M, trials_M = seen.sampled_SM.sum(axis=0), seen.rows_M * steps
    together = _at_least(sampled_M.sum(keepdims=True), trials_M.sum(keepdims=True), p_value / 2)
    return float(max(together.max(), _at_least(sampled_M, trials_M, p_value / (2 * groups)).max()))


def _sizes_are_binomial(seen: StepObservations) -> bool:
    """Whether batches vary in size as Poisson sampling makes them: Fisher's index of dispersion."""
    sizes_S, rows = seen.sampled_SM.sum(axis=1), int(seen.rows_M.sum())
    rate = float(sizes_S.mean()) / rows
    if not 0.0 < rate < 1.0:
        return False
    statistic = float(((sizes_S - sizes_S.mean()) ** 2).sum()) / (rows * rate * (1 - rate))
    freedom = len(sizes_S) - 1
    return bool(min(chdtr(freedom, statistic), chdtrc(freedom, statistic)) > _FALSE_ALARM)


def _correlation(noise_VF: Floats, p_value: float) -> float:
    """A lower bound on the largest correlation of two of the V vectors; 0 if none is certain.

    The exact test of one pair is Student's with F degrees of freedom (the mean is known to be 0), and all pairs are
    tried; beyond its limit, Fisher's z gives the interval.
    """
    vectors, freedom = noise_VF.shape
    norms_V = np.sqrt(np.einsum("vf,vf->v", noise_VF, noise_VF))
    unit_VF = (noise_VF / np.maximum(norms_V, np.finfo(np.float64).tiny)[:, None]).astype(np.float32)
    products_VV = np.abs(unit_VF @ unit_VF.T)
    np.fill_diagonal(products_VV, 0.0)
    largest = min(float(products_VV.max()), 1 - 1e-6)
    pairs = vectors * (vectors - 1) / 2
    t = float(stdtrit(freedom - 1, 1 - p_value / (2 * pairs)))
    limit = t / math.sqrt(freedom - 1 + t**2)
    return math.tanh(max(0.0, math.atanh(largest) - math.atanh(limit)))
