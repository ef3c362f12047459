"""How accurate are the examples with a given epsilon, and what does privacy cost in accuracy and time?

Adult and MNIST, each through its example's own `train.yaml`: both accountants, sampling, clipping and noise as in a
real run, on one rank and one thread. Beside it the same model without privacy, on the same rows and inputs, from the
same initial weights: plain minibatch Adam. Accuracies are exact, since both data sets are public: a real run releases
a noisy histogram instead. A seed of Adult is another split into 80% training and 20% holdout rows, and other initial
weights; a seed of MNIST, whose 60,000 training and 10,000 test pictures are fixed, other initial weights. Sampling and
noise are fresh each time, so the last digit differs from one time to the next.

    python benchmarks/accuracy_at_epsilon.py [--quick] [--json] [--seeds N] [--data FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from _report import Row, options, report, row
from torch import nn

from cloister.datasets.encoding import FeatureEncoder, stored_array
from cloister.datasets.schema import DatasetSchema
from cloister.privacy.keystream import fresh_secret
from cloister.privacy.plan import PrivacyPlan, make_plan
from cloister.privacy.spec import TrainingSpec
from cloister.training.architectures import build_model, fixed_features, trainable_part
from cloister.training.baseline import HOLDOUT, load_public, train_without_privacy
from cloister.training.loop import make_optimizer, train

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, DATA = ROOT / "jobs" / "examples", ROOT.parent / "shared" / "data"
DELTA = 1e-5
ADULT_GOALS = {3.0: 85.0, 1.0: 84.6}  # by epsilon, in percent
MNIST_EPSILON, MNIST_GOAL = 2.93, 98.0  # the epsilon of arXiv 2011.11660, which reports 98.7 %
QUICK_TRAIN, QUICK_TEST = 6_000, 1_000  # pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What one seed trains and is judged on: inputs [N, D] or fixed features [N, F], and labels [N]."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    def accuracy(self, model: nn.Module) -> float:
        """In percent."""
        model.eval()
        with torch.no_grad():
            return 100.0 * float((model(self.test_x).argmax(dim=1) == self.test_y).double().mean())


def main() -> None:
    parser = options(__doc__, f"one seed each, MNIST on {QUICK_TRAIN:,} pictures, which reach no goal; within 60 s")
    parser.add_argument("--seeds", type=int, default=3, help="how often each is trained")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of mnist-train.parquet and mnist-test.parquet")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report("accuracy_at_epsilon", arguments, lambda: adult(arguments) + mnist(arguments))


def adult(arguments: argparse.Namespace) -> list[Row]:
    spec = _spec("adult")
    x, y = load_public(EXAMPLES / "adult", spec)
    held = round(len(x) * HOLDOUT)

    def split(seed: int) -> tuple[nn.Module, Rows]:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
        test, kept = order[:held], order[held:]
        return _model(spec, x.shape[1], 2, seed), Rows(train_x=x[kept], train_y=y[kept], test_x=x[test], test_y=y[test])

    seeds = 1 if arguments.quick else arguments.seeds
    results = []
    for epsilon, goal in ADULT_GOALS.items():
        plan = _plan(spec, epsilon, len(x) - held)
        results += _private(f"adult, epsilon {epsilon:g}", spec, plan, split, seeds, goal)
    return results + _plain("adult", split, seeds)


def mnist(arguments: argparse.Namespace) -> list[Row]:
    spec = _spec("mnist")
    name = "mnist, fewer pictures" if arguments.quick else "mnist"
    seeds = 1 if arguments.quick else arguments.seeds
    train_x, train_y = _pictures(arguments.data / "mnist-train.parquet", spec, QUICK_TRAIN if arguments.quick else None)
    test_x, test_y = _pictures(arguments.data / "mnist-test.parquet", spec, QUICK_TEST if arguments.quick else None)
    start = time.process_time()
    fixed = _model(spec, train_x.shape[1], 10, seed=0)
    rows = Rows(
        train_x=fixed_features(fixed, train_x), train_y=train_y, test_x=fixed_features(fixed, test_x), test_y=test_y
    )
    features_s = time.process_time() - start

    def again(seed: int) -> tuple[nn.Module, Rows]:
        return trainable_part(_model(spec, train_x.shape[1], 10, seed)), rows

    plan = _plan(spec, MNIST_EPSILON, len(train_x))
    return [
        *_private(
            f"{name}, epsilon {MNIST_EPSILON:g}", spec, plan, again, seeds, None if arguments.quick else MNIST_GOAL
        ),
        row(f"{name}, features of all pictures", features_s, "CPU s, once"),
        *_plain(name, again, seeds),
    ]


Seeded = Callable[[int], tuple[nn.Module, Rows]]


def _private(
    name: str, spec: TrainingSpec, plan: PrivacyPlan, seeded: Seeded, seeds: int, goal: float | None
) -> list[Row]:
    accuracies, times = [], []
    for seed in range(seeds):
        model, rows = seeded(seed)
        start = time.process_time()
        train(
            model, make_optimizer(model, spec.training.optimizer, spec.training.learning_rate), rows.train_x,
            rows.train_y, plan, run="benchmark", attempt=1, rank=0, world_size=1, secret=fresh_secret(),
            all_reduce=lambda _tensor: None, commit_block=lambda _first, _stop: None, engine=spec.privacy.engine,
        )  # fmt: skip
        times.append(time.process_time() - start)
        accuracies.append(rows.accuracy(model))
    mean = statistics.mean(accuracies)
    within = plan.epsilon_certified <= plan.epsilon
    return [
        row(
            f"{name}, certified", plan.epsilon_certified, f"epsilon at delta {DELTA:g}", f"<= {plan.epsilon:g}", within
        ),
        row(f"{name}, mean", mean, f"%, {seeds} seeds", f">= {goal} %" if goal else "", mean >= goal if goal else None),
        *(row(f"{name}, seed {seed}", accuracy, "%") for seed, accuracy in enumerate(accuracies)),
        row(f"{name}, training", statistics.median(times), f"CPU s, {plan.steps} steps, median"),
    ]


def _plain(name: str, seeded: Seeded, seeds: int) -> list[Row]:
    accuracies = []
    for seed in range(seeds):
        model, rows = seeded(seed)
        train_without_privacy(model, rows.train_x, rows.train_y, seed)
        accuracies.append(rows.accuracy(model))
    return [row(f"{name}, without privacy, mean", statistics.mean(accuracies), f"%, {seeds} seeds")]


def _spec(example: str) -> TrainingSpec:
    return TrainingSpec.from_yaml_text((EXAMPLES / example / "train.yaml").read_text())


def _plan(spec: TrainingSpec, epsilon: float, rows: int) -> PrivacyPlan:
    return make_plan(
        epsilon=epsilon, delta=DELTA, max_grad_norm=spec.privacy.max_grad_norm, epochs=spec.training.epochs,
        expected_batch_size=spec.training.expected_batch_size, rows=rows,
    )  # fmt: skip


def _model(spec: TrainingSpec, width: int, classes: int, seed: int) -> nn.Module:
    return build_model(spec.model.model_dump(mode="json"), width, classes, seed)


def _pictures(file: Path, spec: TrainingSpec, first: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [N, 784], through the encoder that training uses, and labels [N]."""
    schema = DatasetSchema.from_yaml_text((EXAMPLES / "mnist" / "schema.yaml").read_text())
    if not file.is_file():
        raise SystemExit(f"error: there is no {file}\nhint:  name the folder of the MNIST files with --data")
    table = pq.read_table(file).slice(0, first)
    encoder = FeatureEncoder(schema.feature_columns(spec.features))
    inputs = encoder.encode({c.name: stored_array(table[c.name], c) for c in encoder.columns})
    return torch.from_numpy(inputs), torch.from_numpy(table[spec.label].to_numpy().astype(np.int64))


if __name__ == "__main__":
    main()
