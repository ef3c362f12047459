"""The whole path on a real cluster, and what happens to it when somebody tampers."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import psutil
import pytest

from cloister.authority import data
from cloister.authority.key_use import dataset_key, key_context
from cloister.canonical import b64, unb64
from cloister.client.inference import InferenceClient
from cloister.datasets.manifest import DatasetManifest
from cloister.errors import TokenExpiredError
from cloister.process import Daemon
from cloister.sealing.shard import open_table, shard_aad
from cloister.signing import tokens
from cloister.stores.blobs import FolderBlobs
from cloister.stores.database import Database
from cloister.stores.keys import EmbeddedKeys
from cloister.stores.tables import data_keys
from command_line import ADULT, ROOT, CommandLine, readme_session
from ports import free_port
from waiting import wait_for

pytestmark = pytest.mark.story
SPEC = ADULT / "train.yaml"
NEEDLE_BYTES = 1024
ROWS = {
    "age": [39, 50], "workclass": ["Private", "State-gov"], "education": ["Bachelors", "HS-grad"],
    "education-num": [13, 9], "marital-status": ["Never-married", "Divorced"],
    "occupation": ["Adm-clerical", "Sales"], "relationship": ["Not-in-family", "Unmarried"],
    "capital-gain": [0, 5000], "capital-loss": [0, 0], "hours-per-week": [40, 20],
}  # fmt: skip


def processes_of(home: Path) -> list[psutil.Process]:
    """Everything that names this home in its arguments, and all below it."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(str(home) in word for word in process.cmdline()):
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        except psutil.Error:
            continue
    return list(found.values())


class Listener(NamedTuple):
    """A TCP socket that waits for connections."""

    pid: int
    title: str
    ip: str
    port: int

    @property
    def on_loopback(self) -> bool:
        address = ipaddress.ip_address(self.ip)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def listeners(processes: list[psutil.Process]) -> set[Listener]:
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error, IndexError):  # ended meanwhile
            title = process.cmdline()[0]
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(Listener(process.pid, title, *connection.laddr))
    return found


class Story:
    """One trained, approved and served model: the README's session, as it stands there."""

    def __init__(self, line: CommandLine) -> None:
        self.line = line
        line.clusters.mkdir(mode=0o700)
        self.said: dict[str, str] = {}
        port = free_port()
        bin_folder = line.home.parent / "bin"
        bin_folder.mkdir()
        (bin_folder / "cloister").write_text(f'#!/bin/sh\nexec {sys.executable} -m cloister.cli "$@"\n')
        (bin_folder / "cloister").chmod(0o755)
        self.environment = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HOME": str(line.home.parent)}
        self.environment |= line.environment
        for command, wanted in readme_session("session"):
            # Only what must differ: ports that are free here, the home, and the id that the list has shown.
            typed = command.replace("8471", str(port)).replace("~/.cloister", str(line.home))
            typed = typed.replace("serve deploy adult", f"serve deploy adult --port {port} --quota 20/60s")
            typed = typed.replace("infer adult", f"infer adult --url https://127.0.0.1:{port}")
            typed = typed.replace("cloister up", f"cloister up --port {free_port()}")
            if "APPROVAL" in typed:
                typed = typed.replace("APPROVAL", re.findall(r"apr-[0-9a-f]+", self.said["cloister approvals list"])[0])
                line.refused("approve", typed.split()[2], who="ed")  # the author, in between
            done = subprocess.run(
                ["bash", "-c", typed], env=self.environment, capture_output=True, text=True, timeout=600, cwd=ROOT
            )
            assert done.returncode == wanted, f"{typed}: {done.stdout}{done.stderr}"
            self.said[" ".join(command.split()[:3])] = done.stdout
        self.run = line.json("train", "list", who="ed")[0]["run"]
        self.shown = line.json("train", "status", self.run, who="ed")
        self.endpoint = line.json("serve", "status")[0]["endpoint"]
        self.url = f"https://127.0.0.1:{port}"
        self.ca = line.home / "client" / "endpoint-ca.pem"

    def post(self, token: str | None, rows: dict[str, list[Any]] = ROWS) -> httpx.Response:
        tensors = [
            {"name": name, "shape": [len(values)], "datatype": "BYTES" if isinstance(values[0], str) else "INT64",
             "data": values}
            for name, values in rows.items()
        ]  # fmt: skip
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with httpx.Client(verify=ssl.create_default_context(cafile=str(self.ca)), trust_env=False) as client:
            return client.post(f"{self.url}/v2/models/adult/infer", json={"inputs": tensors}, headers=headers)

    def agree(self, spec: Path = SPEC) -> None:
        """Let the owner of the data approve a run of Ed's."""
        assert "approvals" in self.line.refused("train", "submit", spec, who="ed")
        requests = self.line.json("approvals", "list", who="olga")
        mine = next(request for request in reversed(requests) if request["kind"] == "training")
        self.line.json("approve", mine["approval"], who="olga")

    def submit(self, spec: Path = SPEC, *more: str) -> dict[str, Any]:
        """Ed's run, which the owner of the data approves first."""
        self.agree(spec)
        return dict(self.line.json("train", "submit", spec, *more, who="ed", timeout_s=600))

    def clusters(self) -> set[Path]:
        """The folders of the clusters that are there now."""
        return set(self.line.clusters.iterdir())

    def token(self, who: str) -> str:
        return str(self.line.json("token", who=who)["access_token"])


