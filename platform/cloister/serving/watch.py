"""What a replica hears from the authority twice a second: who is out, which keys sign tokens, whether it may serve.

Guarantees: a revoked token or person, a changed role, a retired token key, a changed policy, a stopped endpoint and a
withdrawn model have effect here within `INTERVAL_S` and one round trip; a replica that has not heard from the
authority for `STALE_S` seconds answers nobody, since it could not know.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from cloister.errors import AuthenticationError, CloisterError, UnavailableError
from cloister.signing.tokens import MAX_LIFETIME_S, Claims, TokenVerifier

INTERVAL_S = 0.4
STALE_S = 5.0
_log = logging.getLogger(__name__)


class Changes(Protocol):
    """Where news come from. `cloister.client.authority.AuthorityClient` fits."""

    def changes(self, endpoint_id: str, after: int, policy_version: int) -> Mapping[str, Any]: ...


class Watch:
    """Listens from construction until `stop`."""

    def __init__(
        self, source: Changes, endpoint_id: str, *, verifier: TokenVerifier, on_policy: Callable[[str], None]
    ) -> None:
        """Hear the news once, then keep listening. `on_policy` is given the site's policies whenever they change.

        Raises:
            CloisterError: the authority does not answer, or has stopped this endpoint.
        """
        self._source = source
        self._endpoint = endpoint_id
        self._verifier = verifier
        self._on_policy = on_policy
        self._sequence = self._policy = 0
        self._epochs: dict[str, int] = {}
        self._dead: dict[str, float] = {}
        self._serving = True
        self._heard = 0.0
        self.listen()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen_for_ever, daemon=True, name="changes")
        self._thread.start()

    def listen(self) -> None:
        """Ask once.

        Raises:
            CloisterError: no answer.
        """
        asked = time.monotonic()
        news = self._source.changes(self._endpoint, self._sequence, self._policy)
        for each in news["revoked"]:
            if each["token_id"] is None:
                self._epochs[each["name"]] = max(each["epoch"], self._epochs.get(each["name"], 0))
            else:
                self._dead[each["token_id"]] = asked
        self._verifier.trust({key_id: pem.encode() for key_id, pem in news["token_keys"].items()})
        if news["policy"] is not None:
            self._on_policy(news["policy"]["text"])
            self._policy = news["policy"]["version"]
        self._sequence = news["sequence"]
        self._serving = bool(news["serving"])
        self._heard = asked
        past = asked - 2 * MAX_LIFETIME_S
        self._dead = {token_id: since for token_id, since in self._dead.items() if since > past}

    def require_live(self, claims: Claims) -> None:
        """Refuse a token that has ended since it was given, and everybody if this replica may not know or serve.

        Raises:
            AuthenticationError, UnavailableError
        """
        if time.monotonic() - self._heard > STALE_S:
            raise UnavailableError("this endpoint has lost touch with its authority", "try again in a moment")
        if not self._serving:
            raise UnavailableError("this endpoint was stopped or its model withdrawn", "cloister serve status")
        if claims.epoch < self._epochs.get(claims.subject, 0) or not self._dead.keys().isdisjoint(claims.token_ids):
            raise AuthenticationError("this access has changed or ended", "get a new token: cloister token")

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=5)

    def _listen_for_ever(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            try:
                self.listen()
            except Exception as error:  # noqa: BLE001  (whatever it was: silence makes this replica refuse by itself)
                if not isinstance(error, CloisterError):
                    _log.error("listening for changes failed: %s", type(error).__name__)
