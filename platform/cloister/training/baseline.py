"""The same model without privacy, for comparison: only ever on data that is public.

    python -m cloister.training.baseline FOLDER      prints the mean holdout accuracy over a few random splits

FOLDER holds `schema.yaml`, `train.yaml` and one `.csv.gz` or `.parquet` file, as `jobs/examples/adult` does. Plain
minibatch Adam on the architecture and inputs of the spec; accuracies are exact.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cloister.datasets.encoding import FeatureEncoder, stored_array
from cloister.datasets.ingest import read_table
from cloister.datasets.schema import DatasetSchema
from cloister.privacy.spec import TrainingSpec
from cloister.training.architectures import build_model

# Chosen for this side's best: on Adult its holdout accuracy is flat from the fifth epoch on.
EPOCHS, BATCH, LEARNING_RATE = 10, 512, 1e-3
HOLDOUT = 0.2
SPLITS = 3


def load_public(folder: Path, spec: TrainingSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of a public dataset, through the encoder that training uses."""
    schema = DatasetSchema.from_yaml_text((folder / "schema.yaml").read_text())
    (file,) = (path for path in folder.iterdir() if path.name.endswith((".csv.gz", ".parquet")))
    table = read_table(file.read_bytes(), schema)
    encoder = FeatureEncoder(schema.feature_columns(spec.features))
    inputs = encoder.encode({c.name: stored_array(table[c.name], c) for c in encoder.columns})
    return torch.from_numpy(inputs), torch.from_numpy(table[spec.label].to_numpy().astype(np.int64))


def train_without_privacy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int) -> None:
    """Train `model` in place. No clipping, no noise: whatever the rows say may end up in the weights."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(x), generator=generator), BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
            optimizer.step()


def main() -> int:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    spec = TrainingSpec.from_yaml_text((folder / "train.yaml").read_text())
    x, y = load_public(folder, spec)
    held, classes = round(len(x) * HOLDOUT), int(y.max()) + 1
    accuracies = []
    for seed in range(SPLITS):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
        model = build_model(spec.model.model_dump(mode="json"), x.shape[1], classes, seed)
        train_without_privacy(model, x[order[held:]], y[order[held:]], seed)
        with torch.no_grad():
            right = model(x[order[:held]]).argmax(1) == y[order[:held]]
        accuracies.append(float(right.double().mean()))
    sys.stdout.write(json.dumps({"accuracy": statistics.mean(accuracies), "splits": SPLITS}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