class Leaks:
    """Looks for keys, the cluster's token and rows wherever a run could leave them, and at its ports, while it runs."""

    def __init__(self, home: Path, cluster: Path, run: str) -> None:
        self._cluster = cluster
        self._driver = home / "runs" / run / "driver"
        self.found: set[str] = set()
        self.listeners: set[Listener] = set()
        self.looked = self.files_seen = self.processes_seen = 0
        service = EmbeddedKeys(home / "authority" / "keys")
        database = Database(home / "authority" / "state.db")
        with database.transaction() as connection:
            manifest = DatasetManifest.parse(data.load(connection, "adult", 1).manifest)
            wrapped = {row.file: row.wrapped for row in connection.execute(data_keys.select())}
        database.close()
        self._needles: dict[str, bytes] = {}
        blobs = FolderBlobs(home / "authority" / "blobs")
        for file in manifest.files:
            bound = key_context(manifest.name, file.sealed_in, file.key_name)
            (key,) = service.unwrap(dataset_key(manifest.name), [(wrapped[file.key_name], bound)])
            aad = shard_aad(manifest.name, file.sealed_in, file.part, file.shard, manifest.dataset_schema["region"])
            rows = open_table(blobs.get(file.path), key, aad)
            self._needles[f"data key {file.key_name}"] = key
            self._needles[f"data key {file.key_name} in base64"] = b64(key).encode()
            for name in ("age", "occupation", "race"):
                if name in rows.column_names:
                    # The column as it lies in memory: so many rows that they are not all alike, as zeros are anywhere.
                    needle = rows.column(name).to_numpy().tobytes()[:NEEDLE_BYTES]
                    assert len(needle) == NEEDLE_BYTES
                    assert len(set(needle)) > 2
                    self._needles[f"{name} of {file.shard}"] = needle
        self._needles["run key"] = b"".join((home / "runs" / run / "run.key").read_bytes().splitlines()[1:-1])
        self._token = (cluster / "token").read_bytes()

    def must_find_what_is_planted(self) -> None:
        """A search that finds nothing must be able to find something."""
        planted = self._cluster / "planted"
        for needle in (next(iter(self._needles.values())), list(self._needles.values())[-2], self._token):
            planted.write_bytes(b"x" * 5000 + needle + b"y")
            self.look()
            assert self.found, "the search is blind"
            self.found.clear()
            planted.unlink()

    def look(self) -> None:
        self.looked += 1
        files = [path for path in self._cluster.rglob("*") if path.is_file() and not path.is_symlink()]
        for path in [*files, self._driver / "log", self._driver / "status.json"]:
            with contextlib.suppress(OSError):
                content = path.read_bytes()
                self._search(content, str(path))
                if path != self._cluster / "token" and self._token in content:
                    self.found.add(f"the token in {path}")
        self.files_seen = max(self.files_seen, len(files))
        members = processes_of(self._cluster)
        self.processes_seen = max(self.processes_seen, len(members))
        self.listeners |= listeners(members)
        for process in members:
            for name in ("environ", "cmdline"):
                with contextlib.suppress(OSError):
                    content = Path(f"/proc/{process.pid}/{name}").read_bytes()
                    self._search(content, f"{name} of a process")
                    if self._token in content:
                        self.found.add(f"the token in {name} of a process")

    def _search(self, content: bytes, place: str) -> None:
        self.found |= {f"{name} in {place}" for name, needle in self._needles.items() if needle in content}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    line = CommandLine(tmp_path_factory.mktemp("story") / "cloister")
    try:
        yield Story(line)
    finally:
        line.run("down")


