"""What people get wrong: refused in two lines with exit code 1, without a data value, and nothing is left behind."""

from __future__ import annotations

import gzip
import json
import os
import socket
import ssl
import stat
from pathlib import Path

import httpx
import pytest

from cloister.process import Daemon
from cloister.signing import tokens
from command_line import ADULT, CommandLine
from ports import free_port

SCHEMA = ADULT / "schema.yaml"


def altered(folder: Path, *replacements: tuple[str, str]) -> Path:
    """Adult as plain CSV with some text replaced once."""
    text = gzip.decompress((ADULT / "adult.csv.gz").read_bytes()).decode()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new, 1)
    file = folder / "rows.csv"
    file.write_text(text)
    return file


class Unchanged:
    """Nothing came of it: no dataset version, no blob, no epsilon spent."""

    def __init__(self, line: CommandLine) -> None:
        self._line = line
        self._before = self._now()

    def _now(self) -> tuple[object, ...]:
        return (
            [row["dataset"] for row in self._line.json("data", "list", who="olga")],
            self._line.blobs(),
            self._line.budget_left(),
            [row["run"] for row in self._line.json("train", "list", who="ed")],
        )

    def check(self) -> None:
        assert self._now() == self._before


def test_a_missing_file_is_named(line: CommandLine, tmp_path: Path) -> None:
    before = Unchanged(line)
    said = line.refused("data", "seal", tmp_path / "none.csv", "--schema", SCHEMA, who="olga")
    assert "none.csv" in said
    said = line.refused("data", "seal", ADULT / "adult.csv.gz", "--schema", tmp_path / "no.yaml", who="olga")
    assert "no.yaml" in said
    assert "nowhere.yaml" in line.refused("train", "plan", tmp_path / "nowhere.yaml", who="ed")
    before.check()


def test_a_wrong_column_name_is_named_with_the_closest_one(line: CommandLine, tmp_path: Path) -> None:
    before = Unchanged(line)
    said = line.refused("data", "seal", altered(tmp_path, ("workclass", "workclas")), "--schema", SCHEMA, who="olga")
    assert "workclass" in said
    before.check()


def test_a_value_out_of_bounds_is_placed_but_never_shown(line: CommandLine, tmp_path: Path) -> None:
    before = Unchanged(line)
    file = altered(tmp_path, ("\n39,State-gov", "\n391739,State-gov"))
    said = line.refused("data", "seal", file, "--schema", SCHEMA, who="olga")
    assert "'age'" in said
    assert "row 1" in said
    assert "391739" not in said
    before.check()


def test_an_unknown_category_is_placed_but_never_shown(line: CommandLine, tmp_path: Path) -> None:
    before = Unchanged(line)
    file = altered(tmp_path, ("Exec-managerial", "Spy-master"))
    said = line.refused("data", "seal", file, "--schema", SCHEMA, who="olga")
    assert "'occupation'" in said
    assert "Spy" not in said
    before.check()


def test_a_file_of_another_kind_behind_a_csv_name_is_refused(line: CommandLine, tmp_path: Path) -> None:
    before = Unchanged(line)
    (tmp_path / "rows.csv").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(99))
    assert "a program" in line.refused("data", "seal", tmp_path / "rows.csv", "--schema", SCHEMA, who="olga")
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("pipe.csv", "."):
        said = line.refused("data", "seal", tmp_path / name, "--schema", SCHEMA, who="olga")
        assert "no regular file" in said
        assert "no regular file" in line.refused("data", "inspect", tmp_path / name)
    before.check()


def test_inspection_shows_no_value_and_its_draft_does_not_seal(line: CommandLine, tmp_path: Path) -> None:
    before = Unchanged(line)
    file, draft = altered(tmp_path, ("Exec-managerial", "Spy-master")), tmp_path / "draft.yaml"
    done = line.run("data", "inspect", file, "--output", draft)
    assert done.returncode == 0
    assert "native-country" in done.stdout
    for value in ("Spy-master", "State-gov", "Bachelors", "77516"):
        assert value not in done.stdout + done.stderr + draft.read_text()
    assert stat.S_IMODE(draft.stat().st_mode) == 0o600
    assert "not valid: name" in line.refused("data", "seal", file, "--schema", draft, who="olga")
    text = draft.read_text()
    for field, stated in (("name:", "adult"), ("purpose:", "research"), ("region:", "eu"), ("retention:", "P1Y")):
        text = text.replace(f"{field}  ", f"{field} {stated} ", 1)
    draft.write_text(text)
    assert "not valid: columns.0.bounds" in line.refused("data", "seal", file, "--schema", draft, who="olga")
    assert "is there already" in line.refused("data", "inspect", file, "--output", draft)
    assert draft.read_text() == text
    assert line.json("data", "inspect", file)["rows"] == 10_000
    before.check()


