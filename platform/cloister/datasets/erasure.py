"""What a certificate of erasure says (FORMAT.md, "Certificate of erasure"), and how it is told to people.

Guarantees: it names versions, files by their digests, keys by their versions and models, and nobody: no field has room
for a subject's name or tag, nor for a sentence that somebody wrote. `parse` accepts nothing else. Whoever may see a
dataset may see its certificates, so they count no rows exactly: those of a version are the published number, and for
how many of them together a bound holds is rounded up to a power of two.
Not guaranteed: that nobody kept a copy in clear, or a copy of the key service's own files. It says what the authority
did with what it held.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from cloister.canonical import canonical_json, sha256_hex
from cloister.errors import IntegrityError
from cloister.validation import first_problem

ERASURE_PREDICATE = "https://cloister.dev/erasure/v1"  # in-toto predicate type of a certificate

Kind = Literal["erase", "rectify", "expire", "key-destruction"]
# Of an erasure, after the grounds of GDPR article 17(1); one of a list, since a sentence could name somebody.
Reason = Literal[
    "request", "consent-withdrawn", "objection", "no-longer-needed", "unlawful", "legal-obligation", "correction",
    "retention",
]  # fmt: skip
REASONS: tuple[Reason, ...] = get_args(Reason)

RETRAIN_EPSILON = 10.0
"""Above this a model's bound says so little about somebody (odds change by e**10) that it counts as none."""
RETRAIN_DELTA = 1e-3
MAX_FILES = 200_000
"""How many files one certificate may say are gone."""

_Digest = Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]
_Version = Annotated[StrictStr, Field(pattern=r"^[a-z][a-z0-9-]{0,62}@[1-9][0-9]{0,8}$")]
_Id = Annotated[StrictStr, Field(pattern=r"^[a-z]+-[0-9a-f]{1,32}$")]
_Count = Annotated[StrictInt, Field(ge=0)]
_Bound = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EndedVersion(_Facts):
    """A version that nobody can open any more. `digest` is its manifest's."""

    version: _Version
    digest: _Digest
    rows: _Count
    """As published."""
    removed: _Count | None = None
    """None. In certificates of before: how many of them are not in `replaced_by`."""


