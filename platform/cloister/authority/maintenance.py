"""An authority's parts for work on its own machine, without a listener: backups, restoring, looking after its state.

Guarantees: whoever does such work is named in the log, because they prove themselves by the key of an identity that is
registered in the state, and policy is asked whether they may, as it is over HTTP.
Not guaranteed: that nobody works on the files behind its back. Whoever has the folder has the state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nacl.signing import SigningKey
from sqlalchemy import Connection, select

from cloister.audit.checkpoint import verifier_key_text
from cloister.authority.core import Caller, Core
from cloister.authority.journal import LOG_ORIGIN, Journal
from cloister.errors import AuthenticationError, NotFoundError
from cloister.signing.keys import ed25519_from_pem, public_to_pem
from cloister.stores.blobs import Stores
from cloister.stores.database import Database
from cloister.stores.keys import KeyService
from cloister.stores.tables import data_keys, datasets, identities, models, runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What there is of an authority beside its state. `directory` is its folder."""

    directory: Path
    keys: KeyService
    stores: Stores
    journal: Journal
    verifier_key: str
    clock: Callable[[], float] = time.time

    @classmethod
    def of(cls, directory: Path, keys: KeyService, stores: Stores, *, clock: Callable[[], float] = time.time) -> Parts:
        """The parts over a key service that an authority has used.

        Raises:
            NotFoundError: none has.
        """
        try:
            log_key = SigningKey(keys.secret("log"))
        except NotFoundError:
            raise NotFoundError(
                "this key service is not the one of an authority: it is empty",
                "restore it first, from where you keep it apart from backups",
            ) from None
        return cls(
            directory=directory, keys=keys, stores=stores, journal=Journal(log_key), clock=clock,
            verifier_key=verifier_key_text(LOG_ORIGIN, bytes(log_key.verify_key)),
        )  # fmt: skip

    def core(self, database: Database) -> Core:
        return Core(database=database, keys=self.keys, journal=self.journal, clock=self.clock)


def local_caller(database: Database, name: str, private_key_pem: bytes) -> Caller:
    """Who has the private key of an identity that is registered here. Roles that are lent do not count.

    Raises:
        AuthenticationError: nobody of that name, with that key, has access.
    """
    public = public_to_pem(ed25519_from_pem(private_key_pem).public_key()).decode()
    with database.reading() as connection:
        row = connection.execute(select(identities).where(identities.c.name == name)).one_or_none()
    if row is None or row.disabled or row.public_key != public:
        raise AuthenticationError(
            "the state does not know this name with this key", "act as an operator of that time: --as NAME"
        )
    return Caller(name=name, roles=frozenset(row.roles), kind=row.kind, source="local")


@dataclass(frozen=True, slots=True)
class Recorded:
    """A blob that the state needs: where it lies and what it is. `what` names it to people."""

    region: str
    path: str
    sha256: str
    what: str


def dataset_names(connection: Connection) -> Sequence[str]:
    """Of every dataset that has, or had, a version."""
    return connection.execute(select(datasets.c.name).distinct().order_by(datasets.c.name)).scalars().all()


def recorded_blobs(connection: Connection) -> Iterator[Recorded]:
    """Every file of a dataset whose key is there, every model, and the checkpoints that runs may go on from.

    Each path once; one manifest in memory at a time.
    """
    for name in dataset_names(connection):
        keyed = keyed_refs(connection, name)
        versions = connection.execute(
            select(datasets.c.version).where(datasets.c.name == name).order_by(datasets.c.version)
        )
        for version in versions.scalars().all():
            row = manifest_row(connection, name, version)
            for file in row.manifest["files"]:
                ref = f"{file['sealed_in']}/{file['shard']}/{file['part']}"
                if ref in keyed:
                    keyed.remove(ref)
                    yield Recorded(row.schema["region"], file["path"], file["sha256"], f"{name} {ref}")
    query = select(models.c.name, models.c.version, models.c.blob, models.c.blob_sha256, runs.c.attributes)
    for row in connection.execute(query.join(runs, runs.c.id == models.c.run)).all():
        yield Recorded(row.attributes["region"], row.blob, row.blob_sha256, f"model {row.name}@{row.version}")
    for row in connection.execute(select(runs.c.id, runs.c.attributes, runs.c.checkpoint)).all():
        if row.checkpoint:
            kept = row.checkpoint
            yield Recorded(row.attributes["region"], kept["blob"], kept["sha256"], f"the checkpoint of {row.id}")


def keyed_refs(connection: Connection, name: str) -> set[str]:
    """What a dataset's files are called whose data keys are there."""
    rows = connection.execute(select(data_keys.c.version, data_keys.c.file).where(data_keys.c.name == name))
    return {f"{row.version}/{row.file}" for row in rows}


def manifest_row(connection: Connection, name: str, version: int) -> Any:
    """One version, whole."""
    return connection.execute(
        select(datasets).where(datasets.c.name == name, datasets.c.version == version)
    ).one()  # fmt: skip