def test_more_epsilon_than_is_left_is_refused_before_anything_starts(line: CommandLine, tmp_path: Path) -> None:
    before = Unchanged(line)
    spec = tmp_path / "greedy.yaml"
    spec.write_text((ADULT / "train.yaml").read_text().replace("epsilon: 3.0", "epsilon: 9.5"))
    assert "does not pay" in line.run("train", "plan", spec, who="ed").stdout
    said = line.refused("train", "submit", spec, who="ed")
    assert "9.5" in said
    assert "its budget is 7 " in said
    assert list((line.home / "runs").glob("*")) == []
    before.check()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("epsilon: 3.0", "epsilon: -1", "epsilon"),
        ("epsilon: 3.0", "epsilon: .nan", "epsilon"),
        ("label: income-per-year", "label: salary", "salary"),
        ("dataset: adult@1", "dataset: adult@9", "adult@9"),
        ("workers: 2", "workers: 40", "workers"),
        ("model:", "modell:", "there is no such field; did you mean model?"),
        ("dataset: adult@1", "dataset: [", "YAML"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(line: CommandLine, tmp_path: Path, old: str, new: str, named: str) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text((ADULT / "train.yaml").read_text().replace(old, new))
    assert named in line.refused("train", "plan", spec, who="ed")


def test_a_dead_authority_is_said_to_be_dead(line: CommandLine, tmp_path: Path) -> None:
    home = tmp_path / "elsewhere"
    (home / "client").mkdir(parents=True)
    (home / "identities").mkdir()
    key = line.home / "identities" / "olga.key"
    (home / "identities" / "olga.key").write_bytes(key.read_bytes())
    (home / "identities" / "olga.key").chmod(0o600)
    (home / "client" / "ca.pem").write_bytes((line.home / "client" / "ca.pem").read_bytes())
    (home / "client" / "authority.json").write_text(json.dumps({"url": f"https://127.0.0.1:{free_port()}"}))
    said = CommandLine(home).refused("data", "list", who="olga")
    assert "does not answer" in said
    assert "cloister up" in said


def test_no_authority_at_all_points_to_up(tmp_path: Path) -> None:
    assert "cloister up" in CommandLine(tmp_path / "new").refused("data", "list", who="olga")


def test_an_occupied_port_is_not_waited_for(tmp_path: Path) -> None:
    fresh = CommandLine(tmp_path / "fresh")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = fresh.refused("up", "--port", str(port))
    assert str(port) in said
    assert Daemon(fresh.home / "authority" / "daemon").process() is None
    assert not (fresh.home / "authority" / "state.db").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])  # noqa: S104  (that is the point)
def test_the_authority_does_not_leave_loopback_without_a_certificate(tmp_path: Path, host: str) -> None:
    fresh = CommandLine(tmp_path / "fresh")
    assert "TLS certificate" in fresh.refused("up", "--host", host, "--port", str(free_port()))
    assert not (fresh.home / "authority").exists()


def test_an_expired_token_is_called_expired(line: CommandLine, tmp_path: Path) -> None:
    private, key_id = line.signing_key()
    url = json.loads((line.home / "client" / "authority.json").read_text())["url"]
    old = tokens.issue(
        private, issuer=url, subject="olga", audience="urn:cloister:authority", roles=["data-owner"], lifetime_s=600,
        now=1_700_000_000, key_id=key_id,
    )  # fmt: skip
    answer = httpx.get(
        f"{url}/v1/datasets", headers={"Authorization": f"Bearer {old}"}, verify=str(line.home / "client" / "ca.pem")
    )
    assert answer.status_code == 401
    assert answer.json()["kind"] == "TokenExpiredError"
    assert "expired" in answer.json()["error"]
    assert answer.json()["hint"]