class GoneFile(_Facts):
    """A sealed file whose key is destroyed."""

    file: Annotated[StrictStr, Field(pattern=r"^[1-9][0-9]{0,8}/[a-z0-9-]{1,40}/[a-z]{1,20}$")]
    check: Annotated[StrictStr, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = Field(
        default=None, exclude_if=lambda check: check is None
    )
    """`manifest.file_check` of its sealed bytes: with their digests, and the manifest's, counts could be tried."""
    sha256: _Digest | None = Field(default=None, exclude_if=lambda digest: digest is None)
    """Absent. Certificates of before have it in place of `check`."""
    rows: _Count | None = Field(default=None, exclude_if=lambda rows: rows is None)
    """Absent. Certificates of before have it."""


class Bound(_Facts):
    """(epsilon, delta)-differential privacy for up to `rows` rows together."""

    rows: Annotated[StrictInt, Field(ge=1)]
    epsilon: _Bound
    delta: Annotated[StrictFloat, Field(ge=0, le=1)]

    @property
    def says_little(self) -> bool:
        return self.epsilon > RETRAIN_EPSILON or self.delta > RETRAIN_DELTA


class TrainedModel(_Facts):
    """A model that learned from what is gone. `unit` is what holds for one unit of privacy, as it was trained: all of
    its rows, of which `unit.rows` were used at most."""

    model: _Version
    run: _Id
    production: StrictBool
    unit: Bound
    subject: Bound | None
    """Where a row is the unit: what holds for all rows together that were removed from the version that it learned
    from; None if their number is unknown, and then the advice is to retrain. Else None."""
    advice: Literal["retrain", "review"]


class Keys(_Facts):
    """`data_keys` rows were deleted, and the versions of `wrapping_key` before `destroyed_below` destroyed, so that the
    wrapped data keys in older copies of the state open nothing."""

    data_keys: _Count
    wrapping_key: StrictStr = Field(pattern=r"^dataset/[a-z][a-z0-9-]{0,62}$")
    destroyed_below: Annotated[StrictInt, Field(ge=1)]


class Blobs(_Facts):
    """Of the sealed files, so many were deleted; the others could not be yet, and are noise."""

    deleted: _Count
    pending: _Count


class Together(_Facts):
    """What all runs on the ended versions have released, by basic composition, for one unit of privacy."""

    runs: _Count
    epsilon: _Bound
    delta: _Bound


class Erasure(_Facts):
    """The predicate. `time` is in RFC 3339."""

    id: _Id
    kind: Kind
    reason: Reason
    dataset: StrictStr = Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")
    time: StrictStr = Field(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{3}Z$")
    unit: StrictStr = Field(max_length=128)
    """The schema's unit of privacy: `row`, or its column."""
    ended: tuple[EndedVersion, ...] = Field(max_length=10_000)
    replaced_by: _Version | None
    files: tuple[GoneFile, ...] = Field(max_length=MAX_FILES)
    keys: Keys
    blobs: Blobs
    models: tuple[TrainedModel, ...] = Field(max_length=10_000)
    stopped_runs: tuple[_Id, ...] = Field(max_length=10_000)
    """Runs that had not ended: they get no key and commit no step any more."""
    together: Together
    derived: tuple[_Version, ...] = Field(default=(), max_length=10_000)
    """Live versions of other datasets that were made from what had the rows. Nothing in them was changed."""

    @classmethod
    def parse(cls, value: object) -> Self:
        """Validate a certificate's predicate.

        Raises:
            IntegrityError: not one; names the field.
        """
        try:
            # As JSON has it: lists for tuples, and no other leniency.
            return cls.model_validate(value)
        except ValidationError as error:
            place = first_problem(error).place[:80]
        raise IntegrityError(f"this is not a certificate of erasure: {place}", "ask the authority for it again")


def subject_digest(erasure: Erasure) -> str:
    """Hex SHA-256 of what is gone: the subject that a certificate's statement is about."""
    return sha256_hex(canonical_json([file.model_dump(mode="json") for file in erasure.files]))


def advice(unit: Bound, subject: Bound | None) -> Literal["retrain", "review"]:
    """Retrain where what the model may say about the subject is hardly bounded, or not known; else review."""
    return "retrain" if (subject or unit).says_little else "review"


_DONE = {
    "erase": "Rows were erased from",
    "rectify": "Values were corrected in",
    "expire": "The retention ended of",
    "key-destruction": "The keys were destroyed of",
}


def sentences(erasure: Erasure) -> list[str]:
    """The certificate for people, in the order: what is gone, what remains and how far it is bounded, what to do."""
    said = [f"{_DONE[erasure.kind]} {erasure.dataset} at {erasure.time} (reason: {erasure.reason})."]
    for version in erasure.ended:
        removed = "" if version.removed is None else f", of which {version.removed:,} are in no later version"
        said.append(f"Gone: {version.version}, about {version.rows:,} rows{removed}. Nobody can open it any more.")
    if erasure.replaced_by:
        said.append(f"In its place: {erasure.replaced_by}.")
    shards = {file.file.rpartition("/")[0] for file in erasure.files}
    said.append(
        f"Gone: {len(erasure.files):,} sealed files of {len(shards):,} shards, by the destruction of "
        f"{erasure.keys.data_keys:,} data keys, and of the versions of "
        f"{erasure.keys.wrapping_key} before {erasure.keys.destroyed_below}, under which backups hold them: those "
        f"open nothing either."
    )
    late = f"; {erasure.blobs.pending:,} could not be yet, and are noise" if erasure.blobs.pending else ""
    said.append(f"Of the sealed files, {erasure.blobs.deleted:,} are deleted{late}.")
    for model in erasure.models:
        said.append(_of_model(model, erasure.unit))
    if not erasure.models:
        said.append("No model was trained on it.")
    if erasure.together.runs > 1:
        said.append(
            f"All {erasure.together.runs} runs together: epsilon {erasure.together.epsilon:g}, "
            f"delta {erasure.together.delta:g} for each {_unit(erasure.unit)}."
        )
    for other in erasure.derived:
        said.append(f"Remains: {other} was made from it, and is as it was: end its rows, and models of it, there.")
    if erasure.stopped_runs:
        said.append(f"No key and no further step for: {', '.join(erasure.stopped_runs)}.")
    return said


def _of_model(model: TrainedModel, unit: str) -> str:
    where = " (in production)" if model.production else ""
    bound = f"epsilon {model.unit.epsilon:g}, delta {model.unit.delta:g} for each {_unit(unit)}"
    if model.subject and model.subject.rows > 1:
        s = model.subject
        bound += f", and epsilon {s.epsilon:g}, delta {s.delta:g} for all of up to {s.rows:,} rows together"
    elif model.subject is None and unit == "row":
        bound += ", and how many rows they had in what it learned from is not known"
    verdict = {
        "retrain": "that says little, so train it again without them",
        "review": "review whether that is enough, or train it again",
    }[model.advice]
    return f"Remains: {model.model}{where} has learned from them. What it can tell is bounded by {bound}: {verdict}."


def _unit(unit: str) -> str:
    return "row" if unit == "row" else f"unit of {unit}"
