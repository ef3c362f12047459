"""The terms of a release, shared by the authority that signs it and the replica that checks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloister.canonical import sha256_hex, unb64

# in-toto predicate types of the statements about one model's root digest.
PROVENANCE_PREDICATE = "https://cloister.dev/provenance/v1"
APPROVAL_PREDICATE = "https://cloister.dev/approval/v1"
APPROVERS_PREDICATE = "https://cloister.dev/approvers/v1"

PRODUCTION = "production"
REQUIRED_APPROVALS = 1
# An approval carries a model into production and keeps it there: a year later somebody must look again.
APPROVAL_LIFETIME_S = 365 * 24 * 3600


def model_seal_context(run: str) -> dict[str, str]:
    """What the sealed model file of a run is bound to (see `cloister.sealing.stream`)."""
    return {"use": "cloister.dev/model/v1", "run": run}


def provenance_digest(envelope: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a provenance statement: what an approver signs beside the model's own digest.

    Raises:
        InputError: not an envelope.
    """
    return sha256_hex(unb64(str(envelope.get("payload", ""))))