def test_a_changed_shard_is_found_without_any_key(line: CommandLine) -> None:
    victim = sorted(line.blobs())[0]
    whole = victim.read_bytes()
    try:
        for position in (0, len(whole) // 2, len(whole) - 1):
            broken = bytearray(whole)
            broken[position] ^= 1
            victim.write_bytes(broken)
            assert "changed since it was sealed" in line.refused("data", "verify", "adult@1", who="ed")
        victim.unlink()
        assert "missing" in line.refused("data", "verify", "adult@1", who="ed")
    finally:
        victim.write_bytes(whole)
    assert line.json("data", "verify", "adult@1", who="ed")["files"] == 15


def test_somebody_unknown_and_somebody_without_a_key_are_told_apart(line: CommandLine) -> None:
    assert "no key for nemo" in line.refused("data", "list", who="nemo")
    (line.home / "identities" / "ghost.key").write_bytes((line.home / "identities" / "carl.key").read_bytes())
    (line.home / "identities" / "ghost.key").chmod(0o600)
    assert "does not know this name" in line.refused("data", "list", who="ghost")


def test_a_key_file_open_to_others_is_not_used(line: CommandLine) -> None:
    key = line.home / "identities" / "carl.key"
    key.chmod(0o644)
    try:
        assert "chmod 600" in line.refused("data", "list", who="carl")
        assert "bad" in line.run("doctor").stdout
    finally:
        key.chmod(0o600)


def test_a_wrong_role_is_named(line: CommandLine, tmp_path: Path) -> None:
    before = Unchanged(line)
    said = line.refused("data", "seal", ADULT / "adult.csv.gz", "--schema", SCHEMA, who="ed")
    assert "engineer" in said
    assert "dataset:seal" in said
    assert "consumer" in line.refused("train", "plan", ADULT / "train.yaml", who="carl")
    assert "engineer" in line.refused("identity", "add", "mallory", "--role", "operator", who="ed")
    assert not (line.home / "identities" / "mallory.key").exists()
    before.check()


@pytest.mark.parametrize(
    "words",
    [
        ["data", "show", "adult"],
        ["data", "show", "adult@0"],
        ["data", "verify", "nothing@1"],
        ["train", "watch", "../../etc"],
        ["approve", "apr-0"],
        ["model", "promote", "adult@1"],
        ["serve", "deploy", "adult"],
        ["budget", "show", "nothing"],
    ],
)
def test_a_thing_that_does_not_exist_is_refused_like_everything_else(line: CommandLine, words: list[str]) -> None:
    who = {"approve": "rita", "serve": "operator"}.get(words[0], "ed")
    line.refused(*words, who=who)


@pytest.mark.parametrize("words", [["seal"], ["data", "seal"], ["up", "--port", "http"], ["train", "plan", "--wat"]])
def test_wrong_usage_is_refused_like_everything_else_with_exit_code_2(line: CommandLine, words: list[str]) -> None:
    assert "--help" in line.refused(*words, code=2)


@pytest.mark.parametrize("words", [[], ["data"]])
def test_who_asks_for_nothing_is_shown_what_there_is(line: CommandLine, words: list[str]) -> None:
    done = line.run(*words)
    assert done.returncode == 2
    assert "Commands" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_program_gets_its_errors_as_json(line: CommandLine) -> None:
    done = line.run("data", "show", "nothing@1", "--json", who="ed")
    assert done.returncode == 1
    assert done.stderr == ""
    assert json.loads(done.stdout)["kind"] == "NotFoundError"


def test_damaged_settings_are_refused(tmp_path: Path) -> None:
    fresh = CommandLine(tmp_path / "fresh")
    fresh.home.mkdir()
    (fresh.home / "config.yaml").write_text("authority: {prot: 1}")
    assert "authority.prot" in fresh.refused("up")


def test_a_missing_root_key_does_not_make_a_new_one(tmp_path: Path) -> None:
    fresh = CommandLine(tmp_path / "fresh")
    port = str(free_port())
    fresh.json("up", "--port", port)
    fresh.json("down")
    (fresh.home / "authority" / "keys" / "root.key").unlink()
    assert "root key" in fresh.refused("up", "--port", port)
    assert not (fresh.home / "authority" / "keys" / "root.key").exists()


def test_an_endpoint_does_not_share_a_port(line: CommandLine) -> None:
    before = line.json("serve", "status")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in line.refused("serve", "deploy", "adult", "--port", port)
    assert line.json("serve", "status") == before


def test_a_plan_touches_no_data(line: CommandLine) -> None:
    """It is made with every sealed file out of reach."""
    blobs = line.home / "authority" / "blobs"
    blobs.chmod(0o000)
    aside = blobs.with_name("aside")
    blobs.rename(aside)
    try:
        plan = line.json("train", "plan", ADULT / "train.yaml", who="ed")
    finally:
        aside.rename(blobs)
        blobs.chmod(0o700)
    assert plan["plan"]["epsilon_certified"] <= 3.0
    budget = plan["budget"]
    assert budget["before"]["epsilon_left"] - budget["after"]["epsilon_left"] == pytest.approx(3.0)
    assert line.json("audit", "search", "--action", "train:plan", "--limit", "1")[0]["actor"] == "ed"


def test_the_authority_speaks_tls_1_3_only(line: CommandLine) -> None:
    url = httpx.URL(json.loads((line.home / "client" / "authority.json").read_text())["url"])
    context = ssl.create_default_context(cafile=str(line.home / "client" / "ca.pem"))
    with (
        socket.create_connection((url.host, url.port)) as plain,
        context.wrap_socket(plain, server_hostname=url.host) as secure,
    ):
        assert secure.version() == "TLSv1.3"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((url.host, url.port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname=url.host)


def test_starting_and_stopping_are_on_record(tmp_path: Path) -> None:
    fresh = CommandLine(tmp_path / "fresh")
    port = str(free_port())
    fresh.json("up", "--port", port)
    fresh.json("down")
    fresh.json("up", "--port", port)
    actions = [entry["action"] for entry in fresh.json("audit", "search")]
    fresh.json("down")
    assert [action for action in actions if action.startswith("authority:")] == [
        "authority:start",
        "authority:stop",
        "authority:start",
    ]


def test_down_leaves_no_process_and_can_be_said_twice(tmp_path: Path) -> None:
    fresh = CommandLine(tmp_path / "fresh")
    fresh.json("up", "--port", str(free_port()))
    process = Daemon(fresh.home / "authority" / "daemon").process()
    assert process is not None
    assert fresh.json("down")["stopped"] == ["authority"]
    assert not process.is_running()
    assert fresh.json("down")["stopped"] == []
