"""What a replica verifies itself, before it serves anything.

Guarantees: `verify_release` returns a model only after every step below held for the very bytes that it was given and
that the returned session was loaded from. Nothing is taken from the word of whoever delivered the bytes: the trust is
one pinned release key, and through its directory the own keys of the people who approved.

    1. The model signature (OMS) by the release key covers exactly `model.onnx` and `manifest.json`.
    2. The provenance statement, by the release key, is about the same root digest.
    3. The directory statement, by the release key and about the same root digest, names the author, the same as the
       provenance does, and the approvers with their Ed25519 keys: one person, one key.
    4. At least `required_approvals` statements about the same root digest say `approve` for `production`, have not
       expired, name this very provenance statement, and are each signed by the own key of another approver, never the
       author's.
    5. The manifest is that of the model asked for, and its ONNX graph loads with the manifest's inputs and outputs.

Not guaranteed: that the release key's holder lists the true keys of its people (the log of the authority shows every
registration), or that a release has not been withdrawn since: the lease decides that.

The predicates, all in DSSE envelopes around in-toto statements whose subject is the root digest:

    provenance/v1   {"author": name, …}
    approvers/v1    {"author": PERSON, "approvers": [PERSON, …]}, a PERSON being {"person": name, "public_key": PEM, …};
                    an author who logs in through an outside issuer may have no key (null)
    approval/v1     {"person": name, "kind": "promotion", "decision": "approve", "expires": Unix seconds,
                     "details": {"stage": "production", "provenance": hex SHA-256 of the provenance payload, …}, …}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from cloister.canonical import sha256_hex
from cloister.datasets.encoding import FeatureEncoder
from cloister.datasets.schema import Column
from cloister.errors import ApprovalMissingError, CloisterError, InputError, IntegrityError
from cloister.models.manifest import MANIFEST_FILE, MODEL_FILE, ModelManifest
from cloister.models.release import (
    APPROVAL_PREDICATE,
    APPROVERS_PREDICATE,
    PRODUCTION,
    PROMOTION,
    PROVENANCE_PREDICATE,
    provenance_digest,
)
from cloister.serving.scorer import Scorer
from cloister.signing import dsse, keys, oms

APPROVE = "approve"
MAX_APPROVALS = 64  # bounds the work that a delivery can ask for

Envelope = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A delivered model with its proofs; nothing of it is believed yet."""

    model_onnx: bytes = field(repr=False)
    manifest: bytes
    bundle: bytes
    provenance: Envelope
    directory: Envelope
    approvals: Sequence[Envelope]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedModel:
    """A model that passed every step. `root_digest` is the hex digest that all the statements are about."""

    manifest: ModelManifest
    root_digest: str
    author: str
    approved_by: tuple[str, ...]
    provenance: Mapping[str, Any]
    encoder: FeatureEncoder
    scorer: Scorer


def verify_release(
    release: Release, *, name: str, release_key_pem: bytes, required_approvals: int, now: float
) -> VerifiedModel:
    """Verify `release` as the model `name` at the Unix time `now`, in the steps above.

    Raises:
        InputError: the trust is unusable: no approvals required, or not a P-256 release key.
        ApprovalMissingError: step 4 failed, and only that.
        IntegrityError: another step failed.
    """
    if required_approvals < 1:
        raise InputError("a release needs at least one approval", "set `required_approvals` to 1 or more")
    release_key = keys.p256_public_from_pem(release_key_pem)
    trusted = {keys.key_id_of(release_key): release_key}

    files = {MODEL_FILE: sha256_hex(release.model_onnx), MANIFEST_FILE: sha256_hex(release.manifest)}
    root = oms.verify_model(release.bundle, files, release_key)  # 1

    provenance = dsse.verify(release.provenance, trusted, predicate_type=PROVENANCE_PREDICATE, subject_digest=root)  # 2

    directory = dsse.verify(release.directory, trusted, predicate_type=APPROVERS_PREDICATE, subject_digest=root)  # 3
    author, approvers = _people(directory.predicate)
    if provenance.predicate.get("author") != author:
        raise IntegrityError("provenance and directory name different authors", "have the model promoted again")

    approved_by = _approved_by(release.approvals, approvers, root, provenance_digest(release.provenance), now)  # 4
    if len(approved_by) < required_approvals:
        raise ApprovalMissingError(
            f"the model has {len(approved_by)} of {required_approvals} approvals for production that hold",
            "have it approved by people who are not its author, then deploy again: cloister model show",
        )

    manifest, encoder = _manifest(release.manifest, name)  # 5
    scorer = Scorer(release.model_onnx, width=encoder.width, classes=len(manifest.labels))
    return VerifiedModel(
        manifest=manifest,
        root_digest=root,
        author=author,
        approved_by=approved_by,
        provenance=provenance.predicate,
        encoder=encoder,
        scorer=scorer,
    )


