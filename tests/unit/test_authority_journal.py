"""The log within the authority's transactions: one commit with the effect, proofs from few rows, a whole log only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from nacl.signing import SigningKey
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import func, insert, select, text

from cloister.audit import checkpoint, merkle
from cloister.audit.event import Event
from cloister.authority.journal import BLOCK, LOG_ORIGIN, Journal
from cloister.errors import CloisterError, InputError, IntegrityError
from cloister.stores.database import Database
from cloister.stores.tables import budgets, log_entries, log_nodes
from databases import Place

KEY = SigningKey(bytes(32))
PUBLIC = bytes(KEY.verify_key)


def event(index: int) -> Event:
    return Event(
        time="2026-11-22T09:30:00.000Z", actor="ada", action="lease.grant", resource="Dataset/adult@1",
        outcome="success", details={"step": index},
    )  # fmt: skip


def events(first: int, count: int) -> list[Event]:
    return [event(index) for index in range(first, first + count)]


def leaves(count: int) -> list[bytes]:
    return [merkle.leaf_hash(event(index).to_bytes()) for index in range(count)]


@pytest.fixture
def database(place: Place) -> Iterator[Database]:
    yield place.open()
    place.close()


@pytest.fixture
def small(tmp_path: Any) -> Iterator[Database]:
    """SQLite, with 600 entries."""
    database = Database(tmp_path / "state.db")
    with database.transaction() as connection:
        Journal(KEY).append(connection, events(0, 600))
    yield database
    database.close()


def test_entries_head_and_nodes_are_those_of_the_tree(database: Database) -> None:
    journal, size = Journal(KEY), 0
    for count in (1, 2, 0, 252, 1, 1, 300, 64):
        with database.transaction() as connection:
            assert journal.append(connection, events(size, count)).size == size + count
        size += count
        with database.reading() as connection:
            head = journal.head(connection)
        root = merkle.root_of(leaves(size))
        assert (head.size, head.root) == (size, root)
        assert checkpoint.verify(head.note, PUBLIC, LOG_ORIGIN) == checkpoint.Checkpoint(LOG_ORIGIN, size, root)
    with database.reading() as connection:
        rows = connection.execute(select(log_entries).order_by(log_entries.c["index"])).all()
        nodes = connection.execute(select(log_nodes).order_by(log_nodes.c["index"])).all()
    assert [(index, bytes(entry)) for index, entry in rows] == [(i, event(i).to_bytes()) for i in range(size)]
    blocks = [leaves(size)[first : first + BLOCK] for first in (0, 256)]
    assert [(level, index, bytes(value)) for level, index, value in nodes] == [
        (1, index, merkle.root_of(block)) for index, block in enumerate(blocks)
    ]


def test_many_entries_are_a_handful_of_round_trips(database: Database) -> None:
    """The PostgreSQL driver's own way of sending many rows is one round trip for each."""
    statements: list[str] = []
    with database.transaction() as connection:
        sqlalchemy_event.listen(connection, "after_cursor_execute", lambda *seen: statements.append(seen[2]))
        Journal(KEY).append(connection, events(0, 300))
    _head, entries, node, _new_head = statements
    assert entries.count("), (") == 299
    assert node.startswith("INSERT INTO log_nodes")


