"""How accurate is the Adult example with epsilon 3, and what does privacy cost in accuracy and time?

Both sides use the same rows, inputs, architecture and initial weights: the example's own `train.yaml` through
`cloister.training.loop`, and plain minibatch Adam. Every seed is another random split into 80% training and 20%
holdout. Accuracies are exact, since Adult is public: a real run releases `private_accuracy` instead.

    python benchmarks/adult_accuracy.py [--quick] [--json] [--seeds N]
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from _report import Row, options, report, row
from torch import nn

from cloister.privacy.keystream import fresh_secret
from cloister.privacy.plan import PrivacyPlan, make_plan
from cloister.privacy.spec import TrainingSpec
from cloister.training.architectures import build_model
from cloister.training.baseline import HOLDOUT, load_public, train_without_privacy
from cloister.training.export import evaluate
from cloister.training.loop import make_optimizer, train

ADULT = Path(__file__).resolve().parents[1] / "jobs" / "examples" / "adult"
GOAL_EACH, GOAL_GAP_POINTS = 0.84, 1.5


def train_privately(model: nn.Module, x: torch.Tensor, y: torch.Tensor, spec: TrainingSpec, plan: PrivacyPlan) -> None:
    optimizer = make_optimizer(model, spec.training.optimizer, spec.training.learning_rate)
    train(
        model, optimizer, x, y, plan, run="benchmark", attempt=1, rank=0, world_size=1, secret=fresh_secret(),
        all_reduce=lambda _tensor: None, commit_block=lambda _first, _stop: None,
    )  # fmt: skip


def measure(seeds: int) -> list[Row]:
    spec = TrainingSpec.from_yaml_text((ADULT / "train.yaml").read_text())
    x, y = load_public(ADULT, spec)
    held = round(len(x) * HOLDOUT)
    start = time.perf_counter()
    plan = make_plan(
        epsilon=spec.privacy.epsilon, delta=spec.privacy.delta, max_grad_norm=spec.privacy.max_grad_norm,
        epochs=spec.training.epochs, expected_batch_size=spec.training.expected_batch_size, rows=len(x) - held,
    )  # fmt: skip
    plan_s = time.perf_counter() - start
    private, plain, step_ms = [], [], []
    for seed in range(seeds):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
        test, rows = order[:held], order[held:]
        architecture = spec.model.model_dump(mode="json")
        model = build_model(architecture, x.shape[1], 2, seed)
        start = time.perf_counter()
        train_privately(model, x[rows], y[rows], spec, plan)
        step_ms.append(1000 * (time.perf_counter() - start) / plan.steps)
        private.append(evaluate(model, x[test], y[test]) / held)
        baseline = build_model(architecture, x.shape[1], 2, seed)
        train_without_privacy(baseline, x[rows], y[rows], seed)
        plain.append(evaluate(baseline, x[test], y[test]) / held)
    gap = 100 * (statistics.mean(plain) - statistics.mean(private))

    step = statistics.median(step_ms)
    return [
        row("certified epsilon", plan.epsilon_certified, "at delta 1e-5", "<= 3", plan.epsilon_certified <= 3.0),
        row("private accuracy, mean", statistics.mean(private), f"share, {seeds} splits"),
        row("private accuracy, least", min(private), "share", f">= {GOAL_EACH}", min(private) >= GOAL_EACH),
        row("plain accuracy, mean", statistics.mean(plain), "share"),
        row("plain accuracy, least", min(plain), "share"),
        row("cost of privacy", gap, "points", f"<= {GOAL_GAP_POINTS}", gap <= GOAL_GAP_POINTS),
        row("private step, one rank, one thread", step, "ms"),
        row("private training", step * plan.steps / 1000, f"s, {plan.steps} steps"),
        row("planning", plan_s, "s"),
    ]


def main() -> None:
    parser = options(__doc__, "three splits, within 60 s")
    parser.add_argument("--seeds", type=int, default=10, help="number of random splits")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report("adult_accuracy", arguments, lambda: measure(3 if arguments.quick else arguments.seeds))


if __name__ == "__main__":
    main()
