"""One noisy histogram tells how a model does: exact noise, a row in one cell, and intervals that hold what is true."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import nn

from cloister.authority.gate import MAX_COMMAS
from cloister.errors import InputError
from cloister.privacy import geometric
from cloister.privacy.evaluation import MOST_BINS, MOST_CELLS, Counts, Evaluation
from cloister.privacy.rowwise import RowWise
from cloister.privacy.spec import PrivacySpec
from cloister.training.architectures import build_model, fixed_features
from cloister.training.evaluation import Evaluator

torch.set_num_threads(1)
ADULT = Evaluation(labels=2, rows=6_512, epsilon=0.2)
NAMES = ("no", "yes")


def drawn(chance: np.random.Generator, rows: int, labels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, whether the model is right, and how confident it is: it is right as often as it says."""
    label = chance.integers(0, labels, rows)
    confidence = 1 / labels + (1 - 1 / labels) * chance.beta(2.5, 0.6, rows)
    return label, chance.random(rows) < confidence, confidence


def auroc(label: np.ndarray, right: np.ndarray, confidence: np.ndarray) -> float:
    """Of all scores, by ranks."""
    score = np.where(right == (label == 1), confidence, 1 - confidence)
    second = int(label.sum())
    ranks = rankdata(score)[label == 1].sum()
    return float((ranks - second * (second + 1) / 2) / (second * (len(label) - second)))


@pytest.mark.parametrize(("epsilon", "sensitivity"), [(0.5, 1), (0.5, 4), (3.0, 1)])
def test_noise_is_two_sided_geometric(epsilon: float, sensitivity: int) -> None:
    draws, source = 40_000, random.Random(1)  # noqa: S311 - a test's own randomness
    found = Counter(geometric.noise(epsilon, sensitivity, source) for _ in range(draws))
    alpha = math.exp(-epsilon / sensitivity)
    for value in range(-4, 5):
        expected = (1 - alpha) / (1 + alpha) * alpha ** abs(value)
        assert abs(found[value] / draws - expected) < 5 * math.sqrt(expected / draws)
    spread = math.sqrt(sum(count * value**2 for value, count in found.items()) / draws)
    assert spread < 1.03 * geometric.standard_deviation(epsilon, sensitivity)


def test_noise_comes_from_the_system_and_is_told_what_it_is_of() -> None:
    assert len({geometric.noise(0.01, 1) for _ in range(50)}) > 25
    for wrong in ((0.0, 1), (-1.0, 1), (math.inf, 1), (math.nan, 1), (1.0, 0)):
        with pytest.raises(ValueError, match="epsilon is positive"):
            geometric.noise(*wrong)


def test_a_row_is_in_one_cell_and_every_cell_has_noise() -> None:
    chance = np.random.default_rng(0)
    label, right, confidence = drawn(chance, 500, 2)
    whole = ADULT.counted(label, right, confidence)
    assert whole.sum() == 500
    assert whole[:, 0].sum() == right.sum()
    for row in range(0, 500, 50):
        kept = np.arange(500) != row
        less = whole - ADULT.counted(label[kept], right[kept], confidence[kept])
        assert (less.sum(), np.abs(less).sum()) == (1, 1)
    noisy = np.stack([ADULT.released(np.zeros(ADULT.shape, dtype=np.int64)) for _ in range(40)])
    assert (noisy.std(axis=0) > 3.0).all()
    assert np.abs(np.corrcoef(noisy.reshape(40, -1).T) - np.eye(whole.size)).max() < 0.8


def test_a_unit_of_several_rows_has_noise_for_all() -> None:
    nothing = np.zeros((2, 2, 1), dtype=np.int64)
    stds = []
    for rows in (1, 10):
        evaluation = Evaluation(labels=2, rows=100, epsilon=1.0, rows_per_unit=rows)
        stds.append(np.std([evaluation.released(nothing) for _ in range(500)]))
    assert 8 < stds[1] / stds[0] < 12.5


