"""`kill -9` at every commit point of 200 mixed operations: nothing acknowledged is lost, nothing is off the record.

Each operation is a real HTTP request to the real application. A forked process makes it and kills itself: just before
COMMIT, just after it and before the answer, and right after the answer; then the state is looked at from outside.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from authority_world import CODE, NODE, STEPS, URL, Person, World, attempt_body, lease_body, receiver, training_spec
from cloister.audit.checkpoint import parse_verifier_key
from cloister.audit.verify import verify_log
from cloister.authority import costs
from cloister.authority.journal import LOG_ORIGIN
from cloister.authority.log import read_export
from cloister.client.authority import TrainingLease
from cloister.signing import certificates, tokens
from cloister.stores.blobs import FolderBlobs
from databases import Place
from postgres import Server, roomy_memory

OPERATIONS = 200
SEEDS = (1, 2)  # half of the operations each
BEFORE, AFTER = "before COMMIT", "after COMMIT"
OFF_THE_RECORD = ("/progress",)  # what people watch, and is no secret


@dataclass
class Answer:
    """What the client got."""

    status_code: int
    text: str
    value: Any

    def json(self) -> Any:
        return self.value


@dataclass(frozen=True)
class State:
    """What a restart would find."""

    content: dict[str, list[str]]
    entries: list[bytes]

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in self.content.items()} | {"log": len(self.entries)}


def look(world: World) -> State:
    return State(world.content(), world.entries())


def request_and_die(world: World, request: Callable[[], Any], commit: int, moment: str) -> tuple[int, Answer | None]:
    """Make a request in another process, which kills itself at its `commit`-th commit, or else right after the answer.

    Returns how many commits were done, and the answer if there was one.
    """
    world.authority.core.database.close()  # no connection is shared with the other process
    inbox, outbox = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(inbox)
            _die_at(world, commit, moment, outbox)
            answer = request()
            os.write(outbox, b"!" + pickle.dumps(Answer(answer.status_code, answer.text, answer.json())))
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.close(outbox)
    with os.fdopen(inbox, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it failed, and was not killed"
    assert os.WTERMSIG(status) == signal.SIGKILL
    commits, _, answer = said.partition(b"!")
    return len(commits), pickle.loads(answer) if answer else None  # noqa: S301  (our own process's)


def _die_at(world: World, commit: int, moment: str, outbox: int) -> None:
    """In the forked process: count commits, and die at the one that was asked for."""
    dialect = world.authority.core.database._writer.dialect
    do_commit, done = dialect.do_commit, 0

    def counted(connection: Any) -> None:
        nonlocal done
        if (done + 1, moment) == (commit, BEFORE):
            os.kill(os.getpid(), signal.SIGKILL)
        do_commit(connection)
        done += 1
        os.write(outbox, b".")
        if (done, moment) == (commit, AFTER):
            os.kill(os.getpid(), signal.SIGKILL)

    dialect.do_commit = counted  # type: ignore[method-assign]


@dataclass
class Mortal:
    """Makes requests of `world`, each of which is killed at every point first."""

    world: World
    folder: Path
    operations: int = 0
    points: int = 0
    kinds: set[str] = field(default_factory=set)

    def ask(self, name: str, method: str, path: str, body: Any = None) -> Answer:
        self.world.token(name)  # so that the request is this one alone
        return self._survive(f"{method} {path}", lambda: self.world.ask(name, method, path, body))

    def post(self, name: str, path: str, body: Any = None) -> Any:
        answer = self.ask(name, "POST", path, body or {})
        assert answer.status_code == 200, f"{path}: {answer.text}"
        return answer.json()

    def agreed(self, voter: str, name: str, method: str, path: str, body: Any = None) -> Any:
        """As `World.agreed`: asked for, approved, and asked for again."""
        answer = self.ask(name, method, path, body)
        if answer.status_code == 403:
            request = self.world.missing(answer)
            self.post(voter, f"/v1/approvals/{request['approval']}/votes", self.world.vote_body(voter, request))
            answer = self.ask(name, method, path, body)
        assert answer.status_code == 200, f"{path}: {answer.text}"
        return answer.json()

    def login(self, name: str) -> None:
        assertion = self.world.assertion(name)
        answer = self._survive("POST /v1/token", lambda: self.world.exchange(assertion))
        assert answer.status_code == 200, answer.text
        self.world.tokens[name, "cloister-authority"] = answer.json()["access_token"], time.monotonic()

    def _survive(self, what: str, request: Callable[[], Any]) -> Answer:
        """The answer to a request that was killed at each of its commits before, and is killed with its answer out."""
        before = look(self.world)
        _, after = self._killed(what, request, 1, BEFORE, before)
        assert after == before, f"{what}: something was done, and not committed"
        commit, answer = 0, None
        with self._kept() as bring_back:
            while answer is None:
                commit += 1
                _, done = self._killed(what, request, commit, AFTER, before)
                bring_back()
                # Either there is no further commit, and this is the answer; or it is killed before that one.
                answer, after = self._killed(what, request, commit + 1, BEFORE, before)
                assert after.sizes == done.sizes, f"{what}: what was committed is not there"
                if answer is None:
                    bring_back()
        self.operations += 1
        kind = "/".join(part for part in what.split("/") if not any(letter.isdigit() for letter in part))
        self.kinds.add(kind)
        return answer

    def _killed(
        self, what: str, request: Callable[[], Any], commit: int, moment: str, before: State
    ) -> tuple[Answer | None, State]:
        """The answer, if there was one, and what is there now: for each commit, at least one new entry in the log."""
        commits, answer = request_and_die(self.world, request, commit, moment)
        assert commits == (commit if moment == AFTER else commit - 1), f"{what} changed and recorded nothing"
        self.points += 1
        after = look(self.world)
        assert after.entries[: len(before.entries)] == before.entries, f"{what}: the log lost something"
        recorded = len(after.entries) - len(before.entries)
        assert recorded >= commits or what.endswith(OFF_THE_RECORD), f"{what} left no record"
        return answer, after

    @contextlib.contextmanager
    def _kept(self) -> Iterator[Callable[[], None]]:
        """Keep the whole authority as it is, for the block: the function brings it back."""
        database = self.world.authority.core.database
        database.close()
        keys, kept = self.world.directory / "keys", self.folder / "keys"
        shutil.copytree(keys, kept, dirs_exist_ok=True)
        with self.world.place.kept(self.folder / "state.db") as bring_back:

            def bring_everything_back() -> None:
                database.close()
                shutil.copytree(kept, keys, dirs_exist_ok=True)
                bring_back()

            yield bring_everything_back


def journeys(mortal: Mortal, chance: random.Random) -> None:
    """Mixed operations, in an order that the seed decides, until there are enough."""
    world = mortal.world
    submitted: list[str] = []
    endpoints: list[str] = []
    people: list[Person] = []
    versions: list[int] = []

    def new_person() -> None:
        person = Person(f"new-{mortal.operations}", ["consumer"])
        body = {"name": person.name, "roles": person.roles, "public_key": person.public}
        mortal.post("operator", "/v1/identities", body)
        world.people[person.name] = person
        people.append(person)

    def change_person() -> None:
        if not people:
            return new_person()
        person = chance.choice(people)
        match chance.randrange(4):
            case 0:
                roles = {"roles": [chance.choice(["reviewer", "consumer"])]}
                mortal.ask("operator", "PUT", f"/v1/identities/{person.name}/roles", roles)
            case 1:
                mortal.login(person.name)
                other = Person(person.name, person.roles)
                audience = tokens.key_proof_audience(URL, other.public.encode())
                proof = world.assertion(person.name, audience=audience)
                body = {"public_key": other.public, "proof": proof}
                mortal.ask(person.name, "PUT", f"/v1/identities/{person.name}/key", body)
                world.people[person.name] = other
                people[people.index(person)] = other
            case 2:
                mortal.login(person.name)
            case 3:
                mortal.post("operator", f"/v1/identities/{person.name}/revocation")
                people.remove(person)

    def budget() -> None:
        body = {"epsilon": 90 + mortal.operations / 100, "delta": 0.002}
        mortal.agreed("sofia", "olga", "PUT", "/v1/datasets/adult/budget", body)

    def refused() -> None:
        """Refusals are on record too."""
        assert mortal.ask("carl", "PUT", "/v1/datasets/adult/budget", {"epsilon": 9.0, "delta": 0.1}).status_code == 403

    def submit() -> None:
        workload = Person("new", ["run"])
        spec = cheap_spec()
        body = {"spec": spec, "code_digest": CODE, "public_key": workload.public}
        workload.name = mortal.agreed("rita", "ed", "POST", "/v1/runs", body)["run"]
        world.people[workload.name] = workload
        submitted.append(workload.name)

    def train() -> None:
        if not submitted:
            return submit()
        run = submitted.pop()
        mortal.login(run)
        mortal.post(run, f"/v1/runs/{run}/attempts", attempt_body())
        world.attempts[run] = 1
        lease = lease_body()
        mortal.post(run, f"/v1/runs/{run}/leases", lease)
        assert mortal.ask(run, "POST", f"/v1/runs/{run}/leases", lease).status_code == 409
        mortal.post(run, f"/v1/runs/{run}/blocks", {"attempt": 1, "first": 0, "last": STEPS})
        mortal.post(run, f"/v1/runs/{run}/checkpoints", world.checkpoint_body(run, STEPS))
        mortal.post(run, f"/v1/runs/{run}/progress", {"attempt": 1, "steps_done": STEPS, "rows_per_s": 1.0})
        match chance.randrange(4):
            case 0:
                mortal.post("ed", f"/v1/runs/{run}/stop")
            case 1:
                mortal.post(run, f"/v1/runs/{run}/end", world.end_body(run))
                mortal.post("ed", f"/v1/runs/{run}/resume")
            case _:
                register(run)

    def register(run: str) -> None:
        made = TrainingLease(
            keys={}, model_key=bytes(32), checkpoint_key=bytes(32), manifest={}, owner_key="", spec={}, plan={},
            seal_context={"use": "test"}, checkpoint_context={"use": "test"},
            blobs=FolderBlobs.make(world.directory / "blobs").url,
        )  # fmt: skip
        version = mortal.post(run, f"/v1/runs/{run}/model", world.model_body(run, made))["model"]
        versions.append(int(version.rpartition("@")[2]))

    def release() -> None:
        if not versions:
            return train()
        version = versions.pop()
        mortal.agreed("rita", "ed", "POST", f"/v1/models/adult/versions/{version}/promotion")

    def serve() -> None:
        if endpoints and chance.random() < 0.7:
            endpoint = chance.choice(endpoints)
            match chance.randrange(8):
                case 0:
                    answer = mortal.ask(endpoint, "POST", f"/v1/endpoints/{endpoint}/leases", receiver())
                    assert answer.status_code in (200, 409)  # another version may be in production by now
                case 1:
                    mortal.post("operator", f"/v1/endpoints/{endpoint}/stop")
                    endpoints.remove(endpoint)
                case _:
                    body = {"subject": chance.choice(["carl", "eve"]), "wanted": chance.randrange(1, 60)}
                    mortal.post(endpoint, f"/v1/endpoints/{endpoint}/quota", body)
            return None
        workload = Person("new", ["endpoint"])
        answer = mortal.ask("operator", "POST", "/v1/endpoints", world.deploy_body(workload, window_s=86_400))
        if answer.status_code != 200:  # there is no model in production yet, which is on record
            return release()
        workload.name = answer.json()["endpoint"]
        world.people[workload.name] = workload
        endpoints.append(workload.name)
        return mortal.login(workload.name)

    def node() -> None:
        csr = certificates.signing_request(certificates.new_private_key(), NODE).decode()
        mortal.post(NODE, "/v1/nodes/certificate", {"csr": csr})

    def access() -> None:
        body = {"role": "operator", "seconds": 60, "reason": f"night shift {mortal.operations}"}
        assert mortal.ask("ed", "POST", "/v1/access", body).status_code in (200, 403)

    def rotate() -> None:
        mortal.post("operator", "/v1/token-keys", {"compromised": False})

    weighted = {
        change_person: 4, new_person: 2, budget: 2, refused: 1, submit: 2, train: 3, release: 2, serve: 6, node: 1,
        access: 1, rotate: 1,
    }  # fmt: skip
    while mortal.operations < OPERATIONS // len(SEEDS):
        chance.choices(list(weighted), list(weighted.values()))[0]()


def cheap_spec() -> dict[str, Any]:
    """A budget's delta is below that of a row, and has to do for all runs."""
    spec = training_spec()
    spec["privacy"]["delta"] = 2e-6
    return spec


