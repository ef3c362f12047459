"""Authorities under load, one of which is killed: real processes, real TLS, many callers at once.

On PostgreSQL two of them share a database and the keys; on SQLite there is one, which is started again. Nothing that
was acknowledged is lost, the log says exactly what the state says, and neither quota nor budget is over-admitted.
"""

from __future__ import annotations

import collections
import contextlib
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from authority_world import CODE, NODE, Person, World, training_spec
from cloister.audit.checkpoint import parse_verifier_key
from cloister.audit.event import Event
from cloister.audit.verify import verify_log
from cloister.authority.journal import LOG_ORIGIN
from cloister.authority.log import read_export
from cloister.authority.settings import AuthoritySettings
from cloister.signing import certificates, tokens
from cloister.signing.tokens import AUTHORITY_AUDIENCE, JWT_BEARER
from cloister.stores.tables import identities, quota_windows, runs
from ports import free_port
from waiting import wait_for

CALLERS, ROUNDS = 8, 12
KILLED_AFTER = CALLERS * ROUNDS // 4
QUOTA = 100  # the callers want 113
AFFORDABLE = 3  # runs of epsilon 3, under a budget of 10
START_TIMEOUT_S = 240.0
SHARED = ("keys", "blobs", "ca.pem", "endpoint-ca.pem", "node-ca.pem")


@dataclass
class Process:
    """One authority. `directory` is its own; what all of them share is linked into it."""

    directory: Path
    settings: AuthoritySettings
    operator_key: Path
    process: subprocess.Popen[bytes] | None = None
    serving: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        (self.directory / "daemon").mkdir(exist_ok=True)
        file = self.directory / "settings.json"
        file.write_text(self.settings.model_dump_json())
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cloister.authority", self.directory, "--settings", file,
             "--operator", "operator", "--operator-key", self.operator_key],
            stdin=subprocess.DEVNULL, stdout=(self.directory / "output").open("ab"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        wait_for(self._answers, "the authority", START_TIMEOUT_S)
        self.serving.set()

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "output").read_text()
        with contextlib.suppress(httpx.TransportError), self.client() as client:
            return client.get("/v1/health").status_code == 200
        return False

    def client(self, certificate: tuple[Path, Path] | None = None) -> httpx.Client:
        context = ssl.create_default_context(cafile=self.directory / "ca.pem")
        if certificate:
            context.load_cert_chain(*certificate)
        return httpx.Client(base_url=self.settings.url, verify=context, timeout=120)

    def end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.serving.clear()
            process, self.process = self.process, None
            process.send_signal(number)
            try:
                process.wait(START_TIMEOUT_S)
            finally:
                process.kill()