def test_what_is_no_number_is_the_least_confident_and_what_is_on_an_edge_is_above_it() -> None:
    edges = ADULT.edges
    assert (edges[0], edges[-1], len(edges)) == (0.5, 1.0, MOST_BINS + 1)
    confidence = np.array([math.nan, 0.5, edges[3], np.nextafter(edges[3], 0.0), 1.0])
    counts = ADULT.counted(np.zeros(5, dtype=int), np.ones(5, dtype=bool), confidence)
    assert counts[0, 0].tolist() == [2, 0, 1, 1, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("rows", "labels", "epsilon", "rows_per_unit"),
    [(6_512, 2, 0.2, 1), (10_000, 10, 0.2, 1), (500, 2, 1.0, 1), (300, 2, 0.2, 1), (6_512, 2, 0.2, 4), (40, 3, 3.0, 1)],
)
def test_intervals_hold_what_is_true(rows: int, labels: int, epsilon: float, rows_per_unit: int) -> None:
    chance, source = np.random.default_rng(1), random.Random(1)  # noqa: S311
    evaluation = Evaluation(labels=labels, rows=rows, epsilon=epsilon, rows_per_unit=rows_per_unit)
    label, right, confidence = drawn(chance, 400_000, labels)
    truth = {"accuracy": right.mean(), "balanced_accuracy": np.mean([right[label == k].mean() for k in range(labels)])}
    truth |= {"auroc": auroc(label, right, confidence)} if labels == 2 else {}
    held, tries = defaultdict[str, float](float), 200
    for _ in range(tries):
        noisy = evaluation.released(evaluation.counted(*drawn(chance, rows, labels)), source)
        figures = evaluation.figures(noisy, [str(each) for each in range(labels)])
        for name, true in truth.items():
            held[name] += figures[name]["low"] <= true <= figures[name]["high"]
        first = figures["by_label"][0]
        held["by_label"] += first["low"] <= right[label == 0].mean() <= first["high"]
        wrong = [each["verdict"] in ("too sure of itself", "not sure enough") for each in figures["calibration"]]
        held["calibration"] += 1 - sum(wrong) / evaluation.bins
    # 95 % of 200, less four standard deviations.
    assert all(count >= 0.95 * tries - 13 for count in held.values()), held


@pytest.mark.parametrize(
    ("rows", "labels", "epsilon", "accurate"),
    [
        (10_000, 10, 0.2, 0.995),
        (60_000, 100, 0.2, 0.99),
        (10_000, 2, 0.2, 1.0),
        (5_000, 2, 3.0, 0.98),
        (2_000, 2, 20.0, 0.99),
    ],
)
def test_intervals_hold_near_the_end_of_what_shares_can_be(
    rows: int, labels: int, epsilon: float, accurate: float
) -> None:
    """What noise takes beyond 1 counts in a mean of shares; where no row was wrong by chance, some might have been."""
    chance, source = np.random.default_rng(4), random.Random(4)  # noqa: S311
    evaluation, held, tries = Evaluation(labels=labels, rows=rows, epsilon=epsilon), Counter[str](), 100
    for _ in range(tries):
        label = (chance.random(rows) < 0.02).astype(int) if labels == 2 else chance.integers(0, labels, rows)
        right, confidence = chance.random(rows) < accurate, np.full(rows, 0.9)
        figures = evaluation.figures(
            evaluation.released(evaluation.counted(label, right, confidence), source), [str(k) for k in range(labels)]
        )
        truth = {"accuracy": accurate, "balanced_accuracy": accurate} | ({"auroc": accurate} if labels == 2 else {})
        for name, true in truth.items():
            held[name] += figures[name]["low"] <= true <= figures[name]["high"]
    assert all(count >= 0.95 * tries - 9 for count in held.values()), held


def test_no_histogram_is_longer_than_the_authority_takes() -> None:
    for labels in (600, 1_000, 5_000):
        evaluation = Evaluation(labels=labels, rows=10**8, epsilon=20.0)
        assert math.prod(evaluation.shape) <= MOST_CELLS < MAX_COMMAS
    with pytest.raises(ValueError, match="out of range"):
        Evaluation(labels=5_001, rows=10**8, epsilon=20.0)


def test_without_much_noise_the_figures_are_those_of_the_rows() -> None:
    chance = np.random.default_rng(2)
    evaluation = Evaluation(labels=2, rows=100_000, epsilon=20.0)
    label, right, confidence = drawn(chance, 100_000, 2)
    figures = evaluation.figures(evaluation.counted(label, right, confidence), NAMES)
    assert figures["accuracy"]["value"] == round(right.mean(), 4)
    assert abs(figures["auroc"]["value"] - auroc(label, right, confidence)) < 0.01
    assert figures["by_label"][1]["label"] == "yes"
    assert abs(figures["by_label"][1]["value"] - right[label == 1].mean()) < 1e-4
    overconfident = evaluation.figures(evaluation.counted(label, chance.random(100_000) < 0.6, confidence), NAMES)
    verdicts = [each["verdict"] for each in overconfident["calibration"]]
    assert verdicts[0] == "as sure as it may be"
    assert set(verdicts[2:]) == {"too sure of itself"}


def test_where_noise_hides_the_rows_nothing_is_claimed() -> None:
    for counts in ([[[3], [-2]], [[-1], [1]]], [[[-30], [2]], [[4], [1]]], [[[0], [0]], [[0], [0]]]):
        figures = Evaluation(labels=2, rows=20, epsilon=0.2).figures(np.array(counts), NAMES)
        for name in ("accuracy", "balanced_accuracy", "auroc"):
            assert figures[name] == {"value": None, "low": 0.0, "high": 1.0}
        assert figures["calibration"][0]["verdict"] == "too few rows to tell"
    assert Evaluation(labels=2, rows=0, epsilon=0.2).noise_of_accuracy == 1.0


