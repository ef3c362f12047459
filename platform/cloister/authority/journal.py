"""The log inside the authority's own transactions: entries, the tree over them, and one signed state of it.

Guarantees: `append` adds entries and replaces the signed head in the transaction that it is given, so an effect and its
record are one commit; nothing is appended over a log whose head is not signed by this log's key, does not fit its tree
or does not end where the entries end; proofs read a few hundred rows, however long the log is.

Does not guarantee: that the database is the newest one. A copy from yesterday is a perfect log of yesterday: a witness,
and the key service's anchor, tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nacl.signing import SigningKey
from sqlalchemy import Connection, Row, func, insert, literal, select, update
from sqlalchemy.exc import IntegrityError as TakenError

from cloister.audit import checkpoint, merkle
from cloister.audit.checkpoint import Checkpoint
from cloister.audit.event import Event
from cloister.audit.merkle import CompactTree
from cloister.errors import IntegrityError
from cloister.stores.tables import log_entries, log_head, log_nodes

LOG_ORIGIN = "cloister.dev/log"
# `log_nodes` holds the roots of perfect subtrees of 256**level leaves, level 1 and up.
LEVEL_BITS = 8
BLOCK = 1 << LEVEL_BITS

_HEAD = 1  # the id of the one row of `log_head`
_HINT = "stop the authority, keep a copy of its state, and verify the log: cloister audit verify"


@dataclass(frozen=True, slots=True)
class Head:
    """The log as it is: `note` is the signed checkpoint over it, and empty only while the log is."""

    size: int
    root: bytes
    note: str


class Journal:
    """The one log of an authority, signed with `log_key`. Holds no state of its own: several may share a database."""

    def __init__(self, log_key: SigningKey) -> None:
        self._key = log_key
        self._public = bytes(log_key.verify_key)
        self._genuine = ""  # the last note that was found to be signed by our key

    @property
    def verifier_key(self) -> str:
        """The C2SP verifier key text of the log."""
        return checkpoint.verifier_key_text(LOG_ORIGIN, self._public)

    def append(self, connection: Connection, events: Sequence[Event]) -> Head:
        """Add `events` in the transaction of their effect, and sign the new tree once. Returns the log with them.

        Raises:
            IntegrityError: the log in the database is not whole; nothing was appended to it.
        """
        tree, note = self._tree(connection)
        first = tree.size
        if not events:
            return Head(first, tree.root(), note)
        entries = [event.to_bytes() for event in events]
        nodes: list[dict[str, object]] = []

        def completed(height: int, index: int, value: bytes) -> None:
            level, rest = divmod(height, LEVEL_BITS)
            if not rest:
                nodes.append({"level": level, "index": index, "hash": value})

        for entry in entries:
            tree.append_hash(merkle.leaf_hash(entry), completed)
        root = tree.root()
        note = checkpoint.sign(Checkpoint(LOG_ORIGIN, tree.size, root), self._key, LOG_ORIGIN)
        head = {"size": tree.size, "tree": tree.to_hex(), "note": note}
        try:
            # With RETURNING, SQLAlchemy sends many rows in one statement to every database.
            connection.execute(
                insert(log_entries).returning(log_entries.c["index"]),
                [{"index": index, "entry": entry} for index, entry in enumerate(entries, first)],
            )
            if nodes:
                connection.execute(insert(log_nodes).returning(log_nodes.c["index"]), nodes)
            if first == 0:
                connection.execute(insert(log_head).values(id=_HEAD, **head))
        except TakenError:
            raise _broken("the log already has an entry where the next one goes") from None
        if first != 0:
            old = (log_head.c.id == _HEAD) & (log_head.c.size == first)
            if connection.execute(update(log_head).where(old).values(**head)).rowcount != 1:
                raise _broken("the log's head changed while it was appended to")
        self._genuine = note
        return Head(tree.size, root, note)

    def head(self, connection: Connection) -> Head:
        """The signed state of the log.

        Raises:
            IntegrityError: it is not signed by this log's key, or does not fit the tree or the entries.
        """
        tree, note = self._tree(connection)
        return Head(tree.size, tree.root(), note)

    def root_at(self, connection: Connection, size: int) -> bytes:
        """The root over the first `size` entries, as they are in the database now. Raises as `inclusion`."""
        return merkle.root_from(size, _Nodes(connection))

    def inclusion(self, connection: Connection, index: int, size: int) -> list[bytes]:
        """The RFC 6962 proof that entry `index` is in the tree of the first `size` entries.

        Raises:
            InputError: there is no such entry.
            IntegrityError: a row that the proof needs is missing.
        """
        return merkle.inclusion_proof(index, size, _Nodes(connection, self._tree(connection)[0]))

    def consistency(self, connection: Connection, first: int, second: int) -> list[bytes]:
        """The RFC 6962 proof that the first `second` entries begin with the first `first`. Raises as `inclusion`."""
        return merkle.consistency_proof(first, second, _Nodes(connection, self._tree(connection)[0]))

    def _tree(self, connection: Connection) -> tuple[CompactTree, str]:
        """The right edge of the tree and the note over it, once they agree with each other and with the entries."""
        try:
            return self._checked_tree(*_stored_head(connection))
        except (TypeError, ValueError, AttributeError):  # SQLite keeps text where a number goes, if told to
            raise _broken("the log's head is not one") from None

    def _checked_tree(self, last: int | None, row: Row[tuple[int, list[str], str]] | None) -> tuple[CompactTree, str]:
        if row is None:
            if last is not None:
                raise _broken("the log has entries but no head")
            return CompactTree(), ""
        tree = CompactTree.from_hex(row.size, row.tree)
        if last != tree.size - 1:
            raise _broken(f"the log's head says {tree.size} entries, and the entries end elsewhere")
        if row.note != self._genuine:
            checkpoint.verify(row.note, self._public, LOG_ORIGIN)
            self._genuine = row.note
        if not row.note.startswith(Checkpoint(LOG_ORIGIN, tree.size, tree.root()).to_text() + "\n"):
            raise _broken("the log's head is not what was signed")
        return tree, row.note


def _stored_head(connection: Connection) -> tuple[int | None, Row[tuple[int, list[str], str]] | None]:
    """The index of the last entry, and the head; in one round trip."""
    last = select(func.max(log_entries.c["index"])).scalar_subquery().label("last")
    always = select(literal(1).label("one")).subquery()
    columns = log_head.c.size, log_head.c.tree, log_head.c.note
    query = select(last, *columns).select_from(always.outerjoin(log_head, log_head.c.id == _HEAD))
    row = connection.execute(query).one()
    return row.last, None if row.size is None else row  # type: ignore[return-value]  # a row with those names


class _Nodes:
    """The hashes of perfect subtrees: known from `tree`, or computed from blocks of stored ones, each read once."""

    def __init__(self, connection: Connection, tree: CompactTree | None = None) -> None:
        self._connection = connection
        self._blocks: dict[tuple[int, int], list[bytes]] = {}
        self._known = tree.nodes() if tree else {}

    def __call__(self, height: int, index: int) -> bytes:
        if (height, index) in self._known:
            return self._known[height, index]
        level, rest = divmod(height, LEVEL_BITS)
        count = 1 << rest
        block, offset = divmod(index * count, BLOCK)
        hashes = self._block(level, block)[offset : offset + count]
        if len(hashes) != count:
            raise _broken("an entry of the log, or a node of its tree, is missing")
        return merkle.perfect_root(hashes)

    def _block(self, level: int, block: int) -> list[bytes]:
        """The hashes with indexes from 256 * `block` on, at most 256; as many as there are without a gap."""
        known = self._blocks.get((level, block))
        if known is None:
            table, column = (log_nodes, log_nodes.c.hash) if level else (log_entries, log_entries.c.entry)
            query = select(table.c["index"], column).order_by(table.c["index"])
            query = query.where(table.c["index"].between(block * BLOCK, block * BLOCK + BLOCK - 1))
            if level:
                query = query.where(log_nodes.c.level == level)
            known = []
            for place, (index, value) in enumerate(self._connection.execute(query).all(), block * BLOCK):
                if index != place:
                    break
                known.append(bytes(value) if level else merkle.leaf_hash(stored(value)))
            self._blocks[level, block] = known
        return known


def stored(value: object) -> bytes:
    """What a column holds as bytes, even if somebody put text or a number there: verifying it must not stumble."""
    return value if isinstance(value, bytes) else str(value).encode()


def _broken(message: str) -> IntegrityError:
    return IntegrityError(message, _HINT)