def _people(predicate: Mapping[str, Any]) -> tuple[str, dict[str, tuple[str, keys.PublicKey]]]:
    """The author, and each approver's name and key by key id."""
    people: list[tuple[str, Ed25519PublicKey | None]] = []
    try:
        for entry in (predicate["author"], *predicate["approvers"]):
            if not isinstance(entry["person"], str) or not entry["person"]:
                raise TypeError
            keyless = entry["public_key"] is None and not people  # who has no key can have signed nothing
            key = None if keyless else keys.ed25519_public_from_pem(entry["public_key"].encode())
            people.append((entry["person"], key))
    except (KeyError, TypeError, AttributeError, InputError):
        raise IntegrityError("the directory of approvers is not usable", "have the model promoted again") from None
    # One person with two keys, or two persons with one key, would make one voice count twice.
    raw_keys = [key.public_bytes_raw() for _, key in people if key]
    if len({name for name, _ in people}) < len(people) or len(set(raw_keys)) < len(raw_keys):
        raise IntegrityError(
            "the directory of approvers does not give each person exactly one key of their own",
            "register a key for each person, then have the model approved and promoted again",
        )
    (author, _), *approvers = people
    return author, {keys.key_id_of(key): (name, key) for name, key in approvers if key}


def _approved_by(
    approvals: Sequence[Envelope],
    approvers: Mapping[str, tuple[str, keys.PublicKey]],
    root: str,
    provenance: str,
    now: float,
) -> tuple[str, ...]:
    """Who approved. An approval that does not hold counts for nothing; it does not spoil the others."""
    approved: set[str] = set()
    for envelope in approvals[:MAX_APPROVALS]:
        try:
            verified = dsse.verify(
                envelope,
                {key_id: key for key_id, (_, key) in approvers.items()},
                predicate_type=APPROVAL_PREDICATE,
                subject_digest=root,
            )
        except CloisterError:
            continue
        said = verified.predicate
        in_time = type(said.get("expires")) in (int, float) and now < said["expires"]
        details = said.get("details")
        meant = (details.get("stage"), details.get("provenance")) if isinstance(details, dict) else None
        if in_time and (said.get("decision"), said.get("kind"), meant) == (
            APPROVE,
            PROMOTION,
            (PRODUCTION, provenance),
        ):
            signers = {approvers[key_id][0] for key_id in verified.key_ids}
            approved |= signers & {said.get("person")}  # a statement speaks for the one person that it names
    return tuple(sorted(approved))


def _manifest(data: bytes, name: str) -> tuple[ModelManifest, FeatureEncoder]:
    damaged = "export and release the model again"
    try:
        manifest = ModelManifest.from_bytes(data)
        columns = [Column.model_validate(column) for column in manifest.features]
        encoder = FeatureEncoder(columns)
    except (InputError, ValidationError):
        raise IntegrityError("the model's manifest is not usable", damaged) from None
    names = [column.name for column in columns]
    if len(manifest.labels) < 2 or not names or any(len(set(each)) != len(each) for each in (manifest.labels, names)):
        raise IntegrityError("the model's manifest names no usable labels or features", damaged)
    if manifest.name != name:
        raise IntegrityError("the delivered model is another one than was asked for", "deploy the endpoint again")
    return manifest, encoder
