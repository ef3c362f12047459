"""The log says everything that was done, nothing that is secret, and shows when somebody has changed it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from authority_world import DELTA, World, receiver, rows_of_adult
from cloister.audit import export, proof
from cloister.audit.verify import LogReport
from cloister.authority import log as log_module
from cloister.authority.log import Filter, read_export
from cloister.canonical import b64
from cloister.errors import InputError, IntegrityError
from cloister.stores.tables import log_entries, log_head, pseudonyms


def verify(exported: bytes, trusted: str | None = None) -> LogReport:
    return export.verify_export(*export.open_export(io.BytesIO(exported)), trusted=trusted)


def from_database(world: World) -> bytes:
    """An export as whoever has the database makes it."""
    header, entries = read_export(world.authority.core.database, world.authority.log.verifier_key)
    return header.to_line() + b"".join(entry + b"\n" for entry in entries)


def header_of(exported: bytes) -> export.Header:
    return export.open_export(io.BytesIO(exported))[0]


@contextlib.contextmanager
def small_pages(size: int) -> Iterator[None]:
    """So that a log of a test has more than one."""
    before, log_module.PAGE = log_module.PAGE, size
    try:
        yield
    finally:
        log_module.PAGE = before


def everything(world: World) -> tuple[str, str]:
    """The whole story once: a run that fails, one that is released, an endpoint, quota, export."""
    failed = world.submit()
    world.lease(failed)
    world.post(
        failed, f"/v1/runs/{failed}/end",
        world.end_body(failed) | {"error": {"kind": "InputError", "error": "SECRET row 17"}},
    )  # fmt: skip
    run = world.train()
    world.release()
    endpoint = world.deploy()
    world.client(endpoint).lease_model(endpoint)
    world.post(endpoint, f"/v1/endpoints/{endpoint}/quota", {"subject": "carl", "wanted": 5})
    world.post("ed", "/v1/models/adult/versions/1/export", receiver())
    world.post("operator", f"/v1/endpoints/{endpoint}/stop")
    return run, endpoint


def told(world: World, **wanted: Any) -> list[dict[str, Any]]:
    return world.authority.log.search(world.caller("ada"), Filter(**{"limit": 1000, **wanted}))


def test_every_change_leaves_exactly_one_entry(world: World) -> None:
    size = len(world.log())
    run, endpoint = everything(world)
    found = [(e["actor"], e["action"], e["outcome"]) for e in told(world) if e["index"] >= size]
    found = [entry for entry in found if entry[1] != "token:issue"]
    done = [entry for entry in found if entry[2] == "success"]
    for action, who, times in (
        ("train:submit", "ed", 2), ("run:lease", run, 1), ("run:work", run, 3), ("model:promote", "ed", 1),
        ("model:export", "ed", 1), ("endpoint:deploy", "operator", 1), ("endpoint:lease", endpoint, 1),
        ("endpoint:work", endpoint, 1), ("endpoint:stop", "operator", 1),
    ):  # fmt: skip
        assert done.count((who, action, "success")) == times, action
    assert {entry[2] for entry in found} <= {"success", "denied"}
    assert all(entry.rule for entry in world.log() if entry.outcome == "success")


def test_sealing_and_budget_are_on_record_too(empty_world: World) -> None:
    empty_world.seal()
    empty_world.set_budget(4.0, DELTA)
    sealed, budget = told(empty_world, actor="olga", action="dataset:seal"), told(empty_world, action="budget:set")
    assert [entry["outcome"] for entry in (*sealed, *budget)] == ["success"] * 3  # its keys, the version, its budget
    assert {"epsilon": 4.0, "delta": DELTA}.items() <= budget[-1]["details"].items()


def test_no_entry_holds_a_key_a_token_or_a_value(world: World) -> None:
    run = world.submit()
    lease = world.lease(run)
    assert lease.model_key is not None
    everything(world)
    keys = [*lease.keys.values(), lease.model_key, (world.directory / "keys" / "root.key").read_bytes()]
    keys += [world.authority.core.keys.secret(name) for name in ("log", "receiving", "ca", "node-ca")]
    tokens = [token for token, _ in world.tokens.values()]
    secrets = [*tokens, "SECRET", "PRIVATE", *(b64(key) for key in keys), *(key.hex() for key in keys)]
    secrets += [person.private.decode().splitlines()[1] for person in world.people.values()]
    text = from_database(world).decode()
    assert not [secret for secret in secrets if secret in text]
    assert not any(row in text for row in rows_of_adult().decode().splitlines())
    if world.place.server is None:
        database = (world.directory / "state.db").read_bytes() + (world.directory / "state.db-wal").read_bytes()
        for key in keys:
            assert key not in database
            assert b64(key).encode() not in database
        assert not [token for token in tokens if token.encode() in database]


def test_no_entry_names_a_person_or_an_address(world: World) -> None:
    everything(world)
    text = from_database(world).decode()
    people = [name for name, person in world.people.items() if person.roles not in (["run"], ["endpoint"], [])]
    assert not [name for name in people if f'"uid":"{name}"' in text or f":{name}@" in text]
    assert "127.0.0.1" not in text
    assert {entry["actor"] for entry in told(world)} >= {"ed", "rita", "operator"}


def test_a_shredded_person_is_nobody_in_every_answer(world: World) -> None:
    with world.authority.core.database.transaction() as connection:
        mine = pseudonyms.c.person == "ed"
        pseudonym = connection.execute(
            select(pseudonyms.c.pseudonym).where(mine & (pseudonyms.c.value == "ed"))
        ).scalar_one_or_none()
        assert pseudonym is None or pseudonym.startswith("p-")
    world.submit()
    assert told(world, actor="ed", action="train:submit")
    before = from_database(world)
    with world.authority.core.database.transaction() as connection:
        connection.execute(pseudonyms.delete().where(pseudonyms.c.person == "ed"))
    assert told(world, actor="ed", action="train:submit") == []
    assert all(entry["actor"].startswith("p-") for entry in told(world, action="train:submit"))
    assert verify(from_database(world), trusted=header_of(before).checkpoints[-1])


def test_an_export_verifies_and_holds_its_own_entry(world: World) -> None:
    everything(world)
    answer = world.ask("ada", "GET", "/v1/log/export")
    report = verify(answer.content)
    assert report.size == len(world.log())
    assert (world.log()[-1].action, world.log()[-1].details) == ("audit:export", {"form": "cloister"})
    assert verify(from_database(world)) == report
    with small_pages(7):
        assert from_database(world) == answer.content


def test_exports_for_collectors(world: World) -> None:
    world.set_budget()
    ocsf = world.ask("ada", "GET", "/v1/log/export?form=ocsf").content.splitlines()
    assert ocsf == world.entries()
    assert json.loads(ocsf[-1])["metadata"]["version"] == "1.9.0"
    cef = world.ask("ada", "GET", f"/v1/log/export?form=cef&first={len(ocsf)}").text.splitlines()
    assert len(cef) == 1
    assert cef[0].startswith("CEF:0|Cloister|authority|2|audit:export|")
    assert f" externalId={len(ocsf)} " in cef[0]
    for query in ("form=xml", "form=cloister&first=1", "form=", "first=-1"):
        assert world.refused(400, "ada", "GET", f"/v1/log/export?{query}") == "InputError"
    assert world.refused(403, "ed", "GET", "/v1/log/export") == "PermissionDeniedError"


def test_search_shows_the_newest_matches_only(world: World) -> None:
    everything(world)
    found = world.get("rita", "/v1/log?action=endpoint:&limit=2")
    assert [entry["action"] for entry in found][-1:] == ["endpoint:stop"]
    assert len(found) == 2
    assert world.get("rita", "/v1/log?actor=nobody") == []
    assert [e["action"] for e in world.get("rita", "/v1/log?actor=ed&action=model:export")] == ["model:export"]
    assert {entry["outcome"] for entry in told(world, outcome="denied")} <= {"denied"}
    for query in ("limit=0", "limit=1001", "since=yesterday", "until=2026-11-22", "action=" + "x" * 400):
        assert world.refused(400, "rita", "GET", f"/v1/log?{query}") == "InputError"


def test_search_reads_in_pages_and_stops_at_the_time_asked_for(world: World) -> None:
    everything(world)
    log = told(world)
    with small_pages(5):
        assert told(world) == log
        middle = log[len(log) // 2]["time"]
        assert told(world, since=middle) == [entry for entry in log if entry["time"] >= middle]
        assert told(world, until=middle) == [entry for entry in log if entry["time"] <= middle]
        assert told(world, since="2999-01-01T00:00:00Z") == []
        assert told(world, action="model:", limit=1) == [entry for entry in log if "model:" in entry["action"]][-1:]
    assert told(world, since=middle.replace("Z", "+00:00")) == told(world, since=middle)
    with pytest.raises(InputError):
        Filter(since="2026-11-22T09:30:00")  # in which zone?


def test_every_entry_can_be_proven_and_growth_too(world: World) -> None:
    early = header_of(from_database(world)).checkpoints[-1]
    everything(world)
    size, key = len(world.log()), world.authority.log.verifier_key
    for index in (0, 1, size // 2, size - 1):
        bundle = world.get("ada", f"/v1/log/entries/{index}/proof")
        found = proof.verify_inclusion(proof.parse(json.dumps(bundle).encode()), key)
        assert (found.index, found.event.to_bytes()) == (index, world.entries()[index])
    first = int(early.split("\n")[1])
    bundle = world.get("ada", f"/v1/log/consistency?first={first}")
    assert bundle["first"] == ""  # no witness saw that size
    grown = proof.verify_consistency(bundle | {"first": early}, key)
    assert (grown.first.size, grown.second.size) == (first, len(world.log()))
    for path in (f"entries/{size + 50}/proof", "consistency?first=0", f"consistency?first={size + 50}",
                 f"consistency?first=5&second={size + 50}", "consistency?first=5&second=4"):  # fmt: skip
        assert world.refused(404, "ada", "GET", f"/v1/log/{path}") == "NotFoundError"
    assert world.refused(400, "ada", "GET", "/v1/log/entries/-1/proof") == "InputError"
    assert world.refused(403, "ed", "GET", "/v1/log/entries/0/proof") == "PermissionDeniedError"


def test_the_checkpoint_is_public_and_the_newest(world: World) -> None:
    shown = world.http.get("/v1/checkpoint").json()
    assert shown == {"note": header_of(from_database(world)).checkpoints[-1], "cosigned": ""}


def tamper(world: World, what: str) -> None:
    index = log_entries.c["index"]
    with world.place.raw() as connection:
        third = bytes(connection.execute(select(log_entries.c.entry).where(index == 3)).scalar_one())
        last = connection.execute(select(func.max(index))).scalar_one()
        statement = {
            "flip": log_entries.update().where(index == 3).values(entry=third[:-2] + b"~}"),
            "replace": log_entries.update().where(index == 2).values(entry=third),
            "delete": log_entries.delete().where(index == 2),
            "delete the last": log_entries.delete().where(index == last),
            "delete all": log_entries.delete(),
            "move": log_entries.update().where(index == 1).values({"index": last + 1000}),
            "add": log_entries.insert().values({"index": last + 1, "entry": third}),
            "add far away": log_entries.insert().values({"index": last + 1000, "entry": third}),
            "add before the first": log_entries.insert().values({"index": -1, "entry": third}),
            "two lines": log_entries.update().where(index == 3).values(entry=third + b"\n"),
            "no head": log_head.delete(),
            "head of another size": log_head.update().values(note=func.replace(log_head.c.note, "dev/log", "dev/lag")),
        }[what]
        assert connection.execute(statement).rowcount >= 1


TAMPERING = ("flip", "replace", "delete", "delete the last", "delete all", "move", "add", "add far away",
             "add before the first", "two lines", "no head", "head of another size")  # fmt: skip


@pytest.mark.parametrize("what", TAMPERING)
def test_a_changed_row_is_found(empty_world: World, what: str) -> None:
    verify(from_database(empty_world))
    tamper(empty_world, what)
    with pytest.raises(IntegrityError):
        verify(from_database(empty_world))


@pytest.mark.parametrize("what", ["flip", "replace"])
def test_a_changed_entry_gets_no_proof_and_is_no_fault_of_the_search(empty_world: World, what: str) -> None:
    tamper(empty_world, what)
    index = 3 if what == "flip" else 2
    assert empty_world.refused(422, "ada", "GET", f"/v1/log/entries/{index}/proof") == "IntegrityError"
    if what == "flip":
        assert empty_world.refused(422, "ada", "GET", "/v1/log?limit=1000") == "IntegrityError"


@pytest.mark.parametrize("what", ["delete the last", "delete all", "add", "add far away", "no head"])
def test_an_authority_does_not_go_on_above_a_log_that_was_cut(empty_world: World, what: str) -> None:
    tamper(empty_world, what)
    before = empty_world.content()
    answer = empty_world.exchange(empty_world.assertion("ed"))
    assert answer.status_code == 422
    assert empty_world.content() == before


def test_an_old_copy_of_the_database_is_found_by_who_remembers(empty_world: World, tmp_path: Path) -> None:
    old = empty_world.copy(tmp_path / "old")
    for _ in range(3):
        assert empty_world.exchange(empty_world.assertion("ed")).status_code == 200
    remembered = empty_world.http.get("/v1/checkpoint").json()["note"]
    assert remembered == header_of(from_database(empty_world)).checkpoints[-1]
    verify(from_database(old))  # by itself the old copy is flawless
    with pytest.raises(IntegrityError, match="rollback"):
        verify(from_database(old), trusted=remembered)
    for _ in range(30):
        assert old.exchange(old.assertion("rita")).status_code == 200
    verify(from_database(old))
    with pytest.raises(IntegrityError, match="fork"):
        verify(from_database(old), trusted=remembered)
    old.close()


def test_an_empty_log_has_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "authority").mkdir()
    world = World(tmp_path / "authority")
    assert world.http.get("/v1/checkpoint").status_code == 404
    with pytest.raises(IntegrityError, match="proves nothing"):
        verify(from_database(world))
    world.close()