def test_proofs_hold_at_every_size_and_fit_into_few_rows(database: Database) -> None:
    journal, size, known = Journal(KEY), 700, leaves(700)
    with database.transaction() as connection:
        journal.append(connection, events(0, size))
    with database.reading() as connection:
        for other in (0, 1, 2, 255, 256, 257, 511, 512, 513, 699, 700):
            assert journal.root_at(connection, other) == merkle.root_of(known[:other])
            journal_proof = journal.consistency(connection, other, size)
            merkle.verify_consistency(other, size, merkle.root_of(known[:other]), merkle.root_of(known), journal_proof)
            for index in {0, other // 2, other - 1} - {-1}:
                if index < other:
                    proof = journal.inclusion(connection, index, other)
                    merkle.verify_inclusion(known[index], index, other, proof, merkle.root_of(known[:other]))
        for index, other in ((5, 5), (-1, 700)):
            with pytest.raises(InputError):
                journal.inclusion(connection, index, other)
        with pytest.raises(IntegrityError):
            journal.inclusion(connection, 5, 701)
        with pytest.raises(InputError):
            journal.consistency(connection, 3, 2)


def test_a_proof_reads_a_few_blocks_of_a_long_log(small: Database) -> None:
    read = 0
    with small.transaction() as connection:
        Journal(KEY).append(connection, events(600, 70_000))

    def count(*_: object) -> None:
        nonlocal read
        read += 1

    with small.reading() as connection:
        sqlalchemy_event.listen(connection, "after_cursor_execute", count)
        proof = Journal(KEY).inclusion(connection, 33_333, 70_600)
        head = Journal(KEY).head(connection)
    merkle.verify_inclusion(merkle.leaf_hash(event(33_333).to_bytes()), 33_333, 70_600, proof, head.root)
    assert read <= 8  # blocks of at most 256 rows: two for each of three levels; and the head


def test_entry_and_effect_are_one_commit(database: Database) -> None:
    journal = Journal(KEY)

    def spend(name: str) -> None:
        with database.transaction() as connection:
            connection.execute(insert(budgets).values(ledger=name, epsilon=1.0, delta=1e-6))
            journal.append(connection, events(0, 3))
            journal.append(connection, events(3, 1))  # twice in one transaction
            if name == "undone":
                raise RuntimeError

    with pytest.raises(RuntimeError):
        spend("undone")
    with database.reading() as connection:
        assert journal.head(connection).size == 0
        assert connection.execute(select(func.count()).select_from(log_entries)).scalar_one() == 0
    spend("done")
    with database.reading() as connection:
        assert journal.head(connection).root == merkle.root_of(leaves(4))


def test_two_journals_over_one_log_take_turns(database: Database) -> None:
    one, two = Journal(KEY), Journal(KEY)
    for place in range(0, 20, 2):
        for journal, index in ((one, place), (two, place + 1)):
            with database.transaction() as connection:
                assert journal.append(connection, [event(index)]).size == index + 1
    with database.reading() as connection:
        assert one.head(connection) == two.head(connection)
        assert one.head(connection).root == merkle.root_of(leaves(20))


HEAD = "SELECT size, tree, note FROM log_head"
ENTRIES = "SELECT * FROM log_entries"


@pytest.mark.parametrize(
    "sql",
    [
        'DELETE FROM log_entries WHERE "index" = 599',
        "DELETE FROM log_entries",
        "DELETE FROM log_head",
        "UPDATE log_head SET size = 599",
        "UPDATE log_head SET size = 0, tree = '[]'",
        "UPDATE log_head SET tree = '[]'",
        "UPDATE log_head SET tree = '[1, 2]'",
        "UPDATE log_head SET tree = replace(tree, 'a', 'b')",
        "UPDATE log_head SET tree = 'x'",
        "UPDATE log_head SET tree = '5'",
        "UPDATE log_head SET size = 'x'",
        "UPDATE log_head SET note = x'ff'",
        "UPDATE log_head SET note = ''",
        "UPDATE log_head SET note = replace(note, '600', '599')",
        "UPDATE log_head SET note = note || note",
        "INSERT INTO log_entries VALUES (600, x'00')",
        "INSERT INTO log_entries VALUES (10000, x'00')",
    ],
)
def test_nothing_is_appended_over_a_log_that_was_changed(small: Database, sql: str) -> None:
    warm = Journal(KEY)
    with small.reading() as connection:
        warm.head(connection)
    with small.transaction() as connection:
        assert connection.execute(text(sql)).rowcount >= 1
        before = connection.execute(text(HEAD)).all(), connection.execute(text(ENTRIES)).all()
    for journal in (warm, Journal(KEY)):
        with pytest.raises(IntegrityError), small.transaction() as connection:
            journal.append(connection, [event(600)])
        with pytest.raises(IntegrityError), small.reading() as connection:
            journal.head(connection)
    with small.reading() as connection:
        assert (connection.execute(text(HEAD)).all(), connection.execute(text(ENTRIES)).all()) == before


def test_a_head_of_another_key_is_not_built_upon(small: Database) -> None:
    with pytest.raises(IntegrityError), small.transaction() as connection:
        Journal(SigningKey(b"\x01" * 32)).append(connection, [event(600)])


def test_a_missing_node_or_entry_gives_no_proof(small: Database) -> None:
    with small.transaction() as connection:
        connection.execute(text('DELETE FROM log_entries WHERE "index" = 300'))
        connection.execute(text('DELETE FROM log_nodes WHERE "index" = 0'))
    with small.reading() as connection:
        for index in (300, 299, 5):
            with pytest.raises(IntegrityError):
                Journal(KEY).inclusion(connection, index, 600)
        with pytest.raises(IntegrityError):
            Journal(KEY).root_at(connection, 301)


def test_an_entry_in_the_way_is_an_error_and_not_overwritten(small: Database) -> None:
    """The check before is the first defence; the primary key is the second."""
    with small.transaction() as connection:
        connection.execute(insert(log_nodes).values(level=1, index=2, hash=b"x" * 32))
    with pytest.raises(CloisterError), small.transaction() as connection:
        Journal(KEY).append(connection, events(600, 200))
    with small.reading() as connection:
        assert Journal(KEY).head(connection).size == 600
        assert connection.execute(select(func.count()).select_from(log_entries)).scalar_one() == 600
