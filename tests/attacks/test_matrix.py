"""Every route, every role, every fault of a token. Generated from the OpenAPI document of the application.

`MAY` says who gets past policy on which route; whoever is not named there must be refused. A route without a row fails
the suite: say who may use it, and how `Case` asks for it.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import re
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from sqlalchemy import select

import clinic
from authority_world import (
    APP,
    AUDIT,
    CODE,
    HISTOGRAM,
    URL,
    Person,
    World,
    attempt_body,
    lease_body,
    receiver,
    training_spec,
)
from cloister.authority import gate
from cloister.authority.identity import add_identity
from cloister.canonical import b64
from cloister.policy.decide import ROLES
from cloister.signing import certificates, keys, tokens
from cloister.signing.tokens import AUTHORITY_AUDIENCE, INFERENCE_AUDIENCE, JWT_BEARER
from cloister.stores.tables import token_keys

# ---- who may ----

READERS = ["operator", "auditor", "security-officer"]
DATA_READERS = [*READERS, "owner", "data-owner", "author", "engineer", "reviewer"]
MODEL_READERS = [*READERS, "author", "engineer", "reviewer"]
LOG_READERS = [*READERS, "reviewer"]
ENGINEERS = ["author", "engineer"]
OWN_RUN = ["run"]
OWN_ENDPOINT = ["endpoint"]
ANY_PERSON = ["owner", "author", *ROLES]

# Route (as the OpenAPI document has it, and which case of it) to who gets past policy. A service may what a person of
# its role may; `PEOPLE_ONLY` are the exceptions. "run" is the run in question, "other run" another; so for endpoints.
MAY: dict[str, list[str]] = {
    "GET /v1/identities": READERS,
    "POST /v1/identities": ["operator"],
    "PUT /v1/identities/{name}/roles": ["operator"],
    "PUT /v1/identities/{name}/key [of another]": [],
    "PUT /v1/identities/{name}/key [one's own]": ANY_PERSON,
    "POST /v1/identities/{name}/revocation [of another]": ["operator", "security-officer"],
    "POST /v1/identities/{name}/shredding": ["security-officer"],
    "GET /v1/me": ANY_PERSON,
    "POST /v1/token-keys": ["operator"],
    "GET /v1/keys": READERS,
    "POST /v1/keys/rotation": ["operator", "security-officer"],
    "POST /v1/nodes": ["operator"],
    "POST /v1/nodes/certificate": ["node", "node, plain"],
    "POST /v1/access": ["operator", *ENGINEERS],
    "GET /v1/policy": DATA_READERS,
    "POST /v1/policy": ["security-officer"],
    "POST /v1/policy/explain [about oneself]": ANY_PERSON,
    "POST /v1/policy/explain [about another]": READERS,
    "GET /v1/datasets": DATA_READERS,
    "POST /v1/datasets": ["owner", "data-owner"],
    "POST /v1/datasets/{name}/sealing": ["owner"],
    "POST /v1/datasets/{name}/openings": ["owner"],
    "POST /v1/datasets/{name}/endings": ["owner"],
    "GET /v1/erasures/{erasure}": DATA_READERS,
    "GET /v1/datasets/{name}/versions/{version}": DATA_READERS,
    "GET /v1/datasets/{name}/budget": DATA_READERS,
    "PUT /v1/datasets/{name}/budget": ["owner"],
    "POST /v1/datasets/{name}/versions/{version}/key-destruction": ["owner"],
    "POST /v1/datasets/{name}/versions/{version}/expiry": ["owner"],
    "POST /v1/plans": ENGINEERS,
    "POST /v1/runs": ENGINEERS,
    "GET /v1/runs": DATA_READERS,
    "GET /v1/runs/{run}": [*DATA_READERS, "run", "run, plain"],
    "POST /v1/runs/{run}/stop": ["operator", "author"],
    "POST /v1/runs/{run}/resume": ["author"],
    "POST /v1/runs/{run}/attempts": OWN_RUN,
    "POST /v1/runs/{run}/checkpoints": OWN_RUN,
    "POST /v1/runs/{run}/leases": OWN_RUN,
    "POST /v1/runs/{run}/blocks": OWN_RUN,
    "POST /v1/runs/{run}/progress": OWN_RUN,
    "POST /v1/runs/{run}/model": OWN_RUN,
    "POST /v1/runs/{run}/end": OWN_RUN,
    "GET /v1/models": MODEL_READERS,
    "GET /v1/models/{name}/versions/{version}": MODEL_READERS,
    "POST /v1/models/{name}/versions/{version}/promotion": ENGINEERS,
    "POST /v1/models/{name}/versions/{version}/export": ENGINEERS,
    "GET /v1/approvals": DATA_READERS,
    # Those who did not ask for it themselves: `author` asked for training and promotion, `owner` for the next two.
    "POST /v1/approvals/{approval}/votes [training]": ["owner", "reviewer"],
    "POST /v1/approvals/{approval}/votes [promotion]": ["reviewer"],
    "POST /v1/approvals/{approval}/votes [budget]": ["security-officer"],
    "POST /v1/approvals/{approval}/votes [key-destruction]": ["security-officer"],
    "POST /v1/approvals/{approval}/votes [access]": ["security-officer"],
    "POST /v1/approvals/{approval}/votes [policy]": ["security-officer"],
    "GET /v1/endpoints": READERS,
    "POST /v1/endpoints": ["operator"],
    "POST /v1/endpoints/{endpoint}/stop": ["operator"],
    "POST /v1/endpoints/{endpoint}/leases": OWN_ENDPOINT,
    "POST /v1/endpoints/{endpoint}/quota": OWN_ENDPOINT,
    "GET /v1/endpoints/{endpoint}/changes": OWN_ENDPOINT,
    "GET /v1/log": LOG_READERS,
    "GET /v1/log/export": LOG_READERS,
    "GET /v1/log/entries/{index}/proof": LOG_READERS,
    "GET /v1/log/consistency": LOG_READERS,
    "POST /v1/log/cosignatures": LOG_READERS,
}
PEOPLE_ONLY = "/votes ["


def route_of(label: str) -> str:
    return label.partition(" [")[0]


def documented(public: bool) -> set[str]:
    """`METHOD /path` of everything in the OpenAPI document."""
    return {
        f"{method.upper()} {path}"
        for path, methods in APP.openapi()["paths"].items()
        for method in methods
        if (path in gate.PUBLIC) == public
    }


def test_every_route_says_who_may_use_it() -> None:
    listed = {route_of(label) for label in MAY}
    missing, gone = sorted(documented(public=False) - listed), sorted(listed - documented(public=False))
    assert not missing, f"say in MAY of {__name__} who may: {', '.join(missing)}"
    assert not gone, f"MAY of {__name__} names routes that are gone: {', '.join(gone)}"


def test_no_route_hides_from_the_document() -> None:
    known = {getattr(route, "path", "") for route in APP.routes}
    assert known - APP.openapi()["paths"].keys() == {"/v1/openapi.json"}


def test_the_public_routes_are_the_ones_that_are_meant() -> None:
    assert documented(public=True) == {
        "GET /v1/health", "GET /v1/info", "GET /v1/checkpoint", "GET /v1/jwks.json", "POST /v1/token",
        "POST /v1/revoke", "GET /.well-known/oauth-authorization-server",
    }  # fmt: skip
    assert {route.partition(" ")[2] for route in documented(public=True)} == gate.PUBLIC - {"/v1/openapi.json"}


# ---- the house in which they try ----


@dataclass
class House:
    """A world in which everything that a route can be about is there. `callers` by the labels of `MAY`."""

    world: World
    names: dict[str, str] = field(default_factory=dict)
    callers: dict[str, str] = field(default_factory=dict)
    certificates: dict[str, bytes | None] = field(default_factory=dict)

    def request(self, label: str, caller: str) -> tuple[str, str, Any]:
        """Method, path and body of a case: a good request, or one that stumbles only after policy was asked."""
        method, template = route_of(label).split(" ")
        case = label.partition(" [")[2].rstrip("]")
        known = self.names | {"approval": self.names.get(case, "apr-0"), "name": "adult", "version": "1", "index": "0"}
        if template.startswith("/v1/identities/"):
            known["name"] = self.callers[caller] if case == "one's own" else self.names["victim"]
        path = re.sub(r"\{(\w+)\}", lambda found: known[found[1]], template)
        if template == "/v1/endpoints/{endpoint}/stop":
            path = path.replace(self.names["endpoint"], self.names["stopped"])
        if template == "/v1/log/consistency":
            path += "?first=1"
        return method, path, self.body(template, case, method)

    def body(self, template: str, case: str, method: str) -> Any:
        if method == "GET":
            return None
        new, garbage = Person("new", []), {"payload": "e30=", "payloadType": "x", "signatures": [{"sig": "AAAA"}]}
        bodies: dict[str, Any] = {
            "/v1/identities": {"name": "nina", "roles": ["no-such-role"], "public_key": new.public},
            "/v1/identities/{name}/roles": {"roles": ["no-such-role"]},
            "/v1/identities/{name}/key": {"public_key": "no key"},
            "/v1/token-keys": {"compromised": False},
            "/v1/keys/rotation": {"name": "dataset/no-such-dataset"},
            "/v1/nodes": {"name": "No-Name", "public_key": new.public, "region": "eu"},
            "/v1/nodes/certificate": {"csr": "no request"},
            "/v1/access": {"role": "no-such-role", "seconds": 600, "reason": "to see"},
            "/v1/policy": {"text": "no policy", "reason": "to see"},
            "/v1/policy/explain": {"action": "run:read", "resource_type": "Run", "resource": self.names["run"]}
            | ({"principal": "victim"} if "another" in case else {}),
            "/v1/datasets": {"envelope": garbage, "sealed_keys": "AAAA"},
            "/v1/datasets/{name}/sealing": receiver() | {"kind": "seal", "region": "eu"},
            "/v1/datasets/{name}/openings": receiver() | {"purpose": "rectify"},
            "/v1/datasets/{name}/endings": {"version": 2, "ends": ["9/no-such/internal"]},
            "/v1/datasets/{name}/budget": {"epsilon": 0.0, "delta": 1e-6},
            "/v1/plans": {"spec": training_spec()},
            "/v1/runs": {"spec": training_spec(), "code_digest": CODE, "public_key": new.public},
            "/v1/runs/{run}/leases": lease_body(),
            "/v1/runs/{run}/attempts": attempt_body(),
            "/v1/runs/{run}/blocks": {"attempt": 1, "first": 0, "last": 1},
            "/v1/runs/{run}/checkpoints": {
                "attempt": 1, "step": 1, "blob": f"models/{self.names['run']}/checkpoints/x", "sha256": "0" * 64,
            },
            "/v1/runs/{run}/progress": {"attempt": 1, "steps_done": 0, "rows_per_s": 1.0},
            "/v1/runs/{run}/model": {
                "manifest": "e30=", "model_sha256": "0" * 64, "blob": "models/x", "blob_sha256": "0" * 64,
                "evaluation": HISTOGRAM, "audit": AUDIT,
            },
            "/v1/runs/{run}/end": {"envelope": garbage, "error": {"kind": "InputError"}},
            "/v1/models/{name}/versions/{version}/export": receiver(),
            "/v1/approvals/{approval}/votes": {"envelope": garbage},
            "/v1/endpoints": self.world.deploy_body(new) | {"model": "no-such-model"},
            "/v1/endpoints/{endpoint}/leases": receiver(),
            "/v1/endpoints/{endpoint}/quota": {"subject": "dora", "wanted": 1},
            "/v1/log/cosignatures": {"note": "no note"},
        }  # fmt: skip
        return bodies.get(template, {})

    def ask(self, label: str, caller: str) -> Any:
        method, path, body = self.request(label, caller)
        self.world.token(self.callers[caller])  # before, so that it is not bound to the certificate
        with self.world.over(self.certificates[caller]):
            return self.world.ask(self.callers[caller], method, path, body)


def expected(label: str) -> set[str]:
    """All the callers that get past policy: those of the table, and the services of their roles."""
    people = set(MAY[label])
    services = set() if PEOPLE_ONLY in label else {f"service: {role}" for role in people & set(ROLES)}
    return people | services


def build(world: World) -> House:
    """Ask for one approval of each kind, and have a production model, its run, another run, and two endpoints."""
    house = House(world)
    for role in ROLES:
        world.register(f"service-{role}", [role], kind="service")
    world.register("victim", ["engineer"])
    world.register("second-officer", ["security-officer"])
    run = world.train()
    world.release()
    other_run = world.submit(name="other")
    house.names |= {"run": run, "endpoint": world.deploy(), "victim": "victim"}
    other_endpoint, house.names["stopped"] = world.deploy(), world.deploy()
    world.post("operator", f"/v1/endpoints/{house.names['stopped']}/stop")

    def wanted(name: str, method: str, path: str, body: Any = None) -> str:
        return str(world.missing(world.ask(name, method, path, body))["approval"])

    new = {"spec": training_spec(name="asked-for"), "code_digest": CODE, "public_key": Person("new", []).public}
    house.names["training"] = wanted("ed", "POST", "/v1/runs", new)
    house.names["budget"] = wanted("olga", "PUT", "/v1/datasets/adult/budget", {"epsilon": 90.0, "delta": 1e-4})
    destruction = "/v1/datasets/adult/versions/1/key-destruction"
    house.names["key-destruction"] = wanted("olga", "POST", destruction)
    asked = {"role": "auditor", "seconds": 600, "reason": "to see"}
    house.names["access"] = world.post("ed", "/v1/access", asked)["approval"]
    house.names["policy"] = wanted("second-officer", "POST", "/v1/policy", {"text": "", "reason": "to see"})
    world.train(model=b"second")
    house.names["promotion"] = world.approval(2)["approval"]

    clinic.seal(world)
    house.names["erasure"] = clinic.erase_person(world, 7)["erasure"]
    in_europe = world.peer
    house.callers = {
        "owner": "olga", "author": "ed", "data-owner": "otto", "engineer": "eve", "reviewer": "rita",
        "operator": "operator", "auditor": "ada", "security-officer": "sofia", "consumer": "carl",
    }  # fmt: skip
    house.callers |= {f"service: {role}": f"service-{role}" for role in ROLES}
    house.certificates = dict.fromkeys(house.callers)
    for label, name, certificate in (
        ("run", run, in_europe), ("run, plain", run, None), ("other run", other_run, in_europe),
        ("endpoint", house.names["endpoint"], in_europe), ("endpoint, plain", house.names["endpoint"], None),
        ("other endpoint", other_endpoint, in_europe), ("node", "node-eu", in_europe), ("node, plain", "node-eu", None),
        ("person on a node", "carl", in_europe),
    ):  # fmt: skip
        house.callers[label], house.certificates[label] = name, certificate
    return house


@pytest.fixture(scope="module")
def house(sealed_template: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    world = sealed_template.copy(tmp_path_factory.mktemp("house") / "authority")
    with world.http:  # one event loop for thousands of requests
        yield build(world)
    world.close()


CALLERS = [
    "owner", "author", *ROLES, *(f"service: {role}" for role in ROLES), "run", "run, plain", "other run", "endpoint",
    "endpoint, plain", "other endpoint", "node", "node, plain", "person on a node",
]  # fmt: skip


@pytest.mark.parametrize("caller", CALLERS)
def test_policy_lets_past_exactly_those_who_may(house: House, caller: str) -> None:
    """Refused: 403 by policy and no change. Allowed: anything but 401 and 403 by policy; what only shows is shown."""
    world = house.world
    as_somebody = {"person on a node": "consumer"}.get(caller, caller)
    before = world.content()
    for label in MAY:
        if as_somebody in expected(label):
            continue
        answer = house.ask(label, caller)
        assert answer.status_code == 403, (label, answer.text)
        assert (answer.json().keys(), answer.json()["kind"]) == ({"error", "hint", "kind"}, "PermissionDeniedError")
    assert world.content() == before
    for label in MAY:
        if as_somebody in expected(label):
            answer = house.ask(label, caller)
            refused = answer.status_code == 403 and answer.json()["kind"] != "ApprovalMissingError"
            assert answer.status_code != 401 and not refused, (label, answer.text)  # noqa: PT018  (one thing)
            assert answer.status_code == 200 or not label.startswith("GET"), (label, answer.text)


# ---- tokens ----


def part(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Mint:
    """Makes tokens as the authority does, with its own key, and with one fault."""

    def __init__(self, world: World) -> None:
        self.world = world
        core = world.authority.core
        with core.database.reading() as connection:
            row = connection.execute(select(token_keys).where(token_keys.c.retired.is_(None))).one()
        self.key_id, self.public = row.key_id, row.public_key.encode()
        self.private = core.keys.secret(row.secret)

    def good(self, name: str = "operator", **changes: Any) -> str:
        """A token that nothing is wrong with but what `changes` say."""
        known: dict[str, Any] = {"issuer": URL, "subject": name, "audience": AUTHORITY_AUDIENCE, "roles": ["operator"],
                                 "lifetime_s": 300, "now": time.time(), "key_id": self.key_id}  # fmt: skip
        return tokens.issue(self.private, **(known | changes))

    def forged(
        self, header: dict[str, Any] | None = None, claims: dict[str, Any] | None = None, drop: str = "",
        sign: Callable[[bytes], bytes] | None = None,
    ) -> str:  # fmt: skip
        """As `good`, of any shape; signed with the authority's key if not by `sign`."""
        now = int(time.time())
        top = {"alg": "Ed25519", "typ": "at+jwt", "kid": self.key_id} | (header or {})
        said = {
            "iss": URL, "sub": "operator", "aud": AUTHORITY_AUDIENCE, "client_id": "operator", "roles": ["operator"],
            "kind": "person", "epoch": 0, "iat": now, "exp": now + 300, "jti": "j1",
        } | (claims or {})  # fmt: skip
        signed = ".".join(part({name: it for name, it in each.items() if name != drop}) for each in (top, said))
        return signed + "." + part((sign or keys.ed25519_from_pem(self.private).sign)(signed.encode()))


