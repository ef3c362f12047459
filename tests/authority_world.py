"""A small true authority for tests: real keys, real tokens, the real HTTP application, a sealed slice of a real table.

What a test needs twice is here: people, a dataset, a run that is driven to a registered model without Ray, and
`still`, which holds that nothing but the log has changed.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import re
import shutil
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from sqlalchemy import func, select
from starlette.testclient import TestClient

from cloister.audit.event import Event
from cloister.authority.api import create_app
from cloister.authority.core import Caller, Node
from cloister.authority.gate import PEER
from cloister.authority.registration import SUBJECTS
from cloister.authority.service import Authority
from cloister.canonical import b64, canonical_json, sha256_hex
from cloister.client.authority import AuthorityClient, TrainingLease
from cloister.client.seal import seal_dataset
from cloister.datasets.ingest import read_table
from cloister.datasets.schema import DatasetSchema
from cloister.models.manifest import ModelManifest
from cloister.models.release import APPROVAL_PREDICATE
from cloister.sealing.lease import OneTimeKey
from cloister.sealing.stream import seal
from cloister.signing import certificates, dsse, keys, tokens
from cloister.signing.run_end import RUN_END_PREDICATE
from cloister.signing.tokens import AUTHORITY_AUDIENCE, JWT_BEARER
from cloister.stores.blobs import FolderBlobs
from cloister.stores.database import Database
from cloister.stores.tables import ledger_members, log_entries, metadata, pseudonyms
from databases import Place
from postgres import Server

ADULT = Path(__file__).parents[1] / "jobs" / "examples" / "adult"
ROWS, SHARDS = 400, 3
URL = "https://127.0.0.1:8443"
ADDRESS = "192.0.2.77"  # where all requests come from (RFC 5737: nobody's)
CODE = "sha256:" + "c0de" * 16
EPSILON, DELTA = 3.0, 1e-5
STEPS = 10
SUBJECTS_KEY = b"who is held out, in all tests..."  # 32 bytes: enough people, in each part
# What a run's audits saw, where nothing is wrong.
AUDIT = {
    "mechanism": {
        "epsilon_lower_bound": 0.1, "noise_multiplier_at_most": 1.0, "sample_rate_at_least": 0.1, "poisson": True,
        "observations": 1000, "confidence": 0.95,
    },
    "one_run": {"canaries": 200, "guesses": 100, "correct": 50},
}  # fmt: skip
HISTOGRAM = [[[3], [1]], [[1], [1]]]  # of a table so small there is one bin of confidence
MANY = 100_000  # what may be handed in a minute: tests are faster than people
ROLES = {
    "operator": ["operator"], "olga": ["data-owner"], "otto": ["data-owner"], "ed": ["engineer"], "eve": ["engineer"],
    "rita": ["reviewer"], "rob": ["reviewer", "engineer"], "carl": ["consumer"], "ada": ["auditor"],
    "sofia": ["security-officer"],
}  # fmt: skip


@dataclass
class Person:
    """Somebody, or a workload, with an Ed25519 key of their own."""

    name: str
    roles: list[str]
    key: Any = field(default_factory=keys.generate_ed25519)

    @property
    def private(self) -> bytes:
        return keys.private_to_pem(self.key)

    @property
    def public(self) -> str:
        return keys.public_to_pem(self.key.public_key()).decode()


class Clock:
    """The true time, moved by `offset` seconds."""

    offset = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset


def rows_of_adult(count: int = ROWS) -> bytes:
    """The header and the first rows of the real table, as CSV."""
    with gzip.open(ADULT / "adult.csv.gz", "rt") as file:
        return "".join(next(file) for _ in range(count + 1)).encode()


def blocks_of_adult(count: int = ROWS) -> list[pa.Table]:
    """The same rows as they are sealed."""
    return [read_table(rows_of_adult(count), adult_schema())]


def adult_schema(**changes: Any) -> DatasetSchema:
    return DatasetSchema.from_mapping(
        DatasetSchema.from_yaml_text((ADULT / "schema.yaml").read_text()).to_dict() | changes
    )


def training_spec(**changes: Any) -> dict[str, Any]:
    """One plan for all tests, since making one takes seconds: 10 steps over the slice."""
    return {
        "dataset": "adult@1", "label": "income-per-year", "model": {"architecture": "mlp", "hidden": [4]},
        "privacy": {"epsilon": EPSILON, "delta": DELTA}, "resources": {"workers": 2, "region": "eu"},
        "training": {"epochs": 2, "expected_batch_size": 64, "learning_rate": 0.01}, "purpose": "income-research",
    } | changes  # fmt: skip


class _Present:
    """Stands for the authority of the world that is speaking: building the routes takes longer than most tests do."""

    authority: Authority

    def __init__(self, part: str = "") -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:
        if not self._part:
            return _Present(name) if name in PARTS else getattr(_Present.authority, name)
        return getattr(getattr(_Present.authority, self._part), name)


PARTS = (
    "identities", "sessions", "nodes", "approvals", "access", "policies", "datasets", "runs", "models", "endpoints",
    "log", "custody", "registration", "lifecycle", "shredding", "attempts", "ends",
    "uploads",
)  # fmt: skip
NODE = "node-eu"
PSEUDONYM = re.compile(rb"\b[ap]-[0-9a-f]{16}\b")
APP = create_app(_Present())  # type: ignore[arg-type]  # it stands for one


class World:
    """`people` by name; `http` speaks to the application; `still()` guards what must not change."""

    def __init__(self, directory: Path, like: World | None = None, place: Place | None = None) -> None:
        """A new authority, or one over the directory of another or a copy: with the same people, whose tokens hold."""
        self.clock = Clock()
        self.place = place or (like.place if like else Place.new(directory / "state.db", None))
        self.authority = Authority(
            directory, url=URL, database=Database(**self.place.options), clock=self.clock, seals_per_minute=MANY
        )
        self.http = TestClient(self._app, base_url=URL, raise_server_exceptions=False, client=(ADDRESS, 50_000))
        self.people = dict(like.people) if like else {name: Person(name, roles) for name, roles in ROLES.items()}
        self.tokens: dict[tuple[str, str], tuple[str, float]] = dict(like.tokens) if like else {}
        self.attempts: dict[str, int] = dict(like.attempts) if like else {}
        """The attempt of each run that is open."""
        self.peer: bytes | None = like.peer if like else None
        """The certificate (DER) of the node that workloads speak from."""
        self._shown: tuple[bytes | None] | None = None

    def choose_who_is_held_out(self) -> None:
        """The same of a few people in every run: by chance it might be nobody, or all of them."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cloister.stores.keys.embedded.new_key", lambda: SUBJECTS_KEY)
            self.authority.core._service.derive(SUBJECTS, b"")

    def copy(self, directory: Path) -> World:
        """Another, over a copy of everything."""
        shutil.copytree(self.directory, directory, ignore=shutil.ignore_patterns("state.db*"))
        return World(directory, self, self.place.copy(directory / "state.db"))

    def reopen(self, **options: Any) -> None:
        """Start the authority anew over the same state, with other options."""
        self.authority.close()
        self.authority = self.another(**options)

    def another(self, **options: Any) -> Authority:
        """A second authority over the same state."""
        database = Database(**self.place.options)
        options = {"seals_per_minute": MANY} | options
        return Authority(self.directory, url=URL, database=database, clock=self.clock, **options)

    def close(self) -> None:
        self.authority.close()
        self.place.drop()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        _Present.authority = self.authority
        usual = self.peer if _of_a_workload(scope) else None
        await APP({**scope, PEER: self._shown[0] if self._shown else usual}, receive, send)

    @contextmanager
    def over(self, certificate: bytes | None) -> Iterator[None]:
        """Requests within come over mutual TLS with this client certificate (DER), or without any."""
        before, self._shown = self._shown, (certificate,)
        try:
            yield
        finally:
            self._shown = before

    def register_node(self, name: str = NODE, region: str = "eu") -> bytes:
        """A node, and its certificate (DER)."""
        node = Person(name, [])
        self.people[name] = node
        self.post("operator", "/v1/nodes", {"name": name, "public_key": node.public, "region": region})
        return self.certificate_of(name)

    def certificate_of(self, node: str) -> bytes:
        """A new certificate (DER) of a node."""
        csr = certificates.signing_request(certificates.new_private_key(), node).decode()
        return ssl.PEM_cert_to_DER_cert(self.post(node, "/v1/nodes/certificate", {"csr": csr})["certificate"])

    def register(self, name: str, roles: list[str], kind: str = "person") -> Person:
        """Somebody new."""
        person = self.people[name] = Person(name, roles)
        self.post(
            "operator", "/v1/identities", {"name": name, "kind": kind, "roles": roles, "public_key": person.public}
        )
        return person

    @property
    def directory(self) -> Path:
        return self.authority.directory

    def register_everybody(self) -> None:
        self.authority.identities.bootstrap("operator", self.people["operator"].public)
        for person in self.people.values():
            if person.name != "operator":
                body = {"name": person.name, "roles": person.roles, "public_key": person.public}
                assert self.post("operator", "/v1/identities", body)["name"] == person.name
        self.peer = self.register_node()

    def replace_key(self, name: str, new: Person) -> Any:
        """The answer when somebody puts a new key in place of theirs, with the old one's word for it."""
        audience = tokens.key_proof_audience(URL, new.public.encode())
        body = {"public_key": new.public, "proof": self.assertion(name, audience=audience)}
        return self.ask(name, "PUT", f"/v1/identities/{name}/key", body)

    # ---- speaking to it ----

    def assertion(self, name: str, *, key: bytes | None = None, **changes: Any) -> str:
        said: dict[str, Any] = {"subject": name, "audience": URL, "now": self.clock()}
        return tokens.issue_assertion(key or self.people[name].private, **(said | changes))

    def exchange(self, assertion: str, audience: str = AUTHORITY_AUDIENCE) -> Any:
        form = {"grant_type": JWT_BEARER, "assertion": assertion, "resource": audience}
        return self.http.post("/v1/token", data=form)

    def token(self, name: str, audience: str = AUTHORITY_AUDIENCE) -> str:
        """A token of less than five true minutes, whatever the world's clock says."""
        token, since = self.tokens.get((name, audience), ("", -math.inf))
        if time.monotonic() - since > 300:
            answer = self.exchange(self.assertion(name), audience)
            assert answer.status_code == 200, answer.text
            token = answer.json()["access_token"]
            # One that was issued under a lent role may live for less.
            self.tokens[name, audience] = token, time.monotonic() - max(0, 305 - answer.json()["expires_in"])
        return token

    def ask(self, name: str, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """The raw answer to a request of `name`, in JSON. A 500 is a fault in whatever test it happens."""
        headers = {"Authorization": f"Bearer {self.token(name)}", "Content-Type": "application/json"}
        if body is not None:
            options["json"] = body
        answer = self.http.request(method, path, headers=headers, **options)
        assert answer.status_code != 500, f"{method} {path}: {answer.text}"
        return answer

    def get(self, name: str, path: str) -> Any:
        answer = self.ask(name, "GET", path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, name: str, path: str, body: Any = None) -> Any:
        answer = self.ask(name, "POST", path, body if body is not None else {})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def put(self, name: str, path: str, body: Any) -> Any:
        answer = self.ask(name, "PUT", path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, status: int, name: str, method: str, path: str, body: Any = None) -> str:
        """The kind of the error that the request is refused with."""
        answer = self.ask(name, method, path, body)
        assert answer.status_code == status, answer.text
        assert answer.json().keys() == {"error", "hint", "kind"}
        return str(answer.json()["kind"])

    def client(self, name: str) -> AuthorityClient:
        """The real client of `name`, its connection led into the application."""
        client = AuthorityClient(
            URL, ca_path=self.directory / "ca.pem", name=name, private_key_pem=self.people[name].private
        )
        client.close()
        client._http = self.http
        return client

    def caller(self, name: str) -> Caller:
        """Who a token of `name` speaks for, on the node of the world if it is a workload."""
        kind: Any = next((role for role in self.people[name].roles if role in ("run", "endpoint")), "person")
        node = None if kind == "person" else Node(name=NODE, region="eu", assurance=0)
        return Caller(name=name, roles=frozenset(self.people[name].roles), kind=kind, source="test", node=node)

    # ---- what is there ----

    def counts(self) -> dict[str, int]:
        with self.authority.core.database.reading() as connection:
            return {
                name: int(connection.execute(select(func.count()).select_from(table)).scalar_one())
                for name, table in metadata.tables.items()
            }

    def content(self) -> dict[str, list[Any]]:
        """Every row of every table but the log's and the used assertions'."""
        skipped = {"log_entries", "log_head", "log_nodes", "used_assertions", "pseudonyms"}
        with self.authority.core.database.reading() as connection:
            return {
                name: sorted(map(repr, connection.execute(select(table)).all()))
                for name, table in metadata.tables.items()
                if name not in skipped
            }

    def entries(self) -> list[bytes]:
        """The log as it is stored."""
        with self.authority.core.database.reading() as connection:
            query = select(log_entries.c.entry).order_by(log_entries.c["index"])
            return [bytes(entry) for entry in connection.execute(query).scalars()]

    def log(self) -> list[Event]:
        """The log with people by their names instead of their pseudonyms, where those are not shredded."""
        with self.authority.core.database.reading() as connection:
            rows = connection.execute(select(pseudonyms.c.pseudonym, pseudonyms.c.value)).all()
        names = {row.pseudonym.encode(): row.value.encode() for row in rows}
        return [
            Event.from_bytes(PSEUDONYM.sub(lambda found: names.get(found[0], found[0]), entry))
            for entry in self.entries()
        ]

    @contextmanager
    def still(self, outcome: str | None = "failure", entries: int = 1) -> Iterator[None]:
        """Nothing changes but the log, which gains `entries` entries, the last with `outcome`."""
        before, size = self.content(), len(self.log())
        yield
        assert self.content() == before
        log = [entry for entry in self.log()[size:] if entry.action != "token:issue"]
        assert [entry.outcome for entry in log] == [outcome] * entries

    @contextmanager
    def recorded(self, actor: str, action: str, outcome: str = "success") -> Iterator[None]:
        """The log gains exactly one entry, this one (and those of the tokens that were needed)."""
        size = len(self.log())
        yield
        log = [entry for entry in self.log()[size:] if entry.action != "token:issue"]
        assert [(entry.actor, entry.action, entry.outcome) for entry in log] == [(actor, action, outcome)]

    def budget(self, name: str = "adult") -> dict[str, Any]:
        return dict(self.get("operator", f"/v1/datasets/{name}/budget"))

    # ---- journeys ----

    def ledger(self, name: str = "adult") -> str:
        """The ledger that pays for a dataset."""
        with self.authority.core.database.reading() as connection:
            mine = ledger_members.c.dataset == name
            found = connection.execute(select(ledger_members.c.ledger).where(mine).order_by(ledger_members.c.version))
            return str(found.scalars().first())

    def seal(self, owner: str = "olga", **schema: Any) -> dict[str, Any]:
        return seal_dataset(
            self.client(owner), self.people[owner].private, blocks_of_adult(), adult_schema(**schema),
            shards=SHARDS, holdout=0.2, receiving_key=self.authority.receiving_public,
        )  # fmt: skip

    def set_budget(self, epsilon: float = 10.0, delta: float = 1e-4, owner: str = "olga") -> None:
        self.agreed("sofia", owner, "PUT", "/v1/datasets/adult/budget", {"epsilon": epsilon, "delta": delta})

    def agreed(self, voter: str, name: str, method: str, path: str, body: Any = None) -> Any:
        """The answer to a request of `name` that may need an approval, which `voter` gives."""
        answer = self.ask(name, method, path, body)
        if answer.status_code == 403:
            assert self.vote(voter, self.missing(answer)).status_code == 200
            answer = self.ask(name, method, path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def missing(self, answer: Any) -> dict[str, Any]:
        """The open request that a refusal for lack of approvals names."""
        assert (answer.status_code, answer.json()["kind"]) == (403, "ApprovalMissingError"), answer.text
        (named,) = re.findall(r"apr-[0-9a-f]{8}", answer.json()["hint"])
        return next(dict(each) for each in self.get("ada", "/v1/approvals") if each["approval"] == named)

    def submit(self, author: str = "ed", **spec: Any) -> str:
        """A run, whose workload is one of `people` from now on."""
        workload = Person("new", ["run"])
        body = {"spec": training_spec(**spec), "code_digest": CODE, "public_key": workload.public}
        workload.name = self.agreed("rita", author, "POST", "/v1/runs", body)["run"]
        self.people[workload.name] = workload
        return workload.name

    def attempt(self, run: str, workers: int | None = None) -> dict[str, Any]:
        """Open the next attempt, with as many workers as the spec says.

        Raises:
            CloisterError: what the authority refuses with.
        """
        client = self.client(run)
        asked = workers or client.get(f"/v1/runs/{run}")["spec"]["resources"]["workers"]
        opened = client.post(f"/v1/runs/{run}/attempts", attempt_body(asked))
        self.attempts[run] = opened["attempt"]
        return dict(opened)

    def lease(self, run: str, rank: int = 0) -> TrainingLease:
        """A rank's lease in the attempt that is open; in the first if there was none."""
        if run not in self.attempts:
            self.attempt(run)
        return self.client(run).lease_shards(run, self.attempts[run], rank, CODE)

    def commit(self, run: str, first: int = 0, last: int = STEPS) -> None:
        self.post(run, f"/v1/runs/{run}/blocks", {"attempt": self.attempts[run], "first": first, "last": last})

    def checkpoint_body(self, run: str, step: int) -> dict[str, Any]:
        return {
            "attempt": self.attempts[run], "step": step, "blob": f"models/{run}/checkpoints/{step}.sealed",
            "sha256": "ab" * 32,
        }  # fmt: skip

    def checkpoint(self, run: str, step: int) -> None:
        self.post(run, f"/v1/runs/{run}/checkpoints", self.checkpoint_body(run, step))

    def end_body(self, run: str, outcome: str = "failed", /, *, key: Any = None, **changes: Any) -> dict[str, Any]:
        """A run's signed word that it has ended."""
        plan = changes.pop("plan", None) or self.get("ed", f"/v1/runs/{run}")["plan"]
        said = {"run": run, "attempt": self.attempts.get(run, 0), "outcome": outcome, "steps_done": 0} | changes
        statement = dsse.statement(run, sha256_hex(canonical_json(plan)), RUN_END_PREDICATE, said)
        error = {"kind": "InputError", "error": "it failed"} if outcome == "failed" else None
        return {"envelope": dsse.sign(statement, key or self.people[run].key), "error": error}

    def end(self, run: str, outcome: str = "failed") -> dict[str, Any]:
        return dict(self.post(run, f"/v1/runs/{run}/end", self.end_body(run, outcome)))

    def model_body(self, run: str, lease: TrainingLease, model: bytes = b"small", /, **facts: Any) -> dict[str, Any]:
        """Seal and upload `model` as rank 0 does; the body that registers it."""
        assert lease.model_key is not None
        known = {
            "name": "adult", "run": run, "dataset": "adult@1", "label": "income-per-year", "labels": ("<=50K", ">50K"),
            "features": ({"name": "age", "type": "integer", "class": "confidential", "bounds": [16, 100]},),
            "architecture": {"architecture": "mlp"},
        }  # fmt: skip
        sealed = seal(lease.model_key, model, lease.seal_context)
        path = f"models/{run}/{os.urandom(4).hex()}.onnx.sealed"
        FolderBlobs.from_url(lease.blobs).put(path, sealed)
        return {
            "manifest": b64(ModelManifest.model_validate(known | facts).to_bytes()), "model_sha256": sha256_hex(model),
            "blob": path, "blob_sha256": sha256_hex(sealed), "evaluation": HISTOGRAM, "audit": AUDIT,
        }  # fmt: skip

    def train(self, author: str = "ed", model: bytes = b"small") -> str:
        """Drive a run to a registered candidate; returns the run."""
        run = self.submit(author)
        lease = self.lease(run)
        self.commit(run)
        self.post(run, f"/v1/runs/{run}/model", self.model_body(run, lease, model))
        return run

    def promote(self, version: int = 1, name: str = "ed") -> Any:
        return self.ask(name, "POST", f"/v1/models/adult/versions/{version}/promotion")

    def approval(self, version: int = 1) -> dict[str, Any]:
        """The open request for a version, asked for if need be."""
        self.promote(version)
        wanted = f"adult@{version}"
        return next(a for a in self.get("ed", "/v1/approvals") if a["subject"] == wanted)

    def vote_body(self, name: str, request: Mapping[str, Any], *, key: Any = None, **changes: Any) -> dict[str, Any]:
        said = {
            "approval": request["approval"], "kind": request["kind"], "person": name, "decision": "approve",
            "expires": int(request["expires"]), "details": request["details"],
        } | changes  # fmt: skip
        statement = dsse.statement(request["subject"], request["digest"], APPROVAL_PREDICATE, said)
        return {"envelope": dsse.sign(statement, key or self.people[name].key)}

    def vote(self, name: str, request: Mapping[str, Any], **changes: Any) -> Any:
        path = f"/v1/approvals/{request['approval']}/votes"
        return self.ask(name, "POST", path, self.vote_body(name, request, **changes))

    def release(self, version: int = 1) -> None:
        """Approve a candidate and put it into production."""
        assert self.vote("rita", self.approval(version)).status_code == 200
        assert self.promote(version).status_code == 200

    def deploy_body(self, workload: Person, quota: int = 100, window_s: int = 60) -> dict[str, Any]:
        csr = certificates.signing_request(certificates.new_private_key(), "endpoint").decode()
        return {"model": "adult", "public_key": workload.public, "csr": csr,
                "quota_requests": quota, "quota_window_s": window_s}  # fmt: skip

    def deploy(self, quota: int = 100, window_s: int = 60) -> str:
        workload = Person("new", ["endpoint"])
        workload.name = self.post("operator", "/v1/endpoints", self.deploy_body(workload, quota, window_s))["endpoint"]
        self.people[workload.name] = workload
        return workload.name


def _of_a_workload(scope: Any) -> bool:
    """Whether a request's token says that it is a run's or an endpoint's: those run on nodes."""
    token = dict(scope.get("headers", [])).get(b"authorization", b"").split(b".")
    if len(token) != 3:
        return False
    try:
        claims = json.loads(base64.urlsafe_b64decode(token[1] + b"=="))
    except ValueError:
        return False
    return isinstance(claims, dict) and claims.get("kind") in ("run", "endpoint")


def lease_body(rank: int = 0, code: str = CODE, key: bytes | None = None, attempt: int = 1) -> dict[str, Any]:
    public = key if key is not None else OneTimeKey.generate().public
    return {"attempt": attempt, "rank": rank, "public_key": b64(public), "code_digest": code}


def attempt_body(workers: int = 2, code: str = CODE) -> dict[str, Any]:
    return {"world_size": workers, "code_digest": code}


def receiver() -> dict[str, str]:
    return {"public_key": b64(OneTimeKey.generate().public)}


@pytest.fixture(scope="session", params=["sqlite", pytest.param("postgres", marks=pytest.mark.story)])
def world_server(request: pytest.FixtureRequest) -> Server | None:
    """Where the worlds' databases are: each test in one runs on both."""
    return request.getfixturevalue("postgres_server") if request.param == "postgres" else None


@pytest.fixture(scope="session")
def empty_template(world_server: Server | None, tmp_path_factory: pytest.TempPathFactory) -> World:
    """An authority with everybody registered, closed again."""
    directory = tmp_path_factory.mktemp("empty") / "authority"
    directory.mkdir()
    world = World(directory, place=Place.new(directory / "state.db", world_server))
    world.register_everybody()
    for name in ROLES:
        world.token(name)
    world.authority.close()
    return world


@pytest.fixture(scope="session")
def sealed_template(empty_template: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """An authority with everybody registered and `adult@1` sealed, closed again."""
    world = empty_template.copy(tmp_path_factory.mktemp("template") / "authority")
    world.choose_who_is_held_out()
    world.seal()
    world.set_budget()
    world.authority.close()
    return world


@pytest.fixture
def world(sealed_template: World, tmp_path: Path) -> Iterator[World]:
    """A copy of the template: everybody registered, `adult@1` sealed, a budget of epsilon 10."""
    world = sealed_template.copy(tmp_path / "authority")
    yield world
    world.close()


@pytest.fixture
def empty_world(empty_template: World, tmp_path: Path) -> Iterator[World]:
    """Everybody registered, nothing else."""
    world = empty_template.copy(tmp_path / "authority")
    yield world
    world.close()


@pytest.fixture(scope="module")
def calm_world(sealed_template: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """As `world`, one for a whole file: for tests in which everything is refused, so that nothing may change."""
    world = sealed_template.copy(tmp_path_factory.mktemp("calm") / "authority")
    before = world.content()
    yield world
    assert world.content() == before
    world.close()