def test_the_ledger_is_charged_what_was_planned_and_no_more(story: Story) -> None:
    assert story.shown["state"] == "finished"
    assert story.shown["steps_committed"] == story.shown["steps"]
    assert 2.9 < story.shown["epsilon_charged"] <= 3.0
    assert story.line.budget_left() == pytest.approx(7 - story.shown["epsilon_charged"])
    assert story.shown["epsilon_spent"] == story.shown["epsilon_charged"]


def test_the_cluster_of_the_run_is_gone(story: Story) -> None:
    assert Daemon(story.line.home / "runs" / story.run / "driver").process() is None
    serving = Daemon(story.line.home / "endpoints" / story.endpoint / "serving").process()
    assert serving is not None
    assert len(story.clusters()) == 1, "only the serving cluster is left"


def test_a_replica_listens_on_loopback_only_and_its_grpc_port_wants_the_token(story: Story) -> None:
    """Ray 2.60 would bind that port to all interfaces: `LoopbackReplica` keeps it in."""
    supervisor = Daemon(story.line.home / "endpoints" / story.endpoint / "serving").process()
    assert supervisor is not None
    (guardian,) = supervisor.children()
    sockets = listeners([supervisor, *supervisor.children(recursive=True)])
    assert len(sockets) >= 8
    assert [each for each in sockets if not each.on_loopback] == []
    replicas = [each for each in sockets if each.title.startswith("ray::ServeReplica:cloister:")]
    own = [each for each in replicas if not story.url.endswith(f":{each.port}")]
    assert 1 <= len(own) < len(replicas)
    folder = Path(guardian.environ()["CLOISTER_CLUSTER"])
    authority, certificate, key, token = ((folder / n).read_bytes() for n in ("ca.crt", "tls.crt", "tls.key", "token"))
    mutual = grpc.ssl_channel_credentials(authority, key, certificate)

    def handle_request(credentials: grpc.ChannelCredentials | None, token: bytes | None) -> grpc.StatusCode:
        metadata = [("authorization", f"Bearer {token.decode()}")] if token else []
        with grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address) as channel:
            try:
                channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=5, metadata=metadata)
            except grpc.RpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    answered = 0
    for each in own:
        address = f"127.0.0.1:{each.port}"
        assert handle_request(None, token) is grpc.StatusCode.UNAVAILABLE
        assert handle_request(grpc.ssl_channel_credentials(authority), token) is grpc.StatusCode.UNAVAILABLE
        # UNKNOWN: it got in, and sent nothing that unpickles. Ray's own port does not know the method.
        if handle_request(mutual, token) is grpc.StatusCode.UNKNOWN:
            answered += 1
            assert handle_request(mutual, None) is grpc.StatusCode.UNAUTHENTICATED
            assert handle_request(mutual, b"0" * 64) is grpc.StatusCode.UNAUTHENTICATED
    assert answered == 1


def test_the_model_is_as_accurate_as_was_promised(story: Story) -> None:
    (model,) = story.line.json("model", "list", who="ed")
    accuracy = model["metrics"]["accuracy"]
    assert accuracy["low"] <= 0.875, "what privacy leaves of it is 0.858"
    assert accuracy["high"] >= 0.84
    assert accuracy["high"] - accuracy["low"] < 0.04
    assert model["stage"] == "production"


def test_both_audits_of_the_run_are_in_its_signed_provenance(story: Story) -> None:
    provenance = story.line.json("model", "show", "adult@1", who="rita")["provenance"]
    privacy = json.loads(unb64(provenance["payload"]))["predicate"]["privacy"]
    audit = privacy["audit"]
    assert audit["verdict"] == "not falsified"
    assert audit["mechanism"]["ratio"] >= 0.8, "it sees most of what there is to see"
    assert audit["one_run"]["epsilon_lower_bound"] <= privacy["epsilon"] == story.shown["epsilon_charged"]
    assert audit["one_run"]["canaries"] == 200
    told = story.said["cloister model show"]
    assert "not falsified" in told
    assert "PRV" in told
    assert "an empty batch is a step" in told


