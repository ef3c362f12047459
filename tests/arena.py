"""A world with something of everything in it, for requests that a machine has made up.

What is refused at the door tests the door alone: `Arena.improve` makes a request good, wholly or but for one part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

from schemathesis import Case
from schemathesis.checks import negative_data_rejection, not_a_server_error
from schemathesis.core import NOT_SET
from schemathesis.core.transport import Response
from schemathesis.python.asgi import ASGIClient

import clinic
from authority_world import (
    CODE,
    NODE,
    STEPS,
    URL,
    Person,
    World,
    adult_schema,
    attempt_body,
    blocks_of_adult,
    lease_body,
    receiver,
    training_spec,
)
from cloister.authority import gate
from cloister.authority.witness import FileWitness, ask
from cloister.client.seal import seal_dataset
from cloister.errors import CloisterError
from cloister.policy.decide import ROLES as POLICY_ROLES
from cloister.privacy.spec import TrainingSpec
from cloister.signing import certificates
from cloister.signing.tokens import AUTHORITY_AUDIENCE, JWT_BEARER, key_proof_audience
from cloister.stores.tables import datasets

PRIVACY = {"epsilon": 0.5, "delta": 1e-5}
RUN, ENDPOINT = "the run", "the endpoint"
CALLERS = (None, "operator", "olga", "ed", "rita", "sofia", "ada", RUN, ENDPOINT, NODE)
BY = {
    "/v1/identities": "operator", "/v1/identities/{name}/shredding": "sofia", "/v1/identities/{name}/key": "dora",
    "/v1/me": "ada", "/v1/token-keys": "operator", "/v1/keys": "sofia", "/v1/nodes": "operator",
    "/v1/nodes/certificate": NODE,
    "/v1/access": "eve", "/v1/policy": "sofia", "/v1/datasets": "olga", "/v1/plans": "ed", "/v1/runs": "ed",
    "/v1/runs/{run}/": RUN, "/v1/runs/{run}/stop": "ed", "/v1/runs/{run}/resume": "ed",
    "/v1/models": "ed", "/v1/approvals": "rita",
    "/v1/endpoints": "operator", "/v1/endpoints/{endpoint}/": ENDPOINT, "/v1/endpoints/{endpoint}/stop": "operator",
    "/v1/log": "ada", "/v1/erasures": "ada",
}  # fmt: skip
"""Who may do it, by the longest prefix of the path. Nobody needs a token for the rest."""


def only_our_fields(_context: Any, response: Response, case: Case) -> None:
    """Every refusal is an error, a hint and a kind; and nobody is sent elsewhere."""
    assert not 300 <= response.status_code < 400
    if response.status_code >= 400 and case.method != "HEAD":
        body = response.json()
        assert body.keys() == {"error", "hint", "kind"}
        assert all(isinstance(part, str) for part in body.values())


class Arena:
    """A seeded world, and what a good request to each operation of it looks like."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.client = ASGIClient(world._app, URL)
        self.client.trust_env = False
        self.sent: Counter[str | None] = Counter()
        self.succeeded: Counter[str] = Counter()
        self.offered: Counter[str] = Counter()
        self.cases: Counter[str] = Counter()
        self.count = 0
        self.requests: dict[str, dict[str, Any]] = {}
        self.leases: dict[str, Any] = {}
        self.committed: dict[str, int] = {}
        self._run = self._endpoint = self._approval = ""
        self.serving, self.candidate = 1, 2
        world.set_budget(100.0, 2e-3)
        for name, roles in {"sam": ["security-officer"], "dora": ["consumer"]}.items():
            world.register(name, roles)
        self.train()
        world.release()
        self.train()
        world.vote("rita", world.approval(2))
        world.seal()
        self.new_version = self.seal_only()
        self.seal_clinic()
        for officer in ("sofia", "sam"):
            self.agree(officer, "olga", "/v1/datasets/adult/versions/2/key-destruction")
        witness = FileWitness(world.directory / "witness", log_verifier_key=world.authority.log.verifier_key)
        world.authority.log._witnesses.append(witness.key)
        core = world.authority.core
        with core.database.reading() as connection:
            head = core.journal.head(connection)
            lines = ask(witness, head, 0, lambda old: core.journal.consistency(connection, old, head.size))
        self.cosigned = head.note + "".join(lines)

    # ---- what is there ----

    def agree(self, voter: str, name: str, path: str, body: Any = None) -> dict[str, Any]:
        """What `name` is about to do has the approval of `voter`, who is asked for it once."""
        answer = self.world.ask(name, "POST", path, body)
        if answer.status_code == 200:  # by an approval that was left over
            answer = self.world.ask(name, "POST", path, body)
        request = self.world.missing(answer)
        assert self.world.vote(voter, request).status_code == 200
        return request

    def newcomer(self) -> Person:
        self.count += 1
        return Person(f"n-{self.count}", ["consumer"])

    def train(self) -> None:
        run = self.run
        self.world.commit(run, self.committed[run])
        self.world.post(run, f"/v1/runs/{run}/model", self.world.model_body(run, self.leases[run]))
        self._run = ""

    @property
    def run(self) -> str:
        """A run that trains; another, once this one has ended or has nothing left to do."""
        if not self._run or self.committed[self._run] == STEPS:
            self._run = run = self.world.submit(privacy=PRIVACY)
            self.leases[run], self.committed[run] = self.world.lease(run), 0
        return self._run

    @property
    def endpoint(self) -> str:
        """An endpoint that serves the production version; another, once this one has ended."""
        if not self._endpoint:
            self._endpoint = self.world.deploy(quota=10_000_000)
        return self._endpoint

    def seal_clinic(self) -> None:
        """Versions of a second dataset: one that had rows erased, one that is due, one to end files of, a newest."""
        clinic.seal(self.world)
        self.erasure = clinic.erase_person(self.world, 7)["erasure"]
        clinic.seal(self.world)
        self.due_version = 3
        clinic.later(self.world, 366 * 6)
        with self.world.authority.core.database.transaction() as connection:
            connection.execute(datasets.update().where(datasets.c.version == 2).values(due=4e9, files_due=4e9))
        clinic.seal(self.world)
        self._ends: list[str] = []

    @property
    def ends(self) -> list[str]:
        """Files of a version that is live and not the newest; of another, once they were ended."""
        if not self._ends:
            clinic.seal(self.world)
            live = [int(name.split("@")[1]) for name, state in clinic.states(self.world).items() if state == "live"]
            version = sorted(set(live) - {self.due_version})[0]
            self._ends = [file.ref for file in clinic.manifest(self.world, version).files]
        return self._ends

    def seal_only(self) -> dict[str, Any]:
        """The body that would register the next version."""
        world, kept = self.world, {}
        client = world.client("olga")
        post = client.post

        def kept_back(path: str, body: Any) -> Any:
            if path != "/v1/datasets":
                return post(path, body)
            kept.update(body)
            return {}

        client.post = kept_back  # type: ignore[method-assign]
        seal_dataset(
            client, world.people["olga"].private, blocks_of_adult(), adult_schema(), shards=1, holdout=0.2,
            receiving_key=world.authority.receiving_public,
        )  # fmt: skip
        return kept

    @property
    def approval(self) -> str:
        """An open request that reviewers may vote on; another, once it was voted on."""
        if not self._approval:
            self.count += 1
            body = {"spec": training_spec(privacy=PRIVACY), "public_key": Person("new", ["run"]).public}
            answer = self.world.ask("eve", "POST", "/v1/runs", body | {"code_digest": f"sha256:{self.count:064x}"})
            request = self.world.missing(answer)
            self._approval = request["approval"]
            self.requests[self._approval] = request
        return self._approval

    # ---- good requests ----

    def path_of(self, case: Case) -> dict[str, Any]:
        """Good path parameters; what a link has led to stays."""
        path, given = case.operation.path, dict(case.path_parameters)
        known = {
            "run": lambda: self.ended() if path.endswith("/resume") else self.known(given["run"]) or self.run,
            "endpoint": lambda: self.known(given["endpoint"]) or self.endpoint,
            "approval": lambda: given["approval"] if self.request(given["approval"]) else self.approval,
            "version": lambda: self.version(path),
            "name": lambda: self.name(path, self.known(given["name"])),
            "index": lambda: 0,
            "erasure": lambda: self.erasure,
        }  # fmt: skip
        return {name: known[name]() for name in given}

    def known(self, name: Any) -> str:
        """The name of somebody, or nothing."""
        return name if isinstance(name, str) and name in self.world.people else ""

    def name(self, path: str, given: str) -> str:
        if "/identities/" not in path:
            return "clinic" if path.endswith(("/endings", "/expiry")) else "adult"
        if path.endswith("/key"):
            return "dora"
        if not given.startswith("n-"):
            given = self.newcomer().name
            self.world.register(given, ["consumer"])
        if path.endswith("/shredding"):
            self.world.post("operator", f"/v1/identities/{given}/revocation")
        return given

    def version(self, path: str) -> int:
        if path.endswith("/promotion"):
            return self.candidate
        if path.endswith("/export"):
            return self.serving
        if path.endswith("/expiry"):
            return self.due_version
        return 2 if path.endswith("/key-destruction") else 1

    def request(self, approval: Any) -> dict[str, Any] | None:
        """The request for approval of that id, if it was open when it was first asked about."""
        if isinstance(approval, str) and approval.startswith("apr-") and approval not in self.requests:
            self.requests |= {each["approval"]: each for each in self.world.get("ada", "/v1/approvals")}
        return self.requests.get(approval) if isinstance(approval, str) else None

    def body_of(self, label: str, path: dict[str, Any]) -> Any:
        """A body that the operation takes, from whoever may do it."""
        build = getattr(self, "_" + BODIES[label]) if label in BODIES else None
        return build(path) if build else NOT_SET

    def _token(self, _path: Any) -> Any:
        return {"grant_type": JWT_BEARER, "assertion": self.world.assertion("carl"), "resource": AUTHORITY_AUDIENCE}

    def _revoke(self, _path: Any) -> Any:
        return {"token": self.world.exchange(self.world.assertion("carl")).json()["access_token"]}

    def _identity(self, _path: Any) -> Any:
        person = self.newcomer()
        self.world.people[person.name] = person
        return {"name": person.name, "roles": person.roles, "public_key": person.public}

    def _roles(self, _path: Any) -> Any:
        return {"roles": ["consumer", "engineer"]}

    def _key(self, path: Any) -> Any:
        person = self.world.people[path["name"]]
        audience = key_proof_audience(URL, person.public.encode())
        return {"public_key": person.public, "proof": self.world.assertion(person.name, audience=audience)}

    def _wrapping_key(self, _path: Any) -> Any:
        return {"name": "dataset/adult"}

    def _rotation(self, _path: Any) -> Any:
        return {"compromised": bool(self.count % 2)}

    def _node(self, _path: Any) -> Any:
        node = self.newcomer()
        return {"name": node.name, "public_key": node.public, "region": "eu", "assurance": 0}

    def _csr(self, _path: Any) -> Any:
        return {"csr": certificates.signing_request(certificates.new_private_key(), NODE).decode()}

    def _access(self, _path: Any) -> Any:
        self.count += 1
        return {"role": POLICY_ROLES[self.count % len(POLICY_ROLES)], "seconds": 60, "reason": f"case {self.count}"}

    def _policy(self, _path: Any) -> Any:
        return {"text": '@id("site") permit (principal is Service, action == Action::"policy:read", resource);'}

    def _question(self, _path: Any) -> Any:
        return {"principal": "ed", "action": "train:submit", "resource_type": "Dataset", "resource": "adult@1"}

    def _dataset(self, _path: Any) -> Any:
        return self.new_version

    def _sealing(self, _path: Any) -> Any:
        return receiver() | {"kind": "seal", "region": "eu"}

    def _opening(self, _path: Any) -> Any:
        return receiver() | {"purpose": "erase"}

    def _ending(self, _path: Any) -> Any:
        ends = self.ends  # it may seal another version first
        return {"version": 1 + len(clinic.states(self.world)), "ends": ends, "reason": "request"}

    def _expiry(self, _path: Any) -> Any:
        return {"early": False}

    def _budget(self, _path: Any) -> Any:
        return {"epsilon": 100.0, "delta": 2e-3}

    def _plan(self, _path: Any) -> Any:
        return {"spec": training_spec(privacy=PRIVACY)}

    def _new_run(self, _path: Any) -> Any:
        workload = Person("new", ["run"])
        self.world.people[workload.public] = workload  # its name is known when the answer comes
        return {"spec": training_spec(privacy=PRIVACY), "code_digest": CODE, "public_key": workload.public}

    def _attempt(self, _path: Any) -> Any:
        return attempt_body()

    def _lease(self, path: Any) -> Any:
        rank = 1 if path["run"] in self.leases else self.count % 2
        return lease_body(rank=rank, attempt=self.attempt(path))

    def _block(self, path: Any) -> Any:
        first = self.committed.get(path["run"], 0)
        return {"attempt": self.attempt(path), "first": first, "last": first + 5}

    def _checkpoint(self, path: Any) -> Any:
        run, step = path["run"], self.committed.get(path["run"], 0)
        blob = f"models/{run}/checkpoints/{step}.sealed"
        return {"attempt": self.attempt(path), "step": step, "blob": blob, "sha256": "ab" * 32}

    def _progress(self, path: Any) -> Any:
        return {"attempt": self.attempt(path), "steps_done": self.committed.get(path["run"], 0), "rows_per_s": 1.0}

    def attempt(self, path: Any) -> int:
        return self.world.attempts.get(path["run"], 1)

    def ended(self) -> str:
        """A run that has ended by its own word, and may go on."""
        run = self.world.submit(privacy=PRIVACY)
        self.world.lease(run)
        self.world.commit(run, 0, 5)
        self.world.checkpoint(run, 5)
        self.world.end(run)
        return run

    def _model(self, path: Any) -> Any:
        return self.world.model_body(path["run"], self.leases.get(path["run"]) or next(iter(self.leases.values())))

    def _end(self, path: Any) -> Any:
        return self.world.end_body(path["run"])

    def _receiver(self, _path: Any) -> Any:
        return receiver()

    def _vote(self, path: Any) -> Any:
        request = self.request(path["approval"])
        assert request is not None
        return self.world.vote_body(_voter(request), request)

    def _deployment(self, _path: Any) -> Any:
        workload = Person("new", ["endpoint"])
        self.world.people[workload.public] = workload
        return self.world.deploy_body(workload)

    def _quota(self, _path: Any) -> Any:
        return {"subject": "carl", "wanted": 1}

    def _cosigned(self, _path: Any) -> Any:
        return {"note": self.cosigned}

    def prepare(self, label: str, path: dict[str, Any], body: Any) -> None:
        """Do what has to be done before a good request succeeds."""
        if label == "POST /v1/runs":
            self.agree("rita", "ed", "/v1/runs", body)
        elif label == "POST /v1/policy":
            self.agree("sam", "sofia", "/v1/policy", body)
        elif label == "POST /v1/runs/{run}/model":
            run, first = path["run"], self.committed.get(path["run"], 0)
            block = {"attempt": self.attempt(path), "first": first, "last": STEPS}
            if self.world.ask(run, "POST", f"/v1/runs/{run}/blocks", block).status_code == 200:
                self.committed[run] = STEPS

    def improve(self, case: Case, *, linked: bool = False) -> Case:
        """The same case, or with a good path, or a good body but for one part of it, or all of it good."""
        case, label = case.derive(), case.operation.label
        seen = self.cases[label] if linked else (case.path_parameters, case.query, case.body)
        chance = Random(repr((label, seen)))  # noqa: S311  (it has to be repeatable)
        level = chance.choice((2, 3, 3) if linked else (0, 1, 1, 2, 2, 2, 2, 3)) if self.succeeded[label] else 3
        if level:
            case.path_parameters = path = self.path_of(case)
            if label == "GET /v1/log/consistency":
                case.query = {"first": 1}
            good = self.body_of(label, path) if level > 1 else NOT_SET
            if good is not NOT_SET:
                case.body = graft(good, case.body, chance) if level == 2 else good
                if level == 3:
                    self.prepare(label, path, good)
                case.media_type = case.media_type or "application/json"
        if label in ("POST /v1/plans", "POST /v1/runs"):
            case.body = _cheap(case.body)
        return case

    # ---- sending ----

    def skips(self, case: Case) -> bool:
        """Whether others like this case are enough: plans have the specs of runs, and SQLite has seen them all."""
        label = case.operation.label
        self.offered[label] += 1
        share = (5 if self.world.place.server else 1) * (3 if label == "POST /v1/runs" else 1)
        return self.succeeded[label] > 0 and self.offered[label] % share != 0

    def callers(self, case: Case) -> Iterator[str | None]:
        """Somebody who may do this; and everybody in turn, soon less often."""
        path, label = case.operation.path, case.operation.label
        best = max((prefix for prefix in BY if path.startswith(prefix)), key=len, default=None)
        yield BY[best] if best else None
        done = self.cases[label]
        self.cases[label] += 1
        if done < len(CALLERS) or done % 4 == 0:
            yield CALLERS[(done if done < len(CALLERS) else done // 4) % len(CALLERS)]

    def send(self, case: Case, caller: str | None) -> Response:
        """One request, which must be answered well."""
        label = case.operation.label
        name = self._name_of(case, caller)
        response = self._call(case, name)
        if name is not None and case.operation.path not in gate.PUBLIC:
            assert response.status_code != 401
        self.sent[caller] += 1
        if response.status_code < 300 and case.method == case.operation.method.upper():
            self.succeeded[label] += 1
            self._note(label, case, response)
        case.validate_response(response, checks=[not_a_server_error, only_our_fields, negative_data_rejection])
        return response

    def _call(self, case: Case, name: str | None) -> Response:
        headers = {"Authorization": f"Bearer {self.world.token(name)}"} if name else {}
        return case.call(base_url=URL, session=self.client, app=self.client.app, headers=headers, allow_redirects=False)

    def _name_of(self, case: Case, caller: str | None) -> str | None:
        path = case.path_parameters
        if caller == RUN:
            return self.known(path.get("run")) or self.run
        if caller == ENDPOINT:
            return self.known(path.get("endpoint")) or self.endpoint
        request = self.request(path.get("approval")) if caller == "rita" else None
        return _voter(request) if request else caller

    def _note(self, label: str, case: Case, response: Response) -> None:
        """What a success has changed."""
        path = case.path_parameters
        if label in ("POST /v1/token-keys", "PUT /v1/identities/{name}/key", "POST /v1/revoke"):
            self.world.tokens.clear()  # it ended some of them
        elif label in ("POST /v1/runs/{run}/stop", "POST /v1/runs/{run}/end", "POST /v1/runs/{run}/model"):
            self._run = "" if path["run"] == self._run else self._run
        elif label == "POST /v1/runs/{run}/leases":
            self._run = ""
        elif label == "POST /v1/runs/{run}/attempts":
            self.world.attempts[path["run"]], self._run = response.json()["attempt"], ""
            self.committed[path["run"]] = response.json()["resume_from"]
        elif label == "POST /v1/datasets/{name}/endings":
            self._ends = []
        elif label == "POST /v1/endpoints/{endpoint}/stop":
            self._endpoint = "" if path["endpoint"] == self._endpoint else self._endpoint
        elif label == "POST /v1/runs/{run}/blocks":
            self.committed[path["run"]] = response.json()["position"]
        elif label == "POST /v1/models/{name}/versions/{version}/promotion":
            self.serving, self.candidate, self._endpoint = self.candidate, self.serving, ""
        elif label == "POST /v1/approvals/{approval}/votes":
            self._approval = "" if path["approval"] == self._approval else self._approval
        elif label in ("POST /v1/runs", "POST /v1/endpoints"):
            body, answer = case.body, response.json()
            if workload := self.world.people.pop(body["public_key"], None):
                workload.name = answer.get("run") or answer["endpoint"]
                self.world.people[workload.name] = workload
                self.committed[workload.name] = 0


BODIES = {
    "POST /v1/token": "token", "POST /v1/revoke": "revoke", "POST /v1/identities": "identity",
    "PUT /v1/identities/{name}/roles": "roles", "PUT /v1/identities/{name}/key": "key",
    "POST /v1/token-keys": "rotation", "POST /v1/nodes": "node", "POST /v1/nodes/certificate": "csr",
    "POST /v1/keys/rotation": "wrapping_key",
    "POST /v1/access": "access", "POST /v1/policy": "policy", "POST /v1/policy/explain": "question",
    "POST /v1/datasets/{name}/sealing": "sealing", "POST /v1/datasets/{name}/openings": "opening",
    "POST /v1/datasets/{name}/endings": "ending",
    "POST /v1/datasets/{name}/versions/{version}/expiry": "expiry",
    "POST /v1/datasets": "dataset", "PUT /v1/datasets/{name}/budget": "budget", "POST /v1/plans": "plan",
    "POST /v1/runs": "new_run", "POST /v1/runs/{run}/leases": "lease", "POST /v1/runs/{run}/blocks": "block",
    "POST /v1/runs/{run}/attempts": "attempt", "POST /v1/runs/{run}/checkpoints": "checkpoint",
    "POST /v1/runs/{run}/progress": "progress", "POST /v1/runs/{run}/model": "model",
    "POST /v1/runs/{run}/end": "end", "POST /v1/models/{name}/versions/{version}/export": "receiver",
    "POST /v1/approvals/{approval}/votes": "vote", "POST /v1/endpoints": "deployment",
    "POST /v1/endpoints/{endpoint}/leases": "receiver", "POST /v1/endpoints/{endpoint}/quota": "quota",
    "POST /v1/log/cosignatures": "cosigned",
}  # fmt: skip


def _voter(request: dict[str, Any]) -> str:
    if request["kind"] in ("training", "promotion"):
        return "rita"
    return "sam" if request["requested_by"] == "sofia" else "sofia"


def graft(good: Any, fuzzed: Any, chance: Random) -> Any:
    """`good`, but for one part that is as in `fuzzed`: replaced, added or left out."""
    if not isinstance(good, dict) or not isinstance(fuzzed, dict):
        return fuzzed
    names = sorted(good.keys() | fuzzed.keys(), key=repr)
    if not names:
        return good
    name = chance.choice(names)
    if name not in fuzzed:
        return {other: part for other, part in good.items() if other != name}
    return good | {name: graft(good.get(name), fuzzed[name], chance)}


def _cheap(body: Any) -> Any:
    """Accounting takes seconds and is no matter of the schema: whatever could be planned is the one plan."""
    try:
        spec = TrainingSpec.parse(body["spec"])
    except (CloisterError, TypeError, KeyError):
        return body
    if not spec.dataset.startswith("adult@"):
        return body
    plan = {key: training_spec(privacy=PRIVACY)[key] for key in ("privacy", "training")}
    return body | {"spec": body["spec"] | plan}