def test_any_counts_give_shares_between_nothing_and_all() -> None:
    chance = np.random.default_rng(3)
    evaluation = Evaluation(labels=3, rows=50_000, epsilon=1.0)
    for _ in range(300):
        figures = evaluation.figures(chance.integers(-50, 400, evaluation.shape) * chance.integers(0, 9), tuple("abc"))
        for each in (figures["accuracy"], figures["balanced_accuracy"], *figures["by_label"], *figures["calibration"]):
            assert 0.0 <= each["low"] <= each["high"] <= 1.0
            assert each["value"] is None or each["low"] <= each["value"] <= each["high"]
    for wrong in (np.zeros((2, 2, 1)), np.zeros((3, 2, evaluation.bins + 1)), np.zeros((3, 1, evaluation.bins))):
        with pytest.raises(ValueError, match="no histogram"):
            evaluation.figures(wrong.astype(np.int64), tuple("abc"))


def test_fewer_rows_and_larger_units_have_fewer_bins() -> None:
    def bins(rows: int, labels: int, units: int) -> int:
        return Evaluation(labels=labels, rows=rows, epsilon=0.2, rows_per_unit=units).bins

    assert (bins(6_512, 2, 1), bins(100, 2, 1), bins(6_512, 2, 8), bins(10**9, 500, 32)) == (10, 1, 1, 10)
    assert ADULT.noise_of_accuracy < 0.015


@pytest.mark.parametrize("rows", [1, 63, 64, 130])
def test_a_row_beside_others_is_in_the_same_cell(rows: int) -> None:
    """To the bit, wherever it is: otherwise one row more could move several."""
    model = build_model({"architecture": "mlp", "hidden": [37], "activation": "silu"}, 11, 3, seed=4)
    evaluator = Evaluator(model, torch.zeros(1, 11))
    x = torch.rand((rows, 11), generator=torch.Generator().manual_seed(rows))
    found = evaluator._probabilities(x)
    for first in (1, rows // 2):
        assert torch.equal(evaluator._probabilities(x[first:]), found[first:])
    counts: Counts = evaluator(Evaluation(labels=3, rows=rows, epsilon=5.0), x, found.argmax(dim=1))
    assert (counts[:, 0].sum(), counts[:, 1].sum()) == (rows, 0)


def test_a_model_is_given_numbers_of_rows_that_were_tried() -> None:
    model, seen = build_model({"architecture": "mlp", "hidden": [37]}, 11, 3), set[int]()
    model.register_forward_pre_hook(lambda _, inputs: seen.add(len(inputs[0])))
    evaluate = RowWise(model, model, torch.zeros(1, 11), 64)
    tried = set(seen)
    for rows in range(1, 150, 7):
        assert evaluate(torch.rand(rows, 11)).shape == (rows, 3)
    assert seen == tried


def test_fixed_features_of_a_row_are_the_same_beside_others() -> None:
    model = build_model({"architecture": "scattering", "image": [28, 28]}, 784, 10)
    x = torch.rand((70, 784), generator=torch.Generator().manual_seed(0))
    found = fixed_features(model, x)
    assert torch.equal(fixed_features(model, x[3:]), found[3:])
    assert fixed_features(model, x[:0]).shape == (0, found.shape[1])


def test_a_model_that_mixes_rows_is_not_evaluated_and_is_left_as_it_was() -> None:
    class Mixing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    with pytest.raises(InputError, match="others are beside it"):
        RowWise(mixing := Mixing(), mixing, torch.zeros(1, 8), 64)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(), nn.Linear(16, 2)).train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    RowWise(model, model, torch.zeros(1, 8), 64)(torch.rand(5, 8))
    assert model.training
    assert model[1].p == 0.5
    assert all(torch.equal(now, was) for now, was in zip(model.parameters(), before, strict=True))


def test_a_spec_may_ask_for_a_finer_evaluation_up_to_its_epsilon() -> None:
    assert PrivacySpec(epsilon=3.0, delta=1e-5).evaluation == 0.2
    assert PrivacySpec(epsilon=0.1, delta=1e-5).evaluation == 0.1
    assert PrivacySpec(epsilon=3.0, delta=1e-5, evaluation_epsilon=3.0).evaluation == 3.0
    for wrong in (3.1, 0.0, -1.0, math.nan, math.inf, 1e-4):
        with pytest.raises(ValueError, match="evaluation_epsilon"):
            PrivacySpec(epsilon=3.0, delta=1e-5, evaluation_epsilon=wrong)