def test_no_row_key_or_token_is_in_any_log_or_record(story: Story) -> None:
    """Ray's own logs went with the cluster: what stays on disk is looked through here, the job's output too."""
    secrets = EmbeddedKeys(story.line.home / "authority" / "keys")
    needles = [
        story.line.signing_key()[0],
        secrets.secret("ca"),
        (story.line.home / "identities" / "ed.key").read_bytes(),
    ]
    needles += [b"Adm-clerical,Not-in-family", b"77516"]  # a row of the table
    haystacks = [said.encode() for said in story.said.values()]
    haystacks += [path.read_bytes() for path in story.line.home.rglob("log") if path.is_file()]
    haystacks += [path.read_bytes() for path in (story.line.home / "authority").glob("state.db*")]
    for needle in needles:
        body = b"".join(needle.splitlines()[1:-1]) if needle.startswith(b"-----") else needle
        assert not any(body in haystack for haystack in haystacks)


def test_every_step_left_an_entry(story: Story) -> None:
    entries = story.line.json("audit", "search", "--limit", "1000")
    actions = {(entry["action"], entry["outcome"]) for entry in entries}
    for action in ("identity:register", "dataset:seal", "budget:set", "train:submit", "run:lease", "run:work",
                   "approval:vote", "model:promote", "endpoint:deploy", "endpoint:lease", "endpoint:work",
                   "node:register", "node:certify", "token:issue"):  # fmt: skip
        assert (action, "success") in actions
    for action in ("train:submit", "model:promote", "approval:vote"):
        assert (action, "denied") in actions


def test_answers_are_labels_and_rounded_probabilities_only(story: Story) -> None:
    answer = story.post(story.token("carl"))
    assert answer.status_code == 200
    outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    assert outputs.keys() == {"label", "probability"}
    assert set(outputs["label"]) <= {"<=50K", ">50K"}
    assert all(round(p, 2) == p and 0.5 <= p <= 1 for p in outputs["probability"])


def test_without_a_token_401_and_with_the_wrong_role_403(story: Story) -> None:
    assert story.post(None).status_code == 401
    assert story.post("nonsense").status_code == 401
    assert story.post(story.token("ed")).status_code == 403
    wrong_audience = story.line.json("token", "--for", "authority", who="carl")["access_token"]
    assert story.post(wrong_audience).status_code == 401


def test_an_expired_token_is_refused_by_the_endpoint(story: Story, tmp_path: Path) -> None:
    private, key_id = story.line.signing_key()
    issuer = json.loads((story.line.home / "client" / "authority.json").read_text())["url"]
    old = tokens.issue(
        private, issuer=issuer, subject="carl", audience=tokens.INFERENCE_AUDIENCE, roles=["consumer"],
        lifetime_s=60, now=time.time() - 120, key_id=key_id,
    )  # fmt: skip
    with InferenceClient(story.url, old, story.ca) as client, pytest.raises(TokenExpiredError):
        client.infer("adult", ROWS)
    (tmp_path / "token").write_text(old)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))
    said = story.line.refused(
        "infer", "adult", rows, "--url", story.url, "--token-file", tmp_path / "token", who="carl"
    )
    assert "expired" in said


def test_who_is_shut_out_or_loses_their_role_is_refused_by_the_replica_soon(story: Story) -> None:
    """Within a second where the machine has the time: `test_watch` has what that rests on."""
    for name, *end in (("caro", "revoke", "caro"), ("cleo", "roles", "cleo", "--role", "auditor")):
        story.line.json("identity", "add", name, "--role", "consumer")
        token = story.token(name)
        assert story.post(token).status_code == 200
        story.line.json("identity", *end)
        wait_for(lambda token=token: story.post(token).status_code == 401)


def test_a_new_signing_key_is_known_to_the_replica_and_the_old_tokens_live_on(story: Story) -> None:
    story.line.json("identity", "add", "cora", "--role", "consumer")
    before = story.token("cora")
    story.line.json("key", "rotate", "--tokens")
    after = story.token("cora")
    wait_for(lambda: story.post(after).status_code == 200)
    assert story.post(before).status_code == 200


