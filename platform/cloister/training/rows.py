"""What is public of a run's rows, and the rows that one lease opens: fetched, checked, decrypted, encoded.

Guarantees: `Declared` needs no lease; a shard is used only if its bytes are those of the signed manifest and it opens
under its own key and name; only the columns that are trained on are decrypted; rows are in clear only in this process.
Of each unit no more rows leave `load`, over all shards and ranks, than the plan's noise is for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cloister.canonical import sha256_hex
from cloister.client.authority import TrainingLease
from cloister.client.verify import signed_manifest
from cloister.datasets.encoding import FeatureEncoder, stored_array
from cloister.datasets.manifest import SealedFile
from cloister.datasets.ordinals import read_ordinals
from cloister.datasets.schema import ORDINAL, ORDINAL_COLUMN, DatasetSchema
from cloister.errors import IntegrityError
from cloister.privacy.plan import PrivacyPlan
from cloister.privacy.spec import TrainingSpec
from cloister.sealing.shard import open_table, shard_aad
from cloister.stores.blobs import open_blobs


class Opened(NamedTuple):
    """Inputs [N, D] float32, labels [N] int64, and the name and number of rows of each shard, in their order."""

    x: torch.Tensor
    y: torch.Tensor
    shards: list[tuple[str, int]]


class Declared:
    """What a signed manifest and a spec say of a run's rows: all but the rows."""

    def __init__(self, manifest: dict[str, Any], owner_key: str, spec: dict[str, Any]) -> None:
        """`manifest` is an envelope, signed by the key `owner_key` (PEM).

        Raises:
            IntegrityError: it is not.
            InputError: the spec does not fit the schema.
        """
        self.manifest = signed_manifest(manifest, owner_key)
        self.spec = TrainingSpec.parse(spec)
        self._schema = schema = DatasetSchema.from_mapping(self.manifest.dataset_schema)
        self.features = schema.feature_columns(self.spec.features)
        self.encoder = FeatureEncoder(self.features)
        self.labels = schema.column(self.spec.label).values or ()


class Rows(Declared):
    """What a lease lets this rank read of its dataset, and what the spec makes of it."""

    def __init__(self, lease: TrainingLease) -> None:
        super().__init__(lease.manifest, lease.owner_key, lease.spec)
        self._wanted = {column.name for column in self.features} | {self.spec.label}
        # The plan's, and not the spec's: what noise there is follows from it.
        plan = PrivacyPlan.from_dict(lease.plan)
        self._used, self._capped = plan.rows_per_unit, plan.is_capped(self._schema.rows_per_unit)
        self._region = self._schema.region
        self._keys = lease.keys
        self._blobs = open_blobs(lease.blobs)

    def load(self, role: str) -> Opened:
        """This lease's shards of one role, in the order of their names; of each unit the rows that the plan uses.

        Raises:
            IntegrityError: a file is not the one that was sealed.
        """
        files = [file for file in self.manifest.files if file.role == role and file.ref in self._keys]
        shards: dict[str, dict[str, npt.NDArray[Any]]] = {}
        # Two at a time: one is hashed, or fetched, while the other is decrypted.
        with ThreadPoolExecutor(2) as threads:
            for file, columns in zip(files, threads.map(self._open, files), strict=True):
                shards.setdefault(file.shard, {}).update(columns)
        if self._capped:
            shards = {shard: self._used_rows(columns) for shard, columns in shards.items()}
        if not any(len(columns[self.spec.label]) for columns in shards.values()):  # erased since, or beyond the cap
            nothing = torch.zeros(0, self.encoder.width)
            return Opened(nothing, torch.zeros(0, dtype=torch.int64), [(shard, 0) for shard in sorted(shards)])
        names = sorted(self._wanted)
        columns = {name: np.concatenate([shards[shard][name] for shard in sorted(shards)]) for name in names}
        inputs = torch.from_numpy(self.encoder.encode(columns))
        labels = torch.from_numpy(columns[self.spec.label].astype(np.int64))
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.labels):
            raise IntegrityError(
                f"column '{self.spec.label}' has values that its schema does not have", "seal it again"
            )
        return Opened(inputs, labels, [(shard, len(shards[shard][self.spec.label])) for shard in sorted(shards)])

    def _used_rows(self, columns: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        ordinals = columns.pop(ORDINAL_COLUMN, None)
        if ordinals is None:
            raise IntegrityError("a shard has no ordinals to choose the rows of a unit by", "submit the run again")
        if len(ordinals) != len(columns[self.spec.label]):
            raise IntegrityError("a shard has other numbers of ordinals than of rows", "submit the run again")
        used = ordinals < self._used
        return {name: values[used] for name, values in columns.items()}

    def _open(self, file: SealedFile) -> dict[str, npt.NDArray[Any]]:
        wanted = {ORDINAL_COLUMN} if file.part == ORDINAL else self._wanted
        columns = [name for name in file.columns if name in wanted]
        if not columns:
            return {}
        sealed = self._blobs.get(file.path)
        if sha256_hex(sealed) != file.sha256:
            raise IntegrityError(
                f"shard {file.key_name} of {self.manifest.name}@{self.manifest.version} changed since it was sealed",
                f"check the dataset: cloister data verify {self.manifest.name}@{self.manifest.version}",
            )
        aad = shard_aad(self.manifest.name, file.sealed_in, file.part, file.shard, self._region)
        table = open_table(sealed, self._keys[file.ref], aad, columns)
        if file.part == ORDINAL:
            return {ORDINAL_COLUMN: read_ordinals(table)}
        return {name: stored_array(table.column(name), self._schema.column(name)) for name in columns}