@dataclass
class Load:
    """What callers ask for, and what they were told."""

    people: dict[str, Person]
    endpoint: str
    node: tuple[Path, Path]
    approved: list[dict[str, Any]]
    acknowledged: collections.Counter[str] = field(default_factory=collections.Counter)
    registered: set[str] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)
    granted: int = 0
    unanswered: int = 0
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, caller: int, authorities: list[Process]) -> None:
        try:
            self._call(caller, authorities)
        except Exception as error:  # noqa: BLE001  (a thread's failure is the test's)
            self.faults.append(repr(error))

    def _call(self, caller: int, authorities: list[Process]) -> None:
        sessions = [Session(self, authority) for authority in authorities]
        for number in range(ROUNDS):
            session = sessions[(caller + number) % len(sessions)]
            try:
                match (caller + number) % 3:
                    case 0:
                        self._register(session, f"new-{caller}-{number}")
                    case 1:
                        self._take_quota(session, 1 + number % 7)
                    case 2:
                        self._submit(session, (caller + number) // 3)
            except httpx.TransportError:
                with self.lock:
                    self.unanswered += 1
                sessions = [each for each in sessions if each is not session] or sessions
                assert sessions[0].authority.serving.wait(START_TIMEOUT_S)

    def _register(self, session: Session, name: str) -> None:
        body = {"name": name, "roles": ["consumer"], "public_key": Person(name, []).public}
        answer = session.post("operator", "/v1/identities", body)
        with self.lock:
            self._count("register", answer, 200)
            if answer.status_code == 200:
                self.registered.add(name)

    def _take_quota(self, session: Session, wanted: int) -> None:
        body = {"subject": "carl", "wanted": wanted}
        answer = session.post(self.endpoint, f"/v1/endpoints/{self.endpoint}/quota", body)
        with self.lock:
            self._count("quota", answer, 200)
            if answer.status_code == 200:
                self.granted += answer.json()["granted"]

    def _submit(self, session: Session, number: int) -> None:
        body = self.approved[number % len(self.approved)]
        answer = session.post("ed", "/v1/runs", body | {"public_key": Person("new", []).public})
        with self.lock:
            # 403 and 409: the approval or the budget is used up. 503: one that was just started is computing plans.
            self._count("submit", answer, 200, 403, 409, 503)
            if answer.status_code == 200:
                self.accepted.add(answer.json()["run"])

    def _count(self, what: str, answer: httpx.Response, *expected: int) -> None:
        self.acknowledged[what] += 1
        if answer.status_code not in expected:
            self.faults.append(f"{what}: {answer.text}")


class Session:
    """One caller's connections to one authority, and its tokens there."""

    def __init__(self, load: Load, authority: Process) -> None:
        self._load = load
        self.authority = authority
        self._plain, self._node = authority.client(), authority.client(load.node)
        self._tokens: dict[str, str] = {}

    def post(self, name: str, path: str, body: Any) -> httpx.Response:
        client = self._node if name == self._load.endpoint else self._plain
        if name not in self._tokens:
            said = tokens.issue_assertion(
                self._load.people[name].private, subject=name, audience=self.authority.settings.url, now=time.time()
            )
            form = {"grant_type": JWT_BEARER, "assertion": said, "resource": AUTHORITY_AUDIENCE}
            answer = client.post("/v1/token", data=form)
            assert answer.status_code == 200, answer.text
            self._tokens[name] = answer.json()["access_token"]
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            answer = client.post(path, json=body, headers={"Authorization": f"Bearer {self._tokens[name]}"})
            busy = answer.status_code == 503 and "nothing was changed" in answer.json()["hint"]
            if not busy or path == "/v1/runs" or time.monotonic() > deadline:
                return answer
            time.sleep(0.02)


@pytest.fixture
def authorities(world: World, tmp_path: Path) -> Iterator[list[Process]]:
    """Two over one PostgreSQL, or one over SQLite; not started."""
    operator_key = tmp_path / "operator.pub"
    operator_key.write_text(world.people["operator"].public)
    database: dict[str, Any] = {}
    if world.place.server:
        options = world.place.options
        database = {"database": options["place"], "database_password_file": options["password_file"]}
    made: list[Process] = []
    for number in range(2 if database else 1):
        directory = world.directory
        if number:
            directory = tmp_path / f"authority-{number}"
            directory.mkdir(mode=0o700)
            for name in SHARED:
                (directory / name).symlink_to(world.directory / name)
        made.append(Process(directory, AuthoritySettings(port=free_port(), **database), operator_key))
    with contextlib.ExitStack() as stack:
        for each in made:
            stack.callback(each.end, signal.SIGTERM)
        yield made


@pytest.mark.long
def test_one_of_many_authorities_may_be_killed_under_load(
    world: World, authorities: list[Process], tmp_path: Path
) -> None:
    load = prepare(world, tmp_path)
    before = read(world)
    world.authority.close()
    for authority in authorities:
        authority.start()
        plan = Session(load, authority).post("ed", "/v1/plans", {"spec": load.approved[0]["spec"]})
        assert plan.status_code == 200, plan.text  # computed once in each process

    def kill_one() -> None:
        while load.acknowledged.total() < KILLED_AFTER and any(caller.is_alive() for caller in callers):
            time.sleep(0.005)
        authorities[0].end(signal.SIGKILL)
        if len(authorities) == 1:
            authorities[0].start()

    callers = [threading.Thread(target=load.call, args=(each, authorities)) for each in range(CALLERS)]
    for caller in callers:
        caller.start()
    kill_one()
    for caller in callers:
        caller.join()

    assert load.faults == []
    assert load.acknowledged.total() > KILLED_AFTER
    after = read(world)
    # 1. What was acknowledged is there. (So may be what was on its way when the authority died.)
    assert load.registered <= after.names
    assert load.accepted
    assert load.accepted <= after.runs
    assert 0 < load.granted <= after.granted
    extra = len(after.names - before.names - load.registered - after.runs)
    assert extra + len(after.runs - before.runs - load.accepted) <= load.unanswered
    # 2. Never more than there is.
    assert after.most_granted <= QUOTA
    assert len(after.runs) <= AFFORDABLE
    assert after.epsilon <= 10.0
    # 3. The log says what the state says, is whole, and goes on from what it was.
    assert after.log[: len(before.log)] == before.log
    new = [Event.from_bytes(entry) for entry in after.log[len(before.log) :]]
    done = [event for event in new if event.outcome == "success"]
    assert sum(event.action == "identity:register" for event in done) == len(after.names - before.names) - len(
        after.runs - before.runs
    )
    assert {event.details["run"] for event in done if event.action == "train:submit"} == after.runs - before.runs
    assert sum(int(event.details.get("granted", 0)) for event in done) == after.granted
    # 4. The one that was killed comes back, and knows everything.
    if authorities[0].process is None:
        authorities[0].start()
    body = {"name": load.registered.pop(), "roles": ["consumer"], "public_key": Person("new", []).public}
    assert Session(load, authorities[0]).post("operator", "/v1/identities", body).status_code == 409


def prepare(world: World, tmp_path: Path) -> Load:
    """A served model with a quota, and twice as many approved runs as the budget can pay for."""
    approved = []
    for number in range(2 * AFFORDABLE):
        spec = training_spec()
        spec["training"] = spec["training"] | {"learning_rate": 0.001 * (number + 1)}
        body = {"spec": spec, "code_digest": CODE}
        answer = world.ask("ed", "POST", "/v1/runs", body | {"public_key": Person("new", []).public})
        assert world.vote("rita", world.missing(answer)).status_code == 200
        approved.append(body)
    run = world.train()  # one of the runs that the budget can pay for
    assert run
    world.release()
    endpoint = world.deploy(quota=QUOTA, window_s=86_400)
    key, certificate = tmp_path / "node.key", tmp_path / "node.pem"
    key.write_bytes(certificates.new_private_key())
    csr = certificates.signing_request(key.read_bytes(), NODE).decode()
    certificate.write_text(world.post(NODE, "/v1/nodes/certificate", {"csr": csr})["certificate"])
    return Load(people=dict(world.people), endpoint=endpoint, node=(certificate, key), approved=approved)


@dataclass(frozen=True)
class Found:
    """What is in the database, seen from outside; its log is whole."""

    names: set[str]
    runs: set[str]
    granted: int
    most_granted: int
    epsilon: float
    log: list[bytes]


def read(world: World) -> Found:
    database = world.place.open()
    with database.reading() as connection:
        names = set(connection.execute(select(identities.c.name)).scalars())
        found = connection.execute(select(runs.c.id, runs.c.epsilon_charged)).all()
        granted = list(connection.execute(select(quota_windows.c.granted)).scalars())
    header, entries = read_export(database, world.authority.log.verifier_key)
    log = list(entries)
    world.place.close()
    _, key = parse_verifier_key(header.verifier_key)
    assert verify_log(log, header.checkpoints, key, LOG_ORIGIN).size == len(log)
    epsilon = sum(run.epsilon_charged for run in found)
    return Found(names, {run.id for run in found}, sum(granted), max(granted, default=0), epsilon, log)