def test_beyond_the_quota_429_says_when_to_come_back(story: Story) -> None:
    token = story.token("carl")
    answers = [story.post(token) for _ in range(12)]
    assert sum(answer.status_code == 200 for answer in answers) <= 20
    refused = answers[-1]
    if refused.status_code == 200:  # a new window opened in between
        refused = [story.post(token) for _ in range(12)][-1]
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert story.post(story.token("ed")).status_code == 403, "somebody else's refusal is their own"


def test_the_reference_verifier_accepts_the_exported_model(story: Story, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    story.line.json("model", "export", "adult@1", "--to", folder, who="ed")
    verify = [sys.executable, "-m", "model_signing", "verify", "key", str(folder / "model"), "--signature",
              str(folder / "model.sig"), "--public_key", str(folder / "release.pub")]  # fmt: skip
    done = subprocess.run(verify, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    onnx = folder / "model" / "model.onnx"
    whole = onnx.read_bytes()
    onnx.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert subprocess.run(verify, capture_output=True).returncode != 0


def test_no_plaintext_model_is_on_disk(story: Story, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    story.line.json("model", "export", "adult@1", "--to", folder, who="ed")
    middle = (folder / "model" / "model.onnx").read_bytes()
    probe = middle[len(middle) // 2 :][:64]  # a piece of the weights
    places = [story.line.home, *story.clusters()]
    files = [path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    for path in files:
        try:
            assert probe not in path.read_bytes(), path
        except OSError:
            continue  # gone meanwhile


def test_a_changed_model_is_not_deployed(story: Story) -> None:
    (blob,) = (story.line.home / "authority" / "blobs" / "models").rglob("*.sealed")
    whole = blob.read_bytes()
    endpoints = [row["endpoint"] for row in story.line.json("serve", "status") if row["state"] == "active"]
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert "changed" in story.line.refused("model", "verify", "adult@1", who="ed")
        port = str(free_port())
        said = story.line.refused("serve", "deploy", "adult", "--port", port, timeout_s=600)
        assert "bytes changed" in said
    finally:
        blob.write_bytes(whole)
    assert [row["endpoint"] for row in story.line.json("serve", "status") if row["state"] == "active"] == endpoints
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"https://127.0.0.1:{port}/v2", verify=False)  # noqa: S501  (nobody is there)


def test_a_changed_shard_ends_the_run_and_costs_no_epsilon(story: Story) -> None:
    before = story.line.budget_left()
    victim = next(path for path in sorted(story.line.blobs()) if path.name == "train-002.confidential.parquet")
    whole = victim.read_bytes()
    victim.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    try:
        run = story.submit()["run"]
        assert story.line.budget_left() == pytest.approx(before - 3)
        said = story.line.refused("train", "watch", run, who="ed", timeout_s=600)
    finally:
        victim.write_bytes(whole)
    assert "train-002/confidential" in said
    assert "cloister data verify adult@1" in said
    assert story.line.budget_left() == pytest.approx(before)
    assert len(story.line.json("model", "list", who="ed")) == 1, "no model came of it"


def test_rays_own_command_trains_with_the_second_engine_and_nothing_leaks_meanwhile(
    story: Story, tmp_path: Path
) -> None:
    spec = tmp_path / "short.yaml"
    changes = {"epochs: 20": "epochs: 1", "epsilon: 3.0": "epsilon: 0.5", "delta: 1.0e-5": "delta: 4.0e-6",
               "engine: bookkeeping": "engine: opacus"}  # fmt: skip
    text = SPEC.read_text()
    for first, second in changes.items():
        text = text.replace(first, second)
    spec.write_text(text)
    held = story.submit(spec, "--hold")
    command = ["job", "submit", "--working-dir", held["jobs"], "--", "python", "train.py", "--run", held["run"]]
    with (tmp_path / "output").open("wb") as output:
        job = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *command],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **held["environment"]},
            stdout=output,
            stderr=output,
        )
        leaks = Leaks(story.line.home, Path(held["environment"]["RAY_AUTH_TOKEN_PATH"]).parent, held["run"])
        leaks.must_find_what_is_planted()
        while job.poll() is None:
            leaks.look()
            time.sleep(1)
    assert job.returncode == 0, (tmp_path / "output").read_text()[-3000:]
    assert leaks.looked > 5
    assert leaks.files_seen > 100
    assert leaks.processes_seen > 10
    assert leaks.found == set()
    assert {each for each in leaks.listeners if not each.on_loopback} == set()
    # Each of the two ranks: Ray's port and the process group's. Fewer, and the group was never looked at.
    assert len({each.port for each in leaks.listeners if "TrainWorker" in each.title}) == 4, leaks.listeners
    assert story.line.json("train", "watch", held["run"], who="ed")["state"] == "finished"
    assert [row["model"] for row in story.line.json("model", "list", who="ed")] == ["adult@1", "adult@2"]
    assert re.search(r"engine +opacus\n", story.line.run("model", "show", "adult@2", who="rita").stdout)


def test_a_run_can_be_stopped_and_its_epsilon_is_free_again(story: Story) -> None:
    before = story.line.budget_left()
    run = story.submit()["run"]
    story.line.refused("train", "stop", run, who="rita")
    shown = story.line.json("train", "stop", run, who="ed")
    assert shown["state"] == "stopped"
    assert story.line.budget_left() == pytest.approx(before)
    assert Daemon(story.line.home / "runs" / run / "driver").process() is None


DIES_BEFORE_IT_STARTS = """
import os, signal
from cloister.cli import main, train
train._start = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
main()
"""


LOSES_THE_ANSWER = """
from cloister.cli import main
from cloister.client.authority import AuthorityClient
from cloister.errors import CloisterError
post = AuthorityClient.post
def lossy(self, path, *body):
    answer = post(self, path, *body)
    if path == "/v1/runs":
        raise CloisterError("the server answered 504")
    return answer
AuthorityClient.post = lossy
main()
"""


def test_a_run_that_was_accepted_and_whose_answer_was_lost_holds_nothing(story: Story) -> None:
    before, runs = story.line.budget_left(), len(story.line.json("train", "list", who="ed"))
    story.agree()
    lost = story.line.run("train", "submit", SPEC, who="ed", program=LOSES_THE_ANSWER)
    assert (lost.returncode, "504" in lost.stderr) == (1, True)
    newest, *others = story.line.json("train", "list", who="ed")
    assert (len(others), newest["state"], newest["settled"]) == (runs, "failed", True)
    assert story.line.budget_left() == pytest.approx(before)


def test_who_is_killed_while_submitting_can_still_end_the_run(story: Story) -> None:
    before, known = story.line.budget_left(), {row["run"] for row in story.line.json("train", "list", who="ed")}
    story.agree()
    died = story.line.run("train", "submit", SPEC, who="ed", program=DIES_BEFORE_IT_STARTS)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert story.line.budget_left() == pytest.approx(before - 3)
    (run,) = {row["run"] for row in story.line.json("train", "list", who="ed")} - known
    assert story.line.json("train", "stop", run, who="ed")["state"] == "stopped"
    assert story.line.budget_left() == pytest.approx(before)


def test_a_killed_supervisor_takes_its_cluster_along_and_the_run_settles(story: Story) -> None:
    before, clusters = story.line.budget_left(), story.clusters()
    run = story.submit()["run"]
    wait_for(lambda: story.clusters() > clusters)
    supervisor = Daemon(story.line.home / "runs" / run / "driver").process()
    assert supervisor is not None
    supervisor.kill()
    said = story.line.refused("train", "watch", run, who="ed")
    assert "supervisor was killed" in said
    assert story.line.budget_left() == pytest.approx(before)
    wait_for(lambda: story.clusters() == clusters)


def test_the_log_verifies_offline_and_down_leaves_nothing(story: Story, tmp_path: Path) -> None:
    """Last: it ends the world of this module."""
    line = story.line
    line.json("audit", "export", tmp_path / "log.jsonl")
    line.json("data", "list", who="ed")  # leaves an entry that the export does not have
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    try:
        stopped = line.json("down")["stopped"]
        assert "authority" in stopped
        wait_for(lambda: processes_of(line.home) == [])
        assert story.clusters() == set()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    report = line.json("audit", "verify", tmp_path / "log.jsonl")
    assert report["entries"] > 50
    assert line.json("audit", "verify")["entries"] > report["entries"], "this machine's own log has grown since"
    said = line.refused("audit", "verify", tmp_path / "log.jsonl")
    assert "rollback" in said
