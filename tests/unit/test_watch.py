"""What ends at the authority ends at a replica with the next poll: a real authority, a real replica, real HTTPS."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import insert

from authority_world import URL, Person, World
from cloister.canonical import sha256_hex
from cloister.client.authority import AuthorityClient
from cloister.datasets.encoding import FeatureEncoder
from cloister.datasets.schema import Column
from cloister.errors import AuthenticationError, CloisterError, NotFoundError, PermissionDeniedError, UnavailableError
from cloister.serving import watch as watch_module
from cloister.serving.connect import cedar_authorizer
from cloister.serving.endpoint import Endpoint, write_endpoint
from cloister.serving.replica import Backing, Replica
from cloister.serving.watch import Watch
from cloister.signing import certificates, keys
from cloister.signing.tokens import INFERENCE_AUDIENCE, Claims, TokenVerifier
from cloister.stores.tables import policy_versions
from serving_world import onnx_model
from waiting import wait_for

AGE = {"name": "age", "type": "integer", "class": "confidential", "bounds": [16, 100]}
QUESTION = {"inputs": [{"name": "age", "shape": [1], "datatype": "INT64", "data": [40]}]}
NO_MORE_CARL = """
@id("our-consumers-are-on-strike")
forbid (principal in Role::"consumer", action == Action::"model:infer", resource);
"""


@dataclass
class Source:
    """The real client, which can be told to fail; remembers what was asked for."""

    client: AuthorityClient
    error: Exception | None = None
    asked: list[tuple[int, int]] = field(default_factory=list)
    failed: int = 0

    def changes(self, endpoint_id: str, after: int, policy_version: int) -> Mapping[str, Any]:
        if self.error:
            self.failed += 1
            raise self.error
        self.asked.append((after, policy_version))
        return self.client.changes(endpoint_id, after, policy_version)


@dataclass
class Listening:
    """A watch over the changes of one endpoint, and the policies that it was told of."""

    world: World
    endpoint: str
    source: Source
    verifier: TokenVerifier
    policies: list[str] = field(default_factory=list)

    def start(self) -> Watch:
        return Watch(self.source, self.endpoint, verifier=self.verifier, on_policy=self.policies.append)

    def claims(self, name: str = "carl") -> Claims:
        """Of a new token for inference, verified as a replica verifies it."""
        answer = self.world.exchange(self.world.assertion(name), INFERENCE_AUDIENCE)
        assert answer.status_code == 200, answer.text
        return self.verifier.verify(answer.json()["access_token"], self.world.clock())


@pytest.fixture
def house(world: World) -> World:
    """With a production model that is one, and a second security officer."""
    world.register("second-officer", ["security-officer"])
    width = FeatureEncoder([Column.model_validate(AGE)]).width
    world.train(model=onnx_model(width))
    world.release()
    return world


@pytest.fixture
def listening(house: World) -> Listening:
    endpoint = house.deploy()
    verifier = TokenVerifier(house.authority.sessions.published_keys(), issuer=URL, audience=INFERENCE_AUDIENCE)
    return Listening(house, endpoint, Source(house.client(endpoint)), verifier)


@pytest.fixture
def watch(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """One that listens only when it is told to, so that each test says when."""
    monkeypatch.setattr(watch_module, "INTERVAL_S", 3600.0)
    monkeypatch.setattr(watch_module, "STALE_S", 3600.0)
    watch = listening.start()
    yield watch
    watch.stop()


def test_a_replica_asks_twice_a_second() -> None:
    """So that what ends at the authority has ended at the replica a second later, with a round trip to spare."""
    assert 2 * watch_module.INTERVAL_S < 1


# ---- who is out ----


def _change_roles(world: World) -> None:
    assert (
        world.ask("operator", "PUT", "/v1/identities/carl/roles", {"roles": ["consumer", "auditor"]}).status_code == 200
    )


def _shut_out(world: World) -> None:
    world.post("sofia", "/v1/identities/carl/revocation")


def _new_key(world: World) -> None:
    new = Person("carl", ["consumer"])
    assert world.replace_key("carl", new).status_code == 200
    world.people["carl"] = new


@pytest.mark.parametrize("end", [_change_roles, _shut_out, _new_key])
def test_whose_access_changed_is_out_with_the_next_poll(
    listening: Listening, watch: Watch, end: Callable[[World], None]
) -> None:
    dead, other = listening.claims(), listening.claims("ada")
    watch.require_live(dead)
    end(listening.world)
    watch.listen()
    with pytest.raises(AuthenticationError, match="ended"):
        watch.require_live(dead)
    watch.require_live(other)
    if end is not _shut_out:
        watch.require_live(listening.claims())  # a new token is good


def test_a_token_that_was_revoked_is_dead_and_no_other(listening: Listening, watch: Watch) -> None:
    world = listening.world
    token = world.exchange(world.assertion("carl"), INFERENCE_AUDIENCE).json()["access_token"]
    dead, other = listening.verifier.verify(token, world.clock()), listening.claims()
    world.http.post("/v1/revoke", data={"token": token})
    watch.listen()
    with pytest.raises(AuthenticationError):
        watch.require_live(dead)
    watch.require_live(other)
    _change_roles(world)
    watch.listen()
    for claims in (dead, other):
        with pytest.raises(AuthenticationError):
            watch.require_live(claims)


def test_what_ended_before_the_start_is_known_from_the_start(listening: Listening) -> None:
    dead = listening.claims()
    _change_roles(listening.world)
    watch = listening.start()
    with pytest.raises(AuthenticationError):
        watch.require_live(dead)
    watch.stop()


def test_news_are_asked_for_once(listening: Listening, watch: Watch) -> None:
    _change_roles(listening.world)
    for _ in range(3):
        watch.listen()
    after = [sequence for sequence, _ in listening.source.asked]
    assert after[0] == 0
    assert after[1] < after[2] == after[3]


def test_a_lent_role_does_not_outlive_its_time_at_a_replica(listening: Listening, watch: Watch) -> None:
    """Nothing needs to be told: the token was given for no longer."""
    world = listening.world
    approval = world.post("ed", "/v1/access", {"role": "consumer", "seconds": 60, "reason": "a demonstration"})
    request = next(a for a in world.get("ada", "/v1/approvals") if a["approval"] == approval["approval"])
    assert world.vote("sofia", request).status_code == 200
    claims = listening.claims("ed")
    watch.require_live(claims)
    assert "consumer" in claims.roles
    assert claims.expires_at <= world.clock() + 60


# ---- keys, policies, the endpoint itself ----


def test_a_new_token_key_is_trusted_with_the_next_poll(listening: Listening, watch: Watch) -> None:
    old = listening.claims()
    listening.world.post("operator", "/v1/token-keys", {})
    with pytest.raises(AuthenticationError):
        listening.claims()  # not known here yet
    watch.listen()
    watch.require_live(listening.claims())
    watch.require_live(old)


def test_a_compromised_token_key_takes_remembered_tokens_along(listening: Listening, watch: Watch) -> None:
    world = listening.world
    token = world.exchange(world.assertion("carl"), INFERENCE_AUDIENCE).json()["access_token"]
    assert listening.verifier.verify(token, world.clock())
    world.post("operator", "/v1/token-keys", {"compromised": True})
    listening.source.client._tokens.clear()  # the endpoint's own died as well
    watch.listen()
    with pytest.raises(AuthenticationError):
        listening.verifier.verify(token, world.clock())


def test_the_endpoints_own_token_may_die_and_it_listens_on(listening: Listening, watch: Watch) -> None:
    listening.world.post("operator", "/v1/token-keys", {"compromised": True})
    listening.world.tokens.clear()
    watch.listen()
    watch.require_live(listening.claims())


def put_in_force(world: World, text: str) -> None:
    body = {"text": text, "reason": "a test"}
    assert (
        world.vote("second-officer", world.missing(world.ask("sofia", "POST", "/v1/policy", body))).status_code == 200
    )
    world.post("sofia", "/v1/policy", body)


def test_a_changed_policy_is_told_once(listening: Listening, watch: Watch) -> None:
    assert listening.policies == []
    put_in_force(listening.world, NO_MORE_CARL)
    for _ in range(3):
        watch.listen()
    put_in_force(listening.world, "")
    watch.listen()
    assert listening.policies == [NO_MORE_CARL, ""]


def test_an_endpoint_that_was_stopped_serves_nobody(listening: Listening, watch: Watch) -> None:
    claims = listening.claims()
    listening.world.post("operator", f"/v1/endpoints/{listening.endpoint}/stop")
    watch.listen()
    with pytest.raises(UnavailableError):
        watch.require_live(claims)


def test_a_model_that_was_withdrawn_is_served_to_nobody(listening: Listening, watch: Watch) -> None:
    claims = listening.claims()
    request = next(a for a in listening.world.get("ada", "/v1/approvals") if a["kind"] == "promotion")
    assert listening.world.vote("rob", request, decision="deny").status_code == 200
    watch.listen()
    with pytest.raises(UnavailableError):
        watch.require_live(claims)


# ---- silence ----


def test_a_replica_that_hears_nothing_answers_nobody(listening: Listening, watch: Watch) -> None:
    claims = listening.claims()
    listening.source.error = UnavailableError("no route")
    with pytest.raises(UnavailableError):
        watch.listen()
    watch.require_live(claims)  # for a while
    watch._heard -= watch_module.STALE_S
    with pytest.raises(UnavailableError, match="lost touch"):
        watch.require_live(claims)
    listening.source.error = None
    watch.listen()
    watch.require_live(claims)


def test_a_policy_that_cannot_be_read_makes_silence(listening: Listening, watch: Watch) -> None:
    def unreadable(text: str) -> None:
        raise CloisterError(f"not a policy of {len(text)} characters")

    watch._on_policy = unreadable
    heard = watch._heard
    put_in_force(listening.world, NO_MORE_CARL)
    with pytest.raises(CloisterError):
        watch.listen()
    assert watch._heard == heard


def test_revocations_are_heard_even_if_the_policies_that_come_along_are_bad(listening: Listening, watch: Watch) -> None:
    dead = listening.claims()
    watch._on_policy = lambda _: _raise(CloisterError("no policy"))
    put_in_force(listening.world, NO_MORE_CARL)
    _change_roles(listening.world)
    with pytest.raises(CloisterError):
        watch.listen()
    with pytest.raises(AuthenticationError):
        watch.require_live(dead)


def _raise(error: Exception) -> None:
    raise error


def test_no_start_without_the_authority(listening: Listening) -> None:
    before = set(threading.enumerate())
    listening.source.error = UnavailableError("no route")
    with pytest.raises(UnavailableError):
        listening.start()
    listening.source.error = None
    listening.endpoint = "ep-none"
    with pytest.raises(NotFoundError):
        listening.start()
    listening.endpoint = listening.world.deploy()  # another's
    with pytest.raises(PermissionDeniedError):
        listening.start()
    assert "changes" not in {thread.name for thread in set(threading.enumerate()) - before}


def test_listening_goes_on_by_itself_whatever_happens(listening: Listening) -> None:
    watch = listening.start()
    dead = listening.claims()
    for error in (UnavailableError("no route"), RuntimeError("what nobody thought of")):
        listening.source.error, failed = error, listening.source.failed
        wait_for(lambda failed=failed: listening.source.failed > failed + 1)
    listening.source.error = None
    _change_roles(listening.world)

    def out() -> bool:
        try:
            watch.require_live(dead)
        except AuthenticationError:
            return True
        except UnavailableError:  # on a slow machine it has not heard anything for too long
            return False
        return False

    wait_for(out)
    watch.stop()


# ---- a whole replica ----


@dataclass
class Served:
    """A replica that leased its model from the authority of the world, on a port of its own."""

    world: World
    endpoint: str
    replica: Replica
    http: httpx.Client

    def status(self, token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return self.http.post("/v2/models/adult/infer", json=QUESTION, headers=headers).status_code

    def token(self, name: str = "carl") -> str:
        return str(self.world.exchange(self.world.assertion(name), INFERENCE_AUDIENCE).json()["access_token"])


@pytest.fixture
def served(house: World, tmp_path: Path) -> Iterator[Served]:
    workload, tls_key = Person("new", ["endpoint"]), certificates.new_private_key()
    csr = certificates.signing_request(tls_key, "endpoint").decode()
    answer = house.post("operator", "/v1/endpoints", house.deploy_body(workload, quota=1_000_000) | {"csr": csr})
    workload.name = answer["endpoint"]
    house.people[workload.name] = workload
    directory = write_endpoint(
        tmp_path / "endpoint", endpoint=workload.name, model="adult", authority_url=URL,
        authority_ca=house.authority.ca_certificate, node="", port=0, replicas=1, quota_block=10,
        info=house.http.get("/v1/info").json(), endpoint_key=keys.private_to_pem(workload.key),
        tls_certificate=answer["certificate"].encode(), tls_key=tls_key,
    )  # fmt: skip

    def connect(_: Endpoint) -> Backing:
        return Backing(authority=house.client(workload.name), authorizer=cedar_authorizer)

    replica = Replica(str(directory.directory), connect)
    context = ssl.create_default_context(cadata=house.authority.endpoint_ca.decode())
    with httpx.Client(
        base_url=f"https://127.0.0.1:{replica.port}", verify=context, trust_env=False, timeout=60
    ) as http:
        yield Served(house, workload.name, replica, http)
    replica.close()


def test_what_ends_at_the_authority_ends_at_the_replica(served: Served) -> None:
    world, before, other = served.world, served.token(), served.token()
    assert served.status(before) == served.status(other) == 200
    world.http.post("/v1/revoke", data={"token": before})
    wait_for(lambda: served.status(before) == 401)
    assert served.status(other) == 200
    _change_roles(world)
    wait_for(lambda: served.status(other) == 401)
    again = served.token()
    assert served.status(again) == 200
    put_in_force(world, NO_MORE_CARL)
    wait_for(lambda: served.status(again) == 403)
    put_in_force(world, "")
    wait_for(lambda: served.status(again) == 200)
    world.post("operator", "/v1/token-keys", {"compromised": True})
    world.tokens.clear()
    wait_for(lambda: served.status(again) == 401)
    wait_for(lambda: served.status(served.token()) == 200)
    world.post("operator", f"/v1/endpoints/{served.endpoint}/stop")
    wait_for(lambda: served.status(served.token()) == 503)


def test_a_replica_whose_node_was_revoked_falls_silent(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    token = served.token()
    assert served.status(token) == 200
    monkeypatch.setattr(watch_module, "STALE_S", 0.8)
    served.world.post("operator", "/v1/identities/node-eu/revocation")
    wait_for(lambda: served.status(token) == 503)


def test_a_site_policy_from_before_the_start_holds_from_the_start(house: World) -> None:
    """The first poll comes before the port opens."""
    with house.authority.core.database.transaction() as connection:
        connection.execute(
            insert(policy_versions).values(
                version=1, text=NO_MORE_CARL, digest=sha256_hex(NO_MORE_CARL.encode()), author="sofia", created=0.0
            )
        )
    endpoint = house.deploy()
    policies: list[str] = []
    verifier = TokenVerifier({}, issuer=URL, audience=INFERENCE_AUDIENCE)
    watch = Watch(house.client(endpoint), endpoint, verifier=verifier, on_policy=policies.append)
    assert policies == [NO_MORE_CARL]
    token = house.exchange(house.assertion("carl"), INFERENCE_AUDIENCE).json()["access_token"]
    assert verifier.verify(token, house.clock()).subject == "carl"  # and the keys came along
    watch.stop()
