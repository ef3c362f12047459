"""What a sealed dataset version is: which files it has, what each file's bytes hash to, which schema they follow.

Guarantees: the digest covers schema, files, row counts and lineage, so a manifest that verifies under the owner's
signature fixes every byte of the version. Holds no key and no row.

Exact row counts are private: they are for the data's owner, and for workers, who hold the rows. All others are told
`published_rows`, which an erasure does not change.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cloister.canonical import digest
from cloister.datasets.schema import ORDINAL, DatasetSchema, PartName
from cloister.errors import InputError
from cloister.rounding import most_rows, rounded_down
from cloister.validation import first_problem

MANIFEST_PREDICATE = "https://cloister.dev/dataset/v2"  # in-toto predicate type of a signed manifest
NAME_PATTERN = r"^[a-z][a-z0-9-]{0,62}$"
Role = Literal["train", "holdout"]
_CHECK = "cloister.dev/file-check/v1"
_REFERENCE = re.compile(r"([a-z][a-z0-9-]{0,62})@([1-9][0-9]{0,8})")


class SealedFile(BaseModel):
    """One file of a shard. `sha256` is of the sealed bytes, so it can be checked without any key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: str = Field(pattern=r"^[a-z0-9-]{1,40}$")
    sealed_in: int = Field(ge=1)
    """The version that it was sealed in, and whose name its bytes are bound to: later versions may list it too."""
    role: Role
    part: PartName
    """The sensitivity class of its columns, the subject index, or the ordinals."""
    columns: tuple[str, ...] = Field(min_length=1, max_length=10_000)
    rows: int = Field(ge=0)
    path: str = Field(max_length=300)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def key_name(self) -> str:
        """The name of this file's data key among those of the version that it was sealed in: `shard/part`."""
        return f"{self.shard}/{self.part}"

    @property
    def ref(self) -> str:
        """What names this file in its dataset, over all versions: `sealed_in/shard/part`."""
        return f"{self.sealed_in}/{self.key_name}"

    def check(self) -> dict[str, Any]:
        """What the stored file can be verified with, by whoever is not to know how many rows it has."""
        return {
            "file": self.key_name, "path": self.path, "check": file_check(self.path, self.sha256),
            "at_most_bytes": 1 << self.bytes.bit_length(),
        }  # fmt: skip


class Lineage(BaseModel):
    """Where a version came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["seal", "append", "erase", "rectify"]
    parents: tuple[str, ...] = Field(default=(), max_length=100)
    """The versions it was made from, as `name@version`; of a seal, other datasets that its owner named."""
    code: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    """Digest of the Cloister code that made it."""
    rows_before: int = Field(ge=0)
    """Of the first parent of the same name."""
    rows_after: int = Field(ge=0)


class Published(BaseModel):
    """Numbers of rows that everybody may know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: int = Field(ge=0)
    holdout: int = Field(ge=0)


class DatasetManifest(BaseModel):
    """One version of a dataset. `dataset_schema` is the schema as the owner wrote it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["cloister.dev/dataset/v2"] = "cloister.dev/dataset/v2"
    name: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=1)
    dataset_schema: dict[str, Any]
    files: tuple[SealedFile, ...] = Field(min_length=1, max_length=100_000)
    lineage: Lineage
    published: Published | None = Field(default=None, exclude_if=lambda published: published is None)
    """Of the version that this one follows, where it was erased from or corrected. Else absent: the version's own."""

    @property
    def digest(self) -> str:
        return digest("cloister.dev/dataset/v2", self.model_dump(mode="json"))

    def rows(self, role: Role) -> int:
        """Exact number of rows in the shards of one role: private, see `published_rows`."""
        return sum({file.shard: file.rows for file in self.files if file.role == role}.values())

    def published_rows(self, role: Role) -> int:
        """The public number of rows of one role: rounded down to two digits when rows were last sealed or appended. No
        erasure, correction or expiry since has changed it.
        """
        if self.published is None:
            return rounded_down(self.rows(role))
        return self.published.train if role == "train" else self.published.holdout

    def most_rows(self, role: Role) -> int:
        """The most rows of one role that any version with these published numbers has: public."""
        return most_rows(self.published_rows(role))

    @property
    def all_published(self) -> Published:
        return Published(train=self.published_rows("train"), holdout=self.published_rows("holdout"))

    @property
    def published_total(self) -> int:
        """Of both roles together, from their published numbers."""
        return rounded_down(self.published_rows("train") + self.published_rows("holdout"))

    def evaluated(self, label: str) -> tuple[tuple[str, ...], int]:
        """What an evaluation of a model of `label` is of: the labels, and the published number of held-out rows."""
        column = DatasetSchema.from_mapping(self.dataset_schema).column(label)
        return column.values or (), self.published_rows("holdout")

    @property
    def numbered(self) -> bool:
        """Whether rows are numbered within their units, so that a run may use fewer of each."""
        return any(file.part == ORDINAL for file in self.files)

    @property
    def all_rows(self) -> int:
        """Exact, of both roles: private."""
        return self.rows("train") + self.rows("holdout")

    def without_counts(self) -> dict[str, Any]:
        """As JSON, what everybody may know of it: no file is named, since its size tells how many rows it has."""
        made = self.model_dump(mode="json", exclude={"files": True, "lineage": {"rows_before", "rows_after"}})
        return made | {"published": self.all_published.model_dump()}

    def shards(self, role: Role) -> tuple[str, ...]:
        return tuple(sorted({file.shard for file in self.files if file.role == role}))

    @classmethod
    def parse(cls, value: object) -> DatasetManifest:
        """Validate outside data.

        Raises:
            InputError: not a manifest; the message names the field, never its value.
        """
        try:
            manifest = cls.model_validate(value)
        except ValidationError as error:
            place = first_problem(error).place
            raise InputError(f"the dataset manifest is not valid at {place}", "seal the data again") from error
        names = [file.key_name for file in manifest.files]
        if len(set(names)) != len(names) or len({file.path for file in manifest.files}) != len(names):
            raise InputError("the dataset manifest lists a file twice", "seal the data again")
        if any(file.sealed_in > manifest.version for file in manifest.files):
            raise InputError("the dataset manifest lists a file of a later version", "seal the data again")
        return manifest


def file_check(path: str, sha256: str) -> str:
    """What tells, to whoever has a stored file, whether it is the one with that hex SHA-256; to others, nothing.

    The digest itself would do so too, but with all of a manifest's the counts of rows could be tried against its own.
    """
    return digest(_CHECK, {"path": path, "sha256": sha256})


def parse_reference(text: str, *, what: str = "dataset") -> tuple[str, int]:
    """`name@version` as a pair.

    Raises:
        InputError: anything else.
    """
    match = _REFERENCE.fullmatch(text)
    if not match:
        raise InputError(f"{text[:80]!r} is not a {what} version", "write it as name@number, such as adult@1")
    return match[1], int(match[2])
