"""The log says everything that was done, nothing that is secret, and shows when somebody has changed it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from authority_world import DELTA, Person, World, receiver, rows_of_adult
from cloister.audit.checkpoint import parse_verifier_key
from cloister.audit.verify import LogReport, verify_log
from cloister.authority.log import read_export
from cloister.canonical import b64, unb64
from cloister.errors import IntegrityError, NotFoundError


def verify(exported: dict[str, Any], trusted: str | None = None) -> LogReport:
    _, public = parse_verifier_key(exported["verifier_key"])
    entries = [unb64(entry) for entry in exported["entries"]]
    return verify_log(entries, exported["checkpoints"], public, exported["origin"], trusted=trusted)


def from_files(world: World) -> dict[str, Any]:
    return read_export(world.directory / "state.db", world.directory / "log.pub")


def change(world: World, sql: str) -> None:
    database = sqlite3.connect(world.directory / "state.db")
    with database:
        assert database.execute(sql).rowcount >= 1
    database.close()


def everything(world: World) -> tuple[str, str]:
    """The whole story once: a run that fails, one that is released, an endpoint, quota, export."""
    failed = world.submit()
    world.lease(failed)
    world.post(failed, f"/v1/runs/{failed}/failure", {"error": {"kind": "InputError", "error": "SECRET row 17"}})
    run = world.train()
    world.release()
    endpoint = world.deploy()
    world.client(endpoint).lease_model(endpoint)
    world.post(endpoint, f"/v1/endpoints/{endpoint}/quota", {"subject": "carl", "wanted": 5})
    world.post("ed", "/v1/models/adult/versions/1/export", receiver())
    world.post("operator", f"/v1/endpoints/{endpoint}/stop")
    return run, endpoint


def test_every_change_leaves_exactly_one_entry(world: World) -> None:
    size = len(world.log())
    run, endpoint = everything(world)
    found = [(e.actor, e.action, e.outcome) for e in world.log()[size:] if e.action != "token:issue"]
    failed = found[1][0]
    assert found == [
        ("ed", "train:submit", "success"),
        (failed, "run:work", "success"),  # lease
        (failed, "run:work", "success"),  # failure
        ("ed", "train:submit", "success"),
        (run, "run:work", "success"),  # lease
        (run, "run:work", "success"),  # block
        (run, "run:work", "success"),  # model
        ("ed", "model:promote", "denied"),
        ("rita", "model:approve", "success"),
        ("ed", "model:promote", "success"),
        ("operator", "endpoint:deploy", "success"),
        (endpoint, "endpoint:work", "success"),  # lease
        (endpoint, "endpoint:work", "success"),  # quota
        ("ed", "model:export", "success"),
        ("operator", "endpoint:stop", "success"),
    ]
    assert all(entry.rule for entry in world.log() if entry.outcome == "success")
    counts = world.counts()
    assert counts["log_entries"] == counts["log_checkpoints"]


def test_sealing_and_budget_are_on_record_too(empty_world: World) -> None:
    with empty_world.recorded("olga", "dataset:seal"):
        empty_world.seal()
    with empty_world.recorded("olga", "budget:set"):
        empty_world.set_budget(4.0, DELTA)
    assert empty_world.log()[-1].details == {"epsilon": 4.0, "delta": DELTA}
    with empty_world.recorded("operator", "identity:register"):
        person = Person("nina", ["auditor"])
        empty_world.post("operator", "/v1/identities",
                         {"name": "nina", "roles": ["auditor"], "public_key": person.public})  # fmt: skip
    issued = {entry.actor for entry in empty_world.log() if entry.action == "token:issue"}
    assert issued == {"operator", "olga"}


def test_no_entry_holds_a_key_a_token_or_a_value(world: World) -> None:
    run = world.submit()
    lease = world.lease(run)
    assert lease.model_key is not None
    everything(world)
    keys = [*lease.keys.values(), lease.model_key, (world.directory / "keys" / "root.key").read_bytes()]
    keys += [world.authority.core.keys.secret(name) for name in ("log", "receiving", "release", "tokens", "ca")]
    tokens = [token for token, _ in world.tokens.values()]
    secrets = [*tokens, "SECRET", "PRIVATE", *(b64(key) for key in keys), *(key.hex() for key in keys)]
    secrets += [person.private.decode().splitlines()[1] for person in world.people.values()]
    text = "\n".join(unb64(entry).decode() for entry in from_files(world)["entries"])
    assert not [secret for secret in secrets if secret in text]
    rows = rows_of_adult().decode().splitlines()
    assert not any(row in text for row in rows)
    database = (world.directory / "state.db").read_bytes() + (world.directory / "state.db-wal").read_bytes()
    for key in keys:
        assert key not in database
        assert b64(key).encode() not in database
    assert not [token for token in tokens if token.encode() in database]


def test_an_export_verifies_and_holds_its_own_entry(world: World) -> None:
    everything(world)
    exported = world.get("ada", "/v1/log/export")
    report = verify(exported)
    assert report.size == report.checkpoints_checked == len(world.log())
    last = json.loads(unb64(exported["entries"][-1]))
    assert (last["actor"], last["action"], last["details"]) == ("ada", "audit:read", {"step": "export"})
    assert verify(from_files(world)) == report


def test_search_shows_the_newest_matches_only(world: World) -> None:
    everything(world)
    found = world.get("rita", "/v1/log?action=model:&limit=2")
    assert [entry["action"] for entry in found] == ["model:promote", "model:export"]
    assert world.get("rita", "/v1/log?actor=nobody") == []
    assert len(world.get("rita", "/v1/log?limit=0")) == 1


@pytest.mark.parametrize(
    "sql",
    [
        """UPDATE log_entries SET entry = replace(entry, 'operator', 'mallorys') WHERE "index" = 3""",
        """UPDATE log_entries SET entry = CAST(replace(CAST(entry AS TEXT), '"operator"', '"somebody"') AS BLOB)
           WHERE "index" = 0""",
        'DELETE FROM log_entries WHERE "index" = 2',
        'DELETE FROM log_entries WHERE "index" = (SELECT max("index") FROM log_entries)',
        'UPDATE log_entries SET "index" = "index" + 1000 WHERE "index" = 1',
        "UPDATE log_checkpoints SET note = replace(note, 'cloister.dev', 'elsewhere.dev') WHERE size = 2",
        "DELETE FROM log_checkpoints WHERE size = (SELECT max(size) FROM log_checkpoints)",
        "DELETE FROM log_checkpoints",
        """INSERT INTO log_entries SELECT "index" + 1000, entry FROM log_entries WHERE "index" = 0""",
    ],
)
def test_a_changed_row_is_found(world: World, sql: str) -> None:
    verify(from_files(world))
    change(world, sql)
    with pytest.raises(IntegrityError):
        verify(from_files(world))


def test_a_changed_entry_is_no_fault_of_the_search(world: World) -> None:
    for entry in ("'{'", "x'ff'", "5", "'[]'", "replace(entry, 'actor', 'reactor')"):
        change(world, f'UPDATE log_entries SET entry = {entry} WHERE "index" = 3')  # noqa: S608  (the list above)
        assert world.refused(422, "rita", "GET", "/v1/log") == "IntegrityError"


def test_a_damaged_tree_stops_everything(world: World) -> None:
    """An authority cannot go on writing above a log that was cut."""
    change(world, "UPDATE log_checkpoints SET tree = '[]' WHERE size = (SELECT max(size) FROM log_checkpoints)")
    before = world.content()
    answer = world.http.post("/v1/token", data={
        "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": world.assertion("ed"),
        "resource": "urn:cloister:authority",
    })  # fmt: skip
    assert answer.status_code == 422
    assert world.content() == before


def test_an_old_copy_of_the_database_is_found_by_who_remembers(world: World, tmp_path: Path) -> None:
    old = tmp_path / "old.db"
    source, target = sqlite3.connect(world.directory / "state.db"), sqlite3.connect(old)
    source.backup(target)
    source.close()
    target.close()
    everything(world)
    remembered = from_files(world)["checkpoints"][-1]
    assert remembered == world.http.get("/v1/checkpoint").json()["note"]
    world.authority.close()
    for name in ("state.db", "state.db-wal", "state.db-shm"):
        (world.directory / name).unlink(missing_ok=True)
    shutil.copy(old, world.directory / "state.db")
    restored = from_files(world)
    verify(restored)  # by itself the old copy is flawless
    with pytest.raises(IntegrityError, match="rollback"):
        verify(restored, trusted=remembered)
    (world.directory / "keys" / "anchor.json").unlink()  # as whoever restores the keys' folder too
    again = World(world.directory, world)
    again.submit()
    for _ in range(30):
        again.set_budget()
    with pytest.raises(IntegrityError, match="fork"):
        verify(from_files(again), trusted=remembered)
    again.authority.close()


def test_a_log_without_its_public_key_is_refused(world: World) -> None:
    with pytest.raises(NotFoundError):
        read_export(world.directory / "state.db", world.directory / "missing.pub")


def test_an_empty_log_has_no_checkpoint(tmp_path: Path) -> None:
    world = World(tmp_path / "authority")
    assert world.http.get("/v1/checkpoint").status_code == 404
    world.authority.close()