def _somebody_elses_key() -> dict[str, Any]:
    stranger = keys.generate_ed25519()
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": part(stranger.public_key().public_bytes_raw())}
    return {"header": {"jwk": jwk}, "sign": stranger.sign}


def _ec(message: bytes) -> bytes:
    return keys.generate_p256().sign(message, ec.ECDSA(hashes.SHA256()))


def _rsa(message: bytes) -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.sign(message, padding.PKCS1v15(), hashes.SHA256())


def _raw(public: bytes) -> bytes:
    return keys.ed25519_public_from_pem(public).public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def _ended(how: Callable[[World, str], Any]) -> Callable[[Mint], str]:
    """The token of somebody whose access was ended in some way after it was given."""

    def make(mint: Mint) -> str:
        name = f"spare-{len(mint.world.people)}"
        mint.world.register(name, ["operator"])
        token = mint.world.token(name)
        ask = {"Authorization": f"Bearer {token}"}
        assert mint.world.http.get("/v1/me", headers=ask).status_code == 200
        how(mint.world, name)
        return token

    return make


def _change_roles(world: World, name: str) -> None:
    answer = world.ask("operator", "PUT", f"/v1/identities/{name}/roles", {"roles": ["operator", "auditor"]})
    assert answer.status_code == 200


def _change_key(world: World, name: str) -> None:
    new = Person(name, [])
    assert world.replace_key(name, new).status_code == 200