def kill_at_every_commit(folder: Path, server: Server | None, seed: int) -> tuple[int, int, set[str]]:
    """In a process of its own: one that is small and has one thread is forked safely, and fast.

    Returns how many operations there were, how many kills, and the kinds of requests.
    """
    directory = folder / "authority"
    directory.mkdir(parents=True)
    world = World(directory, place=Place.new(directory / "state.db", server))
    # Windows of quotas end at midnight (UTC): none shall, while this runs.
    world.clock.offset = max(0.0, 900 - (86_400 - time.time() % 86_400))
    world.register_everybody()
    world.seal()
    world.set_budget(90, 0.002)
    world.train()  # what is slow the first time is done here, and not in each process
    plan = world.post("ed", "/v1/plans", {"spec": cheap_spec()})["plan"]
    costs.accounts(plan, STEPS)
    costs.replacing(plan, STEPS)
    world.release()
    mortal = Mortal(world, folder / "kept")
    mortal.folder.mkdir()
    journeys(mortal, random.Random(seed))  # noqa: S311

    # A restart finds a whole log, and opens.
    world.authority.close()
    again = World(directory, world)
    header, entries = read_export(again.authority.core.database, again.authority.log.verifier_key)
    _, key = parse_verifier_key(header.verifier_key)
    assert verify_log(entries, header.checkpoints, key, LOG_ORIGIN).size == len(again.entries()) > mortal.operations
    again.close()
    return mortal.operations, mortal.points, mortal.kinds


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_kill_at_any_commit_loses_nothing_and_hides_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue("postgres_server") if kind == "postgres" else None
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=roomy_memory()) as folder, ProcessPoolExecutor(len(SEEDS), spawn) as pool:
        halves = [pool.submit(kill_at_every_commit, Path(folder, str(seed)), server, seed) for seed in SEEDS]
    operations, points, kinds = zip(*(half.result() for half in halves), strict=True)
    assert sum(operations) >= OPERATIONS
    assert sum(points) > 3 * OPERATIONS
    assert len(set().union(*kinds)) >= 20
