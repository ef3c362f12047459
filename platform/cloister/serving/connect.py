"""The real surroundings of a replica: the authority over TLS, and the policy that ships with Cloister."""

from __future__ import annotations

import functools

from cloister.client.authority import AuthorityClient
from cloister.models.release import PRODUCTION
from cloister.policy import Policy, Request
from cloister.serving.endpoint import Endpoint
from cloister.serving.pipeline import Authorizer
from cloister.serving.release import VerifiedModel
from cloister.serving.replica import Backing

MAX_DECISIONS = 4096


def connect(endpoint: Endpoint) -> Backing:
    """Speak to the authority as the endpoint itself, by its own key.

    Raises:
        InputError: the authority's URL or certificate is not usable.
    """
    authority = AuthorityClient(
        endpoint.config.authority_url,
        ca_path=endpoint.authority_ca_path,
        name=endpoint.config.endpoint,
        private_key_pem=endpoint.key_path.read_bytes(),
    )
    return Backing(authority=authority, authorizer=cedar_authorizer)


def cedar_authorizer(model: VerifiedModel) -> Authorizer:
    """The shipped Cedar policies, asked about `model` with the facts that its release proved."""
    policy = Policy.shipped()

    @functools.lru_cache(maxsize=MAX_DECISIONS)  # the policy is immutable; a refusal raises and is not remembered
    def authorize(subject: str, roles: frozenset[str], action: str, resource: str) -> None:
        policy.require(
            Request(
                principal=subject,
                roles=roles,
                action=action,
                resource_type="Model",
                resource=resource,
                attributes={"author": model.author, "stage": PRODUCTION},
            )
        )

    return authorize