def _for(kind: str, roles: list[str]) -> Callable[[Mint], str]:
    """A token that says another kind or other roles than the directory, of a name that is not there."""
    return lambda mint: mint.good(f"no-such-{kind}", kind=kind, roles=roles)


FAULTS: dict[str, Callable[[Mint], str | None]] = {
    "no token": lambda _: None,
    "empty": lambda _: "",
    "garbage": lambda _: "garbage",
    "three parts of garbage": lambda _: "a.b.c",
    "expired": lambda mint: mint.good(now=time.time() - 301),
    "not yet valid": lambda mint: mint.good(now=time.time() + 60),
    "not before later": lambda mint: mint.forged(claims={"nbf": int(time.time()) + 60}),
    "valid for a year": lambda mint: mint.forged(claims={"exp": int(time.time()) + 31_536_000}),
    "no expiry": lambda mint: mint.forged(drop="exp"),
    "wrong audience": lambda mint: mint.good(audience=INFERENCE_AUDIENCE),
    "our audience among others": lambda mint: mint.forged(claims={"aud": [AUTHORITY_AUDIENCE, INFERENCE_AUDIENCE]}),
    "no audience": lambda mint: mint.forged(drop="aud"),
    "wrong issuer": lambda mint: mint.good(issuer="https://127.0.0.1:9443"),
    "alg none, no signature": lambda mint: mint.forged({"alg": "none"}, sign=lambda _: b""),
    "alg None, no signature": lambda mint: mint.forged({"alg": "None"}, sign=lambda _: b""),
    "alg none, signed": lambda mint: mint.forged({"alg": "none"}),
    "no alg": lambda mint: mint.forged(drop="alg"),
    "alg EdDSA": lambda mint: mint.forged({"alg": "EdDSA"}),
    "HMAC keyed with the public key's PEM": lambda mint: mint.forged(
        {"alg": "HS256"}, sign=lambda signed: hmac.digest(mint.public, signed, "sha256")
    ),
    "HMAC keyed with the public key's bytes": lambda mint: mint.forged(
        {"alg": "HS256"}, sign=lambda signed: hmac.digest(_raw(mint.public), signed, "sha256")
    ),
    "RS256 by a stranger": lambda mint: mint.forged({"alg": "RS256"}, sign=_rsa),
    "ES256 by a stranger": lambda mint: mint.forged({"alg": "ES256"}, sign=_ec),
    "signed by a stranger": lambda mint: mint.forged(sign=keys.generate_ed25519().sign),
    "signed by its subject": lambda mint: mint.forged(sign=mint.world.people["operator"].key.sign),
    "signed by the log's key": lambda mint: mint.forged(sign=_log_key(mint.world)),
    "a signature of zeros": lambda mint: mint.forged(sign=lambda _: bytes(64)),
    "no signature": lambda mint: mint.forged(sign=lambda _: b""),
    "other claims under a good signature": lambda mint: _spliced(mint),
    "kid unknown": lambda mint: mint.forged({"kid": "0" * 64}),
    "kid empty": lambda mint: mint.forged({"kid": ""}),
    "kid missing": lambda mint: mint.forged(drop="kid"),
    "kid a list": lambda mint: mint.forged({"kid": [mint.key_id]}),
    "kid a path": lambda mint: mint.forged({"kid": "../../../../dev/null"}, sign=lambda _: bytes(64)),
    "kid a key file": lambda mint: mint.forged({"kid": "/etc/hostname"}),
    "kid SQL": lambda mint: mint.forged({"kid": "' OR '1'='1"}),
    "kid a SQL union": lambda mint: mint.forged({"kid": "x' UNION SELECT public_key FROM identities --"}),
    "jwk": lambda mint: mint.forged(**_somebody_elses_key()),
    "jwk beside a good signature": lambda mint: mint.forged({"jwk": _somebody_elses_key()["header"]["jwk"]}),
    "jku": lambda mint: mint.forged({"jku": f"{URL}/v1/jwks.json"}),
    "x5u": lambda mint: mint.forged({"x5u": "https://attacker.test/cert.pem"}),
    "x5c": lambda mint: mint.forged({"x5c": [b64(mint.world.peer or b"")]}),
    "crit": lambda mint: mint.forged({"crit": ["exp"]}),
    "crit b64": lambda mint: mint.forged({"crit": ["b64"], "b64": False}),
    "typ JWT": lambda mint: mint.forged({"typ": "JWT"}),
    "typ missing": lambda mint: mint.forged(drop="typ"),
    "an assertion": lambda mint: mint.world.assertion("operator"),
    "an assertion for the audience of tokens": lambda mint: mint.world.assertion(
        "operator", audience=AUTHORITY_AUDIENCE
    ),
    "revoked": _ended(lambda world, name: world.http.post("/v1/revoke", data={"token": world.token(name)})),
    "of an earlier epoch": _ended(_change_roles),
    "from before another key": _ended(_change_key),
    "of somebody who was shut out": _ended(
        lambda world, name: world.post("operator", f"/v1/identities/{name}/revocation")
    ),
    "of somebody who was shut out, and of the present epoch": lambda mint: _shut_out_but_of_this_epoch(mint),
    "of a later epoch": lambda mint: mint.good(epoch=1),
    "of nobody": lambda mint: mint.good("nobody"),
    "of another kind": lambda mint: mint.good(kind="service"),
    "of a run that is not there": _for("run", ["run"]),
    "of an endpoint that is not there": _for("endpoint", ["endpoint"]),
    "bound to a certificate that is not shown": lambda mint: mint.good(thumbprint="x" * 43),
    "bound in a way that nobody checks": lambda mint: mint.forged(claims={"cnf": {"jkt": "x" * 43}}),
}


