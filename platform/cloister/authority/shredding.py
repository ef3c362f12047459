"""What follows an erasure outside of the database, until it is done; and the certificate, once it is.

Guarantees: a certificate is signed (DSSE, by the release key) only after the versions of the key that wrapped what is
gone are destroyed, and deleted rows overwritten; it says how many blobs could not be deleted yet. Whatever dies in
between, `settle` goes on from there: it is called after each erasure, by the schedule, and so after each start.
"""

from __future__ import annotations

import contextlib
from typing import Any

from sqlalchemy import Connection, delete, func, select, update

from cloister.authority import resources
from cloister.authority.core import Action, Caller, Core
from cloister.authority.custody import Custody
from cloister.authority.data import BATCH, latest
from cloister.authority.key_use import RELEASE
from cloister.canonical import sha256_hex
from cloister.datasets.erasure import ERASURE_PREDICATE, Blobs, Erasure, subject_digest
from cloister.errors import CloisterError, NotFoundError
from cloister.signing import dsse
from cloister.stores.blobs import Stores
from cloister.stores.tables import deletions, erasures, key_destructions


class Shredding:
    """Finishes erasures that are committed."""

    def __init__(self, core: Core, custody: Custody, stores: Stores) -> None:
        self._core = core
        self._custody = custody
        self._stores = stores

    def finished(self, act: Action, erasure: str) -> dict[str, Any]:
        """What there is to say about an erasure whose action has just ended; its certificate, if all went well."""
        with contextlib.suppress(CloisterError):  # its rows are gone; the rest is done by the schedule, or a new start
            self._core.anchor(act)
            self.settle()
        with self._core.database.reading() as connection:
            row = _erasure(connection, erasure)
        ended = [each["version"] for each in row.facts["ended"]]
        return {
            "erasure": erasure, "certificate": row.certificate, "ended": ended,
            "keys_destroyed": row.facts["keys"]["data_keys"],
            "models": [each["model"] for each in row.facts["models"]],
        }  # fmt: skip

    def settle(self) -> None:
        """Do what earlier erasures have left to do outside of the database, and sign their certificates.

        Raises:
            KeyServiceError: the key service cannot be had. Blobs that cannot be deleted are kept in mind, no more.
        """
        self._custody.finish()
        self._core.database.scrub()
        self._delete_blobs()
        with self._core.database.reading() as connection:
            waiting = connection.execute(select(erasures.c.id).where(erasures.c.certificate.is_(None))).scalars().all()
        for erasure in waiting:
            self._certify(erasure)

    def _delete_blobs(self) -> None:
        with self._core.database.reading() as connection:
            pending = connection.execute(select(deletions)).all()
        done: dict[str, list[Any]] = {}
        for row in pending:
            try:
                self._stores.for_region(row.region).remove(row.path)
            except CloisterError:
                continue  # the next time
            done.setdefault(row.erasure, []).append(row)
        for erasure, rows in done.items():
            with self._core.of_itself("dataset:delete-blobs", erasure=erasure, blobs=len(rows)) as act:
                act.resource = resources.dataset(act.connection, _dataset_of(act.connection, erasure))
                for start in range(0, len(rows), BATCH):
                    paths = [row.path for row in rows[start : start + BATCH]]
                    mine = (deletions.c.erasure == erasure) & deletions.c.path.in_(paths)
                    act.connection.execute(delete(deletions).where(mine))

    def _certify(self, erasure: str) -> None:
        with self._core.of_itself("dataset:certify", erasure=erasure) as act:
            connection = act.connection
            row = _erasure(connection, erasure)
            facts = Erasure.parse(row.facts)
            below = key_destructions.c.below >= facts.keys.destroyed_below
            mine = (key_destructions.c.name == facts.keys.wrapping_key) & key_destructions.c.destroyed.is_(None)
            waits = connection.execute(select(key_destructions.c.name).where(mine, below).limit(1)).first()
            if row.certificate is not None or waits is not None:  # another was first, or its keys are not gone yet
                return
            late = select(func.count()).select_from(deletions).where(deletions.c.erasure == erasure)
            pending = int(connection.execute(late).scalar_one())
            blobs = Blobs(deleted=facts.blobs.pending - pending, pending=pending)
            predicate = facts.model_copy(update={"blobs": blobs}).model_dump(mode="json")
            statement = dsse.statement(facts.dataset, subject_digest(facts), ERASURE_PREDICATE, predicate)
            envelope = dsse.sign(statement, act.keys.signer(RELEASE))
            act.details["certificate"] = sha256_hex(statement)
            act.resource = resources.dataset(connection, _dataset_of(connection, erasure))
            connection.execute(update(erasures).where(erasures.c.id == erasure).values(certificate=envelope))

    def certificate(self, caller: Caller, erasure: str) -> dict[str, Any]:
        """A certificate; None while what it says is not yet all done.

        Raises:
            NotFoundError: there is no such erasure.
        """
        with self._core.reading(caller, "dataset:read") as act:
            act.allow(resources.new_dataset("any", ""))
            act.allow(resources.dataset(act.connection, _dataset_of(act.connection, erasure)))
            row = _erasure(act.connection, erasure)
            return {"erasure": row.id, "dataset": row.dataset, "certificate": row.certificate}


def _erasure(connection: Connection, erasure: str) -> Any:
    row = connection.execute(select(erasures).where(erasures.c.id == erasure)).one_or_none()
    if row is None:
        raise NotFoundError("there is no such erasure", "cloister data show names those of a dataset")
    return row


def _dataset_of(connection: Connection, erasure: str) -> Any:
    """The newest version of the dataset that an erasure is about."""
    return latest(connection, _erasure(connection, erasure).dataset)
