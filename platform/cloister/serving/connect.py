"""The real surroundings of a replica: the authority over TLS, and the policy that ships with Cloister."""

from __future__ import annotations

import functools
import time
from typing import cast

from cloister.client.authority import AuthorityClient
from cloister.client.node import present_node
from cloister.models.release import PRODUCTION
from cloister.policy import Policy, Request
from cloister.policy.decide import Kind
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
        node=present_node(endpoint.config.node),
    )
    return Backing(authority=authority, authorizer=cedar_authorizer)


def cedar_authorizer(model: VerifiedModel, reference: str, site: str) -> Authorizer:
    """The shipped Cedar policies and the site's own, asked about `model` with the facts that its release proved."""
    policy = Policy.shipped().with_site(site)

    def authorize(subject: str, kind: str, roles: frozenset[str], action: str) -> None:
        policy.require(
            Request(
                principal=subject,
                kind=cast(Kind, kind),
                roles=roles,
                action=action,
                resource_type="Model",
                resource=reference,
                attributes={"author": model.author, "stage": PRODUCTION},
                context={"time": int(time.time())},
            )
        )

    # The shipped rules do not ask what time it is, so a permission can be remembered; a refusal raises, and is not.
    return authorize if site.strip() else functools.lru_cache(maxsize=MAX_DECISIONS)(authorize)