def _log_key(world: World) -> Callable[[bytes], bytes]:
    from nacl.signing import SigningKey

    key = SigningKey(world.authority.core.keys.secret("log"))
    return lambda message: bytes(key.sign(message).signature)


def _shut_out_but_of_this_epoch(mint: Mint) -> str:
    _shut_out(mint.world)
    return mint.good(list(mint.world.people)[-1], epoch=1)


def _spliced(mint: Mint) -> str:
    header, _, signature = mint.good("carl", roles=["consumer"]).split(".")
    return ".".join([header, mint.forged().split(".")[1], signature])


@pytest.fixture(scope="module")
def mint(house: House) -> Mint:
    """In a house to which nobody is registered any more but for a fault."""
    return Mint(house.world)


def test_what_is_forged_here_is_right_but_for_its_fault(mint: Mint) -> None:
    """Else the tests below would prove nothing."""
    for token in (mint.good(), mint.forged()):
        headers = {"Authorization": f"Bearer {token}"}
        assert mint.world.http.get("/v1/identities", headers=headers).status_code == 200


def refuses_everywhere(house: House, headers: dict[str, str], secret: str) -> None:
    """401 with our error, everywhere, whatever is sent along; and nothing has happened."""
    world = house.world
    content, size = world.content(), len(world.entries())
    strange = [("GET", "/v1/not-there", None), ("GET", "/", None), ("DELETE", "/v1/runs", None), ("PUT", "/v1", None)]
    requests = [*(house.request(label, "operator") for label in MAY), *strange]

    async def answers() -> list[tuple[str, str, httpx.Response]]:
        # Straight into the application: with TestClient most of the time goes into handing over between threads.
        transport = httpx.ASGITransport(world._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=URL, headers=headers) as http:
            return [(method, path, await http.request(method, path, json=body)) for method, path, body in requests]

    for method, path, answer in asyncio.run(answers()):
        assert answer.status_code == 401, (method, path, answer.text)
        assert answer.json().keys() == {"error", "hint", "kind"}
        assert answer.json()["kind"] in ("AuthenticationError", "TokenExpiredError")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert not any(piece in answer.text for piece in secret.split(".") if len(piece) > 8)
    assert (world.content(), len(world.entries())) == (content, size)


