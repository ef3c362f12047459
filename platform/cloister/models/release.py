"""The terms of a release, shared by the authority that signs it and the replica that checks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloister.canonical import canonical_json, sha256_hex, unb64
from cloister.errors import IntegrityError

# in-toto predicate types of the statements about one model's root digest.
PROVENANCE_PREDICATE = "https://cloister.dev/provenance/v1"
APPROVAL_PREDICATE = "https://cloister.dev/approval/v1"
APPROVERS_PREDICATE = "https://cloister.dev/approvers/v1"

PRODUCTION = "production"
PROMOTION = "promotion"  # the kind of approval that a release needs
# An approval carries a model into production and keeps it there: a year later somebody must look again.
APPROVAL_LIFETIME_S = 365 * 24 * 3600


def model_seal_context(run: str) -> dict[str, str]:
    """What the sealed model file of a run is bound to (see `cloister.sealing.stream`)."""
    return {"use": "cloister.dev/model/v1", "run": run}


def checkpoint_seal_context(run: str) -> dict[str, str]:
    """What every sealed checkpoint of a run is bound to; its attempt and step come on top."""
    return {"use": "cloister.dev/checkpoint/v1", "run": run}


def approval_digest(details: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what is approved: what an approver's statement is about, except for a promotion's, which is
    about the model's own root digest."""
    return sha256_hex(canonical_json(dict(details)))


def approval_predicate(request: Mapping[str, Any], person: str, decision: str) -> dict[str, Any]:
    """What an approver signs about a request, as the authority shows it.

    Raises:
        IntegrityError: the request's digest is not that of its details.
    """
    if request["kind"] != PROMOTION and approval_digest(request["details"]) != request["digest"]:
        raise IntegrityError("the request shows something else than would be signed", "do not approve it; report it")
    return {
        "approval": request["approval"],
        "kind": request["kind"],
        "person": person,
        "decision": decision,
        "expires": int(request["expires"]),
        "details": request["details"],
    }


def provenance_digest(envelope: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a provenance statement: what an approver signs beside the model's own digest.

    Raises:
        InputError: not an envelope.
    """
    return sha256_hex(unb64(str(envelope.get("payload", ""))))
