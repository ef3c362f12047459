"""What requests to the authority may say, and how much of it: every text, list and number has its limit.

The limits are in the OpenAPI document too, so a client and a test can see them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from cloister.authority.nodes import MAX_ASSURANCE
from cloister.datasets.erasure import Reason
from cloister.policy.decide import MAX_SITE_CHARACTERS
from cloister.privacy.evaluation import MOST_BINS, MOST_LABELS
from cloister.privacy.spec import TrainingSpec

MAX_FIELDS = 32
MAX_FILE_REFS = 100_000


def _parsed(spec: object) -> dict[str, Any]:
    return TrainingSpec.parse(spec).to_dict()


Name = Annotated[str, Field(min_length=1, max_length=63)]
Version = Annotated[int, Field(ge=1, le=999_999_999)]
Step = Annotated[int, Field(ge=0, le=1_000_000_000)]
Canaries = Annotated[int, Field(ge=0, le=100_000)]
Attempt = Annotated[int, Field(ge=1, le=1_000)]
Text = Annotated[str, Field(min_length=1, max_length=300)]
Pem = Annotated[str, Field(min_length=1, max_length=4096)]
Base64 = Annotated[str, Field(max_length=8 * 1024 * 1024)]
LongBase64 = Annotated[str, Field(max_length=48 * 1024 * 1024)]
FileRef = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}/[a-z0-9-]{1,40}/[a-z]{1,20}$")]
OneTimeKey = Annotated[str, Field(max_length=64)]  # base64 of an X25519 key
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
CodeDigest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
NoisyCount = Annotated[int, Field(ge=-(2**40), le=2**40)]
RightOrWrong = Annotated[list[Annotated[list[NoisyCount], Field(min_length=1, max_length=MOST_BINS)]],
                         Field(min_length=2, max_length=2)]  # fmt: skip
Word = Annotated[str, Query(max_length=300)]
Size = Annotated[int, Field(ge=0, le=2**53)]
Budgeted = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]  # what a budget may be is told by `data.py`
Planned = Annotated[dict[str, Any], PlainValidator(_parsed, json_schema_input_type=TrainingSpec)]
ErrorName = Annotated[str, Field(max_length=40)]
ErrorText = Annotated[str, Field(max_length=16 * 1024)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:  # before each of them becomes an error
            raise ValueError("too many fields")
        return value


class Refusal(BaseModel):
    """Every answer that is not a success."""

    model_config = ConfigDict(extra="forbid")

    error: str
    hint: str
    kind: str


class Roles(Body):
    roles: Annotated[list[Name], Field(min_length=1, max_length=10)]


class CosignedNote(Body):
    note: Annotated[str, Field(min_length=1, max_length=64 * 1024)]


class NewIdentity(Roles):
    name: Name
    kind: Name = "person"
    public_key: Pem | None = None
    issuer: Text | None = None
    subject: Text | None = None


class NewKey(Body):
    public_key: Pem
    proof: Annotated[str, Field(max_length=4096)] = ""


class NewNode(Body):
    name: Name
    public_key: Pem
    region: Name
    assurance: int = Field(default=0, ge=0, le=MAX_ASSURANCE)


class SigningRequest(Body):
    csr: Pem


class KeyRotation(Body):
    compromised: bool = False


class WrappingKey(Body):
    name: Annotated[str, Field(min_length=1, max_length=128)]


class ElevatedAccess(Body):
    role: Name
    seconds: int = Field(ge=1, le=1_000_000)
    reason: Text


class Policies(Body):
    text: Annotated[str, Field(max_length=MAX_SITE_CHARACTERS)]
    reason: Annotated[str, Field(max_length=300)] = ""


class Question(Body):
    principal: Name | None = None
    action: Name
    resource_type: Name
    resource: Annotated[str, Field(min_length=1, max_length=128)]


class Signature(Body):
    keyid: Annotated[str, Field(max_length=128)] = ""
    sig: Annotated[str, Field(max_length=256)]


class Envelope(Body):
    """DSSE v1.0.2."""

    payload: Base64
    payloadType: Annotated[str, Field(max_length=100)]  # noqa: N815  (DSSE's name)
    signatures: Annotated[list[Signature], Field(min_length=1, max_length=8)]


class RunEnd(Body):
    envelope: Envelope
    error: Annotated[dict[ErrorName, ErrorText], Field(max_length=16)] | None = None


class SignedManifest(Envelope):
    """DSSE v1.0.2, of a manifest of up to 100,000 files."""

    payload: LongBase64


class Ending(Body):
    ends: Annotated[list[FileRef], Field(max_length=MAX_FILE_REFS)] = []
    reason: Reason | None = None


class EndingAt(Ending):
    """`version` is the coming one, as `/openings` gave it."""

    version: Version


class SealedDataset(Ending):
    envelope: SignedManifest
    sealed_keys: LongBase64


class Sealing(Body):
    public_key: OneTimeKey
    kind: Literal["seal", "append"]
    region: Name


class Opening(Body):
    public_key: OneTimeKey
    purpose: Literal["erase", "rectify"]
    files: Annotated[list[FileRef], Field(min_length=1, max_length=MAX_FILE_REFS)] | None = None


class Expiry(Body):
    early: bool = False


class Budget(Body):
    epsilon: Budgeted
    delta: Budgeted
    version: Version | None = None
    """Of the dataset whose budget it is; the newest by default. Versions may have different populations."""


class Spec(Body):
    spec: Planned


class NewRun(Spec):
    code_digest: CodeDigest
    public_key: Pem


class NewAttempt(Body):
    world_size: int = Field(ge=1, le=4096)
    code_digest: CodeDigest


class LeaseRequest(Body):
    attempt: Attempt
    rank: int = Field(ge=0, le=4096)
    public_key: OneTimeKey
    code_digest: CodeDigest


class Block(Body):
    attempt: Attempt
    first: Step
    last: Step


class Checkpoint(Body):
    attempt: Attempt
    step: Step
    blob: Annotated[str, Field(max_length=300)]
    sha256: Sha256


class Progress(Body):
    attempt: Attempt
    steps_done: Step
    rows_per_s: float = Field(ge=0, le=1e12, allow_inf_nan=False)


class StepAudit(Body):
    """What an attack on the steps of a run came to: `cloister.privacy.auditing.MechanismAudit`."""

    epsilon_lower_bound: float = Field(ge=0, le=1e6, allow_inf_nan=False)
    noise_multiplier_at_most: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] | None
    sample_rate_at_least: float = Field(ge=0, le=1, allow_inf_nan=False)
    poisson: bool
    observations: Size
    confidence: float = Field(gt=0.5, lt=1, allow_inf_nan=False)


class ModelAudit(Body):
    """What was guessed from a model about its canaries: `cloister.privacy.auditing.Guesses`."""

    canaries: Canaries
    guesses: Canaries
    correct: Canaries

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if not self.correct <= self.guesses <= self.canaries:
            raise ValueError("more guesses than canaries, or more that are correct than guesses")
        return self


class Audit(Body):
    mechanism: StepAudit
    one_run: ModelAudit


class TrainedModel(Body):
    manifest: Base64
    model_sha256: Sha256
    blob: Annotated[str, Field(max_length=300)]
    blob_sha256: Sha256
    evaluation: Annotated[list[RightOrWrong], Field(min_length=1, max_length=MOST_LABELS)]
    """A noisy histogram [labels, 2, bins]: `cloister.privacy.evaluation`."""
    audit: Audit


class Vote(Body):
    envelope: Envelope


class NewEndpoint(Body):
    model: Name
    public_key: Pem
    csr: Pem
    quota_requests: int = Field(ge=1, le=10_000_000)
    quota_window_s: int = Field(ge=1, le=86_400)


class ModelLeaseRequest(Body):
    public_key: OneTimeKey


class QuotaRequest(Body):
    subject: Name
    wanted: int = Field(ge=1, le=10_000)