def test_a_token_with_a_fault_opens_no_route(house: House, mint: Mint, subtests: pytest.Subtests) -> None:
    for fault, make in FAULTS.items():
        with subtests.test(fault):
            token = make(mint)
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            refuses_everywhere(house, headers, token or "")


def test_a_token_over_another_connection_than_its_own_opens_no_route(house: House, mint: Mint) -> None:
    """RFC 8705 section 3: over no client certificate, over another of the same node, and over a stranger's."""
    world = house.world
    mine, again = world.certificate_of("node-eu"), world.certificate_of("node-eu")
    with world.over(mine):
        answer = world.exchange(world.assertion(house.names["run"]))
        token = answer.json()["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        assert world.http.get(f"/v1/runs/{house.names['run']}", headers=headers).status_code == 200
    ca_key = certificates.new_private_key()
    ca = certificates.new_ca(ca_key, "a stranger's CA")
    request = certificates.signing_request(certificates.new_private_key(), "node-eu")
    pem = certificates.issue(ca_key, ca, request, hosts=("node-eu",))
    strangers = ssl.PEM_cert_to_DER_cert(pem.decode())
    for other in (None, again, strangers):
        with world.over(other):
            refuses_everywhere(house, headers, token)


@pytest.mark.parametrize(
    "header", ["Basic b3BlcmF0b3I6", "Bearer", "bearer  ", "DPoP {}", "{}", "Bearer {} {}", "Token {}"]
)
def test_a_good_token_in_another_wrapping_opens_no_route(house: House, mint: Mint, header: str) -> None:
    refuses_everywhere(house, {"Authorization": header.replace("{}", mint.good())}, "")


def test_a_token_elsewhere_than_in_its_header_opens_no_route(house: House, mint: Mint) -> None:
    """RFC 6750 sections 2.2 and 2.3: neither in the query, which ends in logs, nor in a form, nor in a cookie."""
    token = mint.good()
    for label in MAY:
        method, path, _ = house.request(label, "operator")
        answers = [
            house.world.http.request(method, path, params={"access_token": token}),
            house.world.http.request(method, path, headers={"Cookie": f"access_token={token}"}),
        ]
        if method != "GET":
            answers.append(house.world.http.request(method, path, data={"access_token": token}))
        assert {answer.status_code for answer in answers} == {401}, label


def test_no_header_says_who_the_caller_is_or_over_which_connection(house: House) -> None:
    headers = dict.fromkeys(("X-Forwarded-User", "X-Remote-User", "X-Cloister-Peer", "cloister.peer"), "operator")
    refuses_everywhere(house, headers | {"X-Client-Cert": b64(house.world.peer or b"")}, "")


# ---- the token endpoint ----


def asked(world: World, **form: str) -> Any:
    return world.http.post("/v1/token", data={"resource": AUTHORITY_AUDIENCE} | form)


def test_what_proves_somebody_works_once(house: House) -> None:
    world = house.world
    assertion = world.assertion("ed")
    assert asked(world, grant_type=JWT_BEARER, assertion=assertion).status_code == 200
    for form in (
        {"grant_type": JWT_BEARER, "assertion": assertion},
        {
            "grant_type": "client_credentials",
            "client_assertion_type": tokens.CLIENT_ASSERTION,
            "client_assertion": assertion,
        },
    ):
        answer = asked(world, **form)
        assert (answer.status_code, "access_token" in answer.json()) == (401, False)


ASSERTION_FAULTS: dict[str, Callable[[Mint], str]] = {
    "an access token": lambda mint: mint.good(),
    "signed by the authority": lambda mint: tokens.issue_assertion(
        mint.private, subject="operator", audience=URL, now=time.time()
    ),
    "expired": lambda mint: mint.world.assertion("operator", now=time.time() - 61),
    "not yet valid": lambda mint: mint.world.assertion("operator", now=time.time() + 60),
    "for somebody else": lambda mint: mint.world.assertion("operator", audience="https://127.0.0.1:9443"),
    "of another": lambda mint: mint.world.assertion("operator", key=mint.world.people["ed"].private),
    "of nobody": lambda mint: mint.world.assertion("operator", subject="nobody"),
    "of somebody who was shut out": lambda mint: _shut_out(mint.world),
    "an unsigned one": lambda mint: _reassembled(mint.world.assertion("operator"), {"alg": "none"}, b""),
    "with a kid": lambda mint: _resigned(mint.world, {"kid": "k"}),
    "with its own key": lambda mint: _resigned(mint.world, {"jwk": _somebody_elses_key()["header"]["jwk"]}),
    "with a critical extension": lambda mint: _resigned(mint.world, {"crit": ["exp"]}),
    "of another type": lambda mint: _resigned(mint.world, {"typ": "JWT"}),
}


def _reassembled(token: str, header: dict[str, Any], signature: bytes) -> str:
    known, claims, _ = token.split(".")
    top = json.loads(base64.urlsafe_b64decode(known + "==")) | header
    return ".".join([part(top), claims, part(signature)])


def _resigned(world: World, header: dict[str, Any]) -> str:
    signed = _reassembled(world.assertion("operator"), header, b"").rpartition(".")[0]
    return f"{signed}.{part(world.people['operator'].key.sign(signed.encode()))}"


def _shut_out(world: World) -> str:
    name = f"spare-{len(world.people)}"
    world.register(name, ["operator"])
    world.post("operator", f"/v1/identities/{name}/revocation")
    return world.assertion(name)


def test_an_assertion_with_a_fault_gives_no_token(house: House, mint: Mint, subtests: pytest.Subtests) -> None:
    for fault, make in ASSERTION_FAULTS.items():
        with subtests.test(fault):
            assertion = make(mint)
            content = house.world.content()
            answer = asked(house.world, grant_type=JWT_BEARER, assertion=assertion)
            assert (answer.status_code, answer.json().keys()) == (401, {"error", "hint", "kind"})
            assert not any(piece in answer.text for piece in assertion.split(".") if len(piece) > 8)
            assert house.world.content() == content


def test_a_workload_that_nobody_registered_gets_no_token(house: House) -> None:
    """The directory decides, not a name that looks like one."""
    world = house.world
    stranger = Person("run-0123456789", ["run"])
    assert world.exchange(world.assertion(stranger.name, key=stranger.private)).status_code == 401
    with world.authority.core.database.transaction() as connection:
        add_identity(connection, stranger.name, ["run"], stranger.public, "test", 0.0, kind="run")
    world.people[stranger.name] = stranger
    assert world.refused(403, stranger.name, "GET", f"/v1/runs/{house.names['run']}") == "PermissionDeniedError"
